//! One process of a container, from the request that names it to its deletion.
//!
//! ```text
//! first process:  Starting ──► Created ──start──► Running ──► Stopped
//! an exec:        Added ──start──► Starting ──► Created ──► Running ──► Stopped
//! ```
//!
//! A process has stopped as soon as it was reaped, so no signal goes to another that got its number. Those
//! who wait are told by a channel that is there before the process is. Must not know cgroups.

use super::{Container, Machinery, TaskError};
use crate::{
    container::{
        launch::{Gate, LaunchError, Launched, launch},
        spec,
        wire::{Job, JobFds},
    },
    reaper::{self, Exit, ExitWatch},
    stdio::{Pump, StdioError, Stream, Streams, Terminal},
    syscall,
};
use std::{
    fmt,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::timeout};

/// What is told of a process that never ran.
const NEVER_RAN: u32 = 255;
/// For a killed process to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Named, or being set up.
    Added,
    /// Waits to be started.
    Created,
    /// Runs.
    Running,
    /// Would run, but its container is paused.
    Paused,
    /// Has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Added => "not started",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Names of a process's streams, as the shim gave them.
#[derive(Debug, Clone, Default)]
pub(crate) struct StdioNames {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The streams themselves.
pub(super) struct Claimed {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

impl StdioNames {
    /// Takes the named streams; a terminal has no stderr of its own.
    pub(super) fn claim(&self, streams: &Streams, terminal: bool) -> Result<Claimed, StdioError> {
        let stderr = if terminal { "" } else { &self.stderr };
        Ok(Claimed {
            stdin: streams.claim("stdin", &self.stdin)?,
            stdout: streams.claim("stdout", &self.stdout)?,
            stderr: streams.claim("stderr", stderr)?,
        })
    }
}

enum State {
    /// An exec that was not started, or a first process that was not set up.
    Added(Option<Box<spec::Process>>, Claimed),
    /// `walnut-init` is at work.
    Starting,
    Created {
        pid: i32,
        exit: ExitWatch,
        gate: Gate,
    },
    Running {
        pid: i32,
        exit: ExitWatch,
    },
    /// It could not be started.
    Failed,
}

/// A process of a container.
pub(crate) struct Process {
    pub(crate) terminal: bool,
    pub(crate) names: StdioNames,
    state: Mutex<State>,
    /// Told once, after the process has been reaped.
    exit: watch::Sender<Option<Exit>>,
    console: Mutex<Option<Arc<Terminal>>>,
    /// Carry its streams until it is deleted.
    pumps: Mutex<Vec<Pump>>,
}

impl Process {
    /// A container's first process, to be launched at once.
    pub(super) fn new(terminal: bool, names: StdioNames, claimed: Claimed) -> Self {
        Self {
            terminal,
            names,
            state: Mutex::new(State::Added(None, claimed)),
            exit: watch::Sender::new(None),
            console: Mutex::default(),
            pumps: Mutex::default(),
        }
    }

