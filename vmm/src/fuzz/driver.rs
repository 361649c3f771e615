//! A driver that does what bytes say: writes registers, puts anything into its rings, kicks, and resets.

use super::{bytes::Bytes, devices::Subject};
use crate::{
    bus::BusDevice,
    devices::virtio::mmio::{QUEUE_NOTIFY, Transport},
};
use std::{
    any::Any,
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// Guest RAM.
const MEMORY_BYTES: usize = 4 << 20;
/// Where messages lie.
pub(super) const BUFFERS: u64 = 1 << 20;
/// Entries of every queue.
pub(super) const QUEUE_ENTRIES: u16 = 16;
/// Queues that are set up; a device ignores those that it has not.
const QUEUES: u16 = 4;
/// Steps at the most, so that more bytes don't mean more time.
const MAX_STEPS: usize = 200;
/// How long a device's thread may take to end. Far more than it needs on a busy machine.
const RESET_DEADLINE: Duration = Duration::from_secs(30);
/// What is waited for an interrupt that may never come.
const PATIENCE_MS: i32 = 1;
const STATUS: u64 = 0x70;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The host of a fuzzer has memory and descriptors: a driver that cannot be made is no finding.
const HOST: &str = "the host has what a driver needs";

pub(super) fn memory() -> GuestMemoryMmap {
    let ranges = [(GuestAddress(0), MEMORY_BYTES)];
    GuestMemoryMmap::from_ranges(&ranges).expect(HOST)
}

/// Writes what lies in memory.
pub(super) fn put(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) {
    let _ = memory.write_slice(bytes, GuestAddress(address));
}

/// Where the parts of a queue are.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    used: u64,
}

impl Places {
    pub(super) fn of_queue(queue: u16) -> Self {
        let descriptors = u64::from(queue) * 0x1000;
        Self {
            descriptors,
            available: descriptors + 0x400,
            used: descriptors + 0x800,
        }
    }
}

/// Makes `queue` that of index 0, ready, without a transport.
pub(super) fn place_by_hand(queue: &mut Queue) {
    queue.set_size(QUEUE_ENTRIES);
    queue.set_avail_ring_address(Some(0x400), None);
    queue.set_used_ring_address(Some(0x800), None);
    queue.set_ready(true);
}

/// Writes a descriptor that mostly lies in memory and leads somewhere.
pub(super) fn put_descriptor(
    memory: &GuestMemoryMmap,
    table: u64,
    index: u16,
    bytes: &mut Bytes<'_>,
) {
    let choice = bytes.byte();
    let address = match choice % 8 {
        0 => bytes.quad(),
        1 => u64::from(bytes.word()),
        _ => BUFFERS + u64::from(bytes.word()),
    };
    let length = match choice / 8 % 4 {
        0 => bytes.long(),
        1 => u32::from(bytes.word()),
        _ => u32::from(bytes.byte()),
    };
    let flags = u16::from(choice / 32);
    let next = match bytes.byte() {
        byte if byte < 0x20 => bytes.word(),
        _ => index.wrapping_add(1) % QUEUE_ENTRIES,
    };
    put_raw(
        memory,
        table + 16 * u64::from(index),
        (address, length, flags, next),
    );
}

fn put_raw(
    memory: &GuestMemoryMmap,
    at: u64,
    (address, length, flags, next): (u64, u32, u16, u16),
) {
    put(memory, at, &address.to_le_bytes());
    put(memory, at + 8, &length.to_le_bytes());
    put(memory, at + 12, &flags.to_le_bytes());
    put(memory, at + 14, &next.to_le_bytes());
}

/// The driver of one device behind a transport.
pub(super) struct Driver {
    transport: Transport,
    memory: GuestMemoryMmap,
    irqfd: Arc<EventFd>,
    interrupts: Epoll,
    template: Vec<u8>,
    /// The available index of each queue.
    next: [u16; QUEUES as usize],
    /// Lives as long as the device.
    _host: Box<dyn Any>,
}

impl Driver {
    pub(super) fn new(subject: Subject) -> Self {
        let memory = memory();
        let irqfd = Arc::new(EventFd::new(EFD_NONBLOCK).expect(HOST));
        let interrupts = Epoll::new().expect(HOST);
        let event = EpollEvent::new(EventSet::IN, 0);
        let added = interrupts.ctl(ControlOperation::Add, irqfd.as_raw_fd(), event);
        added.expect(HOST);
        let transport = Transport::new(subject.device, memory.clone(), irqfd.clone());
        Self {
            transport: transport.expect(HOST),
            memory,
            irqfd,
            interrupts,
            template: subject.template,
            next: [0; QUEUES as usize],
            _host: subject.host,
        }
    }

    fn register(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        let mut status = [0; 4];
        self.transport.read(STATUS, &mut status);
        u32::from_le_bytes(status)
    }

