//! containerd with Walnut, and with runc as the oracle: the same story ends the same way, but for the
//! kernel that tells it.

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use std::process::Command;
use walnut_tests::{
    command::{self, End, Output},
    ctr::{BUSYBOX, Container, DEBIAN, Runtime, ctr},
    deadline::{self, Deadline},
    leak::Leak,
    requirement,
};

const MIB: usize = 1 << 20;
const BOTH: [Runtime; 2] = [Runtime::Walnut, Runtime::Runc];

/// Bytes that show a lost, doubled or moved block.
fn pattern(length: usize) -> Vec<u8> {
    (0..length / 8).flat_map(|at| at.to_le_bytes()).collect()
}

#[test]
fn only_the_kernel_differs() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let mut releases = Vec::new();
    for runtime in BOTH {
        let output = runtime
            .run(BUSYBOX)
            .shell("uname -r; echo err >&2; exit 42")
            .finish()?
            .exits(42)
            .with_context(|| format!("{runtime:?}"))?;
        ensure!(output.stderr == "err\n", "{output:?}");
        releases.push(output.text());
    }
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy();
    ensure!(
        releases[1] == host,
        "runc's kernel is not the host's: {releases:?}"
    );
    ensure!(
        releases[0] != host && !releases[0].is_empty(),
        "{releases:?}"
    );
    leak.nothing_left()
}

/// What both runtimes must make of one container's configuration. Sorted where the order means nothing;
/// what the kernels themselves differ in (which files of /proc are there to be masked) is left out, and so
/// is what runc inherits from its shim. Of the cgroups, runc shows the host's, Walnut the container's own.
const CONFIGURED: &str = "
    pwd; id; echo $ADDED; cat /proc/sys/kernel/hostname; umask; ulimit -n
    grep -E '^(Cap|NoNewPrivs|Seccomp:|Uid|Gid|Groups)' /proc/self/status
    cat /proc/1/cmdline | wc -c; set -- /proc/[0-9]*; echo $#
    ls /dev | grep -v core | sort; ls -l /dev/null /dev/zero /dev/random | awk '{print $1, $3, $4, $5, $6}'
    ls -l /dev/fd /dev/stdin /dev/ptmx | awk '{print $9, $10, $11}'
    awk '$2 !~ /^.(proc|sys).|^.$/ {print $2, $3, $4}' /proc/mounts | sed 's/,inode64//' | sort
    touch /proc/sys/kernel/domainname 2>&1; touch /sys/written 2>&1; head -c1 /proc/kcore | wc -c
    ls -A /sys/firmware 2>&1; head -c1 /proc/keys | wc -c
    echo written > /root-file && cat /root-file; stat -c '%a %u %g %s' /root-file /bin/busybox
    cd /sys/fs/cgroup; cat memory.max 2>/dev/null || cat ./$(cut -d: -f3 /proc/self/cgroup)/memory.max
    dd if=/dev/zero bs=1M count=250 2>/dev/null | tail -c 200000000 > /dev/null; echo killed=$?";

#[test]
fn a_configured_container_is_as_runc_makes_it() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let mut found = Vec::new();
    for runtime in BOTH {
        let output = runtime
            .run(BUSYBOX)
            .flag("--env=ADDED=by the user")
            .flag("--cwd=/tmp")
            .flag("--hostname=chosen")
            .flag("--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid")
            .flag("--cap-drop=CAP_CHOWN")
            .flag("--memory-limit=50331648")
            .shell(CONFIGURED)
            .finish()?
            .success()
            .with_context(|| format!("{runtime:?}"))?;
        found.push(output.text());
    }
    ensure!(found[1].contains("by the user"), "{}", found[1]);
    ensure!(found[1].contains("50331648"), "{}", found[1]);
    ensure!(found[1].contains("killed=137"), "{}", found[1]);
    same_lines(&found[0], &found[1])?;
    leak.nothing_left()
}

/// Fails with the lines that differ.
fn same_lines(walnut: &str, runc: &str) -> Result<()> {
    let only = |these: &str, those: &str| {
        let those: Vec<&str> = those.lines().collect();
        let missing = these.lines().filter(|line| !those.contains(line));
        missing.map(str::to_owned).collect::<Vec<_>>()
    };
    ensure!(
        walnut == runc,
        "only with walnut: {:#?}\nonly with runc: {:#?}",
        only(walnut, runc),
        only(runc, walnut)
    );
    Ok(())
}