    /// An exec, to be launched when it is started.
    pub(super) fn added(names: StdioNames, claimed: Claimed, process: spec::Process) -> Self {
        let added = Self::new(process.terminal, names, claimed);
        if let State::Added(slot, _) = &mut *added.state() {
            *slot = Some(Box::new(process));
        }
        added
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is in its life.
    pub(crate) fn status(&self) -> Status {
        match &*self.state() {
            State::Added(..) | State::Starting => Status::Added,
            State::Created { exit, .. } | State::Running { exit, .. }
                if exit.borrow().is_some() =>
            {
                Status::Stopped
            }
            State::Created { .. } => Status::Created,
            State::Running { .. } => Status::Running,
            State::Failed => Status::Stopped,
        }
    }

    /// Its id in the guest; 0 before there is one.
    pub(crate) fn pid(&self) -> i32 {
        match &*self.state() {
            State::Created { pid, .. } | State::Running { pid, .. } => *pid,
            _ => 0,
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        match &*self.state() {
            State::Created { exit, .. } | State::Running { exit, .. } => *exit.borrow(),
            _ => *self.exit.borrow(),
        }
    }

    /// Waits for its end, from whenever on.
    pub(crate) async fn wait(&self) -> Option<Exit> {
        reaper::wait(self.exit.subscribe()).await
    }

    /// Sets it up; it waits to be started. Answers its id in the guest.
    pub(super) async fn launch(
        &self,
        machinery: &Machinery,
        container: &Container,
        job: Job,
    ) -> Result<i32, TaskError> {
        let before = std::mem::replace(&mut *self.state(), State::Starting);
        let claimed = match before {
            State::Added(_, claimed) => claimed,
            other => {
                *self.state() = other;
                return Err(self.wrong_state("create"));
            }
        };
        let launched = self.set_up(machinery, container, job, claimed).await;
        let Launched {
            pid, exit, gate, ..
        } = launched.inspect_err(|_| self.fail())?;
        *self.state() = State::Created {
            pid,
            exit: exit.clone(),
            gate,
        };
        let told = self.exit.clone();
        tokio::spawn(async move {
            let ended = reaper::wait(exit).await;
            told.send_replace(ended);
        });
        Ok(pid)
    }

    async fn set_up(
        &self,
        machinery: &Machinery,
        container: &Container,
        job: Job,
        claimed: Claimed,
    ) -> Result<Launched, TaskError> {
        let Claimed {
            stdin,
            stdout,
            stderr,
        } = claimed;
        let mut streams = (stdin, stdout);
        let stdio = if self.terminal {
            None
        } else {
            let (stdin, stdout) = (streams.0.take(), streams.1.take());
            Some(self.make_pipes(stdin, stdout, stderr)?)
        };
        let fds = JobFds {
            cgroup: container.cgroup.open()?,
            container: match job {
                Job::Create(..) => None,
                Job::Exec(..) => Some(container.process("")?.open()?),
            },
            stdio,
        };
        let mut launched = launch(
            &machinery.program,
            &machinery.reaper,
            &job,
            container.confinement.filter.as_ref(),
            fds,
        )
        .await?;
        if let Some(master) = launched.terminal.take() {
            let terminal = Terminal::new(master).map_err(|source| TaskError::System {
                attempted: "use the terminal",
                source,
            })?;
            let terminal = Arc::new(terminal);
            self.keep(Pump::terminal(&terminal, streams.0, streams.1));
            *self.console() = Some(terminal);
        }
        Ok(launched)
    }

    fn make_pipes(
        &self,
        stdin: Option<Stream>,
        stdout: Option<Stream>,
        stderr: Option<Stream>,
    ) -> Result<[OwnedFd; 3], TaskError> {
        let (stdin, input) = Pump::into_process(stdin)?;
        let (stdout, output) = Pump::out_of_process(stdout)?;
        let (stderr, errors) = Pump::out_of_process(stderr)?;
        self.keep([input, output, errors].into_iter().flatten().collect());
        Ok([stdin, stdout, stderr])
    }

    fn keep(&self, pumps: Vec<Pump>) {
        let mut kept = self.pumps.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(pumps);
    }

    fn console(&self) -> MutexGuard<'_, Option<Arc<Terminal>>> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reference to the process itself, for another to join its namespaces.
    fn open(&self) -> Result<OwnedFd, TaskError> {
        self.check_alive()?;
        let pid = rustix::process::Pid::from_raw(self.pid()).ok_or(TaskError::Finished)?;
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).map_err(|error| {
            TaskError::System {
                attempted: "open the container's first process",
                source: error.into(),
            }
        })
    }

    /// Starts an exec: sets it up and lets it go.
    pub(super) async fn launch_added(
        &self,
        machinery: &Machinery,
        container: &Container,
    ) -> Result<i32, TaskError> {
        let process = match &mut *self.state() {
            State::Added(process, _) => process.take(),
            _ => None,
        };
        let process = process.ok_or_else(|| self.wrong_state("start"))?;
        let job = Job::Exec(process, container.inherited.clone());
        self.launch(machinery, container, job).await?;
        self.open_gate().await
    }

    /// Lets a created process become its program.
    pub(super) async fn open_gate(&self) -> Result<i32, TaskError> {
        let (pid, exit, gate) = {
            let mut state = self.state();
            match std::mem::replace(&mut *state, State::Starting) {
                State::Created { pid, exit, gate } if exit.borrow().is_none() => {
                    *state = State::Running {
                        pid,
                        exit: exit.clone(),
                    };
                    (pid, exit, gate)
                }
                other => {
                    *state = other;
                    drop(state);
                    return Err(self.wrong_state("start"));
                }
            }
        };
        if let Err(error) = gate.open().await {
            // It ends by itself after the report; whoever is told of the failure may delete it at once.
            let _ = timeout(KILL_DEADLINE, reaper::wait(exit)).await;
            return Err(error.into());
        }
        Ok(pid)
    }

    fn fail(&self) {
        *self.state() = State::Failed;
        self.exit.send_replace(Some(Exit {
            status: NEVER_RAN,
            at: SystemTime::now(),
        }));
    }

    fn wrong_state(&self, attempted: &'static str) -> TaskError {
        TaskError::State {
            attempted,
            status: self.status(),
        }
    }

    /// Whether there is a process that can be signalled.
    pub(super) fn check_alive(&self) -> Result<(), TaskError> {
        match self.status() {
            Status::Stopped => Err(TaskError::Finished),
            Status::Added => Err(self.wrong_state("signal")),
            _ => Ok(()),
        }
    }

    /// Signals the process.
    pub(super) fn signal(&self, signal: i32) -> Result<(), TaskError> {
        self.check_alive()?;
        match syscall::send_signal(self.pid(), signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(TaskError::Finished),
            other => other.map_err(|source| TaskError::System {
                attempted: "signal the process",
                source,
            }),
        }
    }

    /// Sets the size of its terminal, if it has one.
    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), TaskError> {
        let wrong = |_| TaskError::Size { width, height };
        let columns = u16::try_from(width).map_err(wrong)?;
        let rows = u16::try_from(height).map_err(wrong)?;
        match &*self.console() {
            Some(terminal) => terminal
                .resize(columns, rows)
                .map_err(|source| TaskError::System {
                    attempted: "resize the terminal",
                    source,
                }),
            None => Ok(()),
        }
    }

    /// Makes sure that nothing runs, for the process to be forgotten. One that only waits to be started
    /// is ended.
    pub(super) async fn end_for_delete(&self, first: bool) -> Result<(i32, Exit), TaskError> {
        match self.status() {
            Status::Stopped => {}
            Status::Created => {
                self.signal(libc::SIGKILL).or_else(|error| match error {
                    TaskError::Finished => Ok(()),
                    other => Err(other),
                })?;
                let gone = timeout(KILL_DEADLINE, self.wait()).await;
                gone.map_err(|_| TaskError::Launch(LaunchError::Ended))?;
            }
            Status::Added if !first && !matches!(*self.state(), State::Starting) => self.fail(),
            _ => return Err(self.wrong_state("delete")),
        }
        let ended = self.ended().ok_or_else(|| self.wrong_state("delete"))?;
        Ok((self.pid(), ended))
    }
}
