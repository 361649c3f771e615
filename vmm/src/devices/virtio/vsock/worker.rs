//! The thread of the socket device: queues on one side, epoll on the other.
//!
//! virtio 1.3, sections 2.7 (split virtqueues) and 5.10.6. Must not know the states of a connection.
//! The thread never waits for a socket or for the guest; one round does a bounded amount of work, so that
//! it hears the event that ends it.

use super::{
    muxer::{LISTENER_TOKEN, Muxer, Outgoing, TURN_BYTES},
    packet::{HEADER_BYTES, Header},
};
use crate::devices::virtio::{ActiveQueue, Interrupt};
use std::{
    io::{self, Read, Write},
    os::fd::AsRawFd,
    sync::Arc,
    time::Instant,
};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT, Writer};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

const STOP_TOKEN: u64 = LISTENER_TOKEN + 1;
const RX_TOKEN: u64 = LISTENER_TOKEN + 2;
const TX_TOKEN: u64 = LISTENER_TOKEN + 3;
const EVENT_TOKEN: u64 = LISTENER_TOKEN + 4;
/// Events taken from the kernel at once.
const EVENTS: usize = 32;
/// Packets of either direction in one round.
const ROUND_PACKETS: usize = 128;
/// Buffers of the guest that one turn fills at the most: with Linux' 4 KiB buffers a whole turn.
const TURN_BUFFERS: usize = 20;

/// Why the thread gives up.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    /// The driver corrupted a queue.
    #[error("cannot use the {name} queue")]
    Queue {
        /// Which one.
        name: &'static str,
        /// What the queue said.
        #[source]
        source: virtio_queue::Error,
    },
    /// Epoll failed, which it does only when the host is out of memory.
    #[error("cannot wait for events")]
    Epoll(#[source] io::Error),
}

/// Whether there is work left after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Round {
    /// Nothing can be done until something happens.
    Idle,
    /// The round was cut short.
    More,
}

type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// A queue and its name.
struct Ring {
    name: &'static str,
    active: ActiveQueue,
}

/// A buffer of the guest that can hold a header and a byte of payload at least.
struct Buffer<'a> {
    head: u16,
    writer: Writer<'a>,
    /// Bytes of payload that it can hold.
    room: usize,
}

/// What was next in the receive queue.
enum Popped<'a> {
    Buffer(Buffer<'a>),
    /// A chain that cannot hold a packet.
    Unusable(u16),
    Nothing,
}

impl Ring {
    fn pop<'a>(&mut self, memory: &'a GuestMemoryMmap) -> Result<Option<Chain<'a>>, WorkerError> {
        let error = self.error();
        let mut chains = self.active.queue.iter(memory).map_err(error)?;
        Ok(chains.next())
    }

    fn pop_buffer<'a>(&mut self, memory: &'a GuestMemoryMmap) -> Result<Popped<'a>, WorkerError> {
        let Some(chain) = self.pop(memory)? else {
            return Ok(Popped::Nothing);
        };
        let head = chain.head_index();
        let Ok(writer) = chain.writer(memory) else {
            return Ok(Popped::Unusable(head));
        };
        Ok(match writer.available_bytes().checked_sub(HEADER_BYTES) {
            Some(room) if room > 0 => Popped::Buffer(Buffer { head, writer, room }),
            Some(_) | None => Popped::Unusable(head),
        })
    }

    /// Takes back the last `count` chains that were popped.
    fn unpop(&mut self, count: usize) {
        for _ in 0..count {
            self.active.queue.go_to_previous_position();
        }
    }

    /// Hands a packet to the guest.
    fn fill(
        &mut self,
        memory: &GuestMemoryMmap,
        mut buffer: Buffer<'_>,
        header: Header,
        payload: &[u8],
    ) -> Result<(), WorkerError> {
        let written = buffer
            .writer
            .write_all(&header.to_bytes())
            .and_then(|()| buffer.writer.write_all(payload))
            .and_then(|()| u32::try_from(HEADER_BYTES + payload.len()).map_err(io::Error::other));
        // Both fit, as the buffer was measured; the memory is the guest's RAM and does not fail.
        self.used(memory, buffer.head, written.unwrap_or(0))
    }

    fn used(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), WorkerError> {
        let error = self.error();
        self.active.queue.add_used(memory, head, len).map_err(error)
    }

    /// Asks the driver to kick; true when it has added buffers meanwhile.
    fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, WorkerError> {
        let error = self.error();
        self.active.queue.enable_notification(memory).map_err(error)
    }

    /// Asks the driver not to kick.
    fn hush(&mut self, memory: &GuestMemoryMmap) -> Result<(), WorkerError> {
        let error = self.error();
        self.active
            .queue
            .disable_notification(memory)
            .map_err(error)
    }

    fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, WorkerError> {
        let error = self.error();
        self.active.queue.needs_notification(memory).map_err(error)
    }

    fn error(&self) -> impl FnOnce(virtio_queue::Error) -> WorkerError + use<> {
        let name = self.name;
        move |source| WorkerError::Queue { name, source }
    }
}

