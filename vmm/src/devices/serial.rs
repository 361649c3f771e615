//! COM1: what the guest prints goes to the console's log, and the last of it is kept for error messages.
//!
//! A 16550A by `vm-superio`; there is no input. The guest decides how much it prints, so the log is
//! bounded; a log that cannot be written must not stop the guest.

use crate::bus::{BusDevice, Effect};
use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
};
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;
use walnut_vmm_api::CONSOLE_TAIL_BYTES;

/// Bytes of the log at the most: a guest must not fill the host's disk.
const MAX_LOG_BYTES: usize = 4 * 1024 * 1024;
/// What stands at the end of a log that is full.
const LOG_FULL: &[u8] = b"\n[walnut-vmm: the console log is full, the rest is dropped]\n";
/// A line is written to the log when it ends, or when it has this many bytes.
const MAX_LINE_BYTES: usize = 256;

/// Where the output goes.
struct Console {
    log: File,
    line: Vec<u8>,
    tail: VecDeque<u8>,
    room_bytes: usize,
}

impl Console {
    fn put(&mut self, byte: u8) {
        if self.tail.len() == CONSOLE_TAIL_BYTES {
            self.tail.pop_front();
        }
        self.tail.push_back(byte);
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= MAX_LINE_BYTES {
            self.write_line();
        }
    }

    fn write_line(&mut self) {
        if self.room_bytes > 0 {
            self.room_bytes = self.room_bytes.saturating_sub(self.line.len());
            if self.room_bytes == 0 {
                self.line.extend(LOG_FULL);
            }
            // A full disk is not the guest's fault and not a reason to stop it.
            let _ = self.log.write_all(&self.line);
        }
        self.line.clear();
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.put(byte));
        Ok(bytes.len())
    }

    /// Called after each byte, so it does nothing: lines are written when they end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// COM1.
pub struct SerialPort {
    port: Serial<Irq, NoEvents, Console>,
}

impl SerialPort {
    /// A port whose output goes to `log` and whose interrupt is raised by `irqfd`.
    pub fn new(log: File, irqfd: EventFd) -> Self {
        let console = Console {
            log,
            line: Vec::new(),
            tail: VecDeque::new(),
            room_bytes: MAX_LOG_BYTES,
        };
        Self {
            port: Serial::new(Irq(irqfd), console),
        }
    }

    /// Writes what is left of an unfinished line to the log, and gives the last output as text.
    pub fn finish(&mut self) -> String {
        let console = self.port.writer_mut();
        console.write_line();
        String::from_utf8_lossy(console.tail.make_contiguous()).into_owned()
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
    use std::io::{Read, Seek, SeekFrom};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    fn port() -> (SerialPort, File, EventFd) {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let log = File::from(fd);
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(log.try_clone().unwrap(), irq.try_clone().unwrap());
        (port, log, irq)
    }

    fn print(port: &mut SerialPort, text: &[u8]) {
        for byte in text {
            assert_eq!(port.write(DATA, &[*byte]), Effect::None);
        }
    }

    fn logged(log: &mut File) -> Vec<u8> {
        let mut contents = Vec::new();
        log.seek(SeekFrom::Start(0)).unwrap();
        log.read_to_end(&mut contents).unwrap();
        contents
    }

    #[test]
    fn output_is_logged_by_lines_and_whole_in_the_end() {
        let (mut port, mut log, irq) = port();
        print(&mut port, b"Linux version\npanic");
        assert_eq!(logged(&mut log), b"Linux version\n");
        assert_eq!(port.finish(), "Linux version\npanic");
        assert_eq!(logged(&mut log), b"Linux version\npanic");
        assert!(irq.read().is_err(), "interrupts are off");
        port.write(INTERRUPT_ENABLE, &[2]);
        print(&mut port, b"x");
        assert!(irq.read().is_ok());
        let mut status = [0];
        port.read(LINE_STATUS, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for more");
    }

    #[test]
    fn the_tail_and_the_log_are_bounded() {
        let (mut port, mut log, _irq) = port();
        let line = [b'a'; 1023];
        for _ in 0..MAX_LOG_BYTES / 1024 + 10 {
            print(&mut port, &line);
            print(&mut port, b"\n");
        }
        print(&mut port, b"the end");
        let tail = port.finish();
        assert_eq!(tail.len(), CONSOLE_TAIL_BYTES);
        assert!(tail.ends_with("the end"));
        let log = logged(&mut log);
        assert!(log.len() < MAX_LOG_BYTES + 1024);
        assert!(log.ends_with(LOG_FULL));
    }
}
