//! Network device (virtio 1.3, section 5.1): a tap of the host, one thread for each pair of queues, or vhost-net.
//!
//! Layers, each knowing those below: `worker` (a thread: epoll), `receive` and `transmit` (the two directions of a
//! pair), `link` (what pairs share), `tap` and `vhost` (system calls), `ring` (a queue), and without any I/O `control`, `packet`
//! (bytes to packets) and `features` (bits to the host's offloads). Must not open a tap: it arrives as files.

mod control;
mod features;
mod link;
mod packet;
mod receive;
mod ring;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;
mod worker;

use self::{
    control::Command, link::Link, receive::Receiver, ring::Ring, tap::Tap, transmit::Transmitter,
    vhost::Backend, worker::Pair,
};
use super::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, queue,
    rate_limit::RateLimiter,
};
use crate::{event_loop::Worker, seccomp::Kind};
use std::{io, os::fd::OwnedFd, sync::Arc};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use walnut_vmm_api::NetworkConfig;

pub use self::{tap::TapError, vhost::VhostError};

const DATA_QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Packets after which a thread looks for other work.
const ROUND_PACKETS: usize = 64;

/// Why a network cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A file is not a queue of a tap, or of another kind of it.
    #[error("file {index} of network.taps cannot be used as a tap")]
    Tap {
        /// Which one.
        index: usize,
        /// Why not.
        source: TapError,
    },
    /// Queues of the tap cannot be told to rest.
    #[error("cannot detach the queues of a tap that aren't used yet (TUNSETQUEUE)")]
    Queues(#[source] io::Error),
    /// A timer.
    #[error("cannot limit the rate of a network")]
    Rate(#[source] io::Error),
    /// The host's kernel will not move the packets.
    #[error("file {index} of network.vhost cannot be used as vhost-net")]
    Vhost {
        /// Which one.
        index: usize,
        /// Why not.
        source: VhostError,
    },
}

/// What a half of a pair needs before it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// A kick of the driver, or a change of the pairs in use.
    Kick,
    /// The tap.
    Tap,
    /// The timer of its rate.
    Rate,
    /// Nothing: others have their turn.
    Turn,
}

/// The network device.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
    link: Arc<Link>,
    /// How much the guest may receive, and send: all pairs together.
    limits: [Option<RateLimiter>; 2],
    features: u64,
    queue_sizes: Vec<u16>,
    threads: Vec<Worker>,
}

impl Network {
    /// A device with a pair of queues for each of these files, which `taps` and `vhost` of the configuration name.
    pub fn new(
        config: &NetworkConfig,
        tap_files: Vec<OwnedFd>,
        vhost_files: Vec<OwnedFd>,
    ) -> Result<Self, NetError> {
        let several = tap_files.len() > 1;
        let mut taps = Vec::new();
        for (index, file) in tap_files.into_iter().enumerate() {
            let tap = Tap::new(file, several).map_err(|source| NetError::Tap { index, source })?;
            taps.push(tap);
        }
        let mut backends = Vec::new();
        for (index, file) in vhost_files.into_iter().enumerate() {
            let backend = Backend::new(file);
            backends.push(backend.map_err(|source| NetError::Vhost { index, source })?);
        }
        Self::with_taps(config, taps, backends)
    }

