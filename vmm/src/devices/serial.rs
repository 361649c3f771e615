//! COM1: what the guest prints goes to the console's log.
//!
//! A 16550A by `vm-superio`; there is no input. Must not know where the log goes.

use super::console_log::ConsoleLog;
use crate::bus::{BusDevice, Effect};
use std::io;
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// COM1.
pub struct SerialPort {
    port: Serial<Irq, NoEvents, ConsoleLog>,
}

impl SerialPort {
    /// A port whose output goes to `log` and whose interrupt is raised by `irqfd`.
    pub fn new(log: ConsoleLog, irqfd: EventFd) -> Self {
        Self {
            port: Serial::new(Irq(irqfd), log),
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.port.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let (Ok(offset), &[byte]) = (u8::try_from(offset), data) {
            // Only the interrupt can fail, when its counter is full: then one is pending.
            let _ = self.port.write(offset, byte);
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    #[test]
    fn what_is_printed_reaches_the_log() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let log = ConsoleLog::new(File::from(fd));
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut port = SerialPort::new(log.clone(), irq.try_clone().unwrap());
        for byte in b"Linux version\npanic" {
            assert_eq!(port.write(DATA, &[*byte]), Effect::None);
        }
        assert_eq!(log.finish(), "Linux version\npanic");
        assert!(irq.read().is_err(), "interrupts are off");
        port.write(INTERRUPT_ENABLE, &[2]);
        port.write(DATA, b"x");
        assert!(irq.read().is_ok());
        let mut status = [0];
        port.read(LINE_STATUS, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for more");
    }
}
