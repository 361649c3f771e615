//! A Pod's machine: the VM, the agent in it, and the host's resources that belong to it.
//!
//! Boot acquires in order (cgroup, share, VMM, agent) and `stop` releases in reverse; a boot that fails
//! releases what it has. Knows no container.

use crate::{
    agent::{Agent, AgentError},
    cgroup::{Cgroup, CgroupError},
    config::{Config, ConfigError},
    error::ShimError,
    log,
    size::{Bounds, Limits, Size, SizeError, Sizing, count_of, reserve_mib},
    spec::HostPart,
    state_dir::StateDir,
    storage::{Needs, Share, StorageError},
    vm::{Plan, SHARE_TAG, Vm, VmError},
};
use containerd_shim_protos::api::UpdateTaskRequest;
use oci_spec::runtime::LinuxResources;
use std::{fs, future::Future, io, path::Path, sync::Arc, time::Duration};
use tokio::{sync::Mutex, task::spawn_blocking, time::timeout};
use walnut_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, Request};

/// Between the agent's answer to Shutdown and the VMM's end.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(15);
/// Between a connection that breaks because the VMM ends and the VMM's exit status.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);
/// A guest's host name when the Pod names none.
const DEFAULT_HOSTNAME: &str = "walnut";
const HOST_CPUS: &str = "/sys/devices/system/cpu/online";
const HOST_MEMORY: &str = "/proc/meminfo";

/// Why there is no machine, or why it left something behind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The share.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// What the host has.
    #[error("{0} does not tell what the host has")]
    Host(&'static str),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The agent.
    #[error("the guest booted, but cannot be set up")]
    Agent(#[from] AgentError),
    /// The VM ended while the guest was being set up.
    #[error("the VM ended while its guest was being set up: {0}")]
    Ended(String),
    /// A task of the shim itself.
    #[error("a task of the shim failed")]
    Task(#[from] tokio::task::JoinError),
}

/// What the host holds for a Pod, whether or not its VM runs.
#[derive(Debug)]
struct HostResources {
    state: StateDir,
    share: Arc<Share>,
    cgroup: Arc<Cgroup>,
}

/// A booted machine.
pub(crate) struct Machine {
    vm: Vm,
    agent: Agent,
    host: HostResources,
    bounds: Bounds,
    /// What it booted with, and what it can grow to.
    range: (Size, Size),
    /// Held while the machine is resized.
    growth: Mutex<Growth>,
}

/// What the machine's size follows from, and its size.
#[derive(Debug)]
struct Growth {
    sizing: Sizing,
    size: Size,
}

impl Machine {
    /// Boots a machine for a Pod.
    pub(crate) async fn boot(
        state: &StateDir,
        fallback_cgroup: &Path,
        part: &HostPart,
    ) -> Result<Self, MachineError> {
        let config = Config::load()?;
        let bounds = bounds(&config)?;
        let host = HostResources::acquire(state, fallback_cgroup, part)?;
        let booted = async {
            let range = size_at_first(&host, &bounds, part)?;
            Ok((range, boot_on(&host, &config, part, range).await?))
        };
        match booted.await {
            Ok((range, (vm, agent))) => Ok(Self {
                vm,
                agent,
                host,
                bounds,
                range,
                growth: Mutex::new(Growth {
                    sizing: Sizing::new(part.wanted.pod.clone()),
                    size: range.0,
                }),
            }),
            Err(error) => {
                host.release().await;
                Err(error)
            }
        }
    }

    /// The guest's agent.
    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The VMM's process id on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.vm.pid()
    }

    /// Waits for the VM's end.
    pub(crate) fn exited(&self) -> impl Future<Output = ()> + Send + 'static {
        self.vm.exited()
    }

    /// Whether the VM has ended.
    pub(crate) fn has_exited(&self) -> bool {
        self.vm.has_exited()
    }

    /// Why the VM ended.
    pub(crate) fn describe_end(&self) -> String {
        let mut end = self.vm.describe_end();
        if self.was_out_of_memory() {
            end.push_str(", as the host's memory, or what the Pod may have of it, was used up");
        }
        end
    }

    /// Whether the host's kernel ended the VM for want of memory.
    pub(crate) fn was_out_of_memory(&self) -> bool {
        self.has_exited() && self.host.cgroup.was_out_of_memory()
    }

    /// Does work that needs the guest, racing the VM's end: nobody waits for a guest that is gone, and its
    /// end says more than a broken connection.
    pub(crate) async fn ask<T, E: Into<ShimError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ShimError> {
        let error = tokio::select! {
            biased;
            answer = work => match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => error.into(),
            },
            () = self.vm.exited() => return Err(ShimError::VmEnded(self.describe_end())),
        };
        let broken = error.is_broken_connection();
        if broken && timeout(EXIT_DEADLINE, self.vm.exited()).await.is_ok() {
            return Err(ShimError::VmEnded(self.describe_end()));
        }
        Err(error)
    }

    /// Ends the VM without asking anybody.
    pub(crate) async fn kill(&self) {
        self.vm.kill().await;
    }

    /// Mounts what a container needs.
    pub(crate) async fn expose(&self, needs: Needs) -> Result<(), MachineError> {
        let share = Arc::clone(&self.host.share);
        Ok(spawn_blocking(move || share.expose(&needs)).await??)
    }

    /// Makes room for a container.
    pub(crate) async fn admit(&self, id: &str, limits: Limits) -> Result<(), ShimError> {
        let mut growth = self.growth.lock().await;
        growth.sizing.set(id, limits);
        let settled = self.settle(&mut growth).await;
        if settled.is_err() {
            growth.sizing.forget(id);
        }
        settled
    }

    /// Gives up the room of a container that has gone, as far as the guest goes along.
    pub(crate) async fn dismiss(&self, id: &str) {
        let mut growth = self.growth.lock().await;
        growth.sizing.forget(id);
        if self.has_exited() {
            return;
        }
        if let Err(error) = self.settle(&mut growth).await {
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
        let mut growth = self.growth.lock().await;
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
            let _ = self.settle(&mut growth).await;
        }
        updated
    }

    /// Makes the VM as large as its containers want it, and lets the host's cgroup follow.
    async fn settle(&self, growth: &mut Growth) -> Result<(), ShimError> {
        let room = self.host.cgroup.room_mib();
        let wanted = growth.sizing.size(&self.bounds, room);
        let wanted = wanted.map_err(MachineError::from)?;
        let (least, most) = self.range;
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
        let request = Request::Resize {
            vcpus: (size.vcpus != growth.size.vcpus).then_some(size.vcpus),
            memory_mib: (size.memory_mib != growth.size.memory_mib).then_some(size.memory_mib),
        };
        let resize = async {
            self.vm.request("resize the VM", &request).await?;
            if size.vcpus != growth.size.vcpus {
                self.agent.online(size.vcpus).await?;
            }
            Ok::<(), MachineError>(())
        };
        self.ask(resize).await?;
        growth.size = size;
        Ok(())
    }

    /// Undoes [`Machine::expose`] and [`Machine::admit`]. A second time does nothing.
    pub(crate) async fn withdraw(&self, container_id: &str) -> Result<(), MachineError> {
        self.dismiss(container_id).await;
        let share = Arc::clone(&self.host.share);
        let container_id = container_id.to_owned();
        Ok(spawn_blocking(move || share.withdraw(&container_id)).await??)
    }

    /// Shuts the guest down, ends the VM and releases what the host holds.
    pub(crate) async fn stop(&self) {
        if !self.has_exited() {
            let asked = self.agent.shutdown().await;
            let powered_off =
                asked.is_ok() && timeout(POWER_OFF_DEADLINE, self.vm.exited()).await.is_ok();
            if !powered_off {
                if let Err(error) = asked {
                    log::error("the guest does not shut down", &error);
                }
                self.vm.stop().await;
            }
        }
        self.host.release().await;
    }
}

