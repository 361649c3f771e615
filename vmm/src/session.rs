//! The VM's life from its first instruction to its end: waits for the parent, the vCPUs and the guest's init
//! at once, and says how it all ended. Must not know any device.

use crate::{
    control::{Control, ControlError, Incoming},
    event_loop::Poll,
    resize::{Resize, ResizeError},
    vcpu::{End, Vcpus},
};
use std::{error::Error, io, time::Duration};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};
use walnut_vmm_api::{FailureKind, Message, Request, Statistics, VmmExit};

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
pub fn run(
    control: &Control,
    vcpus: &Vcpus,
    ready: &EventFd,
    resize: &Resize,
) -> Result<Outcome, SessionError> {
    let mut poll = Poll::new()?;
    poll.add(control, CONTROL, EventSet::IN)?;
    poll.add(vcpus.ended(), ENDED, EventSet::IN)?;
    poll.add(ready, READY, EventSet::IN)?;
    vcpus.run();
    control.send(&Message::Booted)?;
    loop {
        for (token, _) in poll.wait()? {
            let outcome = match token {
                CONTROL => serve(control, vcpus, resize)?,
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
fn serve(
    control: &Control,
    vcpus: &Vcpus,
    resize: &Resize,
) -> Result<Option<Outcome>, SessionError> {
    let answer = match control.receive()? {
        Incoming::Request(Request::Statistics) => Message::Statistics(Statistics {
            memory: resize.statistics(),
            ..vcpus.statistics()
        }),
        Incoming::Request(Request::SetBalloon { mib }) => done(resize.set_balloon(mib)),
        Incoming::Request(Request::SetMemory { mib }) => done(resize.set_memory(mib)),
        Incoming::Request(Request::Boot(_)) => return Err(ControlError::SecondBoot.into()),
        Incoming::Request(Request::Stop) | Incoming::Hangup => return Ok(Some(Outcome::ended())),
        Incoming::Nothing => return Ok(None),
    };
    control.send(&answer)?;
    Ok(None)
}

/// What the parent is told of a wish about memory.
fn done(result: Result<(), ResizeError>) -> Message {
    result.map_or_else(
        |error| Message::Failed {
            kind: FailureKind::Config,
            error: error
                .source()
                .map_or(error.to_string(), |source| format!("{error}: {source}")),
        },
        |()| Message::Done,
    )
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
