//! What fuzzers run: one function for each parser of bytes that come from a guest or from the parent, and one for
//! each whole device, whose driver does what the bytes say ([`driver`]).
//!
//! Only built for tests and by the fuzzers of `vmm/fuzz`. Any bytes must be survived: no panic, and an end of every
//! thread when its device is reset.

mod bytes;
mod devices;
mod driver;

use self::{bytes::Bytes, devices::Subject, driver::Driver};
use crate::{
    arch::x86_64::kernel::{self, Kernel},
    devices::virtio::{block::request::Request as BlockRequest, vsock},
};
use std::{fs::File, io::Write};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use walnut_vmm_api::{Message, Request};

/// A name, and what is done with the fuzzer's bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Requests of one announcer, so that more bytes don't mean more time.
const MAX_ANNOUNCEMENTS: usize = 100;

/// All targets, each named as its file in `vmm/fuzz/fuzz_targets`.
pub const TARGETS: &[Target] = &[
    ("control_message", control_message),
    ("kernel_image", kernel_image),
    ("vsock_packet", vsock_packet),
    ("vsock_handshake", vsock_handshake),
    ("block_request", block_request),
    ("fs_message", fs_message),
    ("fs_announcement", fs_announcement),
    ("balloon_report", balloon_report),
    ("transport", transport),
    ("device_balloon", device_balloon),
    ("device_block", device_block),
    ("device_console", device_console),
    ("device_fs", device_fs),
    ("device_mem", device_mem),
    ("device_net", device_net),
    ("device_pmem", device_pmem),
    ("device_vsock", device_vsock),
];

/// Packets of the parent, decoded and checked.
pub fn control_message(data: &[u8]) {
    if let Ok(Request::Boot(config)) = Request::decode(data) {
        let _ = config.validate(usize::from(data.len().to_le_bytes()[0]));
    }
    let _ = Message::decode(data);
}

/// A file that is given as the kernel.
pub fn kernel_image(data: &[u8]) {
    let _ = kernel::entry_of_notes(data);
    let _ = kernel::Headers::parse(data);
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::memfd_create("kernel", flags) else {
        return;
    };
    let mut file = File::from(fd);
    // The bytes as they are, and behind a header that is in order.
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    header.extend([[0; 8], 64_u64.to_le_bytes(), [0; 8]].concat());
    header.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for prefix in [&[][..], &header[..]] {
        let whole = [prefix, data].concat();
        if file.set_len(0).is_ok() && file.write_all(&whole).is_ok() {
            let _ = Kernel::open(&file);
        }
    }
}

/// Packets that one connection of the socket device gets, one after the other.
pub fn vsock_packet(data: &[u8]) {
    vsock::fuzz::packets(data);
}

/// What a host program says before it is connected.
pub fn vsock_handshake(data: &[u8]) {
    vsock::fuzz::handshake(data);
}

/// A block request whose descriptors and bytes are the fuzzer's.
pub fn block_request(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let memory = driver::memory();
    let Ok(mut queue) = Queue::new(driver::QUEUE_ENTRIES) else {
        return;
    };
    driver::place_by_hand(&mut queue);
    let table = driver::Places::of_queue(0);
    let count = u16::from(bytes.byte() % 8) + 1;
    for index in 0..count {
        driver::put_descriptor(&memory, table.descriptors, index, &mut bytes);
    }
    driver::put(&memory, table.available, &[0, 0, 1, 0, 0, 0]);
    driver::put(&memory, driver::BUFFERS, bytes.rest());
    if let Ok(mut chains) = queue.iter(&memory)
        && let Some(chain) = chains.next()
    {
        let _ = BlockRequest::parse(&memory, chain);
    }
}

/// One FUSE message, with room for an answer.
pub fn fs_message(data: &[u8]) {
    one_request(devices::share(), devices::SHARE_REQUESTS, data);
}

