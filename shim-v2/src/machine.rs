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
    network::{NetworkError, Nic, PodNetwork},
    pod_metrics,
    spec::HostPart,
    state_dir::StateDir,
    storage::{Needs, Share, StorageError},
    vm::{Plan, SHARE_TAG, Vm, VmError},
};
use protobuf::well_known_types::any::Any;
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use std::{
    future::Future,
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{io::Interest, net::UnixDatagram, sync::OnceCell, task::spawn_blocking, time::timeout};
use walnut_agent_api::guest;

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
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
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
    network: Arc<tokio::sync::Mutex<PodNetwork>>,
}

/// A booted machine.
pub(crate) struct Machine {
    vm: Vm,
    agent: Agent,
    host: HostResources,
    started_at: SystemTime,
    /// vCPUs and MiB of RAM at the start.
    size: (u8, u32),
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
        let config = Config::load()?;
        let host = HostResources::acquire(state, fallback_cgroup, part, config.vcpus)?;
        let started_at = SystemTime::now();
        let booted = boot_on(&host, &config, part).await;
        match booted {
            Ok((vm, agent)) => Ok(Self {
                vm,
                agent,
                host,
                started_at,
                size: (config.vcpus, config.memory_mib),
                ending: AtomicBool::new(false),
                ended: OnceCell::new(),
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

    /// Gives the guest what has come to the Pod's network since the last look, and takes what has gone.
    pub(crate) async fn refresh_network(&self) -> Result<(), MachineError> {
        let mut network = Arc::clone(&self.host.network).lock_owned().await;
        let (mut network, (wanted, nics)) = spawn_blocking(move || {
            let looked = network.look()?;
            Ok::<_, NetworkError>((network, looked))
        })
        .await??;
        for nic in nics {
            let index = nic.index;
            match self.vm.attach_network(nic).await {
                Ok(device) => network.placed(index, device),
                Err(error) => {
                    spawn_blocking(move || network.give_up(index)).await?;
                    return Err(error.into());
                }
            }
        }
        if let Some(wanted) = network.to_tell(wanted) {
            self.agent.update_network(&wanted).await?;
            for device in network.told(wanted) {
                self.vm.detach(&device).await?;
            }
        }
        Ok(())
    }

    /// Refreshes the network whenever something changes in the Pod's namespace, until the VM ends.
    pub(crate) async fn follow_network(self: Arc<Self>) {
        let news = self.host.network.lock().await.news();
        let followed = async {
            let Some(news) = news? else { return Ok(()) };
            // The type is tokio's for any socket of datagrams.
            let news = UnixDatagram::from_std(news.into()).map_err(NetworkError::News)?;
            loop {
                drain(&news).await.map_err(NetworkError::News)?;
                if let Err(error) = self.refresh_network().await
                    && !self.has_exited()
                {
                    log::error("following a change of the Pod's network", &error);
                }
            }
        };
        let followed: Result<(), NetworkError> = tokio::select! {
            followed = followed => followed,
            () = self.exited() => return,
        };
        if let Err(error) = followed {
            log::error("following the Pod's network", &error);
        }
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

    /// What stands in the Pod's namespace, and devices for what is new in it.
    async fn look_at_network(&self) -> Result<(guest::Network, Vec<Nic>), MachineError> {
        let mut network = Arc::clone(&self.network).lock_owned().await;
        Ok(spawn_blocking(move || network.look()).await??)
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
) -> Result<(Vm, Agent), MachineError> {
    let plan = Plan {
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
        let agent = Agent::connect(host.state.vsock()).await?;
        agent.setup(&hostname, SHARE_TAG, &network).await?;
        host.network.lock().await.told(network);
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

/// Waits until a socket has something, and reads all of it.
async fn drain(news: &UnixDatagram) -> io::Result<()> {
    news.readable().await?;
    let receive = || {
        let mut datagram = [0; 64];
        match recv(news.as_fd(), datagram.as_mut_slice(), RecvFlags::empty()) {
            // Some were lost, which is news too.
            Ok(_) | Err(Errno::NOBUFS) => Ok(()),
            Err(error) => Err(io::Error::from(error)),
        }
    };
    loop {
        match news.try_io(Interest::READABLE, receive) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
