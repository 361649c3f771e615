//! `walnut`, the command: what it says of Pods and the machine, and what it counts and records of system calls,
//! against what the containers are known to do.

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
};
use walnut_tests::{
    command::{self, End, Output, wait_child},
    ctr::{Container, DEBIAN, Runtime},
    deadline::{self, Deadline},
    leak::Leak,
    requirement,
};

/// Calls of which nothing else in the container makes any: 1000 times `getppid`, 50 times a `sethostname` that
/// fails, and 300 ms in `clock_nanosleep`.
const WORKLOAD: &str = "
import os, socket, time
for _ in range(1000): os.getppid()
for _ in range(50):
    try: socket.sethostname('x')
    except OSError: pass
time.sleep(0.3)";

/// A server and a language at work: what is recorded of it is enough to do it again.
const WORK: &str = r#"
set -e
redis-server --save "" --port 7000 >/dev/null &
until redis-cli -p 7000 ping 2>/dev/null | grep -q PONG; do :; done
redis-cli -p 7000 set nut wal
redis-cli -p 7000 get nut
redis-cli -p 7000 shutdown nosave || true
wait
python3 -c '
import socket, subprocess, threading
with open("/tmp/nut", "w") as file: file.write("nut")
a, b = socket.socketpair()
thread = threading.Thread(target=a.sendall, args=[b"nut"])
thread.start()
print(b.recv(3), subprocess.run(["true"]).returncode)
thread.join()'
"#;
const WORK_SAYS: &str = "OK\nwal\nb'nut' 0";
/// What the work doesn't do: a socket of another family, and a call that nothing else makes.
const MISCHIEF: &str = "
import os, socket
for attempt in (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), lambda: os.sched_rr_get_interval(0)):
    try: print('done', attempt())
    except OSError as error: print(error.strerror)";

fn walnut(arguments: &[&str]) -> Result<Output> {
    let mut walnut = Command::new("walnut");
    command::run(
        walnut.args(arguments),
        Vec::new(),
        Deadline::after(deadline::BOOT),
    )
}

#[test]
fn pods_and_their_calls_are_shown_as_they_are() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let nobody = walnut(&["syscalls", "nobody"])?.exits(1)?;
    let words = "walnut: no Pod \"nobody\": there are none\n";
    ensure!(nobody.stderr == words, "{nobody:?}");
    walnut(&["syscalls", "nobody", "--interval", "0"])?.exits(2)?;

    let container = Runtime::Walnut
        .run(DEBIAN)
        .flag("--annotation")
        .flag("walnut.record=true")
        .command(&["sleep", "infinity"])
        .detach()?;
    listed(container.id())?;
    checked()?;
    counted(&container)?;
    shown(&container)?;
    let words = "container \"nobody\" does not exist";
    let nobody = walnut(&["syscalls", container.id(), "nobody"])?.exits(1)?;
    ensure!(nobody.stderr.contains(words), "{nobody:?}");
    recorded(container)?;
    ensure!(walnut(&["ps", "--json"])?.success()?.text().is_empty());
    leak.nothing_left()
}

fn listed(id: &str) -> Result<()> {
    let text = walnut(&["ps", "--json"])?.success()?.text();
    let pod: Value = serde_json::from_str(&text).context(text)?;
    ensure!(pod["id"] == id && pod["namespace"] == "default", "{pod}");
    ensure!(pod["machine"] == "running" && pod["vcpus"] == 1, "{pod}");
    ensure!(pod["resident_bytes"].as_u64() > Some(8 << 20), "{pod}");
    let container = &pod["containers"][0];
    let named = container["id"] == id && container["state"] == "running";
    ensure!(named, "{pod}");
    let table = walnut(&["ps"])?.success()?.text();
    ensure!(table.contains(&format!("{id} (running)")), "{table}");
    Ok(())
}

fn checked() -> Result<()> {
    let check = walnut(&["check", "--hardening", "--json"])?;
    let findings: Vec<Value> = serde_json::from_str(&check.text()).context(check.text())?;
    let find = |id: &str| {
        let found = findings.iter().find(|finding| finding["id"] == id);
        found.with_context(|| format!("no {id} in {findings:?}"))
    };
    for id in [
        "kvm",
        "programs",
        "containerd",
        "file-modes",
        "vmms",
        "host-devices",
    ] {
        ensure!(find(id)?["result"] == "pass", "{}", find(id)?);
    }
    ensure!(
        find("vmms")?["what"].to_string().contains("1 run"),
        "{}",
        find("vmms")?
    );
    let kernel = find("guest-kernel")?;
    ensure!(!kernel["what"].to_string().contains("built in"), "{kernel}");
    let table = walnut(&["check"])?.text();
    ensure!(table.starts_with("pass  kvm "), "{table}");
    Ok(())
}