    /// A device whose tap is a datagram socket, for fuzzers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn of_socket(config: &NetworkConfig, socket: OwnedFd) -> Result<Self, NetError> {
        Self::with_taps(config, vec![Tap::of_socket(socket)], Vec::new())
    }

    fn with_taps(
        config: &NetworkConfig,
        taps: Vec<Tap>,
        backends: Vec<Backend>,
    ) -> Result<Self, NetError> {
        let limit = |rate: Option<_>| rate.map(|rate| RateLimiter::new(Some(rate))).transpose();
        let receive = limit(config.receive_rate).map_err(NetError::Rate)?;
        let transmit = limit(config.transmit_rate).map_err(NetError::Rate)?;
        let link = Link::new(taps, backends).map_err(NetError::Queues)?;
        // A host that cannot segment UDP refuses this, and nothing changes.
        let uso = link.set_offloads(features::TUN_CSUM | features::TUN_USO);
        // What was possible before is possible again.
        let _ = link.set_offloads(0);
        let pairs = link.taps();
        let mut queue_sizes = vec![DATA_QUEUE_SIZE; 2 * pairs];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Ok(Self {
            config: config.clone(),
            link: Arc::new(link),
            limits: [receive, transmit],
            features: features::offered(pairs, uso.is_ok()),
            queue_sizes,
            threads: Vec::new(),
        })
    }

    fn spawn_pair(
        &mut self,
        index: usize,
        [receive, transmit]: [ActiveQueue; 2],
        activation: &Activation,
    ) -> io::Result<()> {
        let (memory, interrupt) = (activation.memory.clone(), activation.interrupt.clone());
        let (link, features) = (self.link.clone(), activation.features);
        let mergeable = features::has(features, VIRTIO_NET_F_MRG_RXBUF);
        let largest = features::largest_packet(features, self.config.mtu);
        let share =
            |limit: &Option<RateLimiter>| limit.as_ref().map(RateLimiter::share).transpose();
        let limits = [share(&self.limits[0])?, share(&self.limits[1])?];
        let thread = activation
            .threads
            .spawn(Kind::Network, "net", move |stop| {
                let [receive_limit, transmit_limit] = limits;
                let receive = Ring::new(receive);
                let pair = Pair {
                    index,
                    link: &link,
                    interrupt: &interrupt,
                    receiver: Receiver::new(&memory, receive, receive_limit, mergeable, largest),
                    transmitter: Transmitter::new(&memory, Ring::new(transmit), transmit_limit),
                };
                pair.run(&stop);
            })?;
        self.threads.push(thread);
        Ok(())
    }

    fn spawn_control(
        &mut self,
        queue: ActiveQueue,
        control: Control,
        activation: Activation,
    ) -> io::Result<()> {
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        let threads = activation.threads;
        let thread = threads.spawn(Kind::NetworkControl, "net-control", move |stop| {
            queue::serve(queue, &memory, &interrupt, &stop, |chain| {
                control.execute(&memory, chain)
            });
        })?;
        self.threads.push(thread);
        Ok(())
    }
}

/// The executor of commands.
struct Control {
    link: Arc<Link>,
    features: u64,
    /// The receive queues' kicks, by pair, so that threads look at the link again.
    wakes: Vec<EventFd>,
}

impl Control {
    /// Executes the command in a buffer and gives the bytes of its answer.
    fn execute(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let Some((command, place)) = control::parse(memory, chain) else {
            return 0;
        };
        let done = match command {
            Command::SetPairs(pairs) => self.set_pairs(pairs.into()),
            Command::SetOffloads(wanted) => {
                let offloads = features::switched_offloads(self.features, wanted);
                offloads.is_some_and(|offloads| self.link.set_offloads(offloads).is_ok())
            }
            Command::Unknown => false,
        };
        control::answer(place, done)
    }

    fn set_pairs(&self, pairs: usize) -> bool {
        let known = features::has(self.features, VIRTIO_NET_F_MQ)
            && (1..=self.wakes.len()).contains(&pairs);
        let done = known && self.link.set_pairs(pairs).is_ok();
        for wake in &self.wakes {
            // Fails only when the counter is full, and then the event is readable.
            let _ = wake.write(1);
        }
        done
    }
}

impl VirtioDevice for Network {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let pairs = u16::try_from(self.link.taps()).unwrap_or(u16::MAX);
        let fields = features::config_space(&self.config, pairs, self.link.is_up());
        super::read_config_space(&fields, offset, data);
    }

    /// Starts a thread for each pair that has both its queues, from the first on, and one for the control queue.
    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let several = features::has(activation.features, VIRTIO_NET_F_MQ);
        let pairs = if several { self.link.taps() } else { 1 };
        let mut queues = std::mem::take(&mut activation.queues).into_iter();
        // Both fail where the tap is gone, which its reader finds out.
        let _ = self.link.set_pairs(1);
        let offloads = features::tap_offloads(activation.features);
        let _ = self.link.set_offloads(offloads);
        let mut wakes = Vec::new();
        for index in 0..pairs {
            let (receive, transmit) = (queues.next().flatten(), queues.next().flatten());
            let (Some(receive), Some(transmit)) = (receive, transmit) else {
                continue;
            };
            if wakes.len() < index {
                continue;
            }
            wakes.push(receive.kick.try_clone().map_err(ActivateError::Thread)?);
            let started = if self.link.has_backends() {
                let queues = [&receive, &transmit];
                let started = self.link.start_backend(index, queues, &activation);
                started.map_err(io::Error::other)
            } else {
                self.spawn_pair(index, [receive, transmit], &activation)
            };
            started.map_err(ActivateError::Thread)?;
        }
        if wakes.is_empty() {
            return Err(ActivateError::MissingQueue { index: 0 });
        }
        if let Some(queue) = queues.next().flatten() {
            let control = Control {
                link: self.link.clone(),
                features: activation.features,
                wakes,
            };
            self.spawn_control(queue, control, activation)
                .map_err(ActivateError::Thread)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.threads.clear();
        self.link.stop_backends();
    }
}

impl Drop for Network {
    /// Guest memory may go after the device.
    fn drop(&mut self) {
        self.reset();
    }
}
