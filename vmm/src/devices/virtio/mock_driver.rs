//! The driver's half of a virtqueue, for tests that run a device without a guest.

use super::{Activation, ActiveQueue, Interrupt};
use crate::event_loop::Threads;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a test waits for a device before it fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Guest RAM of a test.
pub(crate) const MEMORY_BYTES: u64 = 16 << 20;
/// Addresses below it belong to the rings.
pub(crate) const FIRST_BUFFER: u64 = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Guest RAM that is all zero.
pub(crate) fn memory() -> GuestMemoryMmap {
    let bytes = usize::try_from(MEMORY_BYTES).unwrap();
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

/// The driver of all queues of one device.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    irqfd: Arc<EventFd>,
    pub(crate) queues: Vec<DriverQueue>,
}

/// One queue, seen by the driver.
pub(crate) struct DriverQueue {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    kick: EventFd,
    next_avail: u16,
    last_used: u16,
    free: Vec<u16>,
}

impl Driver {
    /// Queues of these sizes, and what the device gets for them.
    pub(crate) fn new(sizes: &[u16], event_idx: bool) -> (Self, Activation) {
        let memory = memory();
        let irqfd = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut queues = Vec::new();
        let mut active = Vec::new();
        for (index, size) in (0u64..).zip(sizes) {
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            let queue = DriverQueue {
                memory: memory.clone(),
                base: index * 0x1_0000,
                size: *size,
                kick: kick.try_clone().unwrap(),
                next_avail: 0,
                last_used: 0,
                free: (0..*size).rev().collect(),
            };
            active.push(Some(ActiveQueue {
                queue: queue.device_side(event_idx),
                kick,
            }));
            queues.push(queue);
        }
        let activation = Activation {
            memory: memory.clone(),
            queues: active,
            features: 0,
            interrupt: Interrupt::new(irqfd.clone()),
            threads: Threads::confined().unwrap(),
        };
        let driver = Self {
            memory,
            irqfd,
            queues,
        };
        (driver, activation)
    }

    /// Waits until the device has used a buffer of this queue: its head and the bytes written.
    pub(crate) fn wait_used(&mut self, index: usize) -> (u16, u32) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.queues[index].take_used() {
                return used;
            }
            self.wait_interrupt(end);
        }
    }

    /// Waits for any interrupt.
    pub(crate) fn wait_interrupt(&self, end: Instant) {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "the device does nothing");
        // SAFETY: the descriptor is owned by `self.irqfd`, which outlives the borrow.
        #[allow(unsafe_code, reason = "EventFd of vmm-sys-util has no AsFd")]
        let fd = unsafe { BorrowedFd::borrow_raw(self.irqfd.as_raw_fd()) };
        let timeout = Timespec::try_from(left).unwrap();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap();
        let _ = self.irqfd.read();
    }
}

impl DriverQueue {
    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        self.base + 0x8000
    }

    fn device_side(&self, event_idx: bool) -> Queue {
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.avail()), Some(0));
        queue.set_used_ring_address(low(self.used()), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    /// How many descriptors are free.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Offers a chain of buffers, given as address and length, and kicks. Gives its head.
    pub(crate) fn offer(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let buffers = readable.iter().map(|buffer| (buffer, 0));
        let buffers: Vec<_> = buffers
            .chain(writable.iter().map(|buffer| (buffer, WRITE)))
            .collect();
        let at = self.free.len() - buffers.len();
        let indices = self.free.split_off(at);
        for (position, ((address, length), flags)) in buffers.iter().enumerate() {
            let next = indices.get(position + 1).copied();
            let descriptor = self.base + 16 * u64::from(indices[position]);
            self.write(descriptor, *address);
            self.write(descriptor + 8, *length);
            self.write(descriptor + 12, flags | next.map_or(0, |_| NEXT));
            self.write(descriptor + 14, next.unwrap_or(0));
        }
        let slot = u64::from(self.next_avail % self.size);
        self.write(self.avail() + 4 + 2 * slot, indices[0]);
        self.publish(self.next_avail.wrapping_add(1));
        indices[0]
    }

    /// Sets the available index, whatever it says, and kicks.
    pub(crate) fn publish(&mut self, index: u16) {
        self.next_avail = index;
        fence(Ordering::SeqCst);
        self.write(self.avail() + 2, index);
        fence(Ordering::SeqCst);
        self.kick.write(1).unwrap();
    }

    fn take_used(&mut self) -> Option<(u16, u32)> {
        // Interrupt when the next one is used (VIRTIO_F_EVENT_IDX).
        self.write(self.avail() + 4 + 2 * u64::from(self.size), self.last_used);
        fence(Ordering::SeqCst);
        let index: u16 = self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if index == self.last_used {
            return None;
        }
        let element = self.used() + 4 + 8 * u64::from(self.last_used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free_chain(head);
        Some((head, length))
    }

    /// Takes what is used without waiting.
    pub(crate) fn poll_used(&mut self) -> Option<(u16, u32)> {
        self.take_used()
    }

    fn free_chain(&mut self, head: u16) {
        let mut index = head;
        loop {
            self.free.push(index);
            let descriptor = self.base + 16 * u64::from(index);
            let flags: u16 = self.memory.read_obj(GuestAddress(descriptor + 12)).unwrap();
            if flags & NEXT == 0 {
                return;
            }
            index = self.memory.read_obj(GuestAddress(descriptor + 14)).unwrap();
        }
    }
}
