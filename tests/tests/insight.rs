//! `walnut`, the command: what it says of Pods, and what it counts of system calls, against what the
//! containers are known to do.

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
        .command(&["sleep", "infinity"])
        .detach()?;
    listed(container.id())?;
    counted(&container)?;
    shown(&container)?;
    let words = "container \"nobody\" does not exist";
    let nobody = walnut(&["syscalls", container.id(), "nobody"])?.exits(1)?;
    ensure!(nobody.stderr.contains(words), "{nobody:?}");
    drop(container);
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