/// Everything that the thread works with.
pub(super) struct Worker {
    rx: Ring,
    tx: Ring,
    /// Nothing is ever put there: a transport reset happens only after a migration.
    event: ActiveQueue,
    interrupt: Interrupt,
    epoll: Arc<Epoll>,
    muxer: Muxer,
    scratch: Box<[u8]>,
}

impl Worker {
    /// Takes the queues in the order of section 5.10.2.
    pub(super) fn new(
        [rx, tx, event]: [ActiveQueue; 3],
        interrupt: Interrupt,
        epoll: Arc<Epoll>,
        muxer: Muxer,
    ) -> io::Result<Self> {
        for (queue, token) in [(&rx, RX_TOKEN), (&tx, TX_TOKEN), (&event, EVENT_TOKEN)] {
            add(&epoll, &queue.kick, token)?;
        }
        Ok(Self {
            rx: Ring {
                name: "receive",
                active: rx,
            },
            tx: Ring {
                name: "transmit",
                active: tx,
            },
            event,
            interrupt,
            epoll,
            muxer,
            scratch: vec![0; TURN_BYTES].into_boxed_slice(),
        })
    }

    /// Works until `stop` becomes readable, or until the driver breaks a queue.
    pub(super) fn run(mut self, memory: &GuestMemoryMmap, stop: &EventFd) {
        if self.serve(memory, stop).is_err() {
            self.interrupt.signal_needs_reset();
        }
    }

    fn serve(&mut self, memory: &GuestMemoryMmap, stop: &EventFd) -> Result<(), WorkerError> {
        add(&self.epoll, stop, STOP_TOKEN).map_err(WorkerError::Epoll)?;
        let mut events = [EpollEvent::default(); EVENTS];
        let mut round = Round::More;
        loop {
            let count = match self.epoll.wait(self.timeout_ms(round), &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(WorkerError::Epoll)?,
            };
            for event in events.iter().take(count) {
                if event.data() == STOP_TOKEN {
                    return Ok(());
                }
                self.dispatch(event.data(), event.events());
            }
            self.muxer.expire(Instant::now());
            let from_guest = self.transmit(memory)?;
            let to_guest = self.receive(memory)?;
            round = from_guest.max(to_guest);
            let wanted = [&mut self.tx, &mut self.rx].map(|ring| ring.wants_interrupt(memory));
            for wants in wanted {
                if wants? {
                    self.interrupt.signal_used();
                }
            }
            self.muxer.sync().map_err(WorkerError::Epoll)?;
        }
    }

