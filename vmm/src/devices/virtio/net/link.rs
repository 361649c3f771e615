//! What all threads of one network device share: the tap's queues, how many pairs the driver uses, and whether the
//! tap is still there. Must not touch guest memory.

use super::{
    tap::Tap,
    vhost::{Backend, VhostError},
};
use crate::devices::virtio::{Activation, ActiveQueue};
use std::{
    io,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// The wire between guest and host.
#[derive(Debug)]
pub(super) struct Link {
    taps: Vec<Tap>,
    /// The host's kernel, for each pair, where it moves the packets.
    backends: Vec<Backend>,
    /// Pairs that the driver uses: the host puts packets into the first so many queues of the tap.
    pairs: AtomicUsize,
    up: AtomicBool,
}

impl Link {
    /// A link that is up, by these queues of one tap, the first of which is used.
    pub(super) fn new(taps: Vec<Tap>, backends: Vec<Backend>) -> io::Result<Self> {
        let link = Self {
            pairs: AtomicUsize::new(taps.len()),
            taps,
            backends,
            up: AtomicBool::new(true),
        };
        link.set_pairs(1)?;
        Ok(link)
    }

    /// The queue of a pair.
    pub(super) fn tap(&self, pair: usize) -> Option<&Tap> {
        self.taps.get(pair)
    }

    /// Queues of the tap.
    pub(super) fn taps(&self) -> usize {
        self.taps.len()
    }

    /// Whether the driver uses this pair.
    pub(super) fn is_used(&self, pair: usize) -> bool {
        pair < self.pairs.load(Ordering::SeqCst)
    }

    /// Whether the host's kernel moves the packets.
    pub(super) fn has_backends(&self) -> bool {
        !self.backends.is_empty()
    }

    /// Hands a pair's queues to the host's kernel, and the first pair's tap with them.
    pub(super) fn start_backend(
        &self,
        pair: usize,
        queues: [&ActiveQueue; 2],
        activation: &Activation,
    ) -> Result<(), VhostError> {
        let Some(backend) = self.backends.get(pair) else {
            return Ok(());
        };
        let (memory, interrupt) = (&activation.memory, &activation.interrupt);
        backend.start(memory, activation.features, queues, interrupt)?;
        if pair == 0 {
            backend.connect(self.tap(pair))?;
        }
        Ok(())
    }

    /// The host's kernel touches neither queues nor guest memory any more.
    pub(super) fn stop_backends(&self) {
        for backend in &self.backends {
            // To take a tap away fails only where there is no owner.
            let _ = backend.connect(None);
        }
    }

    fn connect(&self, pair: usize, tap: Option<&Tap>) -> io::Result<()> {
        let backend = self.backends.get(pair);
        backend.map_or(Ok(()), |backend| {
            backend.connect(tap).map_err(io::Error::other)
        })
    }

    /// Uses the first `pairs` pairs. Called by one thread at a time.
    pub(super) fn set_pairs(&self, pairs: usize) -> io::Result<()> {
        let before = self.pairs.load(Ordering::SeqCst);
        for (pair, tap) in self.taps.iter().enumerate().take(pairs).skip(before) {
            tap.attach(true)?;
            self.connect(pair, Some(tap))?;
        }
        // A thread that finds its queue detached must find its pair unused too.
        self.pairs.store(pairs, Ordering::SeqCst);
        for (pair, tap) in self.taps.iter().enumerate().take(before).skip(pairs) {
            self.connect(pair, None)?;
            tap.attach(false)?;
        }
        Ok(())
    }

    /// Tells the host which packets the guest can deal with. It fails where the tap is gone, and then there are none.
    pub(super) fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.taps
            .iter()
            .take(1)
            .try_for_each(|tap| tap.set_offloads(offloads))
    }

    /// Whether the tap is there.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    /// The tap is gone. Whether that is news.
    pub(super) fn take_down(&self) -> bool {
        self.up.swap(false, Ordering::SeqCst)
    }
}
