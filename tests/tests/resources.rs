//! The size of a Pod's VM and what bounds it on the host: limits, more containers, Update, and the cgroups
//! that a node made for the Pod.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};
use walnut_agent_api::containerd::{
    api::UpdateTaskRequest, protobuf::MessageField, shim_async::TaskClient,
};
use walnut_tests::{
    command::End,
    ctr::{BUSYBOX, Container, Run, Runtime, events},
    deadline::{self, Deadline},
    leak::Leak,
    processes, requirement,
    task::any,
};

const CGROUPS: &str = "/sys/fs/cgroup";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
const MIB: u64 = 1 << 20;

fn sleeping() -> Run {
    Runtime::Walnut.run(BUSYBOX).command(&["sleep", "100000"])
}

/// A number that the container's shell prints.
fn number(container: &Container, script: &str) -> Result<u64> {
    let text = container.shell(script)?.success()?.text();
    text.parse().with_context(|| format!("{script}: {text:?}"))
}

fn total_mib(container: &Container) -> Result<u64> {
    number(
        container,
        "awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo",
    )
}

fn update(container: &Container, resources: &Value) -> Result<()> {
    let request = UpdateTaskRequest {
        id: container.id().to_owned(),
        resources: MessageField::some(any(RESOURCES, resources.to_string().into_bytes())),
        ..Default::default()
    };
    let tasks = container.tasks()?;
    tasks.call(|client, context| async move {
        TaskClient::new(client).update(context, &request).await
    })?;
    Ok(())
}

/// The host's cgroup of a container's VM, which holds every thread of it.
fn cgroup_of(container: &Container) -> Result<PathBuf> {
    let vmm = container.vmm()?;
    let mut cgroups = Vec::new();
    for thread in fs::read_dir(format!("/proc/{}/task", vmm.pid))? {
        let text = fs::read_to_string(thread?.path().join("cgroup"))?;
        let path = text.trim().strip_prefix("0::/").context("not version 2")?;
        cgroups.push(Path::new(CGROUPS).join(path));
    }
    ensure!(cgroups.len() > 3, "few threads: {cgroups:?}");
    cgroups.dedup();
    ensure!(cgroups.len() == 1, "threads are elsewhere: {cgroups:?}");
    cgroups.pop().context("no thread")
}

fn memory_max_mib(cgroup: &Path) -> Result<u64> {
    let text = fs::read_to_string(cgroup.join("memory.max"))?;
    Ok(text.trim().parse::<u64>().context("memory.max")? / MIB)
}

#[test]
fn a_pod_is_as_large_as_its_limits_and_grows_with_them() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let config = tempfile::NamedTempFile::new()?;
    fs::write(config.path(), "max_vcpus = 4\n")?;
    let first = sleeping()
        .flag(&format!(
            "--runtime-config-path={}",
            config.path().display()
        ))
        .flag("--memory-limit=134217728")
        .flag("--cpus=1.5")
        .detach()?;
    let booted = total_mib(&first)?;
    ensure!((160..=214).contains(&booted), "{booted} MiB of RAM");
    ensure!(number(&first, "nproc")? == 2, "no 2 vCPUs");
    let cgroup = cgroup_of(&first)?;
    ensure!(cgroup.ends_with(first.id()), "{cgroup:?}");
    // 128 of the container, 80 and 2 of the guest, 32 and 1 of the VMM.
    ensure!(
        memory_max_mib(&cgroup)? == 243,
        "{}",
        memory_max_mib(&cgroup)?
    );

    // Two more in the same Pod: memory for both, one more vCPU.
    let join = || {
        sleeping()
            .flag("--annotation=io.kubernetes.cri.container-type=container")
            .flag(&format!(
                "--annotation=io.kubernetes.cri.sandbox-id={}",
                first.id()
            ))
            .flag("--memory-limit=134217728")
            .flag("--cpus=0.6")
            .detach()
    };
    let others = [join()?, join()?];
    ensure!(number(&others[1], "nproc")? == 3, "no 3 vCPUs");
    let has = |least: u64| {
        let what = format!("{least} MiB of RAM");
        deadline::until(&what, Deadline::after(deadline::REQUEST), || {
            Ok((total_mib(&first)? >= least).then_some(()))
        })
    };
    has(booted + 250)?;
    ensure!(
        memory_max_mib(&cgroup)? > 243 + 256,
        "the host's cgroup did not grow"
    );

    // What was too much for the first container fits after an update.
    let hog = "dd if=/dev/zero of=/dev/null bs=190000000 count=1 && echo held";
    ensure!(first.shell(hog)?.text() != "held", "no limit");
    update(
        &first,
        &json!({ "memory": { "limit": 256 * MIB }, "cpu": { "quota": 250_000, "period": 100_000 } }),
    )?;
    ensure!(number(&first, "nproc")? == 4, "no 4 vCPUs");
    has(booted + 378)?;
    let output = first.shell(hog)?.success()?;
    ensure!(output.text() == "held", "{output:?}");
    bound_to_a_cpu(&cgroup, &first, &others)?;

    for container in others.into_iter().chain([first]) {
        killed(&container)?;
    }
    leak.nothing_left()
}

