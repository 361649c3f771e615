//! Containers and their processes: the state of each, and who waits for its end.
//!
//! Asks the guest nothing; `sandbox` and `calls` do, and tell the result here.

use crate::{
    hooks::HostHooks,
    io::{Drained, IoError, Stdio, Streams},
    slots::Slots,
};
use containerd_shim_protos::types::task::Status;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};
use tokio::sync::watch;

/// What a process that was killed reports: 128 and SIGKILL's number, as shells do.
pub(crate) const KILLED: u32 = 137;

/// How and when a process ended; by the host's clock, as the guest's isn't trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit status, 0 to 255.
    pub(crate) status: u32,
    /// When the host learned of it.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An end that was learned of just now.
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status: status.min(255),
            at: SystemTime::now(),
        }
    }
}

/// The life of a process, in order; a process may go from any state to `Stopped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProcessState {
    /// Its Create or Exec succeeded.
    Created,
    /// The guest has been asked to start it.
    Starting,
    /// It runs, and containerd has been told.
    Running,
    /// Its container is frozen.
    Paused,
    /// It has ended, and its exit is on its way to containerd.
    Stopped(Exit),
    /// Its exit has been told: who waits may be answered.
    Reported(Exit),
}

/// One process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    container_id: String,
    /// Empty for a container's first process.
    exec_id: String,
    /// The VMM's. containerd wants a process of the host, to show it and to look for it; the guest's number
    /// would name a stranger there.
    pid: u32,
    stdio: Stdio,
    state: watch::Sender<ProcessState>,
    streams: Mutex<Option<Streams>>,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its bundle, for State.
    pub(crate) bundle: PathBuf,
    /// What runs on the host when it starts, and when it is gone.
    pub(crate) hooks: Arc<HostHooks>,
    /// Its first process.
    pub(crate) init: Arc<Process>,
    /// Processes that were added.
    pub(crate) execs: Slots<Process>,
}

impl ProcessState {
    /// containerd's word.
    pub(crate) fn status(self) -> Status {
        match self {
            Self::Created | Self::Starting => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Paused => Status::PAUSED,
            Self::Stopped(_) | Self::Reported(_) => Status::STOPPED,
        }
    }

    /// For error messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) | Self::Reported(_) => "stopped",
        }
    }

    /// How it ended, if it has.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) | Self::Reported(exit) => Some(exit),
            Self::Created | Self::Starting | Self::Running | Self::Paused => None,
        }
    }
}

