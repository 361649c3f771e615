//! Tasks in containerd's sense: containers and the processes in them, by their ids.
//!
//! containerd's `api/runtime/task/v3/shim.proto` and what its runc shim answers set the meaning. Must not
//! know ttrpc: `service` decodes and encodes.

mod container;
mod namespaces;
mod process;

use container::Confinement;
pub(crate) use container::Container;
pub(crate) use process::{Process, Status, StdioNames};

use crate::{
    apparmor::{AppArmorError, Profiles},
    cgroup::{
        CgroupError, Hierarchy,
        devices::{self, DeviceRuleError},
        resources::{self, ResourceError},
    },
    container::{
        launch::LaunchError,
        refuse::{SpecError, parse_process, parse_resources, parse_spec},
        seccomp,
        spec::{Inherited, Spec},
        validate, validate_process,
        wire::{Identity, Job},
    },
    insight::{InsightError, Recorder},
    reaper::{Exit, Reaper},
    stdio::{StdioError, Streams},
};
use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Longest id of a container or process.
const MAX_ID_BYTES: usize = 128;
/// Signals are 1 to this.
const MAX_SIGNAL: u32 = 64;

/// Why a request about a container or process is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// An id that could not be a directory's name.
    #[error(
        "{what} id {id:?} must be letters, digits, dots, dashes and underscores, at most {MAX_ID_BYTES}"
    )]
    Id {
        /// Whose.
        what: &'static str,
        /// What it was.
        id: String,
    },
    /// Nobody has this id.
    #[error("{what} {id:?} not found")]
    NotFound {
        /// Container or process.
        what: &'static str,
        /// The id.
        id: String,
    },
    /// Somebody has it.
    #[error("{what} {id:?} already exists")]
    Exists {
        /// Container or process.
        what: &'static str,
        /// The id.
        id: String,
    },
    /// A process that has ended cannot be signalled.
    #[error("process already finished")]
    Finished,
    /// The process is in another state than the request needs.
    #[error("cannot {attempted} a process that is {status}")]
    State {
        /// What was asked for.
        attempted: &'static str,
        /// What it is.
        status: Status,
    },
    /// The container is paused, or is not.
    #[error("cannot {attempted} a container that is {state}")]
    Paused {
        /// What was asked for.
        attempted: &'static str,
        /// What it is.
        state: &'static str,
    },
    /// A number that is no signal.
    #[error("{0} is not a signal")]
    Signal(u32),
    /// A size that no terminal has.
    #[error("a terminal cannot have {width} columns and {height} rows")]
    Size {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// A namespace that is not one of another container's.
    #[error("linux.namespaces[{kind}].path {path:?} {problem}")]
    Namespace {
        /// Its type.
        kind: String,
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The request contradicts its own document.
    #[error("{0}")]
    Contradiction(&'static str),
    /// The agent does not do this.
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
    /// The configuration is refused.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The profile cannot be had.
    #[error(transparent)]
    AppArmor(#[from] AppArmorError),
    /// The resources are refused.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// The device rules are refused.
    #[error(transparent)]
    DeviceRules(#[from] DeviceRuleError),
    /// A stream is missing.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The process could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The cgroup could not be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The recording of what it calls could not begin.
    #[error(transparent)]
    Insight(#[from] InsightError),
    /// The system refused.
    #[error("cannot {attempted}")]
    System {
        /// What was attempted.
        attempted: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Where the agent's parts are, and what they share.
#[derive(Clone)]
pub(crate) struct Machinery {
    /// The program that becomes `walnut-init`.
    pub(crate) program: PathBuf,
    /// Where containers' cgroups are made.
    pub(crate) hierarchy: Hierarchy,
    /// What notes which system calls they make.
    pub(crate) recorder: Recorder,
    /// What AppArmor's kernel side has been given.
    pub(crate) profiles: Arc<Profiles>,
    /// Where children end.
    pub(crate) reaper: Reaper,
    /// Where the shim's streams wait.
    pub(crate) streams: Streams,
}

/// What a request to create a container says.
pub(crate) struct CreateContainer<'a> {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) terminal: bool,
    pub(crate) names: StdioNames,
    pub(crate) spec: &'a [u8],
}

/// What a request to add a process says.
pub(crate) struct AddProcess<'a> {
    pub(crate) exec_id: String,
    pub(crate) terminal: bool,
    pub(crate) names: StdioNames,
    pub(crate) process: &'a [u8],
}

/// All containers.
pub(crate) struct Tasks {
    machinery: Machinery,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

impl Tasks {
    pub(crate) fn new(machinery: Machinery) -> Self {
        Self {
            machinery,
            containers: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The container of an id.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.lock()
            .get(id)
            .cloned()
            .ok_or_else(|| TaskError::NotFound {
                what: "container",
                id: id.to_owned(),
            })
    }

    /// The process of a container's id and its own; the first process has none.
    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        self.container(id)?.process(exec_id)
    }

    /// Makes a container whose first process waits to be started; answers its id in the guest.
    pub(crate) async fn create(&self, request: CreateContainer<'_>) -> Result<i32, TaskError> {
        // First, so that the streams of a request that fails are closed with it.
        let claimed = request
            .names
            .claim(&self.machinery.streams, request.terminal)?;
        check_id("container", &request.id)?;
        let mut spec = parse_spec(request.spec)?;
        validate(&spec)?;
        let confinement = confinement(&mut spec)?;
        // Held until the container's process has joined them.
        let _shared = self.open_namespaces(&mut spec.linux.namespaces)?;
        same_terminal(request.terminal, spec.process.terminal)?;
        self.machinery
            .profiles
            .load(&spec.process.apparmor_profile)?;
        let settings = resources::settings(&spec.linux.resources)?;
        let device_program = devices::program(&spec.linux.resources.devices)?;
        if self.lock().contains_key(&request.id) {
            return Err(TaskError::Exists {
                what: "container",
                id: request.id,
            });
        }
        let recorder = &self.machinery.recorder;
        recorder.begins(&request.id, &spec.annotations)?;
        let cgroup = self.machinery.hierarchy.create(&request.id)?;
        let process = Process::new(request.terminal, request.names, claimed);
        let identity = Identity {
            id: request.id.clone(),
            bundle: request.bundle,
        };
        let inherited = Inherited::from(&spec);
        let devices = spec.linux.resources.devices.clone();
        let container = Container::new(
            identity.clone(),
            cgroup,
            inherited,
            devices,
            confinement,
            process,
        );
        let container = Arc::new(container);
        self.lock()
            .insert(request.id.clone(), Arc::clone(&container));
        let made = async {
            container.cgroup.apply(&settings)?;
            container.cgroup.restrict_devices(&device_program)?;
            let init = container.process("")?;
            let job = Job::Create(Box::new(spec), identity);
            let pid = init.launch(&self.machinery, &container, job).await?;
            container.when_first_process_ends(&init);
            Ok(pid)
        };
        let made: Result<i32, TaskError> = made.await;
        if made.is_err() {
            self.lock().remove(&request.id);
            // The first error is the one to tell.
            if let Err(error) = container.cgroup.remove().await {
                eprintln!("walnut-agent: {error}");
            }
        }
        made
    }

    /// Adds a process to a container; it runs once it is started.
    pub(crate) fn add(&self, id: &str, request: AddProcess<'_>) -> Result<(), TaskError> {
        let claimed = request
            .names
            .claim(&self.machinery.streams, request.terminal)?;
        check_id("process", &request.exec_id)?;
        let container = self.container(id)?;
        let mut process = parse_process(request.process)?;
        validate_process(&process)?;
        if process.apparmor_profile.is_empty() {
            let inherited = &container.confinement.apparmor_profile;
            process.apparmor_profile.clone_from(inherited);
        }
        same_terminal(request.terminal, process.terminal)?;
        self.machinery.profiles.load(&process.apparmor_profile)?;
        container.check_joinable("exec in")?;
        if container.process(&request.exec_id).is_ok() {
            return Err(TaskError::Exists {
                what: "process",
                id: request.exec_id,
            });
        }
        let added = Process::added(request.names, claimed, process);
        container.insert(request.exec_id, added);
        Ok(())
    }

    /// Makes a profile of AppArmor one that containers can ask for.
    pub(crate) fn load_profile(&self, name: &str, policy: &[u8]) -> Result<(), TaskError> {
        Ok(self.machinery.profiles.replace(name, policy)?)
    }

    /// Starts a process; answers its id in the guest.
    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<i32, TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if exec_id.is_empty() {
            return process.open_gate().await;
        }
        container.check_joinable("exec in")?;
        process.launch_added(&self.machinery, &container).await
    }

    /// Signals one process, or all of a container.
    pub(crate) fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let number = i32::try_from(signal)
            .ok()
            .filter(|_| (1..=MAX_SIGNAL).contains(&signal))
            .ok_or(TaskError::Signal(signal))?;
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if all && exec_id.is_empty() {
            process.check_alive()?;
            return container.signal_all(number);
        }
        process.signal(number)
    }

    /// Forgets a process, or a container with all that is left of it.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<(i32, Exit), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let ended = process.end_for_delete(exec_id.is_empty()).await?;
        if exec_id.is_empty() {
            container.cgroup.remove().await?;
            self.lock().remove(id);
        } else {
            container.forget(exec_id);
        }
        Ok(ended)
    }

    /// Changes a container's limits.
    pub(crate) fn update(&self, id: &str, json: &[u8]) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let resources = parse_resources(json)?;
        // The CRI sends all resources of the container, with what it doesn't change.
        if !resources.devices.is_empty() && resources.devices != container.devices {
            return Err(TaskError::Unsupported(
                "a change of linux.resources.devices",
            ));
        }
        if resources.memory.check_before_update {
            container.cgroup.check_memory(resources.memory.limit)?;
        }
        container.cgroup.apply(&resources::settings(&resources)?)?;
        Ok(())
    }

    /// Waits until memory has run out for a container more often than `seen`; answers how often.
    pub(crate) async fn kills_after(&self, id: &str, seen: u64) -> Result<u64, TaskError> {
        let waiting = self.container(id)?.kills_after(seen);
        waiting.await
    }

    /// Kills everything, for the end of the guest.
    pub(crate) async fn kill_everything(&self) -> Result<(), TaskError> {
        Ok(self.machinery.hierarchy.kill_all().await?)
    }
}

/// What a container's processes are confined by; a filter is compiled once, as execs live under it too.
fn confinement(spec: &mut Spec) -> Result<Confinement, SpecError> {
    let profile = spec.linux.seccomp.take();
    Ok(Confinement {
        filter: profile.as_ref().map(seccomp::compile).transpose()?,
        apparmor_profile: spec.process.apparmor_profile.clone(),
    })
}

fn same_terminal(of_request: bool, of_document: bool) -> Result<(), TaskError> {
    if of_request == of_document {
        return Ok(());
    }
    Err(TaskError::Contradiction(
        "the request and process.terminal do not agree on whether there is a terminal",
    ))
}

/// containerd's identifiers: they become parts of paths.
pub(crate) fn check_id(what: &'static str, id: &str) -> Result<(), TaskError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let first = id
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first && id.len() <= MAX_ID_BYTES && id.bytes().all(plain) {
        return Ok(());
    }
    Err(TaskError::Id {
        what,
        id: id.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_are_those_of_containerd() {
        for id in ["a", "0", "k8s.io-1_2", &"f".repeat(76)] {
            assert!(check_id("container", id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "-a", "a/b", "a\0", "ä", &"f".repeat(129)] {
            assert!(check_id("container", id).is_err(), "{id}");
        }
    }

    proptest! {
        #[test]
        fn an_id_is_one_part_of_a_path(id: String) {
            if check_id("container", &id).is_ok() {
                prop_assert_eq!(std::path::Path::new(&id).components().count(), 1);
                let below = std::path::Path::new("/x").join(&id);
                prop_assert_eq!(below.parent(), Some(std::path::Path::new("/x")));
            }
        }
    }
}
