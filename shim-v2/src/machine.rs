//! A Pod's machine: the VM, the agent in it, and the host's resources that belong to it.
//!
//! Boot acquires in order (cgroup, share, VMM, agent) and `stop` releases in reverse; a boot that fails
//! releases what it has. Knows no container.

use crate::{
    agent::{Agent, AgentError},
    blocks::{self, Blocks, BlocksError, Recipe, Writes},
    cgroup::{Cgroup, CgroupError},
    config::{Config, ConfigError},
    error::ShimError,
    log,
    spec::HostPart,
    state_dir::StateDir,
    storage::{Needs, Root, Share, StorageError},
    vm::{Plan, SHARE_TAG, Vm, VmError},
};
use std::{
    collections::HashMap,
    future::Future,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{task::spawn_blocking, time::timeout};
use walnut_agent_api::guest;
use walnut_vmm_api::FailureKind;

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
    /// Files and devices for disks.
    #[error(transparent)]
    Blocks(#[from] BlocksError),
    /// The guest's part of them.
    #[error("the guest cannot use the container's disks")]
    Disks(#[source] AgentError),
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
    writable_layer_mib: u32,
    /// The VMM's names of the disks of each container.
    disks: Mutex<HashMap<String, Vec<String>>>,
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
        let booted = boot_on(&host, &config, part).await;
        match booted {
            Ok((vm, agent)) => Ok(Self {
                vm,
                agent,
                host,
                writable_layer_mib: config.writable_layer_mib,
                disks: Mutex::default(),
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

    /// Attaches and mounts what a container needs; answers the guest's numbers of its block devices. Leaves nothing
    /// behind on failure.
    pub(crate) async fn expose(&self, needs: Needs) -> Result<Vec<(u32, u32)>, MachineError> {
        let id = needs.container_id.clone();
        let exposed = self.expose_all(needs).await;
        if exposed.is_err()
            && let Err(error) = self.withdraw(&id).await
        {
            log::error("undoing what a container needed", &error);
        }
        exposed
    }

    async fn expose_all(&self, needs: Needs) -> Result<Vec<(u32, u32)>, MachineError> {
        let writes = Writes {
            read_only_root: needs.read_only_root,
            guest_bytes: u64::from(self.writable_layer_mib) << 20,
        };
        // Without the table of mounts no layer is an image, and the host mounts what there is.
        let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        let recipe = blocks::recipe(&needs.rootfs, writes, &mountinfo);
        let (request, first_device) = match self.attach(&needs, recipe.as_ref()).await {
            Err(MachineError::Vm(VmError::Request { kind, .. }))
                if kind == FailureKind::Full
                    && recipe.is_some_and(|recipe| recipe.is_overlay()) =>
            {
                self.release_disks(&needs.container_id).await;
                self.attach(&needs, None).await?
            }
            attached => attached?,
        };
        let root = match request.images.as_slice() {
            [] => Root::OnHost,
            _ => Root::InGuest,
        };
        let share = Arc::clone(&self.host.share);
        spawn_blocking(move || share.expose(&needs, root)).await??;
        if request.disks.is_empty() {
            return Ok(Vec::new());
        }
        let numbers = tokio::select! {
            biased;
            numbers = self.agent.add_storage(&request) => numbers.map_err(MachineError::Disks)?,
            () = self.vm.exited() => return Err(MachineError::Ended(self.describe_end())),
        };
        Ok(numbers.get(first_device..).unwrap_or_default().to_vec())
    }

    /// Attaches the disks of a container; answers what to ask the guest for, and which disk is the first device.
    async fn attach(
        &self,
        needs: &Needs,
        recipe: Option<&Recipe>,
    ) -> Result<(guest::AddStorageRequest, usize), MachineError> {
        let blocks = Blocks::open(recipe, &needs.devices)?;
        let mut disks = Vec::new();
        for disk in &blocks.disks {
            let name = self.vm.attach_disk(disk).await?;
            disks.push(disk.told(&name));
            let mut of_containers = self.disks();
            let names = of_containers.entry(needs.container_id.clone());
            names.or_default().push(name);
        }
        let request = guest::AddStorageRequest {
            container_id: needs.container_id.clone(),
            disks,
            images: blocks.images,
            scratch_bytes: blocks.scratch_bytes,
            ..Default::default()
        };
        Ok((request, blocks.first_device))
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<String, Vec<String>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest let go of a container's disks, and detaches them. A second time does nothing.
    async fn release_disks(&self, container_id: &str) {
        let names = self.disks().remove(container_id).unwrap_or_default();
        if names.is_empty() || self.has_exited() {
            return;
        }
        let released = tokio::select! {
            released = self.agent.remove_storage(container_id) => released,
            () = self.vm.exited() => Ok(()),
        };
        if let Err(error) = released {
            log::error("the guest does not let go of a container's disks", &error);
        }
        // What the guest holds on to it loses.
        for name in names {
            if let Err(error) = self.vm.detach(name).await
                && !self.has_exited()
            {
                log::error("detaching a disk", &error);
            }
        }
    }

    /// Undoes [`Machine::expose`]. A second time does nothing.
    pub(crate) async fn withdraw(&self, container_id: &str) -> Result<(), MachineError> {
        self.release_disks(container_id).await;
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
