//! The devices that hostile drivers are let loose on. A new device is one more function here and one more target.

use super::bytes::Bytes;
use crate::devices::{
    console_log::ConsoleLog,
    virtio::{
        SharedRegion, VirtioDevice,
        balloon::Balloon,
        block::Block,
        console::Console,
        fs::{FileSystem, ShareServer},
        mem::MemoryDevice,
        net::Network,
        pmem::Pmem,
        rng::Rng,
        vsock::Vsock,
    },
};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{
    any::Any,
    fs::{self, File},
    io::Write,
    os::unix::net::{UnixDatagram, UnixListener, UnixStream},
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{DiskConfig, FdSlot, NetworkConfig, connect_line};

/// Bytes of each file behind a device.
const FILE_BYTES: u64 = 1 << 20;
/// What the guest boots with, as far as it matters to its devices.
const RAM_MIB: u32 = 128;
/// Where devices show memory.
const ABOVE_RAM: SharedRegion = SharedRegion {
    address: GuestAddress(4 << 30),
    bytes: 512 << 20,
};
/// The interface's address.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The guest's context id.
const CID: u64 = 42;

/// A device, and what the host has for it.
pub(super) struct Subject {
    pub(super) device: Box<dyn VirtioDevice>,
    /// The beginning of a message that the device understands.
    pub(super) template: Vec<u8>,
    /// Lives as long as the device.
    pub(super) host: Box<dyn Any>,
}

impl Subject {
    fn new(device: impl VirtioDevice + 'static, template: Vec<u8>, host: impl Any) -> Self {
        Self {
            device: Box::new(device),
            template,
            host: Box::new(host),
        }
    }
}

/// The host of a fuzzer has files, sockets and threads: a device that cannot be made is no finding.
const HOST: &str = "the host has what a device needs";

pub(super) fn entropy() -> Subject {
    Subject::new(Rng::new(), Vec::new(), ())
}

pub(super) fn balloon() -> Subject {
    Subject::new(Balloon::new(RAM_MIB).expect(HOST), Vec::new(), ())
}

fn file(name: &str) -> File {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).expect(HOST));
    file.set_len(FILE_BYTES).expect(HOST);
    file
}

pub(super) fn disk() -> Subject {
    let config = DiskConfig::new(FdSlot(0), false, "fuzz");
    let disk = Block::new(file("disk"), &config).expect(HOST);
    // A read of the second sector.
    let request = [0, 1_u64].map(u64::to_le_bytes).concat();
    Subject::new(disk, request, ())
}

pub(super) fn persistent() -> Subject {
    let device = Pmem::new(file("pmem"), ABOVE_RAM);
    Subject::new(device, vec![0; 4], ())
}

pub(super) fn console() -> Subject {
    let log = ConsoleLog::new(file("console"));
    Subject::new(Console::new(log), b"printed\n".to_vec(), ())
}

pub(super) fn memory() -> Subject {
    let device = MemoryDevice::new(ABOVE_RAM, RAM_MIB);
    let control = device.control();
    control.set_size(RAM_MIB + 256).expect(HOST);
    // Plug one block at the region's start: operation, padding, address, blocks.
    let plug = [0, ABOVE_RAM.address.0, 1].map(u64::to_le_bytes).concat();
    Subject::new(device, plug, control)
}

pub(super) fn network() -> Subject {
    let (tap, host) = UnixDatagram::pair().expect(HOST);
    tap.set_nonblocking(true).expect(HOST);
    host.send(&[7; 200]).expect(HOST);
    let config = NetworkConfig {
        taps: vec![FdSlot(0)],
        vhost: Vec::new(),
        mac: MAC,
        mtu: 1500,
        receive_rate: None,
        transmit_rate: None,
    };
    let device = Network::of_socket(&config, tap.into()).expect(HOST);
    // A frame without offloads: twelve bytes of header, addresses, a type.
    let frame = [[0; 12].as_slice(), &[0xff; 12], &[8, 0], &[0x45; 40]].concat();
    Subject::new(device, frame, host)
}

pub(super) fn share() -> Subject {
    let directory = tempfile::TempDir::new().expect(HOST);
    fs::write(directory.path().join("file"), b"content").expect(HOST);
    let path = directory.path().to_str().expect(HOST);
    let pending = ShareServer::before_jail(path).expect(HOST);
    let server = pending.after_jail(false, None).expect(HOST);
    let lookup = fuse(FUSE_LOOKUP, (1, 0, 0), b"file\0");
    Subject::new(FileSystem::new("fuzz", server, 1), lookup, directory)
}

