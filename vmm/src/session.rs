//! The VM's life from its first instruction to its end: waits for the parent, the vCPUs and the guest's init
//! at once, and says how it all ended. Must not know any device.

use crate::{
    control::{Control, ControlError, Incoming},
    event_loop::Poll,
    vcpu::{End, Vcpus},
};
use std::{io, time::Duration};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};
use walnut_vmm_api::{Message, Request, VmmExit};

const CONTROL: u64 = 0;
const ENDED: u64 = 1;
const READY: u64 = 2;
/// A vCPU that is in the guest leaves it at once; one that waits for a device may take longer.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Why the VMM could not go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The parent.
    #[error("the control socket broke")]
    Control(#[from] ControlError),
    /// epoll.
    #[error("cannot wait for events")]
    Wait(#[from] io::Error),
}

/// How the VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The process's exit status.
    pub exit: VmmExit,
    /// What there is to say about it.
    pub detail: Option<String>,
}

impl Outcome {
    fn ended() -> Self {
        Self {
            exit: VmmExit::Ended,
            detail: None,
        }
    }
}

impl From<End> for Outcome {
    fn from(end: End) -> Self {
        let (exit, detail) = match end {
            End::PowerOff | End::Stopped => (VmmExit::Ended, None),
            End::Reset => (VmmExit::GuestReset, None),
            End::TripleFault => (VmmExit::TripleFault, None),
            End::Failed(detail) => (VmmExit::Vcpu, Some(detail)),
        };
        Self { exit, detail }
    }
}

/// Runs the vCPUs until the VM ends, and stops them all.
pub fn run(control: &Control, vcpus: &Vcpus, ready: &EventFd) -> Result<Outcome, SessionError> {
    let mut poll = Poll::new()?;
    poll.add(control, CONTROL, EventSet::IN)?;
    poll.add(vcpus.ended(), ENDED, EventSet::IN)?;
    poll.add(ready, READY, EventSet::IN)?;
    vcpus.run();
    control.send(&Message::Booted)?;
    loop {
        for (token, _) in poll.wait()? {
            let outcome = match token {
                CONTROL => serve(control, vcpus)?,
                ENDED => vcpus.end().map(Outcome::from),
                _ => announce(control, &poll, ready)?,
            };
            if let Some(outcome) = outcome {
                let ended = usize::from(token == ENDED);
                // One that does not stop cannot keep the process from ending.
                let _ = vcpus.stop(vcpus.count() - ended, STOP_DEADLINE);
                return Ok(outcome);
            }
        }
    }
}

/// Answers one request.
fn serve(control: &Control, vcpus: &Vcpus) -> Result<Option<Outcome>, SessionError> {
    match control.receive()? {
        Incoming::Request(Request::Statistics) => {
            control.send(&Message::Statistics(vcpus.statistics()))?;
            Ok(None)
        }
        Incoming::Request(Request::Boot(_)) => Err(ControlError::SecondBoot.into()),
        Incoming::Request(Request::Stop) | Incoming::Hangup => Ok(Some(Outcome::ended())),
        Incoming::Nothing => Ok(None),
    }
}

/// The guest's init listens; said once.
fn announce(
    control: &Control,
    poll: &Poll,
    ready: &EventFd,
) -> Result<Option<Outcome>, SessionError> {
    poll.remove(ready)?;
    control.send(&Message::GuestReady)?;
    Ok(None)
}
