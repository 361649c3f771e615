//! What a Pod and its containers have, see and may do.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, process::Command};
use walnut_tests::{
    command,
    cri::{Container, Cri, Pod, number, says, text},
    ctr::Runtime,
    deadline::{self, Deadline},
    story,
};

pub(crate) const MIB: i64 = 1 << 20;

/// Runs until it is stopped, and ends when it is told to.
pub(crate) const SERVE: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 1000 & wait; done";

pub(crate) fn a_pod_and_its_containers(cri: &Cri) -> Result<()> {
    let version = cri.call("Version", json!({ "version": "v1" }))?;
    ensure!(version["runtime_name"] == "containerd", "{version}");
    the_node_is_ready(cri)?;
    tell(
        named(cri)?,
        &[
            ("a Pod that is ready", is_ready),
            ("containers share the Pod's network and IPC", share),
            ("environment, user, working directory", process),
            ("hostname, names, DNS", names),
            ("sysctls", sysctls),
            ("mounts", mounts),
            ("stats", stats),
            ("the node and the Pod reach each other", network),
        ],
    )
}

/// A Pod whose name, DNS and sysctls are those that [`names`] and [`sysctls`] look for.
pub(crate) fn named(cri: &Cri) -> Result<Pod<'_>> {
    cri.pod(json!({
        "hostname": "a-pod",
        "dns_config": { "servers": ["192.0.2.53"], "searches": ["walnut.local"], "options": ["ndots:5"] },
        "linux": { "sysctls": { "net.ipv4.tcp_keepalive_time": "601", "kernel.shm_rmid_forced": "1" } },
    }))
}

pub(crate) fn what_containers_may_do(cri: &Cri) -> Result<()> {
    tell(
        cri.pod(json!({}))?,
        &[
            ("security context", security),
            ("seccomp", seccomp),
            ("limits, and their update", limits),
        ],
    )
}

/// Tells all chapters of a Pod, and removes it.
pub(crate) fn tell<'a>(mut pod: Pod<'a>, chapters: &[story::Chapter<Pod<'a>>]) -> Result<()> {
    let told = story::tell(&mut pod, chapters);
    let removed = pod.remove();
    told.and(removed)
}

/// `Status`, and the images that were imported.
fn the_node_is_ready(cri: &Cri) -> Result<()> {
    let status = cri.call("Status", json!({}))?;
    for condition in status["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let warning = condition["type"] == "ContainerdHasNoDeprecationWarnings";
        ensure!(condition["status"] == true || warning, "{condition}");
    }
    let handlers = status["runtime_handlers"].as_array();
    let has = |name: &str| handlers.is_some_and(|all| all.iter().any(|one| one["name"] == name));
    ensure!(has("walnut") && has("runc"), "{status}");
    let image = json!({ "image": { "image": "walnut.local/busybox:latest" } });
    let image = cri.call("ImageStatus", image)?;
    ensure!(image["image"]["id"].is_string(), "{image}");
    Ok(())
}

pub(crate) fn is_ready(pod: &mut Pod<'_>) -> Result<()> {
    let status = pod.status()?;
    ensure!(status["state"] == "SANDBOX_READY", "{status}");
    says(&pod.address()?, &["10.88."])?;
    let other = &status["network"]["additional_ips"][0]["ip"];
    says(&text(other)?, &["fd00:88::"])
}

pub(crate) fn share(pod: &mut Pod<'_>) -> Result<()> {
    let script = format!("while :; do echo pong | nc -l -p 8080; done & {SERVE}");
    let server = pod.shell("server", &script, json!({}))?;
    let client = pod.shell("client", SERVE, json!({}))?;
    let ask = |host: &str| -> Result<()> {
        let script = format!("nc -w 5 {host} 8080 </dev/null");
        let what = format!("an answer from {host}");
        deadline::until(&what, Deadline::after(deadline::REQUEST), || {
            Ok((client.exec(&script)?.stdout == "pong").then_some(()))
        })
    };
    ask("127.0.0.1")?;
    ask("::1")?;
    // What a Pod shares, and what not.
    client.output("echo shared > /dev/shm/word")?;
    ensure!(
        server.output("cat /dev/shm/word")? == "shared",
        "/dev/shm is not shared"
    );
    for (namespace, shared) in [
        ("ipc", true),
        ("net", true),
        ("uts", true),
        ("pid", false),
        ("mnt", false),
    ] {
        let link = format!("readlink /proc/self/ns/{namespace}");
        let same = server.output(&link)? == client.output(&link)?;
        ensure!(same == shared, "{namespace}: the same is {same}");
    }
    ensure!(
        client.output("ps | grep -c '[n]c -l'; true")? == "0",
        "sees the other's processes"
    );
    server.stop(30)?;
    ensure!(server.ended()?.0 == 0, "{:?}", server.status()?);
    server.remove()?;
    // One that goes takes nothing of the others.
    ensure!(
        client.output("echo here")? == "here",
        "the client has gone too"
    );
    client.stop(0)?;
    client.remove()
}

