//! Taps: the device whose packets the VMM has, made in the namespace of the thread that opens it.
//!
//! A tap goes with the last of its files: those are the VMM's, so that nobody has to remove it.
#![allow(
    unsafe_code,
    reason = "a tap is asked for by an ioctl that no safe wrapper has"
)]

use rustix::ioctl::{Updater, ioctl, opcode};
use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
};

/// Linux' if_tun.h; the request says that it carries an int, whatever it carries.
const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const NAME_BYTES: usize = 16;
/// How the names of taps begin.
pub(super) const TAP_PREFIX: &str = "walnut";
/// The kernel puts a number in place of it.
const NUMBER: &[u8] = b"%d";

/// `struct ifreq` with flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

/// A tap that exists as long as one of its files is open, here or elsewhere.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) name: String,
    /// One for each queue.
    pub(super) queues: Vec<OwnedFd>,
}

impl Tap {
    /// Makes a tap whose packets have a virtio header.
    pub(super) fn create(queues: usize) -> io::Result<Self> {
        let mut name = [0; NAME_BYTES];
        for (to, from) in name
            .iter_mut()
            .zip(TAP_PREFIX.as_bytes().iter().chain(NUMBER))
        {
            *to = *from;
        }
        let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if queues > 1 {
            flags |= IFF_MULTI_QUEUE;
        }
        let mut files = Vec::with_capacity(queues);
        for _ in 0..queues {
            let file = read_write("/dev/net/tun")?;
            let mut request = InterfaceRequest {
                name,
                flags,
                rest: [0; 22],
            };
            // SAFETY: TUNSETIFF is given a `struct ifreq`, which it reads and writes, as the kernel's contract says.
            let update = unsafe { Updater::<TUNSETIFF, _>::new(&mut request) };
            // SAFETY: the file is that of the driver which knows the request.
            unsafe { ioctl(&file, update) }?;
            // The kernel has chosen the number; the next queues are of the same tap.
            name = request.name;
            files.push(file.into());
        }
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Self {
            name: String::from_utf8_lossy(name).into_owned(),
            queues: files,
        })
    }
}

/// Opens `/dev/vhost-net` for each queue, where the host has it.
pub(super) fn vhost(queues: usize) -> io::Result<Vec<OwnedFd>> {
    let open = || read_write("/dev/vhost-net").map(OwnedFd::from);
    match (0..queues).map(|_| open()).collect() {
        // No such file, or a file without its module: then the VMM moves the packets.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)
            ) =>
        {
            Ok(Vec::new())
        }
        files => files,
    }
}

fn read_write(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}
