//! What a container exhausts is its own: the agent lives, and so do the containers beside it.

use crate::prints;
use anyhow::{Result, ensure};
use serde_json::json;
use std::fs;
use walnut_agent_api::containerd::ttrpc::Code;
use walnut_tests::{
    bundle::{Spec, process},
    ctr::{BUSYBOX, DEBIAN, Runtime},
    deadline::{self, Deadline},
    guest::Guest,
    requirement,
    task::{Stdio, refused},
};

/// A little less than the guest has, which is more than its containers may have.
const GLUTTON: &str = "n=$(busybox awk '/MemTotal/ { print $2 * 1000 }' /proc/meminfo)
    dd if=/dev/zero bs=1M count=$((n / 1048576)) 2>/dev/null | tail -c $n > /dev/null";

pub(crate) fn memory(guest: &mut Guest) -> Result<()> {
    let neighbour = guest.stay()?;
    let id = guest.name();
    // No limit of its own.
    let spec = guest.spec(&id, &["sh", "-c", GLUTTON]);
    guest.agent.create(&id, spec.to_json(), &Stdio::default())?;
    guest.agent.tasks.start(&id, "")?;
    let kills = guest.agent.out_of_memory(&id, 0)?;
    ensure!(kills >= 1, "{kills}");
    ensure!(guest.agent.tasks.wait(&id, "")? == 137, "no 137");
    guest.agent.tasks.delete(&id, "")?;
    refused(
        guest.agent.out_of_memory(&id, kills),
        Code::NOT_FOUND,
        &[&id],
    )?;
    prints(guest, |spec| spec, "echo well", "well\n")?;
    ensure!(guest.remove(&neighbour)? == 137);
    Ok(())
}

pub(crate) fn processes(guest: &mut Guest) -> Result<()> {
    let limits = json!({ "pids": { "limit": 40 }, "memory": { "limit": 64 << 20 } });
    let limited = |spec: Spec| spec.with("/linux/resources", limits.clone());
    let bomb = "f() { f | f & }; f; exec sleep 1";
    guest.run(limited, bomb, b"")?;
    prints(guest, |spec| spec, "echo well", "well\n")?;
    let fill = "dd if=/dev/zero of=/dev/shm/full bs=1M count=200 2>/dev/null; echo $?";
    let outcome = guest.run(limited, fill, b"")?;
    ensure!(outcome.text() != "0\n", "{outcome:?}");
    prints(guest, |spec| spec, "echo well", "well\n")
}

/// More open files than a guest of this size lets there be by itself, kept open.
const MANY: &str = "echo > /dev/shm/file
    busybox tail -q -f -s 100000 $(busybox yes /dev/shm/file | head -n 20000) > /dev/null 2> /dev/shm/errors &
    until [ -s /dev/shm/errors ] || [ $(busybox awk '{ print $1 }' /proc/sys/fs/file-nr) -ge 20000 ]; do
        busybox sleep 0.2
    done
    head -n 1 /dev/shm/errors; echo open; wait";

pub(crate) fn files(guest: &mut Guest) -> Result<()> {
    let few = json!([{ "type": "RLIMIT_NOFILE", "soft": 20, "hard": 20 }]);
    let limited = |spec: Spec| spec.with("/process/rlimits", few);
    let script = "(i=3; while eval \"exec $i< /etc/plain\"; do i=$((i + 1)); done) 2>&1 |
        busybox grep -o 'Too many open files'; echo $?";
    prints(guest, limited, script, "Too many open files\n0\n")?;

    let id = guest.name();
    let many = json!([{ "type": "RLIMIT_NOFILE", "soft": 30000, "hard": 30000 }]);
    let spec = guest
        .spec(&id, &["sh", "-c", MANY])
        .with("/process/rlimits", many);
    let (name, mut stream) = guest.agent.open_stream()?;
    let stdio = Stdio {
        stdout: name,
        ..Stdio::default()
    };
    guest.agent.create(&id, spec.to_json(), &stdio)?;
    guest.agent.tasks.start(&id, "")?;
    let said = String::from_utf8_lossy(&stream.read_some(5)?).into_owned();
    ensure!(said == "open\n", "{said:?}");
    prints(guest, |spec| spec, "echo well", "well\n")?;
    let added = process(&["cat", "/etc/plain"]);
    guest
        .agent
        .tasks
        .exec(&id, "added", &added, &Stdio::default())?;
    guest.agent.tasks.start(&id, "added")?;
    ensure!(guest.agent.tasks.wait(&id, "added")? == 0);
    ensure!(guest.remove(&id)? == 137, "no 137");
    Ok(())
}

/// Makes threads until there can be no more, says so, and keeps them.
const THREADS: &str = "
import threading, time
threading.stack_size(65536)
stay = threading.Event()
try:
    while True: threading.Thread(target=stay.wait, daemon=True).start()
except RuntimeError:
    open('/told/full', 'w')
time.sleep(100000)
";

#[test]
fn threads_run_out_for_containers_alone() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let told = tempfile::tempdir()?;
    let first = Runtime::Walnut
        .run(BUSYBOX)
        .command(&["sleep", "100000"])
        .detach()?;
    let beside = |image| {
        let pod = first.id();
        let run = Runtime::Walnut.run(image);
        run.flag("--annotation=io.kubernetes.cri.container-type=container")
            .flag(&format!("--annotation=io.kubernetes.cri.sandbox-id={pod}"))
    };
    let bind = format!(
        "type=bind,src={},dst=/told,options=rbind:rw",
        told.path().display()
    );
    let glutton = beside(DEBIAN)
        .flag(&format!("--mount={bind}"))
        .command(&["python3", "-c", THREADS])
        .detach()?;
    let full = told.path().join("full");
    deadline::until("all threads", Deadline::after(deadline::BOOT), || {
        Ok(fs::exists(&full)?.then_some(()))
    })?;
    // The agent makes a thread of its own for what it needs, says what there is none for, and can end it all.
    let output = beside(BUSYBOX).command(&["true"]).finish()?;
    let words = "in the container's cgroup: try again";
    ensure!(output.stderr.contains(words), "{output:?}");
    glutton.kill("SIGKILL")?;
    glutton.wait_for("STOPPED")?;
    let output = first.exec(&["echo", "well"])?.success()?;
    ensure!(output.text() == "well", "{output:?}");
    Ok(())
}