    /// Does everything right: resets the device, agrees on all it offers, enables all queues, and starts it.
    pub(super) fn start(&mut self) {
        self.reset();
        for status in [1, 3] {
            self.register(STATUS, status);
        }
        for word in [0, 1] {
            self.register(0x14, word);
            let mut features = [0; 4];
            self.transport.read(0x10, &mut features);
            self.register(0x24, word);
            self.register(0x20, u32::from_le_bytes(features));
        }
        self.register(STATUS, 11);
        for queue in 0..QUEUES {
            let places = Places::of_queue(queue);
            self.register(0x30, queue.into());
            self.register(0x38, QUEUE_ENTRIES.into());
            for (offset, address) in [
                (0x80, places.descriptors),
                (0x90, places.available),
                (0xa0, places.used),
            ] {
                self.register(offset, u32::try_from(address).unwrap_or(0));
            }
            self.register(0x44, 1);
            put(&self.memory, places.available, &[0; 0x800]);
        }
        self.next = [0; QUEUES as usize];
        self.register(STATUS, 15);
    }

    /// Resets the device, which ends its threads.
    fn reset(&mut self) {
        let start = Instant::now();
        self.register(STATUS, 0);
        let took = start.elapsed();
        assert!(took < RESET_DEADLINE, "a reset took {took:?}");
        assert_eq!(self.status(), 0, "the device is not reset");
    }

    /// Makes the chain at `head` available.
    fn publish(&mut self, queue: u16, head: u16, index: u16) {
        let available = Places::of_queue(queue).available;
        let slot = available + 4 + 2 * u64::from(index % QUEUE_ENTRIES);
        put(&self.memory, slot, &head.to_le_bytes());
        put(
            &self.memory,
            available + 2,
            &index.wrapping_add(1).to_le_bytes(),
        );
        self.next[usize::from(queue)] = index.wrapping_add(1);
    }

    /// Offers descriptors that the bytes describe.
    pub(super) fn offer_any(&mut self, queue: u16, bytes: &mut Bytes<'_>) {
        let table = Places::of_queue(queue).descriptors;
        let count = u16::from(bytes.byte()) % QUEUE_ENTRIES + 1;
        for index in 0..count {
            put_descriptor(&self.memory, table, index, bytes);
        }
        self.publish(queue, 0, self.next[usize::from(queue)]);
    }

    /// Offers `message` and room for an answer.
    pub(super) fn offer_request(&mut self, queue: u16, message: &[u8]) {
        put(&self.memory, BUFFERS, message);
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        let table = Places::of_queue(queue).descriptors;
        put_raw(&self.memory, table, (BUFFERS, length, NEXT, 1));
        let answer = (BUFFERS + 0x10_0000, 0x2_0000, WRITE, 0);
        put_raw(&self.memory, table + 16, answer);
        self.publish(queue, 0, self.next[usize::from(queue)]);
    }

    /// As if the ioeventfd had fired, and gives the device a moment.
    pub(super) fn kick(&mut self, queue: u16) {
        self.register(QUEUE_NOTIFY, queue.into());
        let mut events = [EpollEvent::default()];
        let _ = self.interrupts.wait(PATIENCE_MS, &mut events);
        let _ = self.irqfd.read();
    }

    /// Does what the bytes say.
    pub(super) fn follow(&mut self, bytes: &mut Bytes<'_>) {
        if bytes.byte() < 0xe0 {
            self.start();
        }
        for _ in 0..MAX_STEPS {
            if bytes.is_empty() {
                break;
            }
            self.step(bytes);
        }
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let queue = u16::from(bytes.byte()) % QUEUES;
        match bytes.byte() % 12 {
            0 => self.access(bytes),
            1 => self.start(),
            2 => self.reset(),
            3 => {
                let address = u64::from(bytes.long()) % (MEMORY_BYTES as u64);
                let length = bytes.byte().into();
                put(&self.memory, address, bytes.some(length));
            }
            4 => self.publish(queue, bytes.word(), bytes.word()),
            5 => self.offer_any(queue, bytes),
            6..=8 => {
                let mut message = self.template.clone();
                for _ in 0..bytes.byte() % 4 {
                    let at = usize::from(bytes.byte());
                    let value = bytes.byte();
                    if let Some(byte) = message.get_mut(at) {
                        *byte = value;
                    }
                }
                let length = bytes.byte() % 64;
                message.extend(bytes.some(length.into()));
                self.offer_request(queue, &message);
                self.kick(queue);
            }
            _ => self.kick(queue),
        }
    }

    /// Reads or writes any register or part of the configuration.
    fn access(&mut self, bytes: &mut Bytes<'_>) {
        let offset = u64::from(bytes.word()) % 0x180;
        let choice = bytes.byte();
        let length = 1 << (choice % 4);
        let mut data = bytes.quad().to_le_bytes();
        let data = &mut data[..length];
        if choice & 0x80 == 0 {
            self.transport.write(offset, data);
        } else {
            self.transport.read(offset, data);
        }
    }

    /// Whatever happened, the device can be reset, and started again.
    pub(super) fn finish(mut self) {
        self.start();
        self.reset();
    }
}
