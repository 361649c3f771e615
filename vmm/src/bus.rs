//! Which device answers at which address. The sole owner of address and interrupt allocation.
//!
//! Must not know what a device is, nor KVM.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

/// What a write asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: go on.
    None,
    /// Reset the machine.
    Reset,
    /// Switch the machine off.
    PowerOff,
}

/// A device on one of the two buses. Called by vCPU threads; offsets count from the start of its range.
pub trait BusDevice: Send {
    /// The guest reads; `data` holds 0xff in every byte until the device says otherwise.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// A device that several vCPUs may reach.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a device cannot be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The ranges overlap, or this one is empty or wraps around.
    #[error("range of {bytes} bytes at {base:#x} is taken or not a range")]
    Range {
        /// Where it starts.
        base: u64,
        /// How long it is.
        bytes: u64,
    },
    /// The guest's address space is full.
    #[error("no address is left for {0} bytes of device memory")]
    NoMemory(u64),
    /// The window for devices is full.
    #[error("no address is left for a device of {0} bytes")]
    NoAddress(u64),
    /// All interrupts are taken.
    #[error("no interrupt is left for another device")]
    NoInterrupt,
}

/// An address space of devices. Its lock is held to look a device up, not while the device answers: one that
/// takes its time keeps nobody from the others.
#[derive(Default)]
struct Space {
    /// By start: length and device.
    devices: RwLock<BTreeMap<u64, (u64, SharedDevice)>>,
}

impl Space {
    fn insert(&self, base: u64, bytes: u64, device: SharedDevice) -> Result<(), BusError> {
        let refused = BusError::Range { base, bytes };
        let end = base
            .checked_add(bytes)
            .ok_or(BusError::Range { base, bytes })?;
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        let before = devices.range(..end).next_back();
        let free = before.is_none_or(|(&other, &(length, _))| other + length <= base);
        if bytes == 0 || !free {
            return Err(refused);
        }
        devices.insert(base, (bytes, device));
        Ok(())
    }

    fn remove(&self, base: u64) {
        let devices = self.devices.write();
        devices
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base);
    }

    /// The device that holds all of an access, and the offset in it.
    fn find(&self, address: u64, bytes: usize) -> Option<(u64, SharedDevice)> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, (length, device)) = devices.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(u64::try_from(bytes).ok()?)?;
        (end <= *length).then(|| (offset, device.clone()))
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            // A device whose thread panicked has ended the process already: the lock's poison says nothing.
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            device.read(offset, data);
        }
    }

    fn write(&self, address: u64, data: &[u8]) -> Effect {
        let Some((offset, device)) = self.find(address, data.len()) else {
            return Effect::None;
        };
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset, data)
    }
}

/// Address and interrupt of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Start of its registers.
    pub base: u64,
    /// Bytes of its registers.
    pub bytes: u64,
    /// Its interrupt, a pin of the IOAPIC.
    pub interrupt: u32,
}

/// Ports, memory-mapped registers and interrupts. Places are allocated before the vCPUs run; devices may come and
/// go at any time.
pub struct Bus {
    ports: Space,
    memory: Space,
    next_address: u64,
    end_of_window: u64,
    next_memory: u64,
    interrupts: RangeInclusive<u32>,
}

impl Bus {
    /// A bus without devices, that hands out registers from the window at `base`, device memory from
    /// `memory` on, and these interrupts.
    pub fn new(base: u64, bytes: u64, memory: u64, interrupts: RangeInclusive<u32>) -> Self {
        Self {
            ports: Space::default(),
            memory: Space::default(),
            next_address: base,
            end_of_window: base.saturating_add(bytes),
            next_memory: memory,
            interrupts,
        }
    }

    /// Finds a place and an interrupt for a device with `bytes` of registers.
    pub fn allocate(&mut self, bytes: u64) -> Result<Allocation, BusError> {
        let base = self.next_address;
        let end = base
            .checked_add(bytes)
            .filter(|&end| end <= self.end_of_window)
            .ok_or(BusError::NoAddress(bytes))?;
        let interrupt = self.interrupts.next().ok_or(BusError::NoInterrupt)?;
        self.next_address = end;
        Ok(Allocation {
            base,
            bytes,
            interrupt,
        })
    }

    /// Finds guest-physical addresses above RAM for `bytes` of memory that a device shows to the guest, a
    /// multiple of `alignment`, which is a power of two.
    pub fn allocate_memory(&mut self, bytes: u64, alignment: u64) -> Result<u64, BusError> {
        let base = self.next_memory.checked_next_multiple_of(alignment);
        let range = base.and_then(|base| Some((base, base.checked_add(bytes)?)));
        let (base, end) = range.ok_or(BusError::NoMemory(bytes))?;
        self.next_memory = end;
        Ok(base)
    }