    fn timeout_ms(&self, round: Round) -> i32 {
        if round == Round::More {
            return 0;
        }
        self.muxer.deadline().map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // One more, as the fraction is cut off.
            i32::try_from(left.as_millis())
                .unwrap_or(i32::MAX)
                .saturating_add(1)
        })
    }

    fn dispatch(&mut self, token: u64, events: u32) {
        let kick = match token {
            RX_TOKEN => &self.rx.active.kick,
            TX_TOKEN => &self.tx.active.kick,
            EVENT_TOKEN => &self.event.kick,
            LISTENER_TOKEN => return self.muxer.accept(),
            peer => {
                if let Ok(port) = u32::try_from(peer) {
                    let events = EventSet::from_bits_truncate(events);
                    self.muxer.socket_event(port, events);
                }
                return;
            }
        };
        // Fails only when the count was taken already.
        let _ = kick.read();
    }

    /// Takes the packets that the guest sent.
    fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<Round, WorkerError> {
        self.tx.hush(memory)?;
        for _ in 0..ROUND_PACKETS {
            if self.muxer.is_congested() {
                // Goes on when the guest has taken its resets, see `receive`.
                return Ok(Round::Idle);
            }
            let Some(chain) = self.tx.pop(memory)? else {
                if self.tx.listen(memory)? {
                    self.tx.hush(memory)?;
                    continue;
                }
                return Ok(Round::Idle);
            };
            let head = chain.head_index();
            // A packet without a whole header names no connection and gets no answer.
            if let Ok(mut reader) = chain.reader(memory) {
                let mut header = [0; HEADER_BYTES];
                if reader.read_exact(&mut header).is_ok() {
                    let header = Header::from_bytes(&header);
                    self.muxer.receive(&header, &mut reader, &mut self.scratch);
                }
            }
            self.tx.used(memory, head, 0)?;
        }
        Ok(Round::More)
    }

    /// Fills the guest's buffers.
    fn receive(&mut self, memory: &GuestMemoryMmap) -> Result<Round, WorkerError> {
        let was_congested = self.muxer.is_congested();
        let round = self.take_turns(memory)?;
        // Packets of the guest that had to wait are not announced again.
        if was_congested && !self.muxer.is_congested() {
            return Ok(Round::More);
        }
        Ok(round)
    }

    fn take_turns(&mut self, memory: &GuestMemoryMmap) -> Result<Round, WorkerError> {
        self.rx.hush(memory)?;
        for _ in 0..ROUND_PACKETS {
            if !self.muxer.has_outgoing() {
                return Ok(Round::Idle);
            }
            match self.rx.pop_buffer(memory)? {
                Popped::Buffer(buffer) => self.take_turn(memory, buffer)?,
                Popped::Unusable(head) => self.rx.used(memory, head, 0)?,
                Popped::Nothing => {
                    if !self.rx.listen(memory)? {
                        return Ok(Round::Idle);
                    }
                    self.rx.hush(memory)?;
                }
            }
        }
        Ok(Round::More)
    }

    /// Serves whoever is first in line.
    fn take_turn<'a>(
        &mut self,
        memory: &'a GuestMemoryMmap,
        first: Buffer<'a>,
    ) -> Result<(), WorkerError> {
        let (port, bytes) = match self.muxer.next() {
            None => {
                self.rx.unpop(1);
                return Ok(());
            }
            Some(Outgoing::Control(header)) => return self.rx.fill(memory, first, header, &[]),
            Some(Outgoing::Data(port, bytes)) => (port, bytes),
        };
        let mut room = first.room;
        let mut buffers = vec![first];
        while room < bytes && buffers.len() < TURN_BUFFERS {
            match self.rx.pop_buffer(memory)? {
                Popped::Buffer(buffer) => {
                    room = room.saturating_add(buffer.room);
                    buffers.push(buffer);
                }
                Popped::Unusable(_) => {
                    self.rx.unpop(1);
                    break;
                }
                Popped::Nothing => break,
            }
        }
        let limit = bytes.min(room).min(self.scratch.len());
        let count = self.muxer.read(port, &mut self.scratch[..limit]);
        let mut left = &self.scratch[..count];
        let mut buffers = buffers.into_iter();
        while !left.is_empty() {
            // `count` is within the room of the buffers.
            let Some(buffer) = buffers.next() else { break };
            let (payload, rest) = left.split_at(left.len().min(buffer.room));
            let len = u32::try_from(payload.len()).unwrap_or(0);
            let Some(header) = self.muxer.stamp(port, len) else {
                break;
            };
            self.rx.fill(memory, buffer, header, payload)?;
            left = rest;
        }
        self.rx.unpop(buffers.len());
        self.muxer.end_turn(port);
        Ok(())
    }
}

fn add(epoll: &Epoll, event: &EventFd, token: u64) -> io::Result<()> {
    let interest = EpollEvent::new(EventSet::IN, token);
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)
}