fn process(pod: &mut Pod<'_>) -> Result<()> {
    let over = json!({
        "envs": [{ "key": "TREE", "value": "walnut = nut" }, { "key": "EMPTY", "value": "" }],
        "working_dir": "/var",
        "linux": { "security_context": {
            "run_as_user": { "value": 1000 }, "run_as_group": { "value": 1001 },
            "supplemental_groups": [1002],
        } },
    });
    let container = pod.shell("process", SERVE, over)?;
    ensure!(
        container.output("echo $TREE:${EMPTY-unset}:$PWD")? == "walnut = nut::/var",
        "environment"
    );
    ensure!(
        container.output("id -u; id -g; id -G")?.replace('\n', " ") == "1000 1001 1001 1002",
        "user"
    );
    container.stop(0)?;
    container.remove()
}

pub(crate) fn names(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.shell("names", SERVE, json!({}))?;
    ensure!(
        container.output("hostname; cat /etc/hostname")? == "a-pod\na-pod",
        "hostname"
    );
    says(
        &container.output("cat /etc/resolv.conf")?,
        &[
            "nameserver 192.0.2.53",
            "search walnut.local",
            "options ndots:5",
        ],
    )?;
    says(&container.output("cat /etc/hosts")?, &["localhost"])?;
    container.stop(0)?;
    container.remove()
}

pub(crate) fn sysctls(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.shell("sysctls", SERVE, json!({}))?;
    let read = "cat /proc/sys/net/ipv4/tcp_keepalive_time /proc/sys/kernel/shm_rmid_forced";
    ensure!(
        container.output(read)? == "601\n1",
        "{}",
        container.output(read)?
    );
    // containerd's own: a Pod's processes may listen on any port, and ping.
    let ports = container.output("cat /proc/sys/net/ipv4/ip_unprivileged_port_start")?;
    ensure!(ports == "0", "{ports}");
    container.stop(0)?;
    container.remove()
}

/// The node reaches the Pod, and the Pod the node.
fn network(pod: &mut Pod<'_>) -> Result<()> {
    let script = "while :; do echo pong | nc -l -p 8090; done";
    let container = pod.shell("network", script, json!({}))?;
    let address = pod.address()?;
    let reached = deadline::until("the Pod's port", Deadline::after(deadline::REQUEST), || {
        let mut nc = Command::new("busybox");
        nc.args(["nc", "-w", "5", &address, "8090"]);
        let output = command::run(&mut nc, Vec::new(), Deadline::after(deadline::REQUEST))?;
        Ok((output.text() == "pong").then_some(()))
    });
    reached.context("from the node")?;
    container
        .output("ping -c 1 -w 10 10.88.0.1")
        .context("to the node")?;
    container
        .output("ping -c 1 -w 10 fd00:88::1")
        .context("to the node by IPv6")?;
    container.stop(0)?;
    container.remove()
}

/// A line of a process's status.
fn status_line(container: &Container<'_>, name: &str) -> Result<String> {
    let line = container.output(&format!("grep ^{name}: /proc/self/status"))?;
    Ok(line.rsplit('\t').next().unwrap_or_default().to_owned())
}

