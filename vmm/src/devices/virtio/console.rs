//! Console device (virtio 1.3, section 5.3), port 0 only: what the guest prints goes to the console's log, a
//! buffer at a time, where COM1 takes an exit for each byte.
//!
//! There is no input: the driver's receive buffers stay with the device, unused. No size, no second port.

use super::{ActivateError, Activation, DeviceType, VirtioDevice, queue};
use crate::{devices::console_log::ConsoleLog, event_loop::Worker};
use std::io::{self, Read};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

/// Receive and transmit queue of port 0. The driver fills the first with a page for each buffer, so it is short.
const QUEUE_SIZES: [u16; 2] = [2, 64];
const TRANSMIT_QUEUE: usize = 1;
/// Bytes of one buffer that are printed at the most; Linux offers a page at a time.
const MAX_BYTES: u64 = 64 * 1024;

/// The console device.
#[derive(Debug)]
pub struct Console {
    log: ConsoleLog,
    worker: Option<Worker>,
}

impl Console {
    /// A device whose output goes to `log`.
    pub fn new(log: ConsoleLog) -> Self {
        Self { log, worker: None }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_console_config`: all of it belongs to features that are not offered.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.log.clone();
        let index = TRANSMIT_QUEUE;
        let worker = queue::spawn("console", index, activation, move |memory, chain| {
            print(&mut log, memory, chain)
        });
        self.worker = Some(worker?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Appends the buffer to the log; one that lies outside memory says nothing.
fn print(
    log: &mut ConsoleLog,
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> u32 {
    if let Ok(reader) = chain.reader(memory) {
        // The log takes all there is, and guest memory can be read.
        let _ = io::copy(&mut reader.take(MAX_BYTES), log);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::super::mock_driver::{Driver, FIRST_BUFFER};
    use super::*;
    use std::fs::File;
    use vm_memory::{Bytes, GuestAddress};

    fn log() -> ConsoleLog {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        ConsoleLog::new(File::from(fd))
    }

    #[test]
    fn a_buffer_is_printed_whole_and_receive_buffers_are_kept() {
        let log = log();
        let mut console = Console::new(log.clone());
        let (mut driver, activation) = Driver::new(&QUEUE_SIZES, true);
        console.activate(activation).unwrap();
        driver.queues[0].offer(&[], &[(FIRST_BUFFER + 0x8000, 4096)]);
        let text = b"hello from the guest\n";
        driver
            .memory
            .write_slice(text, GuestAddress(FIRST_BUFFER))
            .unwrap();
        driver.queues[1].offer(&[(FIRST_BUFFER, 6), (FIRST_BUFFER + 6, 15)], &[]);
        assert_eq!(driver.wait_used(1).1, 0);
        // Outside memory, and then a buffer that shows that the device goes on.
        driver.queues[1].offer(&[(u64::MAX - 5, 100)], &[]);
        driver.queues[1].offer(&[(FIRST_BUFFER, 5)], &[]);
        driver.wait_used(1);
        driver.wait_used(1);
        console.reset();
        assert_eq!(log.finish(), "hello from the guest\nhello");
        assert_eq!(driver.queues[0].poll_used(), None);
    }

    #[test]
    fn one_buffer_prints_a_bounded_amount() {
        let log = log();
        let (mut driver, activation) = Driver::new(&QUEUE_SIZES, false);
        let mut console = Console::new(log.clone());
        console.activate(activation).unwrap();
        let pieces = vec![(FIRST_BUFFER, 1 << 20); 60];
        driver.queues[1].offer(&pieces, &[]);
        driver.wait_used(1);
        console.reset();
        assert!(log.finish().len() <= walnut_vmm_api::CONSOLE_TAIL_BYTES);
    }
}
