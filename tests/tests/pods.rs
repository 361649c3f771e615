//! Pods of several containers, without containerd's daemon as their caller: the Sandbox API, and the CRI's
//! pause container.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use std::thread;
use walnut_agent_api::containerd::{
    api::ShutdownRequest,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
    shim_async::TaskClient,
    ttrpc::Code,
};
use walnut_tests::{
    leak::Leak,
    pod::{Pod, Sandbox, connect, namespaces, vmm},
    requirement,
    task::{Tasks, refused},
};

/// A program that can be told to end.
const IDLE: &str = "trap 'exit 7' TERM; while :; do sleep 1; done";
/// `PodSandboxConfig`: hostname, and `linux.sysctls`.
const CONFIG: &[u8] =
    b"\x12\x07the-pod\x42\x1c\x1a\x1a\x0a\x12net.core.somaxconn\x12\x04\x31\x32\x33\x34";
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

fn ended(tasks: &Tasks, id: &str, status: u32) -> Result<()> {
    ensure!(tasks.wait(id, "")? == status, "{id} has another status");
    ensure!(tasks.delete(id, "")? == status, "{id} has another status");
    Ok(())
}

/// What a container sees of its namespaces, in one file.
fn look(name: &str) -> String {
    let links = ["ipc", "uts", "pid"].map(|kind| format!("/proc/self/ns/{kind}"));
    let links = links.map(|link| format!("busybox readlink {link}"));
    format!(
        "{{ {}; hostname; echo $$; cat /dev/shm/note 2>/dev/null; echo; }} > /pod/{name}.part; \
         busybox mv /pod/{name}.part /pod/{name}.seen",
        links.join("; ")
    )
}

/// Before its start a Pod answers what it is, and nothing else.
fn not_started(pod: &Pod, sandbox: &Sandbox<'_>) -> Result<()> {
    let id = sandbox.id;
    refused(sandbox.ping_sandbox(), Code::NOT_FOUND, &[id])?;
    refused(sandbox.start_sandbox(), Code::NOT_FOUND, &[id])?;
    let bundle = pod.bundle(id);
    let other = sandbox.create_sandbox(&bundle, Some(("some.Other", Vec::new())));
    refused(other, Code::INVALID_ARGUMENT, &["some.Other"])?;
    let options = || Some((CONFIG_TYPE, CONFIG.to_vec()));
    sandbox.create_sandbox(&bundle, options())?;
    refused(
        sandbox.create_sandbox(&bundle, options()),
        Code::ALREADY_EXISTS,
        &[id],
    )?;
    ensure!(sandbox.platform()? == "linux/amd64");
    ensure!(sandbox.sandbox_status()?.state == "SANDBOX_NOTREADY");
    refused(
        sandbox.ping_sandbox(),
        Code::FAILED_PRECONDITION,
        &["not started"],
    )?;
    pod.prepare("early", "true", namespaces(0, &[]), "container")?;
    let early = sandbox.tasks.create(&pod.request("early"));
    refused(early, Code::FAILED_PRECONDITION, &["not started"])?;
    Ok(())
}

fn is_running(sandbox: &Sandbox<'_>, pid: u32) -> Result<()> {
    ensure!(vmm(pid)?.is_some(), "{pid} is no VMM");
    refused(
        sandbox.start_sandbox(),
        Code::FAILED_PRECONDITION,
        &["running"],
    )?;
    let status = sandbox.sandbox_status()?;
    ensure!(
        status.state == "SANDBOX_READY" && status.pid == pid,
        "{status}"
    );
    sandbox.ping_sandbox()?;
    let metrics = sandbox.sandbox_metrics()?.metrics;
    ensure!(
        metrics.data.type_url == "io.containerd.cgroups.v2.Metrics",
        "{metrics:?}"
    );
    Ok(())
}

