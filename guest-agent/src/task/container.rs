//! One container: its cgroup and its processes.
//!
//! Must not start a process: `process` does.

use super::{Process, Status, TaskError};
use crate::{
    cgroup::Cgroup,
    container::{
        seccomp::Filter,
        spec::{DeviceRule, Inherited},
        wire::Identity,
    },
    syscall,
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

/// Whether the container's processes may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freezer {
    Thawed,
    Frozen,
}

/// What a container's first process is confined by, and with it those that are added.
#[derive(Debug)]
pub(super) struct Confinement {
    /// What system calls they may make.
    pub(super) filter: Option<Filter>,
    /// AppArmor's, if an added process names no other.
    pub(super) apparmor_profile: String,
}

/// A container that exists, running or not.
pub(crate) struct Container {
    /// Its id, one path component.
    pub(crate) id: String,
    /// Where its configuration lies on the host; told back, never used.
    pub(crate) bundle: String,
    /// What its processes are held in.
    pub(crate) cgroup: Cgroup,
    /// What its later processes have from it.
    pub(super) inherited: Inherited,
    /// The device rules that it was made with.
    pub(super) devices: Vec<DeviceRule>,
    /// What its processes are confined by.
    pub(super) confinement: Confinement,
    /// By the ids of execs; the first process has the empty one.
    processes: Mutex<HashMap<String, Arc<Process>>>,
    freezer: Mutex<Freezer>,
    /// Gone with the container.
    alive: watch::Sender<()>,
}

impl fmt::Debug for Container {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "container {:?}", self.id)
    }
}

impl Container {
    pub(super) fn new(
        Identity { id, bundle }: Identity,
        cgroup: Cgroup,
        inherited: Inherited,
        devices: Vec<DeviceRule>,
        confinement: Confinement,
        first: Process,
    ) -> Self {
        Self {
            id,
            bundle,
            cgroup,
            inherited,
            devices,
            confinement,
            processes: Mutex::new(HashMap::from([(String::new(), Arc::new(first))])),
            freezer: Mutex::new(Freezer::Thawed),
            alive: watch::Sender::new(()),
        }
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn freezer(&self) -> MutexGuard<'_, Freezer> {
        self.freezer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process by its exec's id.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        self.processes()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| TaskError::NotFound {
                what: "process",
                id: exec_id.to_owned(),
            })
    }

    pub(super) fn insert(&self, exec_id: String, process: Process) {
        self.processes().insert(exec_id, Arc::new(process));
    }

    pub(super) fn forget(&self, exec_id: &str) {
        self.processes().remove(exec_id);
    }

    /// Whether a process may join now: the first one lives, and nothing is frozen.
    pub(super) fn check_joinable(&self, attempted: &'static str) -> Result<(), TaskError> {
        match self.process("")?.status() {
            Status::Created | Status::Running => {}
            status => return Err(TaskError::State { attempted, status }),
        }
        self.check_thawed(attempted)
    }

    fn check_thawed(&self, attempted: &'static str) -> Result<(), TaskError> {
        match *self.freezer() {
            Freezer::Thawed => Ok(()),
            Freezer::Frozen => Err(TaskError::Paused {
                attempted,
                state: "paused",
            }),
        }
    }

    /// What containerd is told of a process: a frozen one is paused.
    pub(crate) fn status_of(&self, process: &Process) -> Status {
        match (process.status(), *self.freezer()) {
            (Status::Running, Freezer::Frozen) => Status::Paused,
            (status, _) => status,
        }
    }

    /// Stops all processes where they are.
    pub(crate) async fn pause(&self) -> Result<(), TaskError> {
        self.check_joinable("pause")?;
        self.cgroup.freeze(true).await?;
        *self.freezer() = Freezer::Frozen;
        Ok(())
    }

    /// Lets them go on.
    pub(crate) async fn resume(&self) -> Result<(), TaskError> {
        if *self.freezer() == Freezer::Thawed {
            return Err(TaskError::Paused {
                attempted: "resume",
                state: "not paused",
            });
        }
        self.cgroup.freeze(false).await?;
        *self.freezer() = Freezer::Thawed;
        Ok(())
    }

    /// Waits until memory has run out for it more often than `seen`; answers how often. Does not keep the
    /// container: one that has been deleted is not found.
    pub(super) fn kills_after(
        &self,
        seen: u64,
    ) -> impl Future<Output = Result<u64, TaskError>> + use<> {
        let (cgroup, mut alive, id) =
            (self.cgroup.clone(), self.alive.subscribe(), self.id.clone());
        async move {
            let gone = async move { while alive.changed().await.is_ok() {} };
            tokio::select! {
                biased;
                kills = cgroup.kills_after(seen) => Ok(kills?),
                () = gone => Err(TaskError::NotFound { what: "container", id }),
            }
        }
    }

    /// Signals every process.
    pub(super) fn signal_all(&self, signal: i32) -> Result<(), TaskError> {
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.processes()? {
            match syscall::send_signal(pid, signal) {
                // It ended since the list was read.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other.map_err(|source| TaskError::System {
                    attempted: "signal a process of the container",
                    source,
                })?,
            }
        }
        Ok(())
    }

    /// Without its first process a container ends: where the PID namespace is somebody else's, the
    /// kernel does not see to that.
    pub(super) fn when_first_process_ends(self: &Arc<Self>, first: &Arc<Process>) {
        let container = Arc::clone(self);
        let first = Arc::clone(first);
        tokio::spawn(async move {
            first.wait().await;
            if let Err(error) = container.cgroup.kill() {
                // Deleted meanwhile, or it tells of a broken guest.
                eprintln!("walnut-agent: {container:?}: {error}");
            }
        });
    }
}