/// Commands in a running container that end the same way with both: flags of `ctr task exec`, a script.
const ADDED: [(&[&str], &str); 7] = [
    (&[], "echo out; echo err >&2; exit 3"),
    (&["--cwd=/tmp"], "pwd"),
    (&["--user=1000:1001"], "id -u; id -g"),
    (&[], "kill -TERM $$"),
    (
        &[],
        "cat /proc/1/cmdline | tr '\\0' ' '; basename $(cat /proc/self/cgroup)",
    ),
    (
        &[],
        "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status",
    ),
    (&[], "cat | wc -c"),
];

#[test]
fn added_processes_end_as_with_runc() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let containers = BOTH.map(|runtime| runtime.run(BUSYBOX).shell("sleep 100000 & wait").detach());
    let [walnut, runc] = containers;
    let (walnut, runc) = (walnut?, runc?);
    for (flags, script) in ADDED {
        let program = ["sh", "-c", script];
        let on = |container: &Container| {
            let mut output = container.exec_with(flags, &program, b"five\n".to_vec())?;
            output.stdout = output.text().replace(container.id(), "NAME").into_bytes();
            anyhow::Ok(output)
        };
        let (ours, theirs) = (on(&walnut)?, on(&runc)?);
        ensure!(ours == theirs, "{script}: walnut {ours:?}, runc {theirs:?}");
    }
    for absent in ["/etc/passwd", "nosuchprogram"] {
        let refused = walnut.exec(&[absent])?;
        ensure!(refused.end == runc.exec(&[absent])?.end, "{refused:?}");
        says_in_one_line(&refused, absent)?;
    }
    let length = 8 * MIB;
    let output = walnut.exec(&["head", "-c", &length.to_string(), "/dev/zero"])?;
    ensure!(
        output.success()?.stdout.len() == length,
        "output of an added process was cut"
    );
    ctr(&["task", "metrics", walnut.id()])?.success()?;
    // A head, the shell and its child.
    for container in [&walnut, &runc] {
        let processes = ctr(&["task", "ps", container.id()])?.success()?.text();
        ensure!(processes.lines().count() == 3, "{processes}");
    }
    for container in [walnut, runc] {
        container.kill("SIGKILL")?;
        container.wait_for("STOPPED")?;
        ensure!(container.task_status()? == 137, "no 137");
        container.remove()?;
    }
    leak.nothing_left()
}

fn says_in_one_line(refused: &Output, named: &str) -> Result<()> {
    ensure!(refused.end != End::Exited(0), "{refused:?}");
    ensure!(
        refused.stderr.trim_end().lines().count() == 1,
        "{refused:?}"
    );
    ensure!(
        refused.stderr.contains(named),
        "{named:?} is not named: {refused:?}"
    );
    Ok(())
}

#[test]
fn what_cannot_be_run_is_named_and_leaves_nothing() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    for absent in ["/etc/passwd", "nosuchprogram"] {
        let ends = BOTH.map(|runtime| {
            let refused = runtime.run(BUSYBOX).command(&[absent]).finish()?;
            if runtime == Runtime::Walnut {
                says_in_one_line(&refused, absent)?;
            }
            anyhow::Ok(refused.end)
        });
        let [walnut, runc] = ends;
        let (walnut, runc) = (walnut?, runc?);
        ensure!(walnut == runc, "{absent}: walnut {walnut:?}, runc {runc:?}");
    }
    leak.nothing_left()
}

#[test]
fn twenty_mib_pass_through_a_container() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let bytes = pattern(20 * MIB);
    let output = Runtime::Walnut
        .run(BUSYBOX)
        .command(&["cat"])
        .stdin(bytes.clone())
        .finish()?
        .success()?;
    let length = output.stdout.len();
    ensure!(
        output.stdout == bytes,
        "{length} of {} bytes, or others",
        bytes.len()
    );
    leak.nothing_left()
}

#[test]
fn the_output_of_a_container_that_ends_at_once_is_whole() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let length = 8 * MIB;
    let output = Runtime::Walnut
        .run(BUSYBOX)
        .command(&["head", "-c", &length.to_string(), "/dev/zero"])
        .finish()?
        .success()?;
    ensure!(
        output.stdout.len() == length,
        "{} of {length} bytes",
        output.stdout.len()
    );
    leak.nothing_left()
}

