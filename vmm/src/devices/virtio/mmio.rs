//! The virtio-mmio transport (virtio 1.3, section 4.2), version 2 registers only.
//!
//! Owns status, features and queues of its device, and hands the queues over when the driver is ready
//! (section 3.1.1). Kicks arrive by ioeventfd and interrupts leave by irqfd, so that the registers are only
//! reached at set-up and to acknowledge interrupts. Must not know what the device does.

use super::{Activation, ActiveQueue, DEVICE_NEEDS_RESET, Interrupt, VirtioDevice};
use crate::bus::{BusDevice, Effect};
use std::{
    io,
    sync::{Arc, atomic::Ordering},
};
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of one device's registers.
pub const REGISTERS_BYTES: u64 = 0x1000;
/// Offset of QueueNotify, where the driver writes the index of a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"WLNT");
/// Start of the device's configuration.
const CONFIGURATION: u64 = 0x100;
/// What a shared memory region that isn't there has as its length and base, low and high (section 4.2.2).
const NO_REGION: u32 = u32::MAX;
/// Features of the transport and the ring. Queues are not reset one by one (VIRTIO_F_RING_RESET): see
/// docs/decisions/0007-queue-reset.md.
const OWN_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Why a device cannot be put behind the transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A queue size that is not a power of two, or too large.
    #[error("queue {index} of a virtio device cannot have the size {size}")]
    QueueSize {
        /// Which queue.
        index: usize,
        /// Its size.
        size: u16,
    },
    /// An event file descriptor cannot be made.
    #[error("cannot make an event file descriptor for a virtio queue")]
    Event(#[source] io::Error),
}

/// How far the driver has come (section 2.1). Each phase includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Reset,
    Acknowledged,
    DriverFound,
    FeaturesAgreed,
    Running,
    /// The driver gave up.
    Failed,
}

impl Phase {
    fn of(status: u32) -> Self {
        let has = |bit| status & bit != 0;
        if has(VIRTIO_CONFIG_S_FAILED) {
            Self::Failed
        } else if has(VIRTIO_CONFIG_S_DRIVER_OK) {
            Self::Running
        } else if has(VIRTIO_CONFIG_S_FEATURES_OK) {
            Self::FeaturesAgreed
        } else if has(VIRTIO_CONFIG_S_DRIVER) {
            Self::DriverFound
        } else if has(VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            Self::Acknowledged
        } else {
            Self::Reset
        }
    }
}

/// What a driver that is in a phase sets next.
const STEPS: [(Phase, u32); 4] = [
    (Phase::Reset, VIRTIO_CONFIG_S_ACKNOWLEDGE),
    (Phase::Acknowledged, VIRTIO_CONFIG_S_DRIVER),
    (Phase::DriverFound, VIRTIO_CONFIG_S_FEATURES_OK),
    (Phase::FeaturesAgreed, VIRTIO_CONFIG_S_DRIVER_OK),
];

/// One queue of the device.
struct Slot {
    state: SlotState,
    kick: EventFd,
    max_size: u16,
}

enum SlotState {
    /// The driver sets it up.
    Configuring(Queue),
    /// The device has it.
    Active,
}

/// A virtio device on the bus.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    interrupt: Interrupt,
    slots: Vec<Slot>,
    selected_queue: usize,
    selected_region: u32,
    device_features_word: u32,
    driver_features_word: u32,
    driver_features: u64,
}

