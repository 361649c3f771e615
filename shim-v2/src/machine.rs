//! A Pod's machine: the VM, the agent in it, and the host's resources that belong to it.
//!
//! Boot acquires in order (cgroup, share, VMM, agent) and `stop` releases in reverse; a boot that fails
//! releases what it has. Knows no container.

mod disks;
mod network;
mod resize;

use crate::{
    agent::{Agent, AgentError},
    blocks::BlocksError,
    cgroup::{Cgroup, CgroupError},
    changes::{Watches, watched},
    config::{Config, ConfigError},
    error::ShimError,
    log,
    network::{Loopback, NetworkError, PodNetwork},
    pod_metrics, port_forward,
    size::{Size, SizeError},
    spec::HostPart,
    state_dir::StateDir,
    storage::{Needs, Share, StorageError},
    vm::{Plan, SHARE_TAG, Vm, VmError},
};
use protobuf::well_known_types::any::Any;
use resize::{Growth, bounds, size_at_first};
use std::{
    collections::HashMap,
    future::Future,
    io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{sync::OnceCell, task::spawn_blocking, time::timeout};

/// Between the agent's answer to Shutdown and the VMM's end.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(15);
/// Between a connection that breaks because the VMM ends and the VMM's exit status.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);
/// A guest's host name when neither the Pod nor the node has one.
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
    /// The size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// What the host has.
    #[error("{0} does not tell what the host has")]
    Host(&'static str),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
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
    network: Arc<tokio::sync::Mutex<PodNetwork>>,
}

/// A booted machine.
pub(crate) struct Machine {
    vm: Vm,
    agent: Arc<Agent>,
    host: HostResources,
    writable_layer_mib: u32,
    /// The VMM's names of the disks of each container.
    disks: Mutex<HashMap<String, Vec<String>>>,
    /// Since the first container that has something to watch.
    watches: Mutex<Option<Watches>>,
    /// What the machine grows by.
    growth: Growth,
    started_at: SystemTime,
    ending: AtomicBool,
    ended: OnceCell<()>,
}

impl Machine {
    /// Boots a machine for a Pod.
    pub(crate) async fn boot(
        state: &StateDir,
        fallback_cgroup: &Path,
        part: &HostPart,
    ) -> Result<Self, MachineError> {
        let config = Config::load(&part.config)?;
        let bounds = bounds(&config)?;
        let host = HostResources::acquire(state, fallback_cgroup, part, bounds.vcpus)?;
        let started_at = SystemTime::now();
        let booted = async {
            let range = size_at_first(&host.cgroup, &bounds, part)?;
            Ok((range, boot_on(&host, &config, part, range).await?))
        };
        match booted.await {
            Ok((range, (vm, agent, loopback))) => {
                let agent = Arc::new(agent);
                if let Some(loopback) = loopback {
                    let ended = vm.exited();
                    tokio::spawn(port_forward::serve(loopback, Arc::clone(&agent), ended));
                }
                Ok(Self {
                    vm,
                    agent,
                    host,
                    writable_layer_mib: config.writable_layer_mib,
                    disks: Mutex::default(),
                    watches: Mutex::default(),
                    growth: Growth::new(bounds, range, part.wanted.pod.clone()),
                    started_at,
                    ending: AtomicBool::new(false),
                    ended: OnceCell::new(),
                })
            }
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

    /// What the Pod costs the host.
    pub(crate) fn metrics(&self) -> Any {
        pod_metrics::read(self.host.cgroup.directory())
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
        let patience = match self.ending.load(Ordering::Relaxed) {
            true => POWER_OFF_DEADLINE,
            false => EXIT_DEADLINE,
        };
        if broken && timeout(patience, self.vm.exited()).await.is_ok() {
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
        let (id, volumes) = (needs.container_id.clone(), watched(&needs.volumes));
        let exposed = self.expose_all(needs).await;
        if exposed.is_ok() && !volumes.is_empty() {
            self.watch(&id, &volumes).await;
        }
        if exposed.is_err()
            && let Err(error) = self.withdraw(&id).await
        {
            log::error("undoing what a container needed", &error);
        }
        exposed
    }

    /// Has changes that the host makes in these volumes announced. A container runs without that, too.
    async fn watch(&self, container_id: &str, volumes: &[u32]) {
        if let Err(error) = self.agent.watch_volumes(container_id, volumes).await {
            return log::error("changes in volumes are not announced to the guest", &error);
        }
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let started = match watches.take() {
            Some(started) => Ok(started),
            None => Watches::start(Arc::clone(&self.agent)),
        };
        match started {
            Ok(started) => {
                let mounts = self.host.share.mounts(container_id);
                watches.insert(started).add(container_id, &mounts, volumes);
            }
            Err(error) => log::error("changes in volumes are not announced to the guest", &error),
        }
    }

    /// Undoes [`Machine::expose`]. A second time does nothing.
    pub(crate) async fn withdraw(&self, container_id: &str) -> Result<(), MachineError> {
        if let Some(watches) = &*self.watches.lock().unwrap_or_else(PoisonError::into_inner) {
            watches.remove(container_id);
        }
        self.release_disks(container_id).await;
        let share = Arc::clone(&self.host.share);
        let container_id = container_id.to_owned();
        Ok(spawn_blocking(move || share.withdraw(&container_id)).await??)
    }

    /// Shuts the guest down and ends the VM. Who else asks waits for the same end.
    pub(crate) async fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.ended.get_or_init(|| self.power_off()).await;
    }

    async fn power_off(&self) {
        if self.has_exited() {
            return;
        }
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

    /// Ends the VM and releases what the host holds.
    pub(crate) async fn stop(&self) {
        self.end().await;
        self.host.release().await;
    }
}

impl HostResources {
    fn acquire(
        state: &StateDir,
        fallback_cgroup: &Path,
        part: &HostPart,
        vcpus: u8,
    ) -> Result<Self, MachineError> {
        // Nothing is changed by it yet.
        let network = PodNetwork::open(&part.network, state.network(), vcpus)?;
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
                network: Arc::new(tokio::sync::Mutex::new(network)),
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
        let mut network = Arc::clone(&self.network).lock_owned().await;
        let files = [
            self.state.vsock(),
            self.state.console(),
            self.state.vmm_pid(),
        ];
        let released = spawn_blocking(move || {
            if let Err(error) = share.remove() {
                log::error("removing the share", &error);
            }
            if let Err(error) = network.release() {
                log::error("leaving the Pod's network", &error);
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
    (size, most): (Size, Size),
) -> Result<(Vm, Agent, Option<Loopback>), MachineError> {
    let plan = Plan {
        size,
        most,
        config,
        state: &host.state,
        cgroup: &host.cgroup,
        share: host.share.root(),
        oom_score_adj: part.oom_score_adj,
    };
    let (network, nics) = host.look_at_network().await?;
    let vm = Vm::boot(&plan, nics).await?;
    let hostname = hostname(part.hostname.as_deref());
    let set_up = async {
        host.network.lock().await.adopt(vm.pid())?;
        let loopback = host.take_loopback().await;
        let agent = Agent::connect(host.state.vsock()).await?;
        agent.setup(&hostname, SHARE_TAG, &network).await?;
        host.network.lock().await.told(network);
        Ok((agent, loopback))
    };
    let booted = tokio::select! {
        booted = set_up => booted,
        () = vm.exited() => Err(MachineError::Ended(vm.describe_end())),
    };
    match booted {
        Ok((agent, loopback)) => Ok((vm, agent, loopback)),
        Err(error) => {
            vm.kill().await;
            Err(error)
        }
    }
}

/// A Pod that has no name of its own has the node's, as with namespaces.
fn hostname(of_pod: Option<&str>) -> String {
    let node = rustix::system::uname();
    let plain = |name: &&str| {
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
    };
    of_pod
        .filter(|name| !name.is_empty())
        .or(node.nodename().to_str().ok().filter(plain))
        .unwrap_or(DEFAULT_HOSTNAME)
        .to_owned()
}
