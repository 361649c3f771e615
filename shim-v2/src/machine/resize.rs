//! The size of a machine: from what the node and the Pod allow at its boot, and with its containers later.
//!
//! `crate::size` says how large it shall be; this asks the VMM, the host's cgroup and the guest for it.

use super::{Machine, MachineError};
use crate::{
    cgroup::Cgroup,
    config::Config,
    error::ShimError,
    log,
    size::{Bounds, Limits, Size, Sizing, count_of, reserve_mib},
    spec::HostPart,
};
use containerd_shim_protos::api::UpdateTaskRequest;
use oci_spec::runtime::LinuxResources;
use std::fs;
use tokio::sync::Mutex;
use walnut_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS};

const HOST_CPUS: &str = "/sys/devices/system/cpu/online";
const HOST_MEMORY: &str = "/proc/meminfo";

/// What a machine grows by.
#[derive(Debug)]
pub(super) struct Growth {
    bounds: Bounds,
    /// What it booted with, and what it can grow to.
    range: (Size, Size),
    /// Held while the machine is resized.
    state: Mutex<State>,
}

/// What the machine's size follows from, and its size.
#[derive(Debug)]
struct State {
    sizing: Sizing,
    size: Size,
    /// vCPUs that the guest uses: one that did not answer may use fewer than it has.
    online: u8,
}

impl Growth {
    /// Of a machine that has booted with the first of `range`.
    pub(super) fn new(bounds: Bounds, range: (Size, Size), pod: Limits) -> Self {
        let state = State {
            sizing: Sizing::new(pod),
            size: range.0,
            online: range.0.vcpus,
        };
        Self {
            bounds,
            range,
            state: Mutex::new(state),
        }
    }
}

impl Machine {
    /// Makes room for a container.
    pub(crate) async fn admit(&self, id: &str, limits: Limits) -> Result<(), ShimError> {
        let mut growth = self.growth.state.lock().await;
        growth.sizing.set(id, limits);
        let settled = self.settle(&mut growth).await;
        if settled.is_err() {
            growth.sizing.forget(id);
            // The first error is the one to tell.
            let _ = self.resize(&mut growth).await;
        }
        settled
    }

    /// How large it is now.
    pub(crate) async fn size(&self) -> Size {
        self.growth.state.lock().await.size
    }

    /// Undoes [`Machine::admit`], as far as the guest goes along. A second time does nothing.
    pub(crate) async fn dismiss(&self, id: &str) {
        let mut growth = self.growth.state.lock().await;
        growth.sizing.forget(id);
        if self.has_exited() {
            return;
        }
        if let Err(error) = self.resize(&mut growth).await {
            log::error("making the VM smaller", &error);
        }
    }

    /// Update: of a container, or of the Pod by its pause container. The VM first, as what a container may use
    /// must be there.
    pub(crate) async fn update(&self, mut request: UpdateTaskRequest) -> Result<(), ShimError> {
        let (update, guest) = split_update(&request.resources.value).map_err(|source| {
            let (what, path) = ("the resources of update", request.id.clone().into());
            ShimError::Json { what, path, source }
        })?;
        request.resources.mut_or_insert_default().value = guest;
        let mut growth = self.growth.state.lock().await;
        let limits = growth.sizing.updated(&request.id, &update);
        let before = growth
            .sizing
            .replace(&request.id, limits.map_err(MachineError::from)?);
        let updated = match self.settle(&mut growth).await {
            Ok(()) => self.ask(self.agent.update(&request)).await,
            Err(error) => Err(error),
        };
        if updated.is_err() {
            growth.sizing.replace(&request.id, before);
            // The first error is the one to tell.
            let _ = self.resize(&mut growth).await;
        }
        updated
    }

    /// Makes the VM as large as its containers want it, and has the guest use it.
    async fn settle(&self, growth: &mut State) -> Result<(), ShimError> {
        self.resize(growth).await?;
        let vcpus = growth.size.vcpus;
        if growth.online < vcpus {
            self.ask(self.agent.online(vcpus)).await?;
            growth.online = vcpus;
        }
        Ok(())
    }