impl Transport {
    /// Puts `device` behind registers. `irqfd` raises its interrupt.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        irqfd: Arc<EventFd>,
    ) -> Result<Self, TransportError> {
        let mut slots = Vec::new();
        for (index, &size) in device.queue_max_sizes().iter().enumerate() {
            let queue = Queue::new(size).map_err(|_| TransportError::QueueSize { index, size })?;
            slots.push(Slot {
                state: SlotState::Configuring(queue),
                kick: EventFd::new(EFD_NONBLOCK).map_err(TransportError::Event)?,
                max_size: size,
            });
        }
        Ok(Self {
            device,
            memory,
            interrupt: Interrupt::new(irqfd),
            slots,
            selected_queue: 0,
            selected_region: 0,
            device_features_word: 0,
            driver_features_word: 0,
            driver_features: 0,
        })
    }

    /// What the queues' ioeventfds must be attached to, by index.
    pub fn kicks(&self) -> impl Iterator<Item = &EventFd> {
        self.slots.iter().map(|slot| &slot.kick)
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | OWN_FEATURES
    }

    fn status(&self) -> u32 {
        self.interrupt.device_status.load(Ordering::SeqCst)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.device_type() as u32,
            0x0c => VENDOR,
            0x10 => word(self.offered_features(), self.device_features_word),
            0x34 => self
                .slots
                .get(self.selected_queue)
                .map_or(0, |slot| slot.max_size.into()),
            0x44 => match self.slots.get(self.selected_queue).map(|slot| &slot.state) {
                Some(SlotState::Configuring(queue)) => queue.ready().into(),
                Some(SlotState::Active) => 1,
                None => 0,
            },
            0x60 => self.interrupt.status(),
            0x70 => self.status(),
            0xb0..=0xbc => self.read_region(offset),
            0xfc => self.interrupt.config_generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    /// SHMLenLow, SHMLenHigh, SHMBaseLow and SHMBaseHigh of the selected region.
    fn read_region(&self, offset: u64) -> u32 {
        let Some(region) = self.device.shared_region(self.selected_region) else {
            return NO_REGION;
        };
        match offset {
            0xb0 => word(region.bytes, 0),
            0xb4 => word(region.bytes, 1),
            0xb8 => word(region.address.0, 0),
            0xbc => word(region.address.0, 1),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_word = value,
            0x20 => self.accept_features(value),
            0x24 => self.driver_features_word = value,
            0x30 => self.selected_queue = usize::try_from(value).unwrap_or(usize::MAX),
            // Only when the ioeventfd did not take it: a queue that isn't there, or none attached.
            QUEUE_NOTIFY => self.notify(value),
            0x64 => {
                let status = &self.interrupt.interrupt_status;
                status.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => self.write_status(value),
            0xac => self.selected_region = value,
            _ => self.write_queue(offset, value),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if Phase::of(self.status()) != Phase::DriverFound {
            return;
        }
        match self.driver_features_word {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn notify(&self, index: u32) {
        let slot = usize::try_from(index)
            .ok()
            .and_then(|index| self.slots.get(index));
        if let Some(slot) = slot.filter(|slot| matches!(slot.state, SlotState::Active)) {
            // Fails only when the counter is full, and then a kick is pending anyway.
            let _ = slot.kick.write(1);
        }
    }

    /// The selected queue's fields, which the driver may write before it sets DRIVER_OK.
    fn write_queue(&mut self, offset: u64, value: u32) {
        if Phase::of(self.status()) != Phase::FeaturesAgreed {
            return;
        }
        let Some(SlotState::Configuring(queue)) = self
            .slots
            .get_mut(self.selected_queue)
            .map(|slot| &mut slot.state)
        else {
            return;
        };
        if offset == 0x44 {
            return queue.set_ready(value == 1);
        }
        if queue.ready() {
            return;
        }
        match offset {
            // A size that isn't valid leaves the largest one, as if nothing had been written.
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// The driver's steps (section 3.1.1), several of which may come in one write, but none without those before it.
    /// There is no way back but a reset, and after a failure no way forward either.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            return self.add_status(VIRTIO_CONFIG_S_FAILED);
        }
        let status = self.status();
        if status & (VIRTIO_CONFIG_S_FAILED | DEVICE_NEEDS_RESET) != 0 || status & !value != 0 {
            return;
        }
        for (from, step) in STEPS {
            let taken = value & step != 0 && Phase::of(self.status()) == from;
            if taken && (from != Phase::DriverFound || self.features_are_acceptable()) {
                self.add_status(step);
                if Phase::of(self.status()) == Phase::Running {
                    self.activate();
                }
            }
        }
    }

    fn add_status(&self, bits: u32) {
        self.interrupt
            .device_status
            .fetch_or(bits, Ordering::SeqCst);
    }

    /// A subset of what was offered, with VERSION_1: there is no legacy interface (section 6.1).
    fn features_are_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let result = self
            .take_queues()
            .map(|queues| Activation {
                memory: self.memory.clone(),
                queues,
                features: self.driver_features,
                interrupt: self.interrupt.clone(),
            })
            .is_some_and(|activation| self.device.activate(activation).is_ok());
        if !result {
            // Of several threads some may run.
            self.device.reset();
            self.interrupt.signal_needs_reset();
        }
    }

    /// All ready queues; `None` when one of them cannot be used.
    fn take_queues(&mut self) -> Option<Vec<Option<ActiveQueue>>> {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for slot in &mut self.slots {
            let SlotState::Configuring(queue) = &mut slot.state else {
                return None;
            };
            if !queue.ready() {
                queues.push(None);
                continue;
            }
            if !queue.is_valid(&self.memory) {
                return None;
            }
            queue.set_event_idx(event_idx);
            let kick = slot.kick.try_clone().ok()?;
            let SlotState::Configuring(queue) =
                std::mem::replace(&mut slot.state, SlotState::Active)
            else {
                return None;
            };
            queues.push(Some(ActiveQueue { queue, kick }));
        }
        Some(queues)
    }

    /// Back to the state of the start, as the driver can ask for too. The vCPU waits for the device to forget its
    /// queues, see [`VirtioDevice::reset`]: a driver of virtio-mmio does not look whether the status reads zero before
    /// it takes its memory back.
    pub fn reset(&mut self) {
        self.device.reset();
        for slot in &mut self.slots {
            // Kicks of the time before the reset mean nothing after it. An error says that there were none.
            let _ = slot.kick.read();
            if let Ok(queue) = Queue::new(slot.max_size) {
                slot.state = SlotState::Configuring(queue);
            }
        }
        self.selected_queue = 0;
        self.selected_region = 0;
        self.device_features_word = 0;
        self.driver_features_word = 0;
        self.driver_features = 0;
        self.interrupt.interrupt_status.store(0, Ordering::SeqCst);
        self.interrupt.standing_status.store(0, Ordering::SeqCst);
        self.interrupt.device_status.store(0, Ordering::SeqCst);
    }
}

/// A 32-bit part of what the registers show in two halves.
fn word(value: u64, selected: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match selected {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIGURATION) {
            self.device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            // The registers have 32 bits and are only read whole (section 4.2.2.2).
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some(offset) = offset.checked_sub(CONFIGURATION) {
            self.device.write_config(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ActivateError, DeviceType, SharedRegion};
    use super::*;
    use crate::memory;
    use proptest::prelude::*;
    use std::sync::Mutex;
    use vm_memory::GuestAddress;

    #[derive(Default)]
    struct Seen {
        activation: Option<Activation>,
        config_writes: Vec<(u64, Vec<u8>)>,
        resets: u32,
    }

    struct Probe(Arc<Mutex<Seen>>);

    impl VirtioDevice for Probe {
        fn device_type(&self) -> DeviceType {
            DeviceType::Entropy
        }

        fn features(&self) -> u64 {
            1 << 5
        }

        fn queue_max_sizes(&self) -> &[u16] {
            &[8, 16]
        }

        fn read_config(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap_or(0xee));
        }

        fn write_config(&mut self, offset: u64, data: &[u8]) {
            let mut seen = self.0.lock().unwrap();
            seen.config_writes.push((offset, data.to_vec()));
        }

        fn shared_region(&self, id: u32) -> Option<SharedRegion> {
            (id == 1).then_some(SharedRegion {
                address: GuestAddress(0x12_3456_7000),
                bytes: 0x1_0000_2000,
            })
        }

        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            if activation.queues[0].is_none() {
                return Err(ActivateError::MissingQueue { index: 0 });
            }
            self.0.lock().unwrap().activation = Some(activation);
            Ok(())
        }

        fn reset(&mut self) {
            let mut seen = self.0.lock().unwrap();
            seen.activation = None;
            seen.resets += 1;
        }
    }

    struct Driver {
        transport: Transport,
        irqfd: Arc<EventFd>,
        seen: Arc<Mutex<Seen>>,
    }

    impl Driver {
        fn new() -> Self {
            let memory = memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let irqfd = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            let seen = Arc::<Mutex<Seen>>::default();
            let device = Box::new(Probe(seen.clone()));
            let transport = Transport::new(device, memory, irqfd.clone()).unwrap();
            Self {
                transport,
                irqfd,
                seen,
            }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.transport.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }

        fn agree_on(&mut self, features: u64) -> u32 {
            for status in [0, 1, 3] {
                self.write(0x70, status);
            }
            for selected in [0, 1] {
                self.write(0x24, selected);
                self.write(0x20, word(features, selected));
            }
            self.write(0x70, 11);
            self.read(0x70)
        }

        fn set_up_queue(&mut self, index: u32) {
            self.write(0x30, index);
            self.write(0x38, 8);
            for (offset, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
                self.write(offset, address + index * 0x4000);
                self.write(offset + 4, 0);
            }
            self.write(0x44, 1);
        }
    }

    const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    #[test]
    fn a_driver_finds_the_device_and_starts_it() {
        let mut driver = Driver::new();
        assert_eq!(driver.read(0x00), 0x7472_6976);
        assert_eq!((driver.read(0x04), driver.read(0x08)), (2, 4));
        driver.write(0x14, 1);
        assert_eq!(driver.read(0x10) & 1, 1, "VERSION_1");
        let features = VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << 5;
        assert_eq!(driver.agree_on(features), 11);
        driver.write(0x30, 1);
        assert_eq!(driver.read(0x34), 16);
        driver.set_up_queue(0);
        assert_eq!(driver.read(0x44), 1);
        driver.write(0x70, 15);
        assert_eq!(driver.read(0x70), 15);

        let mut seen = driver.seen.lock().unwrap().activation.take().unwrap();
        assert_eq!(seen.features, features);
        assert!(seen.queues[1].is_none());
        let queue = seen.queues[0].take().unwrap();
        assert!(queue.queue.event_idx_enabled());
        assert_eq!(queue.queue.avail_ring(), 0x2000);
        driver.write(0x50, 0);
        assert_eq!(queue.kick.read().unwrap(), 1);

        seen.interrupt.signal_used();
        assert_eq!(driver.irqfd.read().unwrap(), 1);
        assert_eq!(driver.read(0x60), 1);
        driver.write(0x64, 1);
        assert_eq!(driver.read(0x60), 0);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let mut driver = Driver::new();
        assert_eq!(driver.agree_on(VERSION_1 | 1 << 6), 3);
        assert_eq!(driver.agree_on(1 << 5), 3, "no legacy drivers");
        driver.write(0x70, 15);
        assert!(driver.seen.lock().unwrap().activation.is_none());
    }

    #[test]
    fn a_reset_device_starts_again() {
        let mut driver = Driver::new();
        for round in 0..3 {
            driver.agree_on(VERSION_1);
            driver.set_up_queue(0);
            driver.set_up_queue(1);
            driver.write(0x70, 15);
            let active = driver.seen.lock().unwrap().activation.is_some();
            assert!(active, "round {round}");
            driver.write(0x50, 0);
            driver.write(0x70, 0);
            assert_eq!((driver.read(0x70), driver.read(0x44)), (0, 0));
            let kick = driver.transport.kicks().next().unwrap();
            assert!(kick.read().is_err(), "the old kick is gone");
        }
        assert!(driver.seen.lock().unwrap().resets >= 3);
    }

    #[test]
    fn a_queue_outside_memory_and_a_missing_one_break_the_device() {
        for broken in [true, false] {
            let mut driver = Driver::new();
            driver.agree_on(VERSION_1);
            if broken {
                driver.write(0x84, 0xffff_ffff);
                driver.set_up_queue(0);
                driver.write(0x44, 0);
                driver.write(0x94, 0xff);
                driver.write(0x44, 1);
            }
            driver.write(0x70, 15);
            assert_eq!(driver.read(0x70) & DEVICE_NEEDS_RESET, DEVICE_NEEDS_RESET);
            assert_eq!(driver.read(0x60), 2, "configuration change");
            driver.agree_on(VERSION_1);
            driver.set_up_queue(0);
            driver.write(0x70, 15);
            assert_eq!(driver.read(0x70), 15);
        }
    }

    #[test]
    fn shared_memory_regions_are_found_by_their_id() {
        let mut driver = Driver::new();
        let region = |driver: &mut Driver, id| {
            driver.write(0xac, id);
            [0xb0, 0xb4, 0xb8, 0xbc].map(|offset| driver.read(offset))
        };
        assert_eq!(region(&mut driver, 0), [u32::MAX; 4]);
        assert_eq!(region(&mut driver, 1), [0x2000, 1, 0x3456_7000, 0x12]);
        assert_eq!(region(&mut driver, u32::MAX), [u32::MAX; 4]);
    }

    #[test]
    fn configuration_is_written_and_its_changes_are_counted() {
        let mut driver = Driver::new();
        driver.write(0x108, 7);
        driver.transport.write(0x102, &[1]);
        let writes = std::mem::take(&mut driver.seen.lock().unwrap().config_writes);
        assert_eq!(writes, [(8, vec![7, 0, 0, 0]), (2, vec![1])]);
        let before = driver.read(0xfc);
        driver.transport.interrupt.signal_config_change();
        assert_ne!(driver.read(0xfc), before);
        assert_eq!(driver.read(0x60), 2, "configuration change");
        assert_eq!(driver.irqfd.read().unwrap(), 1);
    }

    #[test]
    fn steps_come_in_order_and_never_back() {
        let mut driver = Driver::new();
        for (written, seen) in [
            (2, 0),
            (8, 0),
            (4, 0),
            (1, 1),
            (2, 1),
            (9, 1),
            (3, 3),
            (1, 3),
        ] {
            driver.write(0x70, written);
            assert_eq!(driver.read(0x70), seen, "after {written}");
        }
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, 3 | 8 | 4);
        assert_eq!(driver.read(0x70) & 0xf, 15, "several steps at once");
        // Queue 0 was not set up.
        assert_eq!(driver.read(0x70), 15 | DEVICE_NEEDS_RESET);
        assert_eq!(driver.seen.lock().unwrap().resets, 1);
        driver.write(0x70, 0x80);
        assert_eq!(driver.read(0x70), 0x80 | 15 | DEVICE_NEEDS_RESET);
        driver.write(0x70, 0);
        driver.write(0x70, 0x80);
        driver.write(0x70, 0x81);
        driver.write(0x70, 1);
        assert_eq!(driver.read(0x70), 0x80, "a driver that failed stays so");
    }

    #[test]
    fn a_running_queue_cannot_be_moved() {
        let mut driver = Driver::new();
        driver.agree_on(VERSION_1);
        driver.set_up_queue(0);
        driver.write(0x70, 15);
        for offset in (0x20..0x100).step_by(4).filter(|&offset| offset != 0x70) {
            driver.write(offset, 0x8000);
        }
        driver.write(0x30, 0);
        driver.write(0x44, 0);
        assert_eq!((driver.read(0x44), driver.read(0x70)), (1, 15));
        let seen = driver.seen.lock().unwrap().activation.take().unwrap();
        let queue = &seen.queues[0].as_ref().unwrap().queue;
        let addresses = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
        assert_eq!((queue.size(), addresses), (8, [0x1000, 0x2000, 0x3000]));
        assert_eq!(seen.features, VERSION_1);
    }

    /// What a driver may write, most of it where it matters.
    fn write() -> impl Strategy<Value = (u64, u32)> {
        let registers = [
            0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x44, 0x50, 0x64, 0x80, 0x84, 0x90, 0x94, 0xa0,
            0xa4, 0xac, 0xc0,
        ];
        let register = prop_oneof![
            proptest::sample::select(registers.to_vec()),
            (0_u64..0x48).prop_map(|word| word * 4)
        ];
        let value = prop_oneof![
            0_u32..4,
            Just(1 << 5),
            Just(0x1000),
            Just(0x2000),
            any::<u32>()
        ];
        let status = prop_oneof![
            Just(0_u32),
            Just(1),
            Just(3),
            Just(11),
            Just(11),
            Just(15),
            Just(15),
            any::<u32>()
        ];
        prop_oneof![(register, value), (Just(0x70), status)]
    }

    proptest! {
        #[test]
        fn any_writes_leave_it_consistent_and_a_reset_leaves_nothing(
            writes in proptest::collection::vec(write(), 0..120),
        ) {
            let mut driver = Driver::new();
            let offered = driver.transport.offered_features();
            let mut agreed = None;
            for (offset, value) in writes {
                driver.write(offset, value);
                let status = driver.read(0x70);
                prop_assert!([0, 1, 3, 11, 15].contains(&(status & 0xf)) && status < 0x100);
                let features = driver.transport.driver_features;
                if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                    agreed = None;
                } else {
                    prop_assert!(features & !offered == 0 && features & VERSION_1 != 0);
                    prop_assert_eq!(*agreed.get_or_insert(features), features);
                }
                let runs = status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && status & DEVICE_NEEDS_RESET == 0;
                let seen = driver.seen.lock().unwrap();
                prop_assert_eq!(seen.activation.is_some(), runs);
                for active in seen.activation.iter().flat_map(|seen| seen.queues.iter().flatten()) {
                    prop_assert!(active.queue.is_valid(&driver.transport.memory));
                }
            }
            driver.write(0x70, 0);
            let (mut fresh, generation) = (Driver::new(), 0xfc);
            for queue in [0, 1, 2] {
                for driver in [&mut driver, &mut fresh] {
                    driver.write(0x30, queue);
                }
                for offset in (0..0x100).step_by(4).filter(|&offset| offset != generation) {
                    prop_assert_eq!(driver.read(offset), fresh.read(offset), "register {:#x}", offset);
                }
            }
            driver.agree_on(VERSION_1);
            driver.set_up_queue(0);
            driver.write(0x70, 15);
            prop_assert_eq!(driver.read(0x70), 15);
        }

        #[test]
        fn any_accesses_are_survived(
            accesses in proptest::collection::vec((any::<bool>(), 0_u64..0x140, any::<u32>(), 1_usize..9), 0..200),
        ) {
            let mut driver = Driver::new();
            for (write, offset, value, bytes) in accesses {
                let mut data = u64::from(value % 32).to_le_bytes();
                if write {
                    driver.transport.write(offset, &data[..bytes]);
                } else {
                    driver.transport.read(offset, &mut data[..bytes]);
                }
            }
        }
    }
}
