//! From the host to the guest (virtio 1.3, sections 5.1.6.3 and 5.1.6.4): the receiving half of a pair of queues.
//!
//! Buffers are taken ahead until they hold the largest packet that may come, as the host tells no size before a
//! packet is read; what a packet leaves over is for the next one. Must not wait for anything.

use super::{
    ROUND_PACKETS, Wait,
    link::Link,
    packet::{self, Buffer, HEADER_BYTES, Piece, Used},
    ring::Ring,
    worker::WorkerError,
};
use crate::devices::virtio::{Interrupt, rate_limit::RateLimiter};
use std::{collections::VecDeque, io};
use vm_memory::GuestMemoryMmap;

/// Whether a packet can be read.
enum Gathered {
    Enough,
    /// The driver kicks when there are more buffers.
    Starved,
    /// The driver has offered one useless buffer after another.
    Useless,
}

/// The receiving half of a pair.
pub(super) struct Receiver<'m> {
    memory: &'m GuestMemoryMmap,
    pub(super) ring: Ring,
    /// How much the guest may receive.
    pub(super) limiter: Option<RateLimiter>,
    /// Whether a packet may fill several buffers.
    mergeable: bool,
    /// Bytes of the largest packet that may come.
    largest: usize,
    buffers: VecDeque<Buffer>,
    /// The pieces of all buffers, in order.
    pieces: Vec<Piece<'m>>,
    /// Bytes of all buffers.
    room: usize,
    /// Scratch: what a packet used.
    used: Vec<Used>,
}

impl<'m> Receiver<'m> {
    pub(super) fn new(
        memory: &'m GuestMemoryMmap,
        ring: Ring,
        limiter: Option<RateLimiter>,
        mergeable: bool,
        largest: usize,
    ) -> Self {
        Self {
            memory,
            ring,
            limiter,
            mergeable,
            largest,
            buffers: VecDeque::new(),
            pieces: Vec::new(),
            room: 0,
            used: Vec::new(),
        }
    }

    /// Moves packets until there are no more, or no buffers, or a round is over.
    pub(super) fn round(
        &mut self,
        link: &Link,
        pair: usize,
        interrupt: &Interrupt,
    ) -> Result<Wait, WorkerError> {
        let Some(tap) = link
            .tap(pair)
            .filter(|_| link.is_used(pair) && link.is_up())
        else {
            return Ok(Wait::Kick);
        };
        self.ring.hush(self.memory)?;
        for _ in 0..ROUND_PACKETS {
            if let Some(limiter) = &mut self.limiter
                && !limiter.is_open()?
            {
                return Ok(Wait::Rate);
            }
            match self.gather(interrupt)? {
                Gathered::Enough => {}
                Gathered::Starved => return Ok(Wait::Kick),
                Gathered::Useless => return Ok(Wait::Turn),
            }
            match tap.read(&self.pieces) {
                Ok(0) => return Ok(self.lost(link, pair, interrupt)),
                // No tap makes such a packet.
                Ok(bytes) if bytes < HEADER_BYTES => {}
                Ok(bytes) => {
                    self.deliver(bytes, interrupt)?;
                    if let Some(limiter) = &mut self.limiter {
                        limiter.take((bytes - HEADER_BYTES) as u64);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Wait::Tap),
                Err(_) => return Ok(self.lost(link, pair, interrupt)),
            }
        }
        Ok(Wait::Tap)
    }

    /// The tap gives no packets any more. A queue other than the first may only be detached: then a kick says when
    /// that is over.
    fn lost(&self, link: &Link, pair: usize, interrupt: &Interrupt) -> Wait {
        if pair == 0 && link.take_down() {
            interrupt.signal_config_change();
        }
        Wait::Kick
    }

    /// Takes buffers until the largest packet fits, or until the driver cannot offer more.
    fn gather(&mut self, interrupt: &Interrupt) -> Result<Gathered, WorkerError> {
        let most = self.ring.size();
        for _ in 0..=most {
            let enough = if self.mergeable {
                let all = self.buffers.len() >= most || self.pieces.len() >= most;
                self.room >= self.largest || all
            } else {
                !self.buffers.is_empty()
            };
            if enough {
                return Ok(Gathered::Enough);
            }
            let Some(chain) = self.ring.pop(self.memory)? else {
                return Ok(Gathered::Starved);
            };
            let head = chain.head_index();
            let writable = chain.writable();
            match packet::collect_buffer(self.memory, head, writable, &mut self.pieces) {
                Ok(buffer) => {
                    self.room = self.room.saturating_add(buffer.bytes);
                    self.buffers.push_back(buffer);
                }
                Err(_) => {
                    self.ring.publish(self.memory, &[Used { head, bytes: 0 }])?;
                    if self.ring.wants_interrupt(self.memory)? {
                        interrupt.signal_used();
                    }
                }
            }
        }
        Ok(Gathered::Useless)
    }

    /// Hands the buffers that a packet of `bytes` fills to the driver.
    fn deliver(&mut self, bytes: usize, interrupt: &Interrupt) -> Result<(), WorkerError> {
        self.used.clear();
        packet::fill(&self.buffers, bytes, &mut self.used);
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        packet::write_num_buffers(&self.pieces, count);
        self.ring.publish(self.memory, &self.used)?;
        let filled = self.buffers.drain(..self.used.len());
        let mut pieces = 0;
        for buffer in filled {
            pieces += buffer.pieces;
            self.room = self.room.saturating_sub(buffer.bytes);
        }
        self.pieces.drain(..pieces);
        if self.ring.wants_interrupt(self.memory)? {
            interrupt.signal_used();
        }
        Ok(())
    }
}
