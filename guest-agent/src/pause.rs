//! `walnut-pause`: the first process of a Pod's own namespaces, which lives as long as the Pod.
//!
//! Where containers share a PID namespace it is their process 1, and so the parent of whom nobody waits for.
//! It is run inside a container: must not know the agent.

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
};
use std::process::ExitCode;

/// Reaps until it is killed; other signals mean nothing to process 1 of a namespace.
pub(crate) fn run() -> ExitCode {
    match reap() {
        Ok(never) => match never {},
        Err(_) => ExitCode::FAILURE,
    }
}

fn reap() -> Result<std::convert::Infallible, Errno> {
    let ends = SigSet::from(Signal::SIGCHLD);
    // Blocked before it looks, so that an end in between is not missed.
    ends.thread_block()?;
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        ends.wait()?;
    }
}