/// Four containers share namespaces with the Pod as each asks, and only so.
fn share_what_they_are_to(pod: &Pod, tasks: &Tasks, pid: u32) -> Result<()> {
    let all = namespaces(pid, &["ipc", "uts", "pid", "network"]);
    let without_pid = namespaces(pid, &["ipc", "uts", "network"]);
    let alone = namespaces(pid, &["network"]);
    let note = "echo shared > /dev/shm/note; cat /proc/sys/net/core/somaxconn > /pod/sysctl;";
    pod.prepare(
        "one",
        &format!("{note} {}; {IDLE}", look("one")),
        all.clone(),
        "container",
    )?;
    pod.prepare("two", &format!("{}; {IDLE}", look("two")), all, "container")?;
    pod.prepare("three", &look("three"), without_pid, "container")?;
    pod.prepare("four", &look("four"), alone, "container")?;
    let mut seen = Vec::new();
    for name in ["one", "two", "three", "four"] {
        pod.run(tasks, name)?;
        let text = pod.read(&format!("{name}.seen"))?;
        seen.push(text.lines().map(str::to_owned).collect::<Vec<_>>());
    }
    compare(&seen)?;
    ensure!(pod.read("sysctl")? == "1234\n");
    ensure!(
        pod.exec(
            tasks,
            "two",
            "cat /etc/hostname > /pod/name; ls /etc/resolv.conf"
        )? == 0
    );
    ensure!(pod.read("name")? == "the-pod\n");
    // One sees the other's processes where it should, and only there.
    ensure!(
        pod.exec(
            tasks,
            "two",
            "ls /proc/1/root 2>/dev/null; cat /proc/1/cmdline > /pod/first; echo >> /pod/first"
        )? == 0
    );
    ensure!(pod.read("first")?.starts_with("/walnut-pause"));
    ended(tasks, "three", 0)?;
    ended(tasks, "four", 0)?;
    Ok(())
}

fn compare(seen: &[Vec<String>]) -> Result<()> {
    let [one, two, three, four] = seen else {
        anyhow::bail!("{seen:?}");
    };
    ensure!(one[..3] == two[..3] && one[..2] == three[..2], "{seen:?}");
    ensure!(
        one[2] != three[2] && three[4] == "1" && one[4] != "1",
        "{seen:?}"
    );
    ensure!((0..3).all(|kind| one[kind] != four[kind]), "{seen:?}");
    ensure!(one[3] == "the-pod" && two[3] == "the-pod", "{seen:?}");
    ensure!(two[5] == "shared" && three[5] == "shared", "{seen:?}");
    ensure!(four[5].is_empty(), "{seen:?}");
    Ok(())
}

