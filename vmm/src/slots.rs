//! Virtio devices on the bus, with the interrupt and the kicks that KVM carries, and the places where some may come and
//! go while the guest runs. A place keeps its address and its interrupt: what follows a device there cannot clash with
//! another. Must not know any particular device.

use crate::{
    arch::x86_64::hotplug::{MAX_PLACES, place_name},
    bus::{Allocation, Bus},
    devices::virtio::{
        VirtioDevice,
        mmio::{QUEUE_NOTIFY, REGISTERS_BYTES, Transport},
    },
    event_loop::Threads,
    machine::MachineError,
    vm::Vm,
};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A virtio device that the guest can reach.
pub struct Plugged {
    transport: Arc<Mutex<Transport>>,
    irqfd: Arc<EventFd>,
    place: Allocation,
}

/// What a device is plugged into.
pub struct Board<'a> {
    /// Carries its interrupt and its kicks.
    pub vm: &'a Vm,
    /// Where its registers are.
    pub bus: &'a Bus,
    /// Where its queues are.
    pub memory: &'a GuestMemoryMmap,
    /// Where its threads come from.
    pub threads: &'a Threads,
}

impl Board<'_> {
    /// Puts `device` behind a transport at `place`.
    pub fn plug(
        &self,
        place: Allocation,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Plugged, MachineError> {
        let irqfd = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(MachineError::Event)?);
        let (memory, threads) = (self.memory.clone(), self.threads.clone());
        let transport = Transport::new(device, memory, threads, irqfd.clone())?;
        let plugged = Plugged {
            transport: Arc::new(Mutex::new(transport)),
            irqfd,
            place,
        };
        let connected = plugged.connect(self.vm, self.bus);
        if connected.is_err() {
            plugged.disconnect(self.vm);
        }
        connected.map(|()| plugged)
    }
}

impl Plugged {
    /// Takes it away: registers, kicks, interrupt, its thread and its files.
    pub fn remove(self, vm: &Vm, bus: &Bus) {
        bus.remove_memory(&self.place);
        self.disconnect(vm);
        let mut transport = self
            .transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // A vCPU whose access began before drops the transport as soon as that ends: the thread must not wait for it.
        transport.reset();
    }

    fn connect(&self, vm: &Vm, bus: &Bus) -> Result<(), MachineError> {
        vm.attach_interrupt(&self.irqfd, self.place.interrupt)?;
        let transport = self
            .transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (index, kick) in (0..).zip(transport.kicks()) {
            vm.attach_kick(kick, self.place.base + QUEUE_NOTIFY, index)?;
        }
        drop(transport);
        Ok(bus.add_memory(&self.place, self.transport.clone())?)
    }

    fn disconnect(&self, vm: &Vm) {
        vm.detach_interrupt(&self.irqfd, self.place.interrupt);
        let transport = self
            .transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (index, kick) in (0..).zip(transport.kicks()) {
            vm.detach_kick(kick, self.place.base + QUEUE_NOTIFY, index);
        }
    }
}

/// The places, and what stands in each.
pub struct Slots<T> {
    places: Vec<(Allocation, Option<T>)>,
}

impl<T> Slots<T> {
    /// As many places as the bus still has interrupts for, [`MAX_PLACES`] at the most.
    pub fn reserve(bus: &mut Bus) -> Self {
        let places = (0..MAX_PLACES).map_while(|_| bus.allocate(REGISTERS_BYTES).ok());
        Self {
            places: places.map(|place| (place, None)).collect(),
        }
    }

    /// Where the places are.
    pub fn allocations(&self) -> Vec<Allocation> {
        self.places.iter().map(|(place, _)| *place).collect()
    }

    /// A place where nothing stands, and its number.
    pub fn free(&self) -> Option<(usize, Allocation)> {
        let mut places = self.places.iter().enumerate();
        places.find_map(|(index, (place, content))| content.is_none().then_some((index, *place)))
    }

    /// Fills the free place with this number, and names it.
    pub fn fill(&mut self, index: usize, content: T) -> String {
        if let Some((_, free)) = self.places.get_mut(index) {
            *free = Some(content);
        }
        place_name(index)
    }

    /// Empties the place of this name, and gives its number and what stood there.
    pub fn empty(&mut self, name: &str) -> Option<(usize, T)> {
        let mut places = self.places.iter_mut().enumerate();
        let (index, (_, content)) = places.find(|(index, _)| place_name(*index) == name)?;
        Some((index, content.take()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{BusDevice, Effect};
    use proptest::prelude::*;

    struct Number(u8);

    impl BusDevice for Number {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }

        fn write(&mut self, _offset: u64, _data: &[u8]) -> Effect {
            Effect::None
        }
    }

    #[test]
    fn places_end_with_the_interrupts() {
        let mut bus = Bus::new(0x1000, 0x10_0000, 0, 5..=7);
        let slots = Slots::<()>::reserve(&mut bus);
        assert_eq!(slots.allocations().len(), 3);
        let mut bus = Bus::new(0x1000, 0x10_0000, 0, 5..=23);
        let slots = Slots::<()>::reserve(&mut bus);
        assert_eq!(slots.allocations().len(), MAX_PLACES);
    }

    proptest! {
        /// Any sequence of attaching and detaching: no two devices share a place, each is reached at its own, and
        /// what is gone is neither reached nor kept.
        #[test]
        fn devices_come_and_go_without_overlap_or_leak(
            steps in proptest::collection::vec((any::<bool>(), 0_usize..MAX_PLACES + 1), 1..80),
        ) {
            let mut bus = Bus::new(0x1000, 0x10_0000, 0, 5..=23);
            let mut slots = Slots::reserve(&mut bus);
            let mut there: Vec<(String, Allocation, u8, std::sync::Weak<Mutex<Number>>)> = Vec::new();
            for (number, (attach, which)) in (0_u8..).zip(steps) {
                if attach {
                    let Some((index, place)) = slots.free() else {
                        prop_assert_eq!(there.len(), MAX_PLACES);
                        continue;
                    };
                    let device = Arc::new(Mutex::new(Number(number)));
                    bus.add_memory(&place, device.clone()).unwrap();
                    let name = slots.fill(index, place);
                    prop_assert!(there.iter().all(|other| other.0 != name && other.1 != place));
                    there.push((name, place, number, Arc::downgrade(&device)));
                } else {
                    let name = place_name(which);
                    let known = there.iter().position(|device| device.0 == name);
                    let emptied = slots.empty(&name);
                    prop_assert_eq!(known.is_some(), emptied.is_some());
                    let (Some(known), Some((_, place))) = (known, emptied) else { continue };
                    bus.remove_memory(&place);
                    let (_, _, _, device) = there.swap_remove(known);
                    prop_assert!(device.upgrade().is_none(), "nothing keeps it");
                }
                for place in slots.allocations() {
                    let mut data = [0];
                    bus.read_memory(place.base, &mut data);
                    let expected = there.iter().find(|device| device.1 == place);
                    prop_assert_eq!(data[0], expected.map_or(0xff, |device| device.2));
                }
            }
        }
    }
}
