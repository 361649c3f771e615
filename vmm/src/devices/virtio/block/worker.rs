//! The thread of one queue of a disk: takes requests as long as there is room and the rate allows, and returns
//! them as they are done, in any order.
//!
//! Must not know what is done for a request.

use super::{
    super::{ActiveQueue, Interrupt, queue::QueueError, rate_limit::RateLimiter},
    disk::{Disk, Durability, MAX_REQUEST_BYTES, Plan},
    request::Request,
    ring::Ring,
};
use crate::event_loop::Poll;
use std::{io, sync::Arc};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

const STOP: u64 = 0;
const KICK: u64 = 1;
const DONE: u64 = 2;
const TIMER: u64 = 3;
/// Requests and bytes after which the thread looks for the event that ends it.
const ROUND: Budget = Budget {
    requests: 256,
    bytes: 2 * MAX_REQUEST_BYTES,
};

/// What a queue has whether or not it is active. A guest that resets its disk so gains no new burst.
pub(super) struct Lane {
    /// `None` where the host has no io_uring for us: then each request is done before the next one is taken.
    pub(super) ring: Option<Ring<Ticket>>,
    pub(super) limiter: Option<RateLimiter>,
}

/// A request that is being done.
#[derive(Debug)]
pub(super) struct Ticket {
    head: u16,
    status: GuestAddress,
    /// Bytes of data that the guest has got once it is done.
    written: u32,
}

/// An active queue.
pub(super) struct QueueWorker {
    pub(super) active: ActiveQueue,
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) interrupt: Interrupt,
    pub(super) disk: Arc<Disk>,
    pub(super) durability: Durability,
    pub(super) lane: Lane,
}

struct Budget {
    requests: u32,
    bytes: u64,
}

/// Why no more requests are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// The driver has offered no more.
    Empty,
    /// Until one is done.
    Full,
    /// Until the timer says so.
    Throttled,
    /// Until it is known whether the thread is to end.
    Spent,
}

impl QueueWorker {
    /// Serves the queue until `stop` is readable, and then waits for what is being done. A corrupt queue breaks the
    /// device and ends the loop.
    pub(super) fn serve(mut self, stop: &EventFd) -> Lane {
        let result = self.run(stop);
        // Where the kernel does not say that it is done with the guest's memory, the ring is given up.
        let ring = self.lane.ring.take();
        let ring = ring.and_then(|mut ring| ring.drain().is_ok().then_some(ring));
        if result.is_err() {
            self.interrupt.signal_needs_reset();
        }
        Lane { ring, ..self.lane }
    }

    fn run(&mut self, stop: &EventFd) -> Result<(), QueueError> {
        let mut poll = Poll::new()?;
        poll.add(stop, STOP, EventSet::IN)?;
        poll.add(&self.active.kick, KICK, EventSet::IN)?;
        if let Some(ring) = &self.lane.ring {
            poll.add(ring, DONE, EventSet::IN)?;
        }
        if let Some(limiter) = &self.lane.limiter {
            poll.add(limiter, TIMER, EventSet::IN)?;
        }
        loop {
            for (token, _) in poll.wait()? {
                match token {
                    STOP => return Ok(()),
                    // The count of kicks says nothing; an error says that there was none.
                    KICK => drop(self.active.kick.read()),
                    TIMER => self.clear_timer()?,
                    _ => {}
                }
            }
            self.round()?;
        }
    }

    fn clear_timer(&mut self) -> io::Result<()> {
        let limiter = self.lane.limiter.as_mut();
        limiter.map_or(Ok(()), RateLimiter::clear_timer)
    }

    /// Takes and returns requests until there is something to wait for.
    fn round(&mut self) -> Result<(), QueueError> {
        let mut budget = ROUND;
        loop {
            self.active.queue.disable_notification(&*self.memory)?;
            let pause = self.take(&mut budget)?;
            if let Some(ring) = &mut self.lane.ring {
                ring.submit()?;
            }
            self.return_finished()?;
            let again = match pause {
                Pause::Empty => self.active.queue.enable_notification(&*self.memory)?,
                Pause::Full => self.has_room(),
                Pause::Throttled => false,
                Pause::Spent => {
                    // Fails only when the counter is full, and then the event is readable.
                    let _ = self.active.kick.write(1);
                    false
                }
            };
            if !again {
                return Ok(());
            }
        }
    }

