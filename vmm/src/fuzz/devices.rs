//! The devices that hostile drivers are let loose on. A new device is one more function here and one more target.

use crate::devices::virtio::{
    VirtioDevice,
    balloon::Balloon,
    block::{Block, Disk},
    fs::{FileSystem, ShareServer},
    rng::Rng,
    vsock::Vsock,
};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{
    any::Any,
    fs::{self, File},
    io::Write,
    os::unix::net::{UnixListener, UnixStream},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::connect_line;

/// Bytes of the disk.
const DISK_BYTES: u64 = 1 << 20;
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
    Subject::new(Balloon::new(), Vec::new(), ())
}

pub(super) fn disk() -> Subject {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect(HOST));
    file.set_len(DISK_BYTES).expect(HOST);
    let disk = Disk::new(file, false, "fuzz").expect(HOST);
    // A read of the second sector.
    let request = [0, 1_u64].map(u64::to_le_bytes).concat();
    Subject::new(Block::new(disk), request, ())
}

pub(super) fn share() -> Subject {
    let directory = tempfile::TempDir::new().expect(HOST);
    fs::write(directory.path().join("file"), b"content").expect(HOST);
    let path = directory.path().to_str().expect(HOST);
    let pending = ShareServer::before_jail(path).expect(HOST);
    let server = pending.after_jail().expect(HOST);
    // FUSE_LOOKUP of "file" in the root: length, operation, unique, node, user, group, process, padding.
    let mut lookup = [45_u32, 1, 7, 0, 1, 0, 0, 0, 0, 0]
        .map(u32::to_le_bytes)
        .concat();
    lookup.extend(b"file\0");
    Subject::new(FileSystem::new("fuzz", server), lookup, directory)
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
