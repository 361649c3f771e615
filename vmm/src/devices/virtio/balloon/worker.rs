//! The balloon's thread: serves all of its queues.
//!
//! The statistics queue is the other way round (virtio 1.3, section 5.5.6.3): its one buffer brings numbers and
//! stays here until the host wants new ones.

use super::{BalloonControl, pages, statistics};
use crate::{
    devices::virtio::{
        ActiveQueue, Interrupt,
        queue::{self, QueueError, Round},
    },
    event_loop::Poll,
};
use std::io::Read;
use virtio_queue::QueueT;
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

/// Serves the queues until `stop` is readable. A corrupt queue breaks the device and ends the loop.
pub(super) fn serve(
    queues: Vec<Served>,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    control: &BalloonControl,
    stop: &EventFd,
) {
    if run(queues, memory, interrupt, control, stop).is_err() {
        interrupt.signal_needs_reset();
    }
}

fn run(
    mut queues: Vec<Served>,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    control: &BalloonControl,
    stop: &EventFd,
) -> Result<(), QueueError> {
    let mut poll = Poll::new()?;
    poll.add(stop, STOP, EventSet::IN)?;
    poll.add(control.asked.as_ref(), ASKED, EventSet::IN)?;
    for (token, served) in (FIRST_KICK..).zip(&queues) {
        poll.add(&served.active.kick, token, EventSet::IN)?;
    }
    loop {
        for (token, _) in poll.wait()? {
            if token == STOP {
                return Ok(());
            }
            if token == ASKED {
                let _ = control.asked.read();
            }
            for (kick, served) in (FIRST_KICK..).zip(&mut queues) {
                match (token, served.role) {
                    (ASKED, Role::Statistics) => served.ask(memory, interrupt, control)?,
                    (token, _) if token == kick => served.kicked(memory, interrupt, control)?,
                    _ => {}
                }
            }
        }
    }
}

impl Served {
    /// Serves what the driver offered.
    fn kicked(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
        control: &BalloonControl,
    ) -> Result<(), QueueError> {
        // The count of kicks says nothing; an error says that there was none.
        let _ = self.active.kick.read();
        let role = self.role;
        if role == Role::Statistics {
            return self.keep(memory, control);
        }
        let round = queue::serve_round(&mut self.active.queue, memory, interrupt, &mut |chain| {
            match role {
                Role::Inflate => pages::inflate(memory, chain),
                Role::Reporting => pages::take_back(memory, chain),
                // Deflated pages come back by being touched.
                Role::Deflate | Role::Statistics => {}
            }
            0
        })?;
        if round == Round::Full {
            // Fails only when the counter is full, and then the event is readable.
            let _ = self.active.kick.write(1);
        }
        Ok(())
    }

    /// Takes the buffer with the numbers and keeps it; another one stays in the queue until then.
    fn keep(
        &mut self,
        memory: &GuestMemoryMmap,
        control: &BalloonControl,
    ) -> Result<(), QueueError> {
        while self.kept.is_none() {
            let queue = &mut self.active.queue;
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
            control.state().guest = Some(statistics::parse(&bytes));
        }
        Ok(())
    }

    /// Gives the buffer back, which asks the driver for new numbers.
    fn ask(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
        control: &BalloonControl,
    ) -> Result<(), QueueError> {
        if let Some(head) = self.kept.take() {
            self.active.queue.add_used(memory, head, 0)?;
            if self.active.queue.needs_notification(memory)? {
                interrupt.signal_used();
            }
        }
        self.keep(memory, control)
    }
}
