//! The device against a driver that plays the guest's FUSE client.

use super::{FileSystem, ShareServer};
use crate::devices::virtio::{
    VirtioDevice,
    mock_driver::{DEADLINE, Driver, FIRST_BUFFER},
};
use fuse_backend_rs::abi::fuse_abi::{
    EntryOut, ForgetIn, FsOptions, InHeader, InitIn, InitOut, Opcode, OpenIn, OpenOut, OutHeader,
    ReadIn, WriteIn,
};
use proptest::{option, prelude::*, test_runner::TestRunner};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::{cell::RefCell, fs, os::unix::fs::symlink, time::Instant};
use tempfile::TempDir;
use vm_memory::{ByteValued, Bytes, GuestAddress};

const HIPRIO: usize = 0;
const REQUEST: usize = 1;
const ROOT: u64 = 1;
const IN: u64 = FIRST_BUFFER;
const OUT: u64 = FIRST_BUFFER + 0x20_0000;

struct Client {
    driver: Driver,
    device: FileSystem,
    share: TempDir,
}

impl Client {
    fn start(event_idx: bool) -> Self {
        let share = TempDir::new().unwrap();
        let pending = ShareServer::before_jail(share.path().to_str().unwrap()).unwrap();
        let server = pending.after_jail(false, None).unwrap();
        let mut device = FileSystem::new("walnut", server, 1);
        let (driver, activation) = Driver::new(&[128, 512], event_idx);
        device.activate(activation).unwrap();
        Self {
            driver,
            device,
            share,
        }
    }

    /// Sends header, arguments and data in descriptors of their own; gives errno and what follows the
    /// header of the answer.
    fn call(&mut self, opcode: Opcode, node: u64, args: &[u8], data: &[u8]) -> (i32, Vec<u8>) {
        let header = Self::header(opcode, node, args.len() + data.len());
        let mut at = IN;
        let mut readable = Vec::new();
        for part in [header.as_slice(), args, data] {
            if !part.is_empty() {
                self.driver
                    .memory
                    .write_slice(part, GuestAddress(at))
                    .unwrap();
                readable.push((at, u32::try_from(part.len()).unwrap()));
                at += u64::try_from(part.len()).unwrap();
            }
        }
        let writable = [(OUT, 16), (OUT + 16, 0x1_0000), (OUT + 0x1_0010, 0x1_0000)];
        let head = self.driver.queues[REQUEST].offer(&readable, &writable);
        let (used, length) = self.driver.wait_used(REQUEST);
        assert_eq!(used, head);
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.driver
            .memory
            .read_slice(&mut bytes, GuestAddress(OUT))
            .unwrap();
        let answer: OutHeader = take(&bytes);
        assert_eq!((answer.len, answer.unique), (length, 7));
        (-answer.error, bytes.split_off(size_of::<OutHeader>()))
    }

    fn header(opcode: Opcode, node: u64, payload: usize) -> InHeader {
        InHeader {
            len: u32::try_from(size_of::<InHeader>() + payload).unwrap(),
            opcode: opcode as u32,
            unique: 7,
            nodeid: node,
            ..InHeader::default()
        }
    }

    fn init(&mut self) -> InitOut {
        let init = InitIn {
            major: 7,
            minor: 31,
            max_readahead: 1 << 17,
            flags: !(1 << 30),
        };
        let (error, body) = self.call(Opcode::Init, 0, init.as_slice(), &[]);
        assert_eq!(error, 0);
        take(&body)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let name = format!("{name}\0");
        match self.call(Opcode::Lookup, parent, &[], name.as_bytes()) {
            (0, body) => Ok(take(&body)),
            (error, _) => Err(error),
        }
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let open = OpenIn {
            flags: u32::try_from(flags).unwrap(),
            ..OpenIn::default()
        };
        match self.call(Opcode::Open, node, open.as_slice(), &[]) {
            (0, body) => Ok(take::<OpenOut>(&body).fh),
            (error, _) => Err(error),
        }
    }
}