/// The queue of the shared directory's requests.
pub(super) const SHARE_REQUESTS: u16 = 1;
const FUSE_LOOKUP: u32 = 1;
const FUSE_SETATTR: u32 = 4;
const FUSE_MKNOD: u32 = 8;
const FUSE_MKDIR: u32 = 9;
const FUSE_UNLINK: u32 = 10;
const FUSE_RMDIR: u32 = 11;
const FUSE_RENAME: u32 = 12;
const FUSE_OPEN: u32 = 14;
const FUSE_GETXATTR: u32 = 22;
const FUSE_INIT: u32 = 26;
const FUSE_RENAME2: u32 = 45;
/// Group of an announcement for which no name exists.
const NO_NAME: u32 = 0x7761_6c30;
/// The guest's thread that announces.
const ANNOUNCER: u32 = 4711;

/// A message: its operation, its node, group and process, and its body.
fn fuse(operation: u32, (node, group, process): (u64, u32, u32), body: &[u8]) -> Vec<u8> {
    const HEADER_BYTES: usize = 40;
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let front = [length, operation, 7, 0].map(u32::to_le_bytes).concat();
    let back = [0, group, process, 0].map(u32::to_le_bytes).concat();
    [&front[..], &node.to_le_bytes(), &back, body].concat()
}

/// What the guest's kernel says first, and then its announcer.
pub(super) fn become_announcer() -> [Vec<u8>; 2] {
    let mut init = [7, 38, 1 << 17, u32::MAX].map(u32::to_le_bytes).concat();
    init.resize(64, 0);
    let attribute = [&[0; 8][..], b"trusted.walnut.announcer\0"].concat();
    [
        fuse(FUSE_INIT, (0, 0, 0), &init),
        fuse(FUSE_GETXATTR, (1, 0, ANNOUNCER), &attribute),
    ]
}

/// A message that the announcer may send, mostly, with a body of the fuzzer's.
pub(super) fn announcement(bytes: &mut Bytes<'_>) -> Vec<u8> {
    const OPERATIONS: [u32; 9] = [
        FUSE_LOOKUP,
        FUSE_MKNOD,
        FUSE_MKDIR,
        FUSE_UNLINK,
        FUSE_RMDIR,
        FUSE_RENAME,
        FUSE_RENAME2,
        FUSE_SETATTR,
        FUSE_OPEN,
    ];
    let choice = usize::from(bytes.byte());
    let operation = OPERATIONS.get(choice % 12);
    let operation = operation
        .copied()
        .unwrap_or_else(|| u32::from(bytes.byte()));
    let group = NO_NAME + u32::from(bytes.byte() % 4);
    let process = match bytes.byte() {
        byte if byte < 0xd0 => ANNOUNCER,
        byte => byte.into(),
    };
    // The root and what was found are small numbers.
    let node = bytes.byte().into();
    let mut body = Vec::new();
    match operation {
        // Its name follows where it is moved to.
        FUSE_RENAME => body.extend(u64::from(bytes.byte()).to_le_bytes()),
        FUSE_MKNOD => body.extend([0; 16]),
        FUSE_MKDIR | FUSE_OPEN => body.extend([0; 8]),
        _ => {}
    }
    match bytes.byte() {
        byte if byte < 0x60 => body.extend(b"file\0"),
        byte if byte < 0xa0 => body.extend(b"a\0b\0"),
        byte => body.extend(bytes.some(byte.into())),
    }
    fuse(operation, (node, group, process), &body)
}

pub(super) fn socket() -> Subject {
    let directory = tempfile::TempDir::new().expect(HOST);
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).expect(HOST);
    let programs: Vec<UnixStream> = [1024, 1025]
        .into_iter()
        .map(|port| {
            let mut program = UnixStream::connect(&path).expect(HOST);
            let line = connect_line(port);
            program.write_all(line.as_bytes()).expect(HOST);
            program.write_all(&[7; 5000]).expect(HOST);
            program
        })
        .collect();
    let ready = EventFd::new(EFD_NONBLOCK).expect(HOST);
    let device = Vsock::new(CID, listener.into(), ready).expect(HOST);
    // A response to the first of them: addresses, ports, no payload, a stream, and much credit.
    let mut response = [CID, 2].map(u64::to_le_bytes).concat();
    let fields = [1024, 1 << 30, 0, 1 | 2 << 16, 0, 1 << 16, 0];
    response.extend(fields.map(u32::to_le_bytes).concat());
    Subject::new(device, response, (directory, programs))
}