    /// Puts a device on ports.
    pub fn add_ports(&self, base: u16, count: u16, device: SharedDevice) -> Result<(), BusError> {
        self.ports.insert(base.into(), count.into(), device)
    }

    /// Puts a device where [`Bus::allocate`] said.
    pub fn add_memory(&self, place: &Allocation, device: SharedDevice) -> Result<(), BusError> {
        self.memory.insert(place.base, place.bytes, device)
    }

    /// Takes a device away, if one is there. An access that has begun ends first or last, as it happens.
    pub fn remove_memory(&self, place: &Allocation) {
        self.memory.remove(place.base);
    }

    /// The guest reads a port. Nobody there: 0xff.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    /// The guest writes a port. Nobody there: nothing happens.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Effect {
        self.ports.write(port.into(), data)
    }

    /// The guest reads a register. Nobody there: 0xff.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.memory.read(address, data);
    }

    /// The guest writes a register. Nobody there: nothing happens.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> Effect {
        self.memory.write(address, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
            self.0.push((offset, data.to_vec()));
            Effect::Reset
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(Vec::new())))
    }

    #[test]
    fn accesses_reach_the_device_that_holds_them_whole() {
        let bus = Bus::new(0x1000, 0x1000, 0, 5..=6);
        let device = echo();
        bus.add_ports(0x60, 5, device.clone()).unwrap();
        let mut byte = [0];
        bus.read_port(0x64, &mut byte);
        assert_eq!(byte, [4]);
        assert_eq!(bus.write_port(0x63, &[9]), Effect::Reset);
        assert_eq!(device.lock().unwrap().0, [(3, vec![9])]);

        let mut word = [0, 0];
        bus.read_port(0x64, &mut word);
        assert_eq!(word, [0xff, 0xff], "the second byte is beyond the device");
        bus.read_port(0x5f, &mut byte);
        assert_eq!(byte, [0xff]);
        assert_eq!(bus.write_port(0x65, &[0]), Effect::None);
        assert_eq!(bus.write_memory(u64::MAX, &[0; 8]), Effect::None);
    }

    #[test]
    fn ranges_must_not_overlap() {
        let bus = Bus::new(0x1000, 0x1000, 0, 5..=6);
        bus.add_ports(0x60, 5, echo()).unwrap();
        for (base, count) in [(0x60, 1), (0x5f, 2), (0x64, 1), (0x50, 0x40), (0x10, 0)] {
            let result = bus.add_ports(base, count, echo());
            assert!(matches!(result, Err(BusError::Range { .. })), "{base:#x}");
        }
        bus.add_ports(0x65, 1, echo()).unwrap();
        bus.add_ports(0x5f, 1, echo()).unwrap();
    }

    #[test]
    fn the_window_and_the_interrupts_run_out() {
        let mut bus = Bus::new(0x1000, 0x3000, 0, 5..=6);
        let first = bus.allocate(0x1000).unwrap();
        let second = bus.allocate(0x1000).unwrap();
        assert_eq!((first.base, first.interrupt), (0x1000, 5));
        assert_eq!((second.base, second.interrupt), (0x2000, 6));
        assert_eq!(bus.allocate(0x1000), Err(BusError::NoInterrupt));
        let mut small = Bus::new(0x1000, 0x1000, 0, 5..=6);
        assert_eq!(small.allocate(0x1001), Err(BusError::NoAddress(0x1001)));
    }

    proptest! {
        #[test]
        fn whatever_is_allocated_does_not_overlap(
            asked in proptest::collection::vec((1_u64..1 << 40, 0_u32..34, any::<bool>()), 1..40),
        ) {
            let mut bus = Bus::new(0x1000, 0x10_0000, 1 << 32, 5..=23);
            let (mut taken, mut interrupts) = (Vec::new(), Vec::new());
            for (bytes, alignment, registers) in asked {
                let (base, bytes) = if registers {
                    let Ok(place) = bus.allocate(bytes % 0x1_0000 + 1) else { continue };
                    interrupts.push(place.interrupt);
                    (place.base, place.bytes)
                } else {
                    let Ok(base) = bus.allocate_memory(bytes, 1 << alignment) else { continue };
                    prop_assert!(base.is_multiple_of(1 << alignment));
                    (base, bytes)
                };
                taken.push((base, base + bytes));
            }
            taken.sort_unstable();
            prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{taken:x?}");
            let count = interrupts.len();
            interrupts.sort_unstable();
            interrupts.dedup();
            prop_assert_eq!(interrupts.len(), count);
        }
    }
}
