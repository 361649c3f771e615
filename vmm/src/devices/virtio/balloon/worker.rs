//! The balloon's thread: serves all of its queues.
//!
//! The statistics queue is the other way round (virtio 1.3, section 5.5.6.3): its one buffer brings numbers and
//! stays here until the host wants new ones.

use super::{BalloonControl, pages, statistics};
use crate::{
    devices::virtio::{
        ActiveQueue, Interrupt,
        queue::{self, QueueError},
    },
    event_loop::Poll,
};
use std::io::Read;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

const STOP: u64 = 0;
const ASKED: u64 = 1;
const FIRST_KICK: u64 = 2;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// A queue that this thread serves.
#[derive(Debug)]
pub(super) struct Served {
    role: Role,
    active: ActiveQueue,
    /// The buffer that waits for the host's question, of the statistics queue alone.
    kept: Option<u16>,
}

impl Served {
    pub(super) fn new(role: Role, active: ActiveQueue) -> Self {
        let kept = None;
        Self { role, active, kept }
    }
}

/// Those whom the queues are served for.
pub(super) struct Sides<'a> {
    pub(super) memory: &'a GuestMemoryMmap,
    pub(super) interrupt: &'a Interrupt,
    pub(super) control: &'a BalloonControl,
}

/// Serves the queues until `stop` is readable. A corrupt queue breaks the device and ends the loop.
pub(super) fn serve(queues: Vec<Served>, sides: &Sides<'_>, stop: &EventFd) {
    if run(queues, sides, stop).is_err() {
        sides.interrupt.signal_needs_reset();
    }
}

fn run(mut queues: Vec<Served>, sides: &Sides<'_>, stop: &EventFd) -> Result<(), QueueError> {
    let asked = sides.control.asked.as_ref();
    let mut poll = Poll::new()?;
    poll.add(stop, STOP, EventSet::IN)?;
    poll.add(asked, ASKED, EventSet::IN)?;
    for (token, served) in (FIRST_KICK..).zip(&queues) {
        poll.add(&served.active.kick, token, EventSet::IN)?;
    }
    loop {
        for (token, _) in poll.wait()? {
            if token == STOP {
                return Ok(());
            }
            if token == ASKED {
                let _ = asked.read();
            }
            for (kick, served) in (FIRST_KICK..).zip(&mut queues) {
                match (token, served.role) {
                    (ASKED, Role::Statistics) => served.ask(sides)?,
                    (token, _) if token == kick => served.kicked(sides)?,
                    _ => {}
                }
            }
        }
    }
}

impl Served {
    /// Serves what the driver offered.
    fn kicked(&mut self, sides: &Sides<'_>) -> Result<(), QueueError> {
        let (role, memory) = (self.role, sides.memory);
        if role == Role::Statistics {
            // The count of kicks says nothing; an error says that there was none.
            let _ = self.active.kick.read();
            return self.keep(sides);
        }
        let execute = &mut |chain: DescriptorChain<&GuestMemoryMmap>| {
            match role {
                Role::Inflate => pages::inflate(memory, chain),
                Role::Reporting => pages::take_back(memory, chain),
                // Deflated pages come back by being touched.
                Role::Deflate | Role::Statistics => {}
            }
            0
        };
        queue::serve_kicked(&mut self.active, memory, sides.interrupt, execute)
    }

    /// Takes the buffer with the numbers and keeps it; another one stays in the queue until then.
    fn keep(&mut self, sides: &Sides<'_>) -> Result<(), QueueError> {
        let (queue, memory) = (&mut self.active.queue, sides.memory);
        while self.kept.is_none() {
            let Some(chain) = queue::pop(queue, memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(());
            };
            self.kept = Some(chain.head_index());
            let mut bytes = Vec::new();
            if let Ok(reader) = chain.reader(memory) {
                let _ = reader.take(statistics::MAX_BYTES).read_to_end(&mut bytes);
            }
            sides.control.state().guest = Some(statistics::parse(&bytes));
        }
        Ok(())
    }

    /// Gives the buffer back, which asks the driver for new numbers.
    fn ask(&mut self, sides: &Sides<'_>) -> Result<(), QueueError> {
        let queue = &mut self.active.queue;
        if let Some(head) = self.kept.take() {
            queue.add_used(sides.memory, head, 0)?;
            if queue.needs_notification(sides.memory)? {
                sides.interrupt.signal_used();
            }
        }
        self.keep(sides)
    }
}