/// What was recorded lets the same work be done again, and nothing else; and it was recorded without a filter.
fn recorded(container: Container) -> Result<()> {
    let id = container.id().to_owned();
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (profile, end) = (path("work.json"), path("end.json"));
    let work = container.shell(WORK)?.success()?;
    ensure!(work.text() == WORK_SAYS, "{work:?}");
    walnut(&["profile", "record", &id, &id, "-o", &profile, "--for", "0"])?.success()?;
    let text = std::fs::read_to_string(&profile)?;
    ensure!(text.contains("from its start while it ran"), "{text}");
    let test = ["profile", "test", &profile, &id, &id, "--for", "0"];
    let good = walnut(&test)?.success()?.text();
    ensure!(good.starts_with("nothing of "), "{good}");
    container.exec(&["python3", "-c", MISCHIEF])?.success()?;
    let bad = walnut(&test)?.exits(4)?.text();
    for words in [
        "socket",
        "AF_NETLINK",
        "sched_rr_get_interval",
        "SCMP_ACT_ERRNO",
    ] {
        ensure!(bad.contains(words), "{bad}");
    }
    let mut recording = Command::new("walnut");
    recording.args(["profile", "record", &id, &id, "-o", &end]);
    let recording = command::start(&mut recording, Vec::new())?;
    container.kill("SIGKILL")?;
    container.wait_for("STOPPED")?;
    recording.wait(Deadline::after(deadline::BOOT))?.success()?;
    let text = std::fs::read_to_string(&end)?;
    ensure!(text.contains("from its start to its end"), "{text}");
    drop(container);
    applied(&profile, &end, &path("merged.json"))
}

fn applied(profile: &str, whole: &str, merged: &str) -> Result<()> {
    walnut(&["profile", "merge", profile, whole, "-o", merged])?.success()?;
    let run = |profile: &str| {
        let script = format!("{WORK}\npython3 -c \"$MISCHIEF\"");
        Runtime::Walnut
            .run(DEBIAN)
            .flag("--seccomp")
            .flag("--seccomp-profile")
            .flag(profile)
            .flag("--env")
            .flag(&format!("MISCHIEF={MISCHIEF}"))
            .shell(&script)
            .finish()?
            .success()
    };
    let refused = run(profile)?.text();
    let no = "Operation not permitted";
    ensure!(refused == format!("{WORK_SAYS}\n{no}\n{no}"), "{refused}");
    let allowed = run(merged)?.text();
    ensure!(
        allowed.starts_with(&format!("{WORK_SAYS}\ndone ")),
        "{allowed}"
    );
    Ok(())
}

/// A `walnut syscalls` that goes on, and its reports.
struct Counting {
    child: Child,
    reports: Receiver<String>,
}

impl Counting {
    fn start(pod: &str) -> Result<Self> {
        let mut child = Command::new("walnut")
            .args(["syscalls", pod, "--interval", "1", "--format", "json"])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start walnut")?;
        let stdout = child.stdout.take().context("no output")?;
        let (sender, reports) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.all(|line| sender.send(line).is_ok())
        });
        Ok(Self { child, reports })
    }

    fn report(&self, deadline: Deadline) -> Result<Value> {
        let line = self.reports.recv_timeout(deadline.left());
        let line = line.context("walnut does not report")?;
        serde_json::from_str(&line).context(line)
    }

    /// As a person at the keyboard ends it.
    fn interrupt(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::INT)?;
        match wait_child(&mut self.child, Deadline::after(deadline::REQUEST))? {
            Some(status) if End::from(status) == End::Exited(0) => Ok(()),
            other => bail!("an interrupted walnut ended with {other:?}"),
        }
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn counted(container: &Container) -> Result<()> {
    let id = container.id();
    let counting = Counting::start(id)?;
    counting.report(Deadline::after(deadline::BOOT))?;
    container.exec(&["python3", "-c", WORKLOAD])?.success()?;
    // Reports of the time before may still be waiting to be read.
    let end = Deadline::after(deadline::BOOT);
    let report = loop {
        let report = counting.report(end)?;
        let rows = report["syscalls"].as_array().context("no rows")?;
        if rows.iter().any(|row| row["syscall"] == "clock_nanosleep") {
            // The next one has the program's end, too.
            break counting.report(end)?;
        }
    };
    let rows = report["syscalls"].as_array().context("no rows")?;
    let find = |name: &str| {
        let found = rows.iter().find(|row| row["syscall"] == name);
        found.with_context(|| format!("no {name} in {report}"))
    };
    let getppid = find("getppid")?;
    ensure!(getppid["container"] == id, "{getppid}");
    ensure!(
        getppid["calls"] == 1000 && getppid["errors"] == 0,
        "{getppid}"
    );
    let sethostname = find("sethostname")?;
    let failed = sethostname["calls"] == 50 && sethostname["errors"] == 50;
    ensure!(failed, "{sethostname}");
    let sleep = find("clock_nanosleep")?;
    for time in ["total_ns", "longest_ns"] {
        ensure!(sleep[time].as_u64() >= Some(300_000_000), "{sleep}");
    }
    find("execve")?;
    find("exit_group")?;
    ensure!(report["missed"] == 0, "{report}");
    counting.interrupt()
}

fn shown(container: &Container) -> Result<()> {
    let once = [
        "syscalls",
        container.id(),
        container.id(),
        "-n",
        "1",
        "--interval",
        "1",
    ];
    let table = walnut(&once)?.success()?.text();
    ensure!(table.starts_with("CONTAINER"), "{table}");
    let metrics = walnut(&[&once[..], &["--format", "prometheus"]].concat())?;
    let metrics = metrics.success()?.text();
    ensure!(
        metrics.contains("# TYPE walnut_syscall_calls_total counter"),
        "{metrics}"
    );
    Ok(())
}