/// Requests of the guest's announcer of host changes, one after another, and of others between them.
pub fn fs_announcement(data: &[u8]) {
    let mut driver = Driver::new(devices::share());
    driver.start();
    let mut request = |message: &[u8]| {
        driver.offer_request(devices::SHARE_REQUESTS, message);
        driver.kick(devices::SHARE_REQUESTS);
    };
    devices::become_announcer()
        .iter()
        .for_each(|message| request(message));
    let mut bytes = Bytes::new(data);
    for _ in 0..MAX_ANNOUNCEMENTS {
        if bytes.is_empty() {
            break;
        }
        request(&devices::announcement(&mut bytes));
    }
    driver.finish();
}

/// One report of pages that the guest doesn't use: sixteen bytes for each descriptor.
pub fn balloon_report(data: &[u8]) {
    let mut driver = Driver::new(devices::balloon());
    driver.start();
    let mut bytes = Bytes::new(data);
    driver.offer_any(2, &mut bytes);
    driver.kick(2);
    driver.finish();
}

/// Registers and rings, of the simplest device.
pub fn transport(data: &[u8]) {
    whole(devices::entropy(), data);
}

/// The balloon.
pub fn device_balloon(data: &[u8]) {
    whole(devices::balloon(), data);
}

/// A disk.
pub fn device_block(data: &[u8]) {
    whole(devices::disk(), data);
}

/// The console.
pub fn device_console(data: &[u8]) {
    whole(devices::console(), data);
}

/// The memory device.
pub fn device_mem(data: &[u8]) {
    whole(devices::memory(), data);
}

/// A network interface, with a frame that waits.
pub fn device_net(data: &[u8]) {
    whole(devices::network(), data);
}

/// A persistent memory.
pub fn device_pmem(data: &[u8]) {
    whole(devices::persistent(), data);
}

/// The shared directory.
pub fn device_fs(data: &[u8]) {
    whole(devices::share(), data);
}

/// The socket device, with host programs that have connected.
pub fn device_vsock(data: &[u8]) {
    whole(devices::socket(), data);
}

fn whole(subject: Subject, data: &[u8]) {
    let mut driver = Driver::new(subject);
    driver.follow(&mut Bytes::new(data));
    driver.finish();
}

fn one_request(subject: Subject, queue: u16, data: &[u8]) {
    let mut driver = Driver::new(subject);
    driver.start();
    driver.offer_request(queue, data);
    driver.kick(queue);
    driver.finish();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{panic, process, sync::Once, thread};

    /// A panic of a device's thread would be lost when the thread is joined.
    fn no_device_may_panic() {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |panic| {
                previous(panic);
                let name = thread::current().name().unwrap_or_default().to_owned();
                // Tests are named by their path, and their panics are failures.
                if !name.contains("::") && name != "main" {
                    process::abort();
                }
            }));
        });
    }

    /// Numbers that are the same each time (xorshift).
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn bytes(&mut self) -> Vec<u8> {
            let length = self.next() % 600;
            (0..length).map(|_| self.next().to_le_bytes()[3]).collect()
        }
    }

    fn survives(name: &str, inputs: u32) {
        no_device_may_panic();
        let (_, target) = TARGETS.iter().find(|target| target.0 == name).unwrap();
        target(&[]);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for _ in 0..inputs {
            target(&random.bytes());
        }
    }

    #[test]
    fn parsers_survive_any_bytes() {
        for name in [
            "control_message",
            "kernel_image",
            "vsock_packet",
            "vsock_handshake",
            "block_request",
        ] {
            survives(name, 1000);
        }
    }

    #[test]
    fn messages_survive_any_bytes() {
        for name in ["fs_message", "fs_announcement", "balloon_report"] {
            survives(name, 100);
        }
    }

    #[test]
    fn the_transport_survives_any_driver() {
        survives("transport", 300);
    }

    #[test]
    fn the_balloon_survives_any_driver() {
        survives("device_balloon", 150);
    }

    #[test]
    fn a_disk_survives_any_driver() {
        survives("device_block", 150);
    }

    #[test]
    fn consoles_and_memories_survive_any_driver() {
        for name in ["device_console", "device_mem", "device_pmem"] {
            survives(name, 50);
        }
    }

    #[test]
    fn a_network_survives_any_driver() {
        survives("device_net", 150);
    }

    #[test]
    fn a_share_survives_any_driver() {
        survives("device_fs", 150);
    }

    #[test]
    fn the_socket_device_survives_any_driver() {
        survives("device_vsock", 150);
    }
}
