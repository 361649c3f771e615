//! The VM's life from its first instruction to its end: waits for the parent, the vCPUs and the guest's init
//! at once, does what the parent asks, and says how it all ended. Must not know any device.

use crate::{
    attach::{self, AttachError},
    boot::Booted,
    control::{Control, ControlError, Files, Incoming, failure},
    event_loop::Poll,
    resize::{Resize, ResizeError},
    running::{RunningError, RunningMachine},
    vcpu::End,
};
use std::{io, time::Duration};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};
use walnut_vmm_api::{FailureKind, Message, Request, Statistics, VmmExit};

const CONTROL: u64 = 0;
const ENDED: u64 = 1;
const READY: u64 = 2;
const CHANGED: u64 = 3;
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

    /// What the guest has as memory is gone.
    fn cut(detail: String) -> Self {
        Self {
            exit: VmmExit::Device,
            detail: Some(detail),
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
pub fn run(control: &Control, booted: &mut Booted) -> Result<Outcome, SessionError> {
    let Booted {
        machine,
        ready,
        resize,
        cuts,
        ..
    } = booted;
    let mut poll = Poll::new()?;
    poll.add(control, CONTROL, EventSet::IN)?;
    poll.add(machine.vcpus.ended(), ENDED, EventSet::IN)?;
    poll.add(ready, READY, EventSet::IN)?;
    if let Some(changed) = cuts.changed() {
        poll.add(changed, CHANGED, EventSet::IN)?;
    }
    machine.vcpus.run();
    control.send(&Message::Booted)?;
    loop {
        for (token, _) in poll.wait()? {
            let outcome = match token {
                CONTROL => serve(control, machine, resize)?,
                ENDED => machine.vcpus.end().map(Outcome::from),
                CHANGED => cuts.find().map(Outcome::cut),
                _ => announce(control, machine, &poll, ready)?,
            };
            if let Some(outcome) = outcome {
                let ended = usize::from(token == ENDED);
                // One that does not stop cannot keep the process from ending.
                let left = machine.vcpus.count() - ended;
                let _ = machine.vcpus.stop(left, STOP_DEADLINE);
                return Ok(outcome);
            }
        }
    }
}

/// Answers one request.
fn serve(
    control: &Control,
    machine: &mut RunningMachine,
    resize: &Resize,
) -> Result<Option<Outcome>, SessionError> {
    let answer = match control.receive()? {
        Incoming::Request(Request::Boot(_), _) => return Err(ControlError::SecondBoot.into()),
        Incoming::Request(Request::Stop, _) | Incoming::Hangup => {
            return Ok(Some(Outcome::ended()));
        }
        Incoming::Nothing => return Ok(None),
        Incoming::Request(request, files) => answer(request, files, machine, resize),
    };
    control.send(&answer)?;
    Ok(None)
}

/// Does what a request asks. Files that it didn't need are closed with `files`.
fn answer(
    request: Request,
    mut files: Files,
    machine: &mut RunningMachine,
    resize: &Resize,
) -> Message {
    match request {
        Request::Statistics => Message::Statistics(Statistics {
            memory: resize.statistics(),
            ..machine.statistics()
        }),
        Request::Pause => done(machine.pause()),
        Request::Resume => done(machine.resume()),
        Request::SetBalloon { mib } => done_to_memory(resize.set_balloon(mib)),
        Request::PowerButton => {
            machine.press_power_button();
            Message::Done
        }
        Request::AttachDisk(config) => attached(attach::disk(machine, &config, &mut files)),
        Request::AttachNetwork(config) => attached(attach::network(machine, &config, &mut files)),
        Request::Detach { name } => done(machine.detach(&name)),
        Request::Resize { vcpus, memory_mib } => change_size(machine, resize, vcpus, memory_mib),
        // `serve` has looked for them.
        Request::Boot(_) | Request::Stop => failure(FailureKind::State, &ControlError::SecondBoot),
    }
}

fn done(result: Result<(), RunningError>) -> Message {
    match result {
        Ok(()) => Message::Done,
        Err(error) => failure(error.kind(), &error),
    }
}

fn done_to_memory(result: Result<(), ResizeError>) -> Message {
    match result {
        Ok(()) => Message::Done,
        Err(error) => failure(error.kind(), &error),
    }
}

/// Memory first: it is refused without an effect.
fn change_size(
    machine: &mut RunningMachine,
    resize: &Resize,
    vcpus: Option<u8>,
    memory_mib: Option<u32>,
) -> Message {
    let memory = memory_mib.map_or(Ok(()), |mib| resize.set_memory(mib));
    match (memory, vcpus) {
        (Ok(()), Some(vcpus)) => done(machine.set_vcpus(vcpus)),
        (memory, _) => done_to_memory(memory),
    }
}

fn attached(result: Result<String, AttachError>) -> Message {
    match result {
        Ok(name) => Message::Attached { name },
        Err(error) => failure(error.kind(), &error),
    }
}

/// The guest's init listens; said once.
fn announce(
    control: &Control,
    machine: &RunningMachine,
    poll: &Poll,
    ready: &EventFd,
) -> Result<Option<Outcome>, SessionError> {
    poll.remove(ready)?;
    machine.remind_guest();
    control.send(&Message::GuestReady)?;
    Ok(None)
}
