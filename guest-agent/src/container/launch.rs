//! Starts `walnut-init` for a job and follows it until the container's process waits to become its program.
//!
//! The agent's side of `wire`. Every wait has a deadline. Must not know what is set up.

use super::{
    seccomp::Filter,
    wire::{self, Blame, Failure, GO, Job, JobFds, Report},
};
use crate::{
    reaper::{ExitWatch, Launching, Reaper},
    syscall,
};
use nix::{sys::signal::Signal, unistd::Pid};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// The first argument that makes the agent's program `walnut-init`.
pub(crate) const INIT_NAME: &str = "walnut-init";
/// For a container's whole set-up, file system included, on the slowest machine.
const SETUP_DEADLINE: Duration = Duration::from_secs(60);

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// The agent could not even begin.
    #[error("cannot {attempted}")]
    System {
        /// The step.
        attempted: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// `walnut-init` said why.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// `walnut-init` ended without a word.
    #[error("the container's process ended before it was ready")]
    Ended,
    /// `walnut-init` took too long.
    #[error("the container's process was not ready after {} s", SETUP_DEADLINE.as_secs())]
    TooSlow,
}

impl LaunchError {
    /// Whether the request is at fault.
    pub(crate) fn is_of_request(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.blame == Blame::Request)
    }

    fn system(attempted: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { attempted, source }
    }
}

/// A process that waits to become its program.
#[derive(Debug)]
pub(crate) struct Launched {
    /// Its id in the agent's PID namespace.
    pub(crate) pid: i32,
    /// How it will have ended.
    pub(crate) exit: ExitWatch,
    /// The master side of its terminal, if it has one.
    pub(crate) terminal: Option<OwnedFd>,
    /// Lets it go.
    pub(crate) gate: Gate,
}

/// Holds a process back from its program. Without the gate it ends.
#[derive(Debug)]
pub(crate) struct Gate(AsyncFd<OwnedFd>);

impl Gate {
    /// Lets the process become its program, and waits until it has.
    pub(crate) async fn open(self) -> Result<(), LaunchError> {
        let Self(socket) = self;
        // If it has been killed meanwhile, the end of the socket says what happened.
        let _ = rustix::io::write(socket.get_ref(), GO);
        match timeout(SETUP_DEADLINE, next_report(&socket)).await {
            Err(_) => Err(LaunchError::TooSlow),
            Ok(Ok(Some((Report::Failed(failure), _)))) => Err(failure.into()),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(source)) => Err(LaunchError::system("hear from the container's process")(
                source,
            )),
        }
    }
}

/// Runs `program` as `walnut-init` with a job. On failure no process of it is left.
pub(crate) async fn launch(
    program: &Path,
    reaper: &Reaper,
    job: &Job,
    filter: Option<&Filter>,
    fds: JobFds,
) -> Result<Launched, LaunchError> {
    let launching = reaper.launching();
    let socket = spawn(program)?;
    wire::send_job(socket.get_ref(), job, filter, &fds)
        .map_err(LaunchError::system("send a container's process its job"))?;
    // The container's side of the pipes must not stay open here.
    drop(fds);
    let mut process = None;
    let ready = timeout(SETUP_DEADLINE, follow(&socket, &launching, &mut process)).await;
    let outcome = match ready {
        Err(_) => Err(LaunchError::TooSlow),
        Ok(outcome) => outcome,
    };
    match (outcome, process) {
        (Ok(terminal), Some((pid, exit))) => Ok(Launched {
            pid,
            exit,
            terminal,
            gate: Gate(socket),
        }),
        (outcome, process) => {
            if let Some((pid, exit)) = process {
                abandon(pid, exit).await;
            }
            Err(outcome.err().unwrap_or(LaunchError::Ended))
        }
    }
}

fn spawn(program: &Path) -> Result<AsyncFd<OwnedFd>, LaunchError> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| LaunchError::system("make a socket for walnut-init")(error.into()))?;
    let child = Command::new(program)
        .arg0(INIT_NAME)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .spawn()
        .map_err(LaunchError::system("run walnut-init"))?;
    // The reaper collects it; `Child` neither waits nor kills when dropped.
    drop(child);
    rustix::fs::fcntl_setfl(&ours, rustix::fs::OFlags::NONBLOCK)
        .map_err(|error| LaunchError::system("use walnut-init's socket")(error.into()))?;
    syscall::register(ours, Interest::READABLE)
        .map_err(LaunchError::system("use walnut-init's socket"))
}

/// Reads reports until the process is both known and ready. Two processes send them, in any order.
async fn follow(
    socket: &AsyncFd<OwnedFd>,
    launching: &Launching<'_>,
    process: &mut Option<(i32, ExitWatch)>,
) -> Result<Option<OwnedFd>, LaunchError> {
    let mut ready = None;
    let mut failure = None;
    loop {
        let report = next_report(socket)
            .await
            .map_err(LaunchError::system("hear from walnut-init"))?;
        match report {
            Some((Report::Process(pid), _)) => *process = Some((pid, launching.claim(pid))),
            Some((Report::Ready, terminal)) => ready = Some(terminal),
            // Until the end of the socket: the report of the process may still come.
            Some((Report::Failed(reason), _)) => failure = Some(reason),
            None => return Err(failure.map_or(LaunchError::Ended, LaunchError::from)),
        }
        if process.is_some()
            && let Some(terminal) = ready.take()
        {
            return Ok(terminal);
        }
    }
}

async fn next_report(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    socket
        .async_io(Interest::READABLE, |socket| {
            wire::receive_report(socket.as_fd())
        })
        .await
}

/// Ends a process that failed in its set-up, and waits until it is gone.
async fn abandon(pid: i32, exit: ExitWatch) {
    // While it has not been reaped, the id is its own.
    if exit.borrow().is_none() {
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        let _ = timeout(SETUP_DEADLINE, crate::reaper::wait(exit)).await;
    }
}
