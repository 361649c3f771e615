//! From the guest to the host (virtio 1.3, section 5.1.6.2): the transmitting half of a pair of queues.
//!
//! The host's tap looks at each header, and refuses what makes no sense: such a packet is lost, as on any wire.
//! Must not wait for anything.

use super::{
    ROUND_PACKETS, Wait,
    link::Link,
    packet::{self, HEADER_BYTES, Piece, Used},
    ring::Ring,
    worker::WorkerError,
};
use crate::devices::virtio::{Interrupt, rate_limit::RateLimiter};
use std::io;
use vm_memory::GuestMemoryMmap;

/// The transmitting half of a pair.
pub(super) struct Transmitter<'m> {
    memory: &'m GuestMemoryMmap,
    pub(super) ring: Ring,
    /// How much the guest may send.
    pub(super) limiter: Option<RateLimiter>,
    /// Scratch: the pieces of a packet.
    pieces: Vec<Piece<'m>>,
}

impl<'m> Transmitter<'m> {
    pub(super) fn new(
        memory: &'m GuestMemoryMmap,
        ring: Ring,
        limiter: Option<RateLimiter>,
    ) -> Self {
        Self {
            memory,
            ring,
            limiter,
            pieces: Vec::new(),
        }
    }

    /// Moves packets until there are no more, or the host takes none, or a round is over.
    pub(super) fn round(
        &mut self,
        link: &Link,
        pair: usize,
        interrupt: &Interrupt,
    ) -> Result<Wait, WorkerError> {
        self.ring.hush(self.memory)?;
        for _ in 0..ROUND_PACKETS {
            if let Some(limiter) = &mut self.limiter
                && !limiter.is_open()?
            {
                return Ok(Wait::Rate);
            }
            let Some(chain) = self.ring.pop(self.memory)? else {
                return Ok(Wait::Kick);
            };
            let head = chain.head_index();
            self.pieces.clear();
            let readable = chain.readable();
            if let Ok(bytes) = packet::collect_sent(self.memory, readable, &mut self.pieces) {
                let sent = link.tap(pair).map(|tap| tap.write(&self.pieces));
                if let Some(Err(error)) = &sent
                    && error.kind() == io::ErrorKind::WouldBlock
                {
                    self.ring.unpop();
                    return Ok(Wait::Tap);
                }
                // Any other error is about this packet, or the link is down: it is lost.
                if let Some(limiter) = &mut self.limiter {
                    limiter.take((bytes - HEADER_BYTES) as u64);
                }
            }
            self.ring.publish(self.memory, &[Used { head, bytes: 0 }])?;
            if self.ring.wants_interrupt(self.memory)? {
                interrupt.signal_used();
            }
        }
        Ok(Wait::Turn)
    }
}
