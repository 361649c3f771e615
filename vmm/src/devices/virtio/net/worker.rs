//! The thread of a pair of queues: moves packets as the driver, the tap and the rates allow.
//!
//! Must not know what is in a packet. One round does a bounded amount of work, so that the thread hears the event
//! that ends it.

use super::{Wait, link::Link, receive::Receiver, transmit::Transmitter};
use crate::{devices::virtio::Interrupt, event_loop::Poll};
use std::{io, os::fd::AsRawFd};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

const STOP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const TAP: u64 = 3;
const RECEIVE_RATE: u64 = 4;
const TRANSMIT_RATE: u64 = 5;

/// Why the thread gives up.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    /// The driver's rings make no sense.
    #[error("the driver corrupted a queue")]
    Queue(#[from] virtio_queue::Error),
    /// epoll or a timer failed, which they do only when the host is out of memory.
    #[error("cannot wait for packets")]
    Wait(#[from] io::Error),
}

/// What an epoll instance waits for of one file, which it is asked to change only when that changes. Where it waits
/// for nothing, it doesn't know the file: errors would be reported for ever.
struct Interest {
    token: u64,
    current: EventSet,
}

impl Interest {
    fn none(token: u64) -> Self {
        Self {
            token,
            current: EventSet::empty(),
        }
    }

    fn set(&mut self, poll: &Poll, fd: &impl AsRawFd, wanted: EventSet) -> io::Result<()> {
        if wanted == self.current {
            return Ok(());
        }
        if self.current.is_empty() {
            poll.add(fd, self.token, wanted)?;
        } else if wanted.is_empty() {
            poll.remove(fd)?;
        } else {
            poll.modify(fd, self.token, wanted)?;
        }
        self.current = wanted;
        Ok(())
    }
}

/// One pair of queues.
pub(super) struct Pair<'m> {
    /// Its number.
    pub(super) index: usize,
    /// The way to the host.
    pub(super) link: &'m Link,
    /// The way to the driver.
    pub(super) interrupt: &'m Interrupt,
    /// From the host.
    pub(super) receiver: Receiver<'m>,
    /// To the host.
    pub(super) transmitter: Transmitter<'m>,
}

impl Pair<'_> {
    /// Moves packets until `stop` is readable. A corrupt queue breaks the device and ends the thread.
    pub(super) fn run(mut self, stop: &EventFd) {
        if self.serve(stop).is_err() {
            self.interrupt.signal_needs_reset();
        }
    }

    fn serve(&mut self, stop: &EventFd) -> Result<(), WorkerError> {
        let mut poll = Poll::new()?;
        poll.add(stop, STOP, EventSet::IN)?;
        poll.add(self.receiver.ring.kick(), RECEIVE_KICK, EventSet::IN)?;
        poll.add(self.transmitter.ring.kick(), TRANSMIT_KICK, EventSet::IN)?;
        let mut tap = Interest::none(TAP);
        let mut rates = [Interest::none(RECEIVE_RATE), Interest::none(TRANSMIT_RATE)];
        let (mut receive, mut transmit) = (true, true);
        let mut waits = (Wait::Kick, Wait::Kick);
        loop {
            if receive {
                waits.0 = self.receiver.round(self.link, self.index, self.interrupt)?;
            }
            if transmit {
                waits.1 = self
                    .transmitter
                    .round(self.link, self.index, self.interrupt)?;
            }
            self.wait_for(&poll, waits, &mut tap, &mut rates)?;
            (receive, transmit) = (false, false);
            for (token, events) in poll.wait()? {
                match token {
                    STOP => return Ok(()),
                    RECEIVE_KICK => {
                        // The count of kicks says nothing; an error says that there was none.
                        let _ = self.receiver.ring.kick().read();
                        receive = true;
                    }
                    TRANSMIT_KICK => {
                        let _ = self.transmitter.ring.kick().read();
                        transmit = true;
                    }
                    TAP => {
                        let broken = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
                        receive |= broken || events.contains(EventSet::IN);
                        transmit |= broken || events.contains(EventSet::OUT);
                    }
                    RECEIVE_RATE => receive = true,
                    _ => transmit = true,
                }
            }
        }
    }

    /// Waits for what each half waits for.
    fn wait_for(
        &self,
        poll: &Poll,
        (receive, transmit): (Wait, Wait),
        tap: &mut Interest,
        rates: &mut [Interest; 2],
    ) -> io::Result<()> {
        let wanted = |wait, kind, events| {
            if wait == kind {
                events
            } else {
                EventSet::empty()
            }
        };
        if let Some(queue) = self.link.tap(self.index) {
            let events = wanted(receive, Wait::Tap, EventSet::IN)
                | wanted(transmit, Wait::Tap, EventSet::OUT);
            tap.set(poll, queue, events)?;
        }
        let limits = [&self.receiver.limiter, &self.transmitter.limiter];
        for ((interest, limit), wait) in rates.iter_mut().zip(limits).zip([receive, transmit]) {
            if let Some(limiter) = limit {
                interest.set(poll, limiter, wanted(wait, Wait::Rate, EventSet::IN))?;
            }
        }
        for (wait, ring) in [
            (receive, &self.receiver.ring),
            (transmit, &self.transmitter.ring),
        ] {
            if wait == Wait::Turn {
                // Fails only when the counter is full, and then the event is readable.
                let _ = ring.kick().write(1);
            }
        }
        Ok(())
    }
}