fn killed(container: &Container) -> Result<()> {
    container.kill("SIGKILL")?;
    container.wait_for("STOPPED")?;
    ensure!(container.task_status()? == 137, "no 137");
    container.remove()
}

/// CPUs are the host's, so that the VMM is bound to them and the guest isn't told.
fn bound_to_a_cpu(cgroup: &Path, first: &Container, others: &[Container]) -> Result<()> {
    update(first, &json!({ "cpu": { "cpus": "0", "mems": "0" } }))?;
    for container in others {
        update(container, &json!({ "cpu": { "cpus": "0" } }))?;
    }
    let cpus = fs::read_to_string(cgroup.join("cpuset.cpus"))?;
    ensure!(cpus.trim() == "0", "{cpus:?}");
    Ok(())
}

/// A cgroup as a kubelet makes it for a Pod.
struct PodCgroup(PathBuf);

impl PodCgroup {
    fn new(name: &str, memory_mib: u64) -> Result<Self> {
        let path = Path::new(CGROUPS).join(name);
        // What the kernel has no controller for shows below.
        let _ = fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), "+memory");
        fs::create_dir(&path).context("a cgroup")?;
        let made = Self(path);
        fs::write(made.0.join("memory.max"), (memory_mib * MIB).to_string())?;
        Ok(made)
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_limit_of_the_pod_never_kills_its_vm() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let pod = PodCgroup::new("walnuttest.slice", 200)?;
    // A container that nothing limits but its Pod, by systemd's names.
    let greedy = sleeping()
        .flag("--cgroup=walnuttest.slice:cri-containerd:greedy")
        .detach()?;
    ensure!(cgroup_of(&greedy)? == pod.0.join("cri-containerd-greedy.scope"));
    let total = total_mib(&greedy)?;
    ensure!((96..168).contains(&total), "{total} MiB of RAM");
    let vmm = greedy.vmm()?;
    // All that the guest has, and more.
    let output = greedy.shell("head -c 400000000 /dev/zero | tail -c 390000000 | wc -c")?;
    ensure!(output.text() != "390000000", "{output:?}");
    greedy.shell("true")?.success()?;
    ensure!(greedy.vmm()? == vmm, "another VMM");
    let events = fs::read_to_string(pod.0.join("memory.events"))?;
    ensure!(events.contains("oom_kill 0"), "{events}");
    drop(greedy);

    // Less than any VM needs.
    fs::write(pod.0.join("memory.max"), (100 * MIB).to_string())?;
    let refused = Runtime::Walnut
        .run(BUSYBOX)
        .flag("--cgroup=/walnuttest.slice/small")
        .command(&["true"])
        .finish()?;
    ensure!(refused.end == End::Exited(1), "{refused:?}");
    for word in ["100 MiB", "129 MiB", "RuntimeClass"] {
        ensure!(refused.stderr.contains(word), "{refused:?}");
    }
    drop(pod);
    leak.nothing_left()
}

#[test]
fn a_vm_that_the_host_kills_for_memory_is_told_as_such() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let told = events()?;
    let container = sleeping().detach()?;
    let cgroup = cgroup_of(&container)?;
    // As an administrator might, or a node that is short of memory.
    fs::write(cgroup.join("memory.max"), (20 * MIB).to_string())?;
    container.wait_for("STOPPED")?;
    ensure!(
        !processes::named("walnut-vmm")?
            .iter()
            .any(|vmm| vmm.command.contains(container.id())),
        "a VMM is left"
    );
    ensure!(container.task_status()? == 137, "no 137");
    container.remove()?;
    let seen = told.seen(container.id(), "/tasks/delete")?;
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/oom",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(seen == topics, "{seen:?}");
    leak.nothing_left()
}

#[test]
fn events_keep_their_order_while_containerd_stands_still() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let told = events()?;
    let container = sleeping().detach()?;
    let tasks = container.tasks()?;
    let daemon = processes::named("containerd")?;
    let [daemon] = &daemon[..] else {
        anyhow::bail!("{daemon:?}");
    };
    daemon.kill(Signal::STOP)?;
    let ended = tasks
        .kill(container.id(), "", 9, false)
        .and_then(|()| tasks.wait(container.id(), ""));
    daemon.kill(Signal::CONT)?;
    // Whoever waits is answered, containerd or not.
    ensure!(ended? == 137, "no 137");
    container.wait_for("STOPPED")?;
    ensure!(container.task_status()? == 137, "no 137");
    container.remove()?;
    let mut seen = told.seen(container.id(), "/tasks/delete")?;
    // One whose answer did not come in time may come twice.
    seen.dedup();
    ensure!(
        seen == [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete"
        ],
        "{seen:?}"
    );
    leak.nothing_left()
}
