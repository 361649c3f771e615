#![allow(
    unsafe_code,
    reason = "hands queues and guest memory to the host's kernel"
)]
//! The host's kernel in place of our threads: vhost-net (Linux, include/uapi/linux/vhost.h) moves the packets of one
//! pair of queues between its tap and guest memory. Must not look into a queue.

use super::tap::Tap;
use crate::devices::virtio::{ActiveQueue, Interrupt};
use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::VIRTIO_NET_F_MRG_RXBUF,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::ioctl::{
    _IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ptr,
};

/// What the device and the transport offer and the host's kernel must then know.
const REQUIRED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// In place of a tap: none.
const NO_TAP: RawFd = -1;

/// Why the host's kernel does not move the packets.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// It refuses a request.
    #[error("{request} failed")]
    Request {
        /// Which.
        request: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It knows less than the device offers.
    #[error("the host's vhost-net has the features {features:#x}, but {REQUIRED:#x} are needed")]
    Features {
        /// What it knows.
        features: u64,
    },
    /// A ring that is not in guest memory.
    #[error("a ring at {at:#x} is not in guest memory")]
    Ring {
        /// Where it should be.
        at: u64,
        /// What vm-memory says.
        source: GuestMemoryError,
    },
}

/// A request that carries a `T` to the kernel.
struct Request<T> {
    code: libc::c_ulong,
    name: &'static str,
    payload: PhantomData<T>,
}

impl<T> Request<T> {
    /// `bytes` is the size of what the kernel reads: that of `T`.
    const fn new(number: u32, bytes: u32, name: &'static str) -> Self {
        Self {
            code: ioctl_expr(_IOC_WRITE, VHOST, number, bytes),
            name,
            payload: PhantomData,
        }
    }
}

const VHOST: u32 = 0xaf;
const GET_FEATURES: libc::c_ulong = ioctl_expr(_IOC_READ, VHOST, 0x00, 8);
const SET_OWNER: libc::c_ulong = ioctl_expr(_IOC_NONE, VHOST, 0x01, 0);
const SET_FEATURES: Request<u64> = Request::new(0x00, 8, "VHOST_SET_FEATURES");
/// Its size is that of the part before the regions.
const SET_MEM_TABLE: libc::c_ulong = ioctl_expr(_IOC_WRITE, VHOST, 0x03, 8);
const SET_VRING_NUM: Request<VringState> = Request::new(0x10, 8, "VHOST_SET_VRING_NUM");
const SET_VRING_ADDR: Request<VringAddresses> = Request::new(0x11, 40, "VHOST_SET_VRING_ADDR");
const SET_VRING_BASE: Request<VringState> = Request::new(0x12, 8, "VHOST_SET_VRING_BASE");
const SET_VRING_KICK: Request<VringFile> = Request::new(0x20, 8, "VHOST_SET_VRING_KICK");
const SET_VRING_CALL: Request<VringFile> = Request::new(0x21, 8, "VHOST_SET_VRING_CALL");
const SET_BACKEND: Request<VringFile> = Request::new(0x30, 8, "VHOST_NET_SET_BACKEND");

/// `struct vhost_vring_state`.
#[repr(C)]
struct VringState {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`, with addresses of this process.
#[repr(C)]
struct VringAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `/dev/vhost-net`, opened for one pair of queues.
#[derive(Debug)]
pub(super) struct Backend {
    file: OwnedFd,
    features: u64,
}

impl Backend {
    /// Makes this process the owner.
    pub(super) fn new(file: OwnedFd) -> Result<Self, VhostError> {
        // SAFETY: the request has no argument.
        check("VHOST_SET_OWNER", unsafe { ioctl(&file, SET_OWNER) })?;
        let mut features = 0_u64;
        // SAFETY: the request writes a number of 64 bits.
        let result = unsafe { ioctl_with_mut_ref(&file, GET_FEATURES, &mut features) };
        check("VHOST_GET_FEATURES", result)?;
        if features & REQUIRED != REQUIRED {
            return Err(VhostError::Features { features });
        }
        Ok(Self { file, features })
    }

    /// Hands over the receive and the transmit queue; they rest until there is a tap.
    pub(super) fn start(
        &self,
        memory: &GuestMemoryMmap,
        features: u64,
        queues: [&ActiveQueue; 2],
        interrupt: &Interrupt,
    ) -> Result<(), VhostError> {
        self.set(&SET_FEATURES, &(features & self.features))?;
        self.set_memory(memory)?;
        for (index, active) in (0..).zip(queues) {
            let queue = &active.queue;
            let state = |value: u16| VringState {
                index,
                value: value.into(),
            };
            self.set(&SET_VRING_NUM, &state(queue.size()))?;
            self.set(&SET_VRING_BASE, &state(queue.next_avail()))?;
            let addresses = VringAddresses {
                index,
                flags: 0,
                descriptors: host_address(memory, queue.desc_table())?,
                used: host_address(memory, queue.used_ring())?,
                available: host_address(memory, queue.avail_ring())?,
                log: 0,
            };
            self.set(&SET_VRING_ADDR, &addresses)?;
            let file = |fd| VringFile { index, fd };
            self.set(&SET_VRING_KICK, &file(active.kick.as_raw_fd()))?;
            let irqfd = interrupt.hand_over().as_raw_fd();
            self.set(&SET_VRING_CALL, &file(irqfd))?;
        }
        Ok(())
    }

    /// Moves packets by this tap from now on, or none. Guest memory is not touched once it rests.
    pub(super) fn connect(&self, tap: Option<&Tap>) -> Result<(), VhostError> {
        let fd = tap.map_or(NO_TAP, AsRawFd::as_raw_fd);
        (0..2).try_for_each(|index| self.set(&SET_BACKEND, &VringFile { index, fd }))
    }

    fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<(), VhostError> {
        let count = u64::try_from(memory.num_regions()).unwrap_or(u64::MAX);
        // `struct vhost_memory`: a count of 32 bits and padding, then address, length, our address and padding.
        let mut table = vec![count];
        for region in memory.iter() {
            let start = region.as_ptr().addr() as u64;
            table.extend([region.start_addr().0, region.len(), start, 0]);
        }
        // SAFETY: the table has as many regions as it says, and the kernel reads no further.
        let result = unsafe { ioctl_with_ptr(&self.file, SET_MEM_TABLE, table.as_ptr()) };
        check("VHOST_SET_MEM_TABLE", result)
    }

    fn set<T>(&self, request: &Request<T>, value: &T) -> Result<(), VhostError> {
        // SAFETY: the request reads a `T`. What it refers to is guest memory, which the transport keeps mapped until
        // the device was reset, and files, of which the kernel keeps references.
        let result = unsafe { ioctl_with_ptr(&self.file, request.code, value) };
        check(request.name, result)
    }
}

fn host_address(memory: &GuestMemoryMmap, at: u64) -> Result<u64, VhostError> {
    let address = memory.get_host_address(GuestAddress(at));
    let address = address.map_err(|source| VhostError::Ring { at, source })?;
    Ok(address.addr() as u64)
}

fn check(request: &'static str, result: libc::c_int) -> Result<(), VhostError> {
    if result < 0 {
        let source = io::Error::last_os_error();
        return Err(VhostError::Request { request, source });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_carry_what_they_say() {
        assert_eq!(size_of::<VringState>(), 8);
        assert_eq!(size_of::<VringFile>(), 8);
        assert_eq!(size_of::<VringAddresses>(), 40);
        let file = rustix::fs::memfd_create("none", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let error = Backend::new(file).unwrap_err();
        assert_eq!(error.to_string(), "VHOST_SET_OWNER failed");
    }
}