fn security(pod: &mut Pod<'_>) -> Result<()> {
    let over = json!({ "linux": { "security_context": {
        "capabilities": { "drop_capabilities": ["ALL"], "add_capabilities": ["NET_RAW"] },
        "readonly_rootfs": true,
        "no_new_privs": true,
        "masked_paths": ["/proc/keys", "/sys/firmware"],
        "readonly_paths": ["/proc/sys"],
    } } });
    let container = pod.shell("confined", SERVE, over)?;
    ensure!(
        status_line(&container, "CapBnd")? == "0000000000002000",
        "capabilities"
    );
    ensure!(
        status_line(&container, "CapEff")? == "0000000000002000",
        "capabilities"
    );
    ensure!(
        status_line(&container, "NoNewPrivs")? == "1",
        "no_new_privs"
    );
    let written = container.exec("touch /file")?;
    says(&written.stderr, &["Read-only file system"])?;
    ensure!(
        container.output("cat /proc/keys")?.is_empty(),
        "/proc/keys is not masked"
    );
    let written = container.exec("echo 1 > /proc/sys/kernel/panic")?;
    ensure!(written.code != 0, "/proc/sys is writable");
    container.stop(0)?;
    container.remove()?;
    let plain = pod.shell("plain", SERVE, json!({}))?;
    // containerd's default set.
    ensure!(
        status_line(&plain, "CapEff")? == "00000000a80425fb",
        "{}",
        status_line(&plain, "CapEff")?
    );
    ensure!(status_line(&plain, "NoNewPrivs")? == "0", "no_new_privs");
    plain.stop(0)?;
    plain.remove()?;
    let all = json!({ "linux": { "security_context": { "privileged": true } } });
    let refused = pod.refuses("privileged", all)?;
    says(&refused.message, &["privileged"])
}

fn seccomp(pod: &mut Pod<'_>) -> Result<()> {
    let profile = |kind: &str| json!({ "linux": { "security_context": { "seccomp": { "profile_type": kind } } } });
    let plain = pod.shell("unconfined", SERVE, profile("Unconfined"))?;
    ensure!(status_line(&plain, "Seccomp")? == "0", "unconfined");
    plain.stop(0)?;
    plain.remove()?;
    let container = pod.shell("seccomp", SERVE, profile("RuntimeDefault"))?;
    ensure!(status_line(&container, "Seccomp")? == "2", "no filter");
    let forbidden = container.exec("unshare -U true")?;
    ensure!(forbidden.code != 0, "{forbidden:?}");
    container.stop(0)?;
    container.remove()
}

fn limits(pod: &mut Pod<'_>) -> Result<()> {
    let resources = |memory: i64, quota: i64| {
        json!({
            "memory_limit_in_bytes": memory, "memory_swap_limit_in_bytes": memory,
            "cpu_period": 100_000, "cpu_quota": quota, "cpu_shares": 512, "oom_score_adj": 900,
        })
    };
    let over = json!({ "linux": { "resources": resources(64 * MIB, 50_000) } });
    let container = pod.shell("limits", SERVE, over)?;
    let seen = "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max cpu.weight";
    let at_first = container.output(seen)?;
    says(&at_first, &["67108864\n0\n50000 100000\n"])?;
    let update = json!({ "linux": resources(96 * MIB, 70_000) });
    container.ask("UpdateContainerResources", update)?;
    says(&container.output(seen)?, &["100663296\n0\n70000 100000\n"])?;
    let status = container.status()?;
    let told = &status["resources"]["linux"]["memory_limit_in_bytes"];
    ensure!(number(told)? == 96 * MIB, "{status}");
    container.stop(0)?;
    container.remove()
}

fn mounts(pod: &mut Pod<'_>) -> Result<()> {
    let (volume, file) = (pod.directory().join("volume"), pod.directory().join("file"));
    fs::create_dir(&volume)?;
    fs::write(volume.join("from-node"), "node")?;
    fs::write(&file, "one file")?;
    let mount = |inside: &str, outside: &std::path::Path, readonly: bool| json!({ "container_path": inside, "host_path": outside, "readonly": readonly });
    let over = json!({ "mounts": [
        mount("/volume", &volume, false),
        mount("/volume-ro", &volume, true),
        mount("/etc/one-file", &file, true),
    ] });
    let container = pod.shell("mounts", SERVE, over)?;
    let read = "cat /volume/from-node /volume-ro/from-node /etc/one-file";
    ensure!(container.output(read)? == "nodenodeone file", "contents");
    container.output("echo pod > /volume/from-pod")?;
    ensure!(
        fs::read_to_string(volume.join("from-pod"))? == "pod\n",
        "the node sees it"
    );
    fs::write(volume.join("later"), "later")?;
    ensure!(
        container.output("cat /volume/later")? == "later",
        "the Pod sees it"
    );
    let written = container.exec("touch /volume-ro/x")?;
    says(&written.stderr, &["Read-only file system"])?;
    container.stop(0)?;
    container.remove()
}