    /// Makes the VM as large as its containers want it, and lets the host's cgroup follow.
    async fn resize(&self, growth: &mut State) -> Result<(), ShimError> {
        let room = self.host.cgroup.room_mib();
        let wanted = growth.sizing.size(&self.growth.bounds, room);
        let wanted = wanted.map_err(MachineError::from)?;
        let (least, most) = self.growth.range;
        let size = Size {
            // vCPUs come and don't go.
            vcpus: wanted.vcpus.clamp(growth.size.vcpus, most.vcpus),
            memory_mib: wanted.memory_mib.clamp(least.memory_mib, most.memory_mib),
        };
        let limits = growth.sizing.host(size);
        self.host
            .cgroup
            .limit(&limits)
            .map_err(MachineError::from)?;
        if size == growth.size {
            return Ok(());
        }
        let vcpus = (size.vcpus != growth.size.vcpus).then_some(size.vcpus);
        let memory = (size.memory_mib != growth.size.memory_mib).then_some(size.memory_mib);
        let resized = async {
            self.vm
                .resize(vcpus, memory)
                .await
                .map_err(MachineError::from)
        };
        self.ask(resized).await?;
        growth.size = size;
        Ok(())
    }
}

/// What this node allows.
pub(super) fn bounds(config: &Config) -> Result<Bounds, MachineError> {
    let read = |path| fs::read_to_string(path).map_err(|_| MachineError::Host(path));
    let cpus = count_of(&read(HOST_CPUS)?).ok_or(MachineError::Host(HOST_CPUS))?;
    let memory = read(HOST_MEMORY)?;
    let total = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|total| total.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let mib = kib.ok_or(MachineError::Host(HOST_MEMORY))? / 1024;
    let cpus = u8::try_from(cpus).unwrap_or(MAX_VCPUS).min(MAX_VCPUS);
    let mib = u32::try_from(mib)
        .unwrap_or(MAX_MEMORY_MIB)
        .min(MAX_MEMORY_MIB);
    Ok(Bounds {
        vcpus: config.vcpus,
        max_vcpus: config.max_vcpus.unwrap_or(cpus).max(config.vcpus),
        memory_mib: config.memory_mib,
        max_memory_mib: config.max_memory_mib.unwrap_or(mib).max(config.memory_mib),
    })
}

/// The size to boot with and the one to grow to; limits the host's cgroup.
pub(super) fn size_at_first(
    cgroup: &Cgroup,
    bounds: &Bounds,
    part: &HostPart,
) -> Result<(Size, Size), MachineError> {
    let mut sizing = Sizing::new(part.wanted.pod.clone());
    if let Some(limits) = &part.wanted.container {
        sizing.set("", limits.clone());
    }
    let size = sizing.size(bounds, cgroup.room_mib())?;
    cgroup.limit(&sizing.host(size))?;
    let most = Size {
        vcpus: bounds.max_vcpus,
        memory_mib: reserve_mib(size.memory_mib, bounds),
    };
    Ok((size, most))
}

/// An update, and what of it the guest is told: CPUs and memory nodes are the host's.
fn split_update(json: &[u8]) -> Result<(LinuxResources, Vec<u8>), serde_json::Error> {
    let mut guest: serde_json::Value = serde_json::from_slice(json)?;
    if let Some(cpu) = guest.get_mut("cpu").and_then(|cpu| cpu.as_object_mut()) {
        cpu.remove("cpus");
        cpu.remove("mems");
    }
    Ok((serde_json::from_slice(json)?, serde_json::to_vec(&guest)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_not_told_of_the_hosts_cpus() {
        let update = br#"{"memory":{"limit":5},"cpu":{"cpus":"7","mems":"0","quota":9},"unified":{"a.b":"c"}}"#;
        let (whole, guest) = split_update(update).unwrap();
        let cpu = whole.cpu().as_ref().unwrap();
        assert_eq!(cpu.cpus().as_deref(), Some("7"));
        let guest: serde_json::Value = serde_json::from_slice(&guest).unwrap();
        let expected = r#"{"memory":{"limit":5},"cpu":{"quota":9},"unified":{"a.b":"c"}}"#;
        assert_eq!(
            guest,
            serde_json::from_str::<serde_json::Value>(expected).unwrap()
        );
        assert!(split_update(b"5").is_err() && split_update(b"").is_err());
    }

    #[test]
    fn this_machine_has_bounds_that_the_configuration_overrides() {
        let mut config = Config::default();
        let bounds = super::bounds(&config).unwrap();
        assert!(bounds.max_vcpus >= 1 && bounds.max_memory_mib >= config.memory_mib);
        (config.max_vcpus, config.max_memory_mib) = (Some(7), Some(1000));
        let bounds = super::bounds(&config).unwrap();
        assert_eq!((bounds.max_vcpus, bounds.max_memory_mib), (7, 1000));
    }
}