impl Process {
    /// A process that the guest has created.
    pub(crate) fn new(
        container_id: &str,
        exec_id: &str,
        pid: u32,
        stdio: Stdio,
        streams: Streams,
    ) -> Self {
        Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid,
            stdio,
            state: watch::Sender::new(ProcessState::Created),
            streams: Mutex::new(Some(streams)),
        }
    }

    /// Its container.
    pub(crate) fn container_id(&self) -> &str {
        &self.container_id
    }

    /// Its own id; empty for a container's first process.
    pub(crate) fn exec_id(&self) -> &str {
        &self.exec_id
    }

    /// The id by which events name it.
    pub(crate) fn event_id(&self) -> &str {
        if self.is_init() {
            &self.container_id
        } else {
            &self.exec_id
        }
    }

    /// Whether it is a container's first process.
    pub(crate) fn is_init(&self) -> bool {
        self.exec_id.is_empty()
    }

    /// The process that containerd knows it by.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// What containerd asked for.
    pub(crate) fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    /// The present state.
    pub(crate) fn state(&self) -> ProcessState {
        *self.state.borrow()
    }

    /// Begins to start it, or answers the state that doesn't allow it.
    pub(crate) fn begin_start(&self) -> Result<(), ProcessState> {
        self.advance(ProcessState::Starting, |state| {
            state == ProcessState::Created
        })
    }

    /// It runs. Too late if it was told to be stopped meanwhile.
    pub(crate) fn started(&self) {
        // A process that has stopped stays so.
        let _ = self.advance(ProcessState::Running, |state| {
            state == ProcessState::Starting
        });
    }

    /// Its container was frozen. Too late if it has ended meanwhile.
    pub(crate) fn paused(&self) {
        // A process that has stopped stays so.
        let _ = self.advance(ProcessState::Paused, |state| state == ProcessState::Running);
    }

    /// Its container was thawed. Too late if it has ended meanwhile.
    pub(crate) fn resumed(&self) {
        // A process that has stopped stays so.
        let _ = self.advance(ProcessState::Running, |state| state == ProcessState::Paused);
    }

    /// It has ended; answers whether that is news.
    pub(crate) fn stopped(&self, exit: Exit) -> bool {
        self.advance(ProcessState::Stopped(exit), |state| state.exit().is_none())
            .is_ok()
    }

    /// Its exit has been told.
    pub(crate) fn reported(&self) {
        self.state.send_if_modified(|state| match *state {
            ProcessState::Stopped(exit) => {
                *state = ProcessState::Reported(exit);
                true
            }
            _ => false,
        });
    }

    fn advance(
        &self,
        next: ProcessState,
        allowed: impl FnOnce(ProcessState) -> bool,
    ) -> Result<(), ProcessState> {
        let mut seen = next;
        let advanced = self.state.send_if_modified(|state| {
            seen = *state;
            let may = allowed(*state);
            if may {
                *state = next;
            }
            may
        });
        if advanced { Ok(()) } else { Err(seen) }
    }

    /// Waits until its exit has been told.
    pub(crate) async fn wait(&self) -> Exit {
        self.wait_for(|state| match state {
            ProcessState::Reported(exit) => Some(exit),
            _ => None,
        })
        .await
    }

    /// Waits until it isn't being started any more: its start comes before its exit.
    pub(crate) async fn settled(&self) {
        self.wait_for(|state| (state != ProcessState::Starting).then_some(()))
            .await;
    }

    /// Waits until it is marked as ended by someone else.
    pub(crate) async fn marked_stopped(&self) -> Exit {
        self.wait_for(ProcessState::exit).await
    }

    async fn wait_for<T>(&self, wanted: impl Fn(ProcessState) -> Option<T>) -> T {
        let mut states = self.state.subscribe();
        loop {
            let state = *states.borrow_and_update();
            if let Some(found) = wanted(state) {
                return found;
            }
            if states.changed().await.is_err() {
                // The sender is `self`, which this borrows.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Starts the input of a process that is about to start.
    pub(crate) fn start_stdin(&self) -> Result<(), IoError> {
        self.streams().as_mut().map_or(Ok(()), Streams::start_stdin)
    }

    /// Ends the input once all of it is through.
    pub(crate) fn close_stdin(&self) {
        if let Some(streams) = self.streams().as_ref() {
            streams.close_stdin();
        }
    }

    /// Ends the input and waits for the output of a process that has ended.
    pub(crate) async fn finish_streams(&self) {
        let Some(mut streams) = self.streams().take() else {
            return;
        };
        streams.abandon_stdin();
        if streams.drain().await == Drained::Stalled {
            // Copying goes on until the process is deleted: a slow reader loses nothing.
            *self.streams() = Some(streams);
        }
    }

    /// Ends all copying.
    pub(crate) fn drop_streams(&self) {
        *self.streams() = None;
    }

    fn streams(&self) -> std::sync::MutexGuard<'_, Option<Streams>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    /// A container with its first process alone.
    pub(crate) fn new(bundle: PathBuf, hooks: Arc<HostHooks>, init: Process) -> Self {
        Self {
            bundle,
            hooks,
            init: Arc::new(init),
            execs: Slots::default(),
        }
    }

    /// The process that a request names; an empty name is the first process.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            Some(Arc::clone(&self.init))
        } else {
            self.execs.get(exec_id)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new("c1", "", 1, Stdio::default(), Streams::none())
    }

    #[test]
    fn a_process_starts_once_and_ends_once() {
        let process = process();
        process.begin_start().unwrap();
        assert_eq!(process.begin_start(), Err(ProcessState::Starting));
        process.started();
        assert_eq!(process.state(), ProcessState::Running);
        process.paused();
        assert_eq!(process.state(), ProcessState::Paused);
        process.resumed();
        assert_eq!(process.state(), ProcessState::Running);
        let exit = Exit::now(3);
        assert!(process.stopped(exit));
        assert!(!process.stopped(Exit::now(KILLED)), "the first end counts");
        process.started();
        assert_eq!(process.state(), ProcessState::Stopped(exit));
        process.reported();
        assert_eq!(process.state(), ProcessState::Reported(exit));
    }

    #[tokio::test]
    async fn waiters_are_answered_after_the_exit_was_told() {
        let process = Arc::new(process());
        let waiting = tokio::spawn({
            let process = Arc::clone(&process);
            async move { process.wait().await }
        });
        process.stopped(Exit::now(1000));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        process.reported();
        assert_eq!(
            waiting.await.unwrap().status,
            255,
            "a guest's number is bounded"
        );
        assert_eq!(
            process.wait().await.status,
            255,
            "waiting later is answered at once"
        );
    }
}
