//! virtio devices (virtio 1.3) and what they share.
//!
//! A device is split in two: a parser, pure and fuzzed, that turns a descriptor chain into a request, and
//! an executor that does the I/O on the device's own thread. The transport ([`mmio`]) owns queues,
//! features and status for every device. Devices must not import `vm`, `vcpu` or `boot`.

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod mem;
pub mod mmio;
#[cfg(test)]
mod mock_driver;
pub mod net;
pub mod pmem;
mod queue;
mod rate_limit;
pub mod rng;
pub mod vsock;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Device ids of virtio 1.3, section 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// Section 5.1.
    Network = 1,
    /// Section 5.2.
    Block = 2,
    /// Section 5.3.
    Console = 3,
    /// Section 5.4.
    Entropy = 4,
    /// Section 5.5.
    Balloon = 5,
    /// Section 5.10.
    Socket = 19,
    /// Section 5.15.
    Memory = 24,
    /// Section 5.11.
    FileSystem = 26,
    /// Section 5.19.
    PersistentMemory = 27,
}

/// InterruptStatus bit 0: the device used a buffer.
const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration or the device status changed.
const CONFIGURATION_CHANGE: u32 = 2;
/// Device status bit (section 2.1): the device met an error from which only a reset recovers.
const DEVICE_NEEDS_RESET: u32 = 64;

/// How a device's thread tells the driver that it used buffers, or that it cannot go on.
///
/// Sets the bits of InterruptStatus (virtio 1.3, section 4.2.2) and then writes the irqfd.
#[derive(Debug, Clone)]
pub struct Interrupt {
    interrupt_status: Arc<AtomicU32>,
    /// Bits of InterruptStatus that acknowledging doesn't clear.
    standing_status: Arc<AtomicU32>,
    device_status: Arc<AtomicU32>,
    config_generation: Arc<AtomicU32>,
    irqfd: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that is raised by writing `irqfd`.
    pub fn new(irqfd: Arc<EventFd>) -> Self {
        Self {
            interrupt_status: Arc::default(),
            standing_status: Arc::default(),
            device_status: Arc::default(),
            config_generation: Arc::default(),
            irqfd,
        }
    }

    /// Tells the driver that buffers were used. Call it only when `Queue::needs_notification` says so.
    pub fn signal_used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the device's configuration space reads differently from now on (section 2.5). Call
    /// it after the change, so that a driver that sees the same generation twice has read one state.
    pub fn signal_config_change(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIGURATION_CHANGE);
    }

    /// Tells the driver that the device broke (DEVICE_NEEDS_RESET), after which the device's thread ends.
    /// This is the answer to a driver that corrupts its queues.
    pub fn signal_needs_reset(&self) {
        self.device_status
            .fetch_or(DEVICE_NEEDS_RESET, Ordering::SeqCst);
        self.raise(CONFIGURATION_CHANGE);
    }

    /// The irqfd, for the host's kernel to write where it uses buffers in the device's place. As it doesn't set
    /// InterruptStatus, that says until the next reset that buffers were used: a driver may look in vain.
    pub fn hand_over(&self) -> &EventFd {
        self.standing_status.store(USED_BUFFER, Ordering::SeqCst);
        &self.irqfd
    }

    fn status(&self) -> u32 {
        let standing = self.standing_status.load(Ordering::SeqCst);
        standing | self.interrupt_status.load(Ordering::SeqCst)
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::SeqCst);
        // Fails only when the counter is full, and then an interrupt is pending anyway.
        let _ = self.irqfd.write(1);
    }
}

/// One virtqueue that the driver enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The queue, valid in the memory that came with it.
    pub queue: Queue,
    /// Readable when the driver kicked the queue (ioeventfd).
    pub kick: EventFd,
}

/// What a device receives when the driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// All queues that the driver enabled, by index; `None` where it left one out.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Features that both sides agreed on, the transport's included.
    pub features: u64,
    /// The way to the driver.
    pub interrupt: Interrupt,
}

/// Why a device could not start; the transport answers with DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot work without.
    #[error("the driver did not enable queue {index}")]
    MissingQueue {
        /// Its index.
        index: usize,
    },
    /// The device's thread or its event file descriptors could not be made.
    #[error("cannot start the device's thread")]
    Thread(#[source] std::io::Error),
}

/// Guest-physical memory that a device shares with its driver beside the queues (section 2.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedRegion {
    /// Where it starts.
    pub address: GuestAddress,
    /// How long it is.
    pub bytes: u64,
}

/// Answers a read of a device's configuration space, which `config` is the whole of; bytes beyond it are zero.
fn read_config_space(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let known = rest.len().min(data.len());
    data[..known].copy_from_slice(&rest[..known]);
    data[known..].fill(0);
}

/// A device behind the transport. Calls come in this order, from the vCPU threads under the transport's lock:
/// any number of reads and writes of the configuration; `activate` once the driver is ready; `reset` when it
/// asks for one or the VM ends; then `activate` may come again.
pub trait VirtioDevice: Send {
    /// What the device is.
    fn device_type(&self) -> DeviceType;

    /// Feature bits of the device itself; the transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the device's configuration space; bytes beyond its end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the device's configuration space, which few devices have writable fields in.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The shared memory region with this id, if the device has one.
    fn shared_region(&self, _id: u32) -> Option<SharedRegion> {
        None
    }

    /// Starts the device's thread.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device's threads, waits for their end and forgets the queues: none of the driver's memory is
    /// touched afterwards. A vCPU waits in it, so what a device has begun and cannot take back must be bounded.
    fn reset(&mut self);
}