fn stats(pod: &mut Pod<'_>) -> Result<()> {
    let script = format!("head -c 20m /dev/zero > /written; {SERVE}");
    let limit = json!({ "linux": { "resources": { "memory_limit_in_bytes": 128 * MIB } } });
    let container = pod.shell("stats", &script, limit)?;
    let above = |value: &Value, least: i64| -> Result<()> {
        let number = number(value)?;
        ensure!(number >= least, "{number} is less than {least}");
        Ok(())
    };
    let check = |stats: &Value| -> Result<()> {
        above(&stats["cpu"]["usage_core_nano_seconds"], 1).context("cpu")?;
        above(&stats["memory"]["working_set_bytes"], 1).context("working set")?;
        above(&stats["memory"]["usage_bytes"], 1).context("usage")?;
        let available = number(&stats["memory"]["available_bytes"]).context("available")?;
        ensure!(
            (1..=128 * MIB).contains(&available),
            "available: {available}"
        );
        Ok(())
    };
    let answer = container.ask("ContainerStats", json!({}))?;
    check(&answer["stats"]).with_context(|| format!("ContainerStats: {answer}"))?;
    let list = json!({ "filter": { "pod_sandbox_id": pod.id } });
    let answer = pod.cri().call("ListContainerStats", list)?;
    let of_this = answer["stats"].as_array().and_then(|all| {
        all.iter()
            .find(|one| one["attributes"]["id"] == container.id.as_str())
    });
    check(of_this.context("not listed")?)?;
    // containerd sums up the writable layers now and then.
    deadline::until(
        "the writable layer's size",
        Deadline::after(deadline::REQUEST),
        || {
            let answer = container.ask("ContainerStats", json!({}))?;
            let used = number(&answer["stats"]["writable_layer"]["used_bytes"]);
            Ok(used.is_ok_and(|used| used >= 20 * MIB).then_some(()))
        },
    )?;
    let answer = pod.ask("PodSandboxStats")?;
    let stats = &answer["stats"]["linux"];
    let whole = || -> Result<()> {
        above(&stats["cpu"]["usage_core_nano_seconds"], 1).context("cpu")?;
        above(&stats["memory"]["usage_bytes"], 1).context("memory")?;
        above(&stats["process"]["process_count"], 1).context("processes")?;
        above(&stats["network"]["default_interface"]["rx_bytes"], 1).context("network")?;
        ensure!(
            stats["network"]["default_interface"]["name"] == "eth0",
            "no eth0"
        );
        let containers = stats["containers"].as_array().map(Vec::len);
        ensure!(containers == Some(1), "{containers:?} containers");
        Ok(())
    };
    whole().with_context(|| format!("PodSandboxStats: {answer}"))?;
    container.stop(0)?;
    container.remove()
}

/// `shareProcessNamespace: true`.
pub(crate) fn processes_of_a_pod_that_shares_them(cri: &Cri) -> Result<()> {
    let shared = json!({ "security_context": { "namespace_options": { "pid": "POD" } } });
    let pod = cri.pod(json!({ "linux": shared }))?;
    let over = || json!({ "linux": shared });
    let one = pod.shell("one", SERVE, over())?;
    let other = pod.shell("other", "sleep 4321", over())?;
    says(&one.output("ps")?, &["sleep 4321", "sleep 2147483647"])?;
    one.output("kill $(ps | awk '/[s]leep 4321/ { print $1 }')")?;
    ensure!(other.ended()?.0 == 143, "{:?}", other.status()?);
    // Orphans fall to the Pod's first process, not to the container's.
    // Its streams are not the exec's, whose end would otherwise be waited for.
    one.output("(sleep 300 > /dev/null 2>&1 &) ; sleep 1")?;
    let parent =
        one.output("awk '{ print $4 }' /proc/$(ps | awk '/[s]leep 300$/ { print $1 }')/stat")?;
    ensure!(parent == "1", "an orphan's parent is {parent}");
    if cri.runtime() == Runtime::Runc {
        ensure!(
            one.output("readlink /proc/self/ns/pid")? == one.output("readlink /proc/1/ns/pid")?,
            "pid"
        );
    }
    pod.remove()
}
