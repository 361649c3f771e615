//! The loop of a device that serves one queue on its own thread.
//!
//! Must not know what is in a buffer.

use super::{ActivateError, Activation, ActiveQueue, Interrupt};
use crate::event_loop::{Poll, Worker};
use std::io;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

const STOP: u64 = 0;
const KICK: u64 = 1;
/// Buffers after which the thread looks for the event that ends it, so that a driver that never pauses
/// cannot keep it.
const ROUND_BUFFERS: usize = 64;

/// How a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// The queue is empty, and the driver kicks when it is not.
    Drained,
    /// There may be more.
    Full,
}

/// Why a queue is no longer served.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    /// The driver's rings make no sense.
    #[error("the driver corrupted its queue")]
    Corrupt(#[from] virtio_queue::Error),
    /// Waiting failed.
    #[error("cannot wait for the driver")]
    Wait(#[from] io::Error),
}

/// Serves one queue of a device, the one at `index`, on a thread of its own. `execute` handles a buffer and gives
/// the bytes it wrote to it.
pub(super) fn spawn(
    name: &str,
    index: usize,
    activation: Activation,
    mut execute: impl for<'a> FnMut(&'a GuestMemoryMmap, DescriptorChain<&'a GuestMemoryMmap>) -> u32
    + Send
    + 'static,
) -> Result<Worker, ActivateError> {
    let active = activation.queues.into_iter().nth(index).flatten();
    let active = active.ok_or(ActivateError::MissingQueue { index })?;
    let (memory, interrupt) = (activation.memory, activation.interrupt);
    let worker = Worker::spawn(name, move |stop| {
        serve(active, &memory, &interrupt, &stop, |chain| {
            execute(&memory, chain)
        });
    });
    worker.map_err(ActivateError::Thread)
}

/// Serves `active` until `stop` is readable. `execute` handles a buffer and gives the bytes it wrote to it.
/// A corrupt queue breaks the device and ends the loop.
pub(super) fn serve(
    active: ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    stop: &EventFd,
    execute: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) {
    if run(active, memory, interrupt, stop, execute).is_err() {
        interrupt.signal_needs_reset();
    }
}

fn run(
    mut active: ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    stop: &EventFd,
    mut execute: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> Result<(), QueueError> {
    let mut poll = Poll::new()?;
    poll.add(stop, STOP, EventSet::IN)?;
    poll.add(&active.kick, KICK, EventSet::IN)?;
    loop {
        for (token, _) in poll.wait()? {
            if token == STOP {
                return Ok(());
            }
            // The count of kicks says nothing; an error says that there was none.
            let _ = active.kick.read();
            if serve_round(&mut active.queue, memory, interrupt, &mut execute)? == Round::Full {
                // Fails only when the counter is full, and then the event is readable.
                let _ = active.kick.write(1);
            }
        }
    }
}

/// Executes what the driver offered, and lets it know of each buffer as soon as it is used.
pub(super) fn serve_round(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    execute: &mut impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> Result<Round, QueueError> {
    queue.disable_notification(memory)?;
    for _ in 0..ROUND_BUFFERS {
        let Some(chain) = pop(queue, memory)? else {
            if queue.enable_notification(memory)? {
                queue.disable_notification(memory)?;
                continue;
            }
            return Ok(Round::Drained);
        };
        let head = chain.head_index();
        let written = execute(chain);
        queue.add_used(memory, head, written)?;
        if queue.needs_notification(memory)? {
            interrupt.signal_used();
        }
    }
    Ok(Round::Full)
}

/// The next buffer that the driver offered, if there is one.
pub(super) fn pop<'a>(
    queue: &mut Queue,
    memory: &'a GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'a GuestMemoryMmap>>, QueueError> {
    Ok(queue.iter(memory)?.next())
}