impl HostResources {
    fn acquire(
        state: &StateDir,
        fallback_cgroup: &Path,
        part: &HostPart,
    ) -> Result<Self, MachineError> {
        let cgroup = Cgroup::create(
            part.cgroups_path.as_deref(),
            fallback_cgroup,
            state.cgroup(),
        )?;
        match Share::create(state.share(), state.tree()) {
            Ok(share) => Ok(Self {
                state: state.clone(),
                share: Arc::new(share),
                cgroup: Arc::new(cgroup),
            }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = cgroup.remove();
                Err(error.into())
            }
        }
    }

    /// Releases everything. What fails stays for the `delete` command, and is told to the log.
    async fn release(&self) {
        let share = Arc::clone(&self.share);
        let cgroup = Arc::clone(&self.cgroup);
        let files = [
            self.state.vsock(),
            self.state.console(),
            self.state.vmm_pid(),
        ];
        let released = spawn_blocking(move || {
            if let Err(error) = share.remove() {
                log::error("removing the share", &error);
            }
            if let Err(error) = cgroup.remove() {
                log::error("removing the cgroup", &error);
            }
            for file in files {
                match std::fs::remove_file(&file) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        log::error("removing a file of the VM", &error);
                    }
                    _ => {}
                }
            }
        });
        if let Err(error) = released.await {
            log::error("releasing the host's resources", &error);
        }
    }
}

/// What this node allows.
fn bounds(config: &Config) -> Result<Bounds, MachineError> {
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
fn size_at_first(
    host: &HostResources,
    bounds: &Bounds,
    part: &HostPart,
) -> Result<(Size, Size), MachineError> {
    let mut sizing = Sizing::new(part.wanted.pod.clone());
    if let Some(limits) = &part.wanted.container {
        sizing.set("", limits.clone());
    }
    let size = sizing.size(bounds, host.cgroup.room_mib())?;
    host.cgroup.limit(&sizing.host(size))?;
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

async fn boot_on(
    host: &HostResources,
    config: &Config,
    part: &HostPart,
    (size, most): (Size, Size),
) -> Result<(Vm, Agent), MachineError> {
    let plan = Plan {
        size,
        most,
        config,
        state: &host.state,
        cgroup: &host.cgroup,
        share: host.share.root(),
        oom_score_adj: part.oom_score_adj,
    };
    let vm = Vm::boot(&plan).await?;
    let hostname = part.hostname.as_deref().filter(|name| !name.is_empty());
    let set_up = async {
        let agent = Agent::connect(host.state.vsock()).await?;
        agent
            .setup(hostname.unwrap_or(DEFAULT_HOSTNAME), SHARE_TAG)
            .await?;
        Ok(agent)
    };
    let agent = tokio::select! {
        agent = set_up => agent,
        () = vm.exited() => Err(MachineError::Ended(vm.describe_end())),
    };
    match agent {
        Ok(agent) => Ok((vm, agent)),
        Err(error) => {
            vm.kill().await;
            Err(error)
        }
    }
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
