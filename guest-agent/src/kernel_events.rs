//! The kernel's word that a device came, went or changed: `NETLINK_KOBJECT_UEVENT`, netlink(7).
//!
//! Who waits for a device listens first, then looks, and looks again at each event, whatever it says. Must not
//! know devices.

use crate::syscall;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
        recv, socket_with,
    },
};
use std::{io, os::fd::OwnedFd};
use tokio::io::{Interest, unix::AsyncFd};

/// The kernel's own multicast group, not that of udev.
const KERNEL_GROUP: u32 = 1;

/// A listener.
#[derive(Debug)]
pub(crate) struct KernelEvents(AsyncFd<OwnedFd>);

impl KernelEvents {
    /// Hears every event from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            flags,
            Some(KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        syscall::register(socket, Interest::READABLE).map(Self)
    }

    /// Waits for one event.
    pub(crate) async fn next(&self) -> io::Result<()> {
        let read = |socket: &OwnedFd| {
            let mut event = [0; 4096];
            match recv(socket, event.as_mut_slice(), RecvFlags::empty()) {
                // Some were lost: as good a reason to look.
                Err(Errno::NOBUFS) => Ok(()),
                result => result.map(drop).map_err(io::Error::from),
            }
        };
        self.0.async_io(Interest::READABLE, read).await
    }
}
