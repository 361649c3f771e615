//! Collects every child that ends, and tells those who wait how it ended.
//!
//! PID 1 is the parent of its containers' processes and of every orphan. One task reaps them all, so a
//! process id that was not reaped yet is never anybody else's. Must not signal.

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    unistd::Pid,
};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// What a shell adds to the number of the signal that ended a process.
const SIGNALLED: u32 = 128;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its exit status, or 128 and the signal's number.
    pub(crate) status: u32,
    /// When it was reaped.
    pub(crate) at: SystemTime,
}

/// Follows one process; holds its exit once it has ended.
pub(crate) type ExitWatch = watch::Receiver<Option<Exit>>;

#[derive(Default)]
struct Children {
    /// Those that somebody follows, until they are reaped.
    claimed: HashMap<i32, watch::Sender<Option<Exit>>>,
    /// Those that were reaped before anybody knew of them, kept while a launch is under way.
    unclaimed: HashMap<i32, Exit>,
    launches: usize,
}

/// The one place where children are reaped.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<Children>>);

/// Held from before a process is started until its id has been claimed.
pub(crate) struct Launching<'a>(&'a Reaper);

impl Reaper {
    /// Starts reaping in the background. Children that end before this are reaped too.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut ended = signal(SignalKind::child())?;
        let background = reaper.clone();
        tokio::spawn(async move {
            loop {
                background.reap();
                if ended.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Keeps the exits of processes that nobody follows yet.
    pub(crate) fn launching(&self) -> Launching<'_> {
        self.with(|children| children.launches += 1);
        Launching(self)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Children) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn reap(&self) {
        self.with(|children| {
            while let Some((pid, status)) = next_zombie() {
                let exit = Exit {
                    status,
                    at: SystemTime::now(),
                };
                if let Some(sender) = children.claimed.remove(&pid) {
                    sender.send_replace(Some(exit));
                } else if children.launches > 0 {
                    children.unclaimed.insert(pid, exit);
                }
            }
        });
    }
}

impl Launching<'_> {
    /// Follows child `pid`, which was started since [`Reaper::launching`].
    pub(crate) fn claim(&self, pid: i32) -> ExitWatch {
        self.0.with(|children| {
            let (sender, receiver) = watch::channel(None);
            match children.unclaimed.remove(&pid) {
                // A child of that id still there means that the exit was of another, before it.
                Some(exit) if !is_child(pid) => {
                    sender.send_replace(Some(exit));
                }
                _ => {
                    children.claimed.insert(pid, sender);
                }
            }
            receiver
        })
    }
}

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        self.0.with(|children| {
            children.launches -= 1;
            if children.launches == 0 {
                children.unclaimed.clear();
            }
        });
    }
}

/// Waits for the end of a followed process.
pub(crate) async fn wait(mut watch: ExitWatch) -> Option<Exit> {
    // The sender only goes away after it has sent.
    match watch.wait_for(Option::is_some).await {
        Ok(exit) => *exit,
        Err(_) => None,
    }
}

fn next_zombie() -> Option<(i32, u32)> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(pid, status)) => {
                return Some((pid.as_raw(), status.unsigned_abs()));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) => {
                let number = (signal as i32).unsigned_abs();
                return Some((pid.as_raw(), SIGNALLED + number));
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// Whether `pid` is a child that was not reaped.
fn is_child(pid: i32) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(Pid::from_raw(pid)), flags).is_ok()
}