/// Whoever names another's namespace, or none, gets none.
fn foreign_namespaces(pod: &Pod, tasks: &Tasks) -> Result<()> {
    for (list, named) in [
        (
            json!([{"type": "mount"}, {"type": "network"}, {"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]),
            "/proc/1/ns/ipc",
        ),
        (
            json!([{"type": "mount"}, {"type": "network"}, {"type": "pid"}]),
            "no ipc namespace",
        ),
        (
            json!([{"type": "mount"}, {"type": "network"}, {"type": "ipc"}]),
            "no pid namespace",
        ),
    ] {
        pod.prepare("foreign", "true", list, "container")?;
        let answer = tasks.create(&pod.request("foreign"));
        refused(answer, Code::INVALID_ARGUMENT, &[named])?;
    }
    Ok(())
}

#[test]
fn the_sandbox_api_makes_a_pod_in_which_containers_come_and_go() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let pod = Pod::new(programs, "sandbox")?;
    let id = pod.id.as_str();
    let address = pod.start(id)?;
    let tasks = connect(&address)?;
    let sandbox = Sandbox { tasks: &tasks, id };

    not_started(&pod, &sandbox)?;

    let pid = sandbox.start_sandbox()?;
    is_running(&sandbox, pid)?;
    let waiting = thread::spawn({
        let (address, id) = (address.clone(), pod.id.clone());
        move || -> Result<u32> {
            let tasks = connect(&address)?;
            Ok(Sandbox {
                tasks: &tasks,
                id: &id,
            }
            .wait_sandbox()?)
        }
    });

    share_what_they_are_to(&pod, &tasks, pid)?;

    // A container is killed, is made again, and touches no other.
    tasks.kill("one", "", 9, false)?;
    ended(&tasks, "one", 137)?;
    ensure!(sandbox.sandbox_status()?.state == "SANDBOX_READY");
    refused(tasks.create(&pod.request(id)), Code::ALREADY_EXISTS, &[id])?;
    pod.run(&tasks, "one")?;
    ensure!(pod.exec(&tasks, "two", "true")? == 0);
    tasks.kill("two", "", 15, false)?;
    ended(&tasks, "two", 7)?;

    sandbox.stop_sandbox()?;
    sandbox.stop_sandbox()?;
    ensure!(vmm(pid)?.is_none(), "the VM still runs");
    ensure!(sandbox.sandbox_status()?.state == "SANDBOX_NOTREADY");
    let exit = waiting
        .join()
        .map_err(|_| anyhow::anyhow!("a waiter panicked"))?;
    ensure!(exit? == 0);
    tasks.kill("one", "", 9, false)?;
    ended(&tasks, "one", 137)?;
    refused(
        tasks.create(&pod.request("two")),
        Code::FAILED_PRECONDITION,
        &["stopped"],
    )?;
    sandbox.shutdown_sandbox()?;
    drop(tasks);
    leak.nothing_left()
}

#[test]
fn a_pod_whose_vm_dies_says_so() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let pod = Pod::new(programs, "dying")?;
    let id = pod.id.as_str();
    let tasks = connect(&pod.start(id)?)?;
    let sandbox = Sandbox { tasks: &tasks, id };
    sandbox.create_sandbox(&pod.bundle(id), None)?;
    let pid = sandbox.start_sandbox()?;
    pod.prepare("one", IDLE, namespaces(pid, &["ipc"]), "container")?;
    pod.run(&tasks, "one")?;
    vmm(pid)?.context("no VMM")?.kill(Signal::KILL)?;
    ensure!(sandbox.wait_sandbox()? == 137);
    ensure!(sandbox.sandbox_status()?.state == "SANDBOX_NOTREADY");
    ended(&tasks, "one", 137)?;
    sandbox.stop_sandbox()?;
    sandbox.shutdown_sandbox()?;
    drop(tasks);
    leak.nothing_left()
}

#[test]
fn a_pause_container_holds_its_pod_and_ends_it() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let pod = Pod::new(programs, "pause")?;
    let id = pod.id.as_str();
    let note = format!("echo shared > /dev/shm/note; {IDLE}");
    pod.prepare(id, &note, namespaces(0, &[]), "sandbox")?;
    // As containerd 2.3 starts a shim.
    let parameters = BootstrapParams {
        instance_id: id.to_owned(),
        namespace: "walnut-tests".to_owned(),
        ..Default::default()
    };
    let reply = pod
        .shim(id, "start", parameters.write_to_bytes()?)?
        .success()?;
    let result = BootstrapResult::parse_from_bytes(&reply.stdout).context("no result")?;
    ensure!(
        result.version == 3 && result.protocol == "ttrpc",
        "{result}"
    );
    let tasks = connect(&result.address)?;
    let pid = pod.run(&tasks, id)?;

    foreign_namespaces(&pod, &tasks)?;
    let shared = namespaces(pid, &["ipc", "uts", "network"]);
    for round in ["first", "second"] {
        pod.prepare(
            "web",
            &format!("{}; {IDLE}", look(round)),
            shared.clone(),
            "container",
        )?;
        ensure!(pod.start("web")? == result.address, "another server");
        pod.run(&tasks, "web")?;
        let seen = pod.read(&format!("{round}.seen"))?;
        let lines: Vec<_> = seen.lines().collect();
        ensure!(lines[3..] == ["the-pod", "1", "shared", ""], "{lines:?}");
        ensure!(pod.exec(&tasks, "web", "exit 5")? == 5);
        if round == "first" {
            tasks.kill("web", "", 9, true)?;
            ended(&tasks, "web", 137)?;
            ensure!(vmm(pid)?.is_some(), "a container has ended its Pod");
        }
    }
    tasks.kill(id, "", 9, false)?;
    ensure!(tasks.wait(id, "")? == 137);
    ended(&tasks, "web", 137)?;
    ended(&tasks, id, 137)?;
    ensure!(vmm(pid)?.is_none(), "the VM has outlived its sandbox");
    let request = ShutdownRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    // The server may be gone before its answer is out.
    let _ = tasks.call(|client, context| async move {
        TaskClient::new(client).shutdown(context, &request).await
    });
    drop(tasks);
    leak.nothing_left()
}