    fn has_room(&self) -> bool {
        self.lane.ring.as_ref().is_none_or(Ring::has_room)
    }

    /// Begins what the driver offered.
    fn take(&mut self, budget: &mut Budget) -> Result<Pause, QueueError> {
        let memory = self.memory.clone();
        loop {
            if budget.requests == 0 || budget.bytes == 0 {
                return Ok(Pause::Spent);
            }
            if !self.has_room() {
                return Ok(Pause::Full);
            }
            if let Some(limiter) = &mut self.lane.limiter
                && !limiter.is_open()?
            {
                return Ok(Pause::Throttled);
            }
            let Some(chain) = self.active.queue.iter(&*memory)?.next() else {
                return Ok(Pause::Empty);
            };
            let head = chain.head_index();
            let cost = match Request::parse(&memory, chain) {
                Ok(request) => self.begin(head, request)?,
                Err(_) => {
                    self.active.queue.add_used(&*memory, head, 0)?;
                    self.notify()?;
                    0
                }
            };
            budget.requests -= 1;
            budget.bytes = budget.bytes.saturating_sub(cost);
        }
    }

    /// Begins a request, or finishes it at once, and gives what it costs.
    fn begin(&mut self, head: u16, request: Request) -> Result<u64, QueueError> {
        if let Some(limiter) = &mut self.lane.limiter {
            limiter.take(request.data_bytes());
        }
        let mut ticket = Ticket {
            head,
            status: request.status,
            written: 0,
        };
        let job = match self.disk.plan(&self.memory, request) {
            Plan::Work(job, written) => {
                ticket.written = written;
                job
            }
            Plan::Done(status, written) => {
                self.finish(&ticket, status, written)?;
                self.notify()?;
                return Ok(0);
            }
        };
        let cost = job.weight();
        let failure = match &mut self.lane.ring {
            Some(ring) if !job.is_direct() => {
                ring.begin(&self.memory, job, self.durability, ticket).err()
            }
            _ => {
                let result = self.disk.perform(&self.memory, &job, self.durability);
                self.finish_with(&ticket, &result)?;
                self.notify()?;
                None
            }
        };
        if let Some((ticket, error)) = failure {
            self.finish_with(&ticket, &Err(error))?;
            self.notify()?;
        }
        Ok(cost)
    }

    /// Returns what the kernel has done.
    fn return_finished(&mut self) -> Result<(), QueueError> {
        let mut any = false;
        while let Some((ticket, result)) = self.lane.ring.as_mut().and_then(Ring::finished) {
            self.finish_with(&ticket, &result)?;
            any = true;
        }
        // What the kernel did in part goes on.
        if let Some(ring) = &mut self.lane.ring {
            ring.submit()?;
        }
        if any { self.notify() } else { Ok(()) }
    }

    fn finish_with(&mut self, ticket: &Ticket, result: &io::Result<()>) -> Result<(), QueueError> {
        match result {
            Ok(()) => self.finish(ticket, VIRTIO_BLK_S_OK, ticket.written),
            Err(_) => self.finish(ticket, VIRTIO_BLK_S_IOERR, 0),
        }
    }

    fn finish(&mut self, ticket: &Ticket, status: u32, written: u32) -> Result<(), QueueError> {
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        let written = match self.memory.write_obj(status, ticket.status) {
            Ok(()) => written.saturating_add(1),
            Err(_) => 0,
        };
        self.active
            .queue
            .add_used(&*self.memory, ticket.head, written)?;
        Ok(())
    }

    fn notify(&mut self) -> Result<(), QueueError> {
        if self.active.queue.needs_notification(&*self.memory)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }
}
