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
    spec::HostPart,
    state_dir::StateDir,
    storage::{Needs, Share, StorageError},
    vm::{Plan, SHARE_TAG, Vm, VmError},
};
use std::{
    future::Future,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{task::spawn_blocking, time::timeout};

/// Between the agent's answer to Shutdown and the VMM's end.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(15);
/// Between a connection that breaks because the VMM ends and the VMM's exit status.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);
/// A guest's host name when the Pod names none.
const DEFAULT_HOSTNAME: &str = "walnut";

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
    started_at: SystemTime,
    /// vCPUs and MiB of RAM at the start.
    size: (u8, u32),
}

impl Machine {
    /// Boots a machine for a Pod.
    pub(crate) async fn boot(
        state: &StateDir,
        fallback_cgroup: &Path,
        part: &HostPart,
    ) -> Result<Self, MachineError> {
        let config = Config::load()?;
        let host = HostResources::acquire(state, fallback_cgroup, part)?;
        let started_at = SystemTime::now();
        let booted = boot_on(&host, &config, part).await;
        match booted {
            Ok((vm, agent)) => Ok(Self {
                vm,
                agent,
                host,
                started_at,
                size: (config.vcpus, config.memory_mib),
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

    /// When the VM was started.
    pub(crate) fn started_at(&self) -> SystemTime {
        self.started_at
    }

    /// vCPUs and MiB of RAM that the VM was started with.
    pub(crate) fn size(&self) -> (u8, u32) {
        self.size
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
        self.vm.describe_end()
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

    /// Undoes [`Machine::expose`]. A second time does nothing.
    pub(crate) async fn withdraw(&self, container_id: &str) -> Result<(), MachineError> {
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

async fn boot_on(
    host: &HostResources,
    config: &Config,
    part: &HostPart,
) -> Result<(Vm, Agent), MachineError> {
    let plan = Plan {
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
