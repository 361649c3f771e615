//! The event device (ACPI 6.5, section 5.6.9): how a running guest hears that its power button was pressed and that
//! vCPUs or devices came or went. What its registers mean is `arch::x86_64::hotplug`'s.

use crate::{
    arch::x86_64::hotplug::{CONTENTS, DEVICES_OFFSET, EVENTS_OFFSET, POWER_BUTTON, VCPUS_OFFSET},
    bus::{BusDevice, Effect},
};
use vmm_sys_util::eventfd::EventFd;

/// The device.
#[derive(Debug)]
pub struct EventDevice {
    events: u8,
    vcpus: u8,
    devices: u8,
    interrupt: EventFd,
}

impl EventDevice {
    /// In a machine with `vcpus` and no device that came later; writing `interrupt` raises its interrupt.
    pub fn new(vcpus: u8, interrupt: EventFd) -> Self {
        Self {
            events: 0,
            vcpus,
            devices: 0,
            interrupt,
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) {
        self.raise(POWER_BUTTON);
    }

    /// Says that there are `vcpus` now.
    pub fn set_vcpus(&mut self, vcpus: u8) {
        self.vcpus = vcpus;
        self.raise(CONTENTS);
    }

    /// Says that a device came to this place, or left it.
    pub fn set_device(&mut self, index: usize, present: bool) {
        let bit = 1_u8 << index;
        self.devices = self.devices & !bit | if present { bit } else { 0 };
        self.raise(CONTENTS);
    }

    /// Interrupts again for what the guest has not read: a guest that starts may have missed it.
    pub fn remind(&mut self) {
        if self.events != 0 {
            self.raise(0);
        }
    }

    fn raise(&mut self, event: u8) {
        self.events |= event;
        // Fails only when the counter is full, and then an interrupt is pending anyway.
        let _ = self.interrupt.write(1);
    }
}

impl BusDevice for EventDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [value] = data else {
            return data.fill(0);
        };
        *value = match u8::try_from(offset) {
            Ok(EVENTS_OFFSET) => std::mem::take(&mut self.events),
            Ok(VCPUS_OFFSET) => self.vcpus,
            Ok(DEVICES_OFFSET) => self.devices,
            _ => 0,
        };
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Effect {
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn read(device: &mut EventDevice, offset: u8) -> u8 {
        let mut data = [0xff];
        device.read(offset.into(), &mut data);
        data[0]
    }

    #[test]
    fn an_event_is_read_once_and_what_there_is_any_number_of_times() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut device = EventDevice::new(2, interrupt.try_clone().unwrap());
        device.press_power_button();
        device.set_vcpus(3);
        device.set_device(0, true);
        device.set_device(7, true);
        device.set_device(0, false);
        assert_eq!(interrupt.read().unwrap(), 5);
        device.remind();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut device, EVENTS_OFFSET), POWER_BUTTON | CONTENTS);
        for _ in 0..2 {
            assert_eq!(read(&mut device, EVENTS_OFFSET), 0);
            assert_eq!(read(&mut device, VCPUS_OFFSET), 3);
            assert_eq!(read(&mut device, DEVICES_OFFSET), 0x80);
        }
        device.remind();
        assert!(interrupt.read().is_err(), "nothing is left to read");
        let mut two = [0xff; 2];
        device.read(0, &mut two);
        assert_eq!(two, [0, 0], "registers are bytes");
        assert_eq!(device.write(1, &[9]), Effect::None);
        assert_eq!(read(&mut device, VCPUS_OFFSET), 3);
    }
}
