//! The Pod service, for people: what the Pod is, and what its containers call of their kernel.
//!
//! The guest's numbers are passed on as such, bounded in size; nothing of the guest names a thing here. Must
//! not change anything.

use crate::{agent::Agent, error::ShimError, sandbox::Sandbox};
use async_trait::async_trait;
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use ttrpc::r#async::TtrpcContext;
use walnut_agent_api::guest;
use walnut_shim_api::{pod, pod_ttrpc};

/// Rows that are passed on at the most, as many as a truthful guest has.
const MAX_COUNTS: usize = 16384;
/// Calls of one container, which are told apart by less than this.
const MAX_USES: usize = 2048;

/// The Pod service of one Pod.
pub(crate) struct PodService(pub(crate) Arc<Sandbox>);

#[async_trait]
impl pod_ttrpc::Pod for PodService {
    async fn describe(
        &self,
        _: &TtrpcContext,
        _: pod::DescribeRequest,
    ) -> ttrpc::Result<pod::DescribeResponse> {
        Ok(describe(&self.0).await)
    }

    async fn syscalls(
        &self,
        _: &TtrpcContext,
        request: pod::SyscallsRequest,
    ) -> ttrpc::Result<pod::SyscallsResponse> {
        Ok(syscalls(&self.0, &request).await?)
    }

    async fn record(
        &self,
        _: &TtrpcContext,
        request: pod::RecordRequest,
    ) -> ttrpc::Result<pod::RecordResponse> {
        Ok(record(&self.0, request).await?)
    }
}

async fn describe(sandbox: &Sandbox) -> pod::DescribeResponse {
    let containers = sandbox.containers.all();
    let mut response = pod::DescribeResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        machine: sandbox.phase_name().to_owned(),
        containers: containers
            .iter()
            .map(|container| pod::Container {
                id: container.init.container_id().to_owned(),
                state: container.init.state().name().to_owned(),
                execs: u32::try_from(container.execs.all().len()).unwrap_or(u32::MAX),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    if let Some(machine) = sandbox.running() {
        let size = machine.size().await;
        response.vmm_pid = machine.pid();
        response.vcpus = size.vcpus.into();
        response.memory_mib = size.memory_mib;
        response.started_at_ns = since_epoch(machine.started_at());
        response.resident_bytes = resident_bytes(machine.pid());
    }
    response
}

async fn syscalls(
    sandbox: &Sandbox,
    request: &pod::SyscallsRequest,
) -> Result<pod::SyscallsResponse, ShimError> {
    let wanted = &request.container_id;
    if !wanted.is_empty() && sandbox.containers.get(wanted).is_none() {
        return Err(ShimError::NoContainer(wanted.clone()));
    }
    let machine = sandbox.living()?;
    let counted = machine
        .ask(Agent::syscalls(machine.agent(), request.keep_ms))
        .await?;
    let known = |count: &guest::SyscallCount| {
        if wanted.is_empty() {
            sandbox.containers.get(&count.container_id).is_some()
        } else {
            count.container_id == *wanted
        }
    };
    let counts = counted.counts.into_iter().filter(known).take(MAX_COUNTS);
    Ok(pod::SyscallsResponse {
        elapsed_ns: counted.elapsed_ns,
        counts: counts.map(pass_on).collect(),
        missed: counted.missed,
        ..Default::default()
    })
}

async fn record(
    sandbox: &Sandbox,
    request: pod::RecordRequest,
) -> Result<pod::RecordResponse, ShimError> {
    if sandbox.containers.get(&request.container_id).is_none() {
        return Err(ShimError::NoContainer(request.container_id));
    }
    let machine = sandbox.living()?;
    let request = guest::RecordRequest {
        container_id: request.container_id,
        keep_ms: request.keep_ms,
        wait_ms: request.wait_ms,
        ..Default::default()
    };
    let recorded = machine
        .ask(Agent::record(machine.agent(), &request))
        .await?;
    let uses = recorded.uses.into_iter().take(MAX_USES);
    let uses = uses.map(|one| pod::SyscallUse {
        number: one.number,
        class: one.class,
        ..Default::default()
    });
    Ok(pod::RecordResponse {
        elapsed_ns: recorded.elapsed_ns,
        whole: recorded.whole,
        ended: recorded.ended,
        uses: uses.collect(),
        missed: recorded.missed,
        ..Default::default()
    })
}

fn pass_on(count: guest::SyscallCount) -> pod::SyscallCount {
    pod::SyscallCount {
        container_id: count.container_id,
        number: count.number,
        calls: count.calls,
        errors: count.errors,
        total_ns: count.total_ns,
        longest_ns: count.longest_ns,
        ..Default::default()
    }
}

fn since_epoch(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Proportional set size of a process; proc(5), `smaps_rollup`.
fn resident_bytes(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    pss_bytes(&rollup)
}

fn pss_bytes(rollup: &str) -> u64 {
    let value = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = value.and_then(|value| value.trim().strip_suffix("kB"));
    kib.and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_a_process_is_read_in_bytes() {
        let rollup = "55d0-7ffd ---p 00000000 00:00 0 [rollup]\nRss:   900 kB\nPss:    12 kB\nPss_Anon: 3 kB\n";
        assert_eq!(pss_bytes(rollup), 12 * 1024);
        assert_eq!(pss_bytes(""), 0);
        assert_eq!(pss_bytes("Pss: x kB"), 0);
    }
}