fn take<T: ByteValued>(bytes: &[u8]) -> T {
    let mut value = T::zeroed();
    value
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

#[test]
fn a_file_is_read_and_written() {
    for event_idx in [false, true] {
        let mut client = Client::start(event_idx);
        fs::create_dir(client.share.path().join("etc")).unwrap();
        let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        fs::write(client.share.path().join("etc/motd"), &content).unwrap();
        let options = client.init();
        assert!(options.max_write >= 1 << 20, "{options:?}");
        let enabled = FsOptions::from_bits_truncate(options.flags.into());
        let refused = FsOptions::WRITEBACK_CACHE | FsOptions::ZERO_MESSAGE_OPEN;
        assert!(!enabled.intersects(refused), "{enabled:?}");

        let directory = client.lookup(ROOT, "etc").unwrap();
        let file = client.lookup(directory.nodeid, "motd").unwrap();
        assert_eq!((file.attr.size, file.entry_valid), (400_000, 1));
        let handle = client.open(file.nodeid, libc::O_RDWR).unwrap();
        let read = ReadIn {
            fh: handle,
            offset: 4000,
            size: 0x2_0000,
            flags: u32::try_from(libc::O_RDWR).unwrap(),
            ..ReadIn::default()
        };
        let (error, body) = client.call(Opcode::Read, file.nodeid, read.as_slice(), &[]);
        assert_eq!(error, 0);
        assert!(body == content[4000..4000 + 0x2_0000]);

        let write = WriteIn {
            fh: handle,
            size: 5,
            flags: read.flags,
            ..WriteIn::default()
        };
        let (error, _) = client.call(Opcode::Write, file.nodeid, write.as_slice(), b"hello");
        assert_eq!(error, 0);
        let written = fs::read(client.share.path().join("etc/motd")).unwrap();
        assert_eq!(&written[..5], b"hello");
    }
}

#[test]
fn nothing_outside_the_share_is_reached() {
    let mut client = Client::start(true);
    client.init();
    symlink("/etc", client.share.path().join("link")).unwrap();
    for name in ["", ".", "..", "../etc", "/etc", "link/passwd"] {
        assert_eq!(
            client.lookup(ROOT, name).unwrap_err(),
            libc::EINVAL,
            "{name}"
        );
    }
    let link = client.lookup(ROOT, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(client.lookup(link.nodeid, "passwd").is_err());
    assert!(client.open(link.nodeid, libc::O_RDONLY).is_err());
}

#[test]
fn special_files_are_shown_and_not_opened() {
    let mut client = Client::start(true);
    client.init();
    let fifo = client.share.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let node = client.lookup(ROOT, "fifo").unwrap();
    assert_eq!(node.attr.mode & libc::S_IFMT, libc::S_IFIFO);
    // Opening it would block the thread until the deadline of the test.
    assert_eq!(client.open(node.nodeid, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn what_the_guest_forgets_is_unknown_afterwards() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let forget = ForgetIn { nlookup: 1 };
    let header = Client::header(Opcode::Forget, node, size_of::<ForgetIn>());
    let memory = &client.driver.memory;
    memory.write_obj(header, GuestAddress(IN)).unwrap();
    let size = u64::try_from(size_of::<InHeader>()).unwrap();
    memory
        .write_slice(forget.as_slice(), GuestAddress(IN + size))
        .unwrap();
    client.driver.queues[HIPRIO].offer(&[(IN, 48)], &[]);
    let (_, written) = client.driver.wait_used(HIPRIO);
    assert_eq!(written, 0);
    assert!(client.open(node, libc::O_RDONLY).is_err());
}

#[test]
fn the_device_starts_again_after_a_reset() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    client.device.reset();
    let (driver, activation) = Driver::new(&[128, 512], true);
    client.driver = driver;
    client.device.activate(activation).unwrap();
    client.init();
    assert!(client.open(node, libc::O_RDONLY).is_err());
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    client.open(node, libc::O_RDONLY).unwrap();
}

#[test]
fn a_corrupt_queue_asks_for_a_reset_of_the_device() {
    let mut client = Client::start(true);
    client.driver.queues[REQUEST].publish(1000);
    client.driver.wait_interrupt(Instant::now() + DEADLINE);
    client.device.reset();
}

#[test]
fn the_configuration_is_the_tag_and_one_queue() {
    let client = Client::start(true);
    let mut config = [1; 44];
    client.device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"walnut\0\0");
    assert_eq!(&config[32..], &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

/// A piece of a chain: an address and a length, whatever they say.
fn piece() -> impl Strategy<Value = (u64, u32)> {
    prop_oneof![
        Just((0, 40)),
        (0u64..0x100_0100, 0u32..0x2000),
        (any::<u64>(), any::<u32>())
    ]
}

/// Any chain is used in the end, and the device still answers afterwards.
#[test]
fn any_request_is_survived() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"content").unwrap();
    fs::create_dir(client.share.path().join("directory")).unwrap();
    let file = client.lookup(ROOT, "file").unwrap().nodeid;
    let directory = client.lookup(ROOT, "directory").unwrap().nodeid;
    let request = (
        0u32..60,
        prop_oneof![Just(ROOT), Just(file), Just(directory), any::<u64>()],
        option::weighted(0.3, prop_oneof![0u32..200, any::<u32>()]),
        proptest::collection::vec(any::<u8>(), 0..200),
        proptest::collection::vec(piece(), 0..4),
        proptest::collection::vec(piece(), 0..4),
    );
    let client = RefCell::new(client);
    TestRunner::new(ProptestConfig {
        cases: 2000,
        // The device lives on from case to case.
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    })
    .run(&request, |(opcode, node, length, body, more, writable)| {
        let mut client = client.borrow_mut();
        let honest = Client::header(Opcode::Lookup, node, body.len());
        let header = InHeader {
            opcode,
            len: length.unwrap_or(honest.len),
            ..honest
        };
        let memory = &client.driver.memory;
        memory.write_obj(header, GuestAddress(IN)).unwrap();
        memory.write_slice(&body, GuestAddress(IN + 40)).unwrap();
        let mut readable = vec![(IN, 40 + u32::try_from(body.len()).unwrap())];
        readable.extend(more);
        // The rings stay as they are, or the test could not go on.
        let outside_rings = |(at, size): (u64, u32)| (at.saturating_add(OUT), size);
        let writable: Vec<_> = writable.into_iter().map(outside_rings).collect();
        let head = client.driver.queues[REQUEST].offer(&readable, &writable);
        prop_assert_eq!(client.driver.wait_used(REQUEST).0, head);
        Ok(())
    })
    .unwrap();
    client.into_inner().lookup(ROOT, "file").unwrap();
}