#[test]
fn a_terminal_reaches_the_container() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let name = format!("test-terminal-{}", std::process::id());
    // `script` lends ctr a terminal; its size is that of the one that it makes.
    let inside = "stty rows 33 cols 77; exec ctr run --rm --tty --runtime";
    // ctr sends the size once the container runs.
    let asks = "for try in 1 2 3 4 5 6 7 8 9; do stty size | grep 33 && break; sleep 1; done
        test -t 0 && test -t 1 && test -t 2 && tty && exit 5";
    let line = format!(
        "{inside} {} {BUSYBOX} {name} sh -c '{asks}'",
        Runtime::Walnut.name()
    );
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    let shown =
        command::run(&mut terminal, Vec::new(), Deadline::after(deadline::BOOT))?.exits(5)?;
    let text = shown.text();
    ensure!(text.contains("33 77"), "no size: {text:?}");
    ensure!(
        text.contains("/dev/pts/0") || text.contains("/dev/console"),
        "{text:?}"
    );
    leak.nothing_left()
}

#[test]
fn each_pod_has_a_kernel_of_its_own_and_ends_on_a_signal() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let ends_well = "trap 'exit 7' TERM; sleep 100000 & wait";
    let run = || Runtime::Walnut.run(BUSYBOX).shell(ends_well).detach();
    let (one, other) = (run()?, run()?);
    let boot_id = |container: &Container| {
        let read = container.exec(&["cat", "/proc/sys/kernel/random/boot_id"])?;
        anyhow::Ok(read.success()?.text())
    };
    let ids = [boot_id(&one)?, boot_id(&other)?];
    ensure!(ids[0] != ids[1], "two Pods share a kernel: {ids:?}");
    for container in [one, other] {
        container.kill("SIGTERM")?;
        container.wait_for("STOPPED")?;
        ensure!(container.task_status()? == 7, "no 7");
        container.remove()?;
    }
    leak.nothing_left()
}

#[test]
fn signals_and_the_death_of_ctr_are_cleaned_up_after() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let ends_well = "trap 'exit 9' TERM; sleep 100000 & wait";

    // A signal to `ctr run` is the container's.
    let (container, running) = Runtime::Walnut.run(BUSYBOX).shell(ends_well).start()?;
    container.wait_for("RUNNING")?;
    container.exec(&["true"])?.success()?;
    running.signal(Signal::TERM)?;
    running.wait(Deadline::after(deadline::REQUEST))?.exits(9)?;
    leak.nothing_left()?;

    // Killed while the container runs: it runs on, until someone removes it.
    let (container, running) = Runtime::Walnut.run(BUSYBOX).shell(ends_well).start()?;
    container.wait_for("RUNNING")?;
    running.kill()?;
    drop(container);
    leak.nothing_left()?;

    // Killed while the VM boots.
    let (container, running) = Runtime::Walnut.run(BUSYBOX).shell(ends_well).start()?;
    container.vmm()?;
    running.kill()?;
    drop(container);
    leak.nothing_left()
}

/// Asks every context id that leads somewhere (1 is the guest itself, 2 the host) for the agent's ports.
const KNOCK: &str = "
import socket
for cid in (1, 2):
    for port in (1023, 1024, 1025):
        knock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        knock.settimeout(60)
        connected, answer = False, b''
        try:
            knock.connect((cid, port))
            connected = True
            knock.sendall(bytes(8))
            answer = knock.recv(1)
        except ConnectionError:
            pass
        print(cid, port, connected, answer)
";

#[test]
fn a_container_reaches_neither_the_agent_nor_the_host_by_vsock() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let output = Runtime::Walnut
        .run(DEBIAN)
        .command(&["python3", "-c", KNOCK])
        .finish()?
        .success()?;
    // The kernel connects to a listener before the listener can refuse; nothing must be answered.
    let expected = "1 1023 False b''\n1 1024 True b''\n1 1025 True b''\n\
        2 1023 False b''\n2 1024 False b''\n2 1025 False b''";
    ensure!(output.text() == expected, "{output:?}");
    leak.nothing_left()
}

#[test]
fn a_server_is_started_asked_and_stopped() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let server = Runtime::Walnut
        .run(DEBIAN)
        .command(&["redis-server", "--bind", "127.0.0.1", "--save", ""])
        .detach()?;
    let ask = |question: &[&str]| {
        let words: Vec<&str> = ["redis-cli"].iter().chain(question).copied().collect();
        anyhow::Ok(server.exec(&words)?.text())
    };
    deadline::until(
        "redis to answer",
        Deadline::after(deadline::REQUEST),
        || Ok((ask(&["ping"])? == "PONG").then_some(())),
    )?;
    ensure!(ask(&["set", "walnut", "works"])? == "OK", "redis refuses");
    let answer = ask(&["get", "walnut"])?;
    if answer != "works" {
        bail!("redis answers {answer:?}");
    }
    server.kill("SIGTERM")?;
    server.wait_for("STOPPED")?;
    ensure!(server.task_status()? == 0, "no 0");
    server.remove()?;
    leak.nothing_left()
}
