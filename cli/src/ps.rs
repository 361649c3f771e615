//! `walnut ps`: every Pod with its containers. A Pod whose shim doesn't answer is listed as such.

use crate::{
    CommandError,
    pods::{Pod, PodError, Pods},
    table::Table,
};
use serde::Serialize;
use std::{
    io::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use walnut_shim_api::pod::DescribeResponse;

const MIB: u64 = 1 << 20;

#[derive(Debug, Serialize)]
struct Line<'a> {
    namespace: &'a str,
    id: &'a str,
    machine: &'a str,
    vmm_pid: u32,
    vcpus: u32,
    memory_mib: u32,
    resident_bytes: u64,
    uptime_s: u64,
    containers: Vec<ContainerLine<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct ContainerLine<'a> {
    id: &'a str,
    state: &'a str,
    execs: u32,
}

/// Writes the list to standard output.
pub(crate) async fn run(pods: &Pods, json: bool) -> Result<(), CommandError> {
    let mut table = Table::new(&[
        "NAMESPACE",
        "POD",
        "MACHINE",
        ">VCPUS",
        ">RAM",
        ">RESIDENT",
        ">UPTIME",
        "CONTAINERS",
    ]);
    let mut output = std::io::stdout().lock();
    for pod in pods.all()? {
        let described = describe(&pod).await;
        if json {
            let line = line(&pod, described.as_ref());
            writeln!(output, "{}", serde_json::to_string(&line)?)?;
        } else {
            add(&mut table, &pod, described.as_ref());
        }
    }
    if !json {
        output.write_all(table.text().as_bytes())?;
    }
    Ok(())
}

async fn describe(pod: &Pod) -> Result<DescribeResponse, PodError> {
    pod.connect().await?.describe().await
}

fn line<'a>(pod: &'a Pod, described: Result<&'a DescribeResponse, &PodError>) -> Line<'a> {
    let mut line = Line {
        namespace: &pod.namespace,
        id: &pod.id,
        machine: "unknown",
        vmm_pid: 0,
        vcpus: 0,
        memory_mib: 0,
        resident_bytes: 0,
        uptime_s: 0,
        containers: Vec::new(),
        error: None,
    };
    match described {
        Ok(described) => {
            line.machine = &described.machine;
            line.vmm_pid = described.vmm_pid;
            line.vcpus = described.vcpus;
            line.memory_mib = described.memory_mib;
            line.resident_bytes = described.resident_bytes;
            line.uptime_s = uptime(described).as_secs();
            let containers = described.containers.iter();
            line.containers = containers
                .map(|container| ContainerLine {
                    id: &container.id,
                    state: &container.state,
                    execs: container.execs,
                })
                .collect();
        }
        Err(error) => line.error = Some(crate::with_causes(error)),
    }
    line
}

fn add(table: &mut Table, pod: &Pod, described: Result<&DescribeResponse, &PodError>) {
    let (namespace, id) = (pod.namespace.clone(), pod.id.clone());
    let none = || "-".to_owned();
    let described = match described {
        Ok(described) => described,
        Err(error) => {
            let error = crate::with_causes(error);
            let cells = [
                namespace,
                id,
                "unknown".to_owned(),
                none(),
                none(),
                none(),
                none(),
                error,
            ];
            return table.row(cells);
        }
    };
    let containers = described.containers.iter();
    let containers: Vec<String> = containers
        .map(|container| format!("{} ({})", container.id, container.state))
        .collect();
    table.row([
        namespace,
        id,
        described.machine.clone(),
        described.vcpus.to_string(),
        format!("{} MiB", described.memory_mib),
        format!("{} MiB", described.resident_bytes / MIB),
        short(uptime(described)),
        containers.join(", "),
    ]);
}

fn uptime(described: &DescribeResponse) -> Duration {
    if described.started_at_ns == 0 {
        return Duration::ZERO;
    }
    let started = UNIX_EPOCH + Duration::from_nanos(described.started_at_ns);
    SystemTime::now()
        .duration_since(started)
        .unwrap_or_default()
}

/// The two largest units.
fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    match (
        seconds / 86400,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ) {
        (0, 0, 0, seconds) => format!("{seconds}s"),
        (0, 0, minutes, seconds) => format!("{minutes}m{seconds}s"),
        (0, hours, minutes, _) => format!("{hours}h{minutes}m"),
        (days, hours, ..) => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (seconds, text) in [(5, "5s"), (65, "1m5s"), (3700, "1h1m"), (90_000, "1d1h")] {
            assert_eq!(short(Duration::from_secs(seconds)), text);
        }
    }
}
