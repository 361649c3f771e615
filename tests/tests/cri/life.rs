//! How Pods come and go: whole, halfway, many at once, and under a containerd that restarts.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::Barrier, time::Instant};
use walnut_tests::{
    cri::{Cri, says},
    deadline::{self, Deadline},
    processes,
};

use crate::pod::SERVE;

/// How many Pods come at once, unless `WALNUT_MANY_PODS` says otherwise.
const MANY: usize = 8;

pub(crate) fn the_end_of_a_pod_with_all_in_it(cri: &Cri) -> Result<()> {
    let pod = cri.pod(json!({}))?;
    let one = pod.shell("one", SERVE, json!({}))?;
    let deaf = pod.shell("deaf", "trap '' TERM; while :; do sleep 1; done", json!({}))?;
    let never = pod.create("never", "true", json!({}))?;
    pod.stop()?;
    ensure!(
        pod.status()?["state"] == "SANDBOX_NOTREADY",
        "{}",
        pod.status()?
    );
    for container in [&one, &deaf] {
        let ended = container.ended()?;
        ensure!(ended == (137, "Error".to_owned()), "{ended:?}");
    }
    // Nothing starts in it any more.
    let refused = never.start().err().context("it started")?;
    says(&format!("{refused:#}"), &["not running"])?;
    pod.stop().context("stop twice")?;
    let id = pod.id.clone();
    pod.remove()?;
    pod.remove().context("remove twice")?;
    let gone = cri.refused("PodSandboxStatus", json!({ "pod_sandbox_id": id }))?;
    ensure!(gone.code == 5, "{gone:?}");
    Ok(())
}

pub(crate) fn a_pod_is_removed_while_it_starts(cri: &Cri) -> Result<()> {
    // Its containers start while it is stopped and removed.
    let pod = cri.pod(json!({}))?;
    let container = pod.create("late", SERVE, json!({}))?;
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| {
            barrier.wait();
            container.start()
        });
        barrier.wait();
        let removed = pod.remove();
        // Whether it started before the Pod's end is chance.
        let _ = starting.join();
        removed
    })?;
    pod.remove()?;
    Ok(())
}

pub(crate) fn containerd_restarts_under_a_pod(cri: &Cri) -> Result<()> {
    let pod = cri.pod(json!({}))?;
    let script = "i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.5; done";
    let container = pod.shell("ticks", script, json!({}))?;
    let script = "until [ -e /end ]; do sleep 0.2; done; exit 9";
    let ends = pod.shell("ends", script, json!({}))?;
    let daemon = processes::named("containerd")?
        .pop()
        .context("no containerd")?;
    daemon.kill(Signal::KILL)?;
    deadline::until(
        "containerd's return",
        Deadline::after(deadline::BOOT),
        || {
            let status = cri.call("Version", json!({}));
            let others = processes::named("containerd")?;
            let new = others.iter().any(|process| process.pid != daemon.pid);
            Ok((status.is_ok() && new).then_some(()))
        },
    )?;
    deadline::until("the Pod's return", Deadline::after(deadline::BOOT), || {
        Ok((pod.status()?["state"] == "SANDBOX_READY").then_some(()))
    })?;
    ensure!(
        container.status()?["state"] == "CONTAINER_RUNNING",
        "{}",
        container.status()?
    );
    ensure!(container.output("echo here")? == "here", "exec");
    ends.output("touch /end")?;
    ensure!(ends.ended()?.0 == 9, "{:?}", ends.status()?);
    let length = container.log()?.len();
    deadline::until(
        "the log to go on",
        Deadline::after(deadline::REQUEST),
        || Ok((container.log()?.len() > length).then_some(())),
    )?;
    pod.remove()
}

pub(crate) fn many_pods_at_once(cri: &Cri) -> Result<()> {
    let many = match std::env::var("WALNUT_MANY_PODS") {
        Ok(many) => many.parse().context("WALNUT_MANY_PODS")?,
        Err(_) => MANY,
    };
    let since = Instant::now();
    let run = || -> Result<(_, String)> {
        let pod = cri.pod(json!({}))?;
        {
            let container = pod.shell("one", SERVE, json!({}))?;
            ensure!(container.output("echo here")? == "here", "exec");
        }
        let address = pod.address()?;
        Ok((pod, address))
    };
    let pods = std::thread::scope(|scope| -> Result<Vec<_>> {
        let threads: Vec<_> = (0..many).map(|_| scope.spawn(run)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|pod| pod.map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .collect()
    })?;
    let addresses: BTreeSet<&String> = pods.iter().map(|(_, address)| address).collect();
    ensure!(addresses.len() == many, "{addresses:?}");
    println!("{many} Pods in {:?}: {}", since.elapsed(), memory()?);
    std::thread::scope(|scope| {
        let threads: Vec<_> = pods
            .iter()
            .map(|(pod, _)| scope.spawn(|| pod.remove()))
            .collect();
        let mut joined = threads.into_iter().map(|thread| thread.join());
        joined.try_for_each(|end| end.map_err(|_| anyhow::anyhow!("a thread panicked"))?)
    })?;
    ensure!(
        cri.call("ListPodSandbox", json!({}))?["items"] == Value::Array(Vec::new()),
        "Pods stay"
    );
    Ok(())
}

/// What the node has left.
fn memory() -> Result<String> {
    let info = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = info.lines().find(|line| line.starts_with("MemAvailable"));
    Ok(line.unwrap_or_default().to_owned())
}
