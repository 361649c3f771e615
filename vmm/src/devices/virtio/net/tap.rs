#![allow(
    unsafe_code,
    reason = "moves packets between a tap and guest memory, and sets taps up"
)]
//! The host's end of the wire: a queue of a tap (Linux, Documentation/networking/tuntap.rst).
//!
//! A packet is moved in one system call between the tap and the pieces of guest memory that it lies in. Must not
//! know what is in a packet.

use super::packet::{HEADER_BYTES, Piece};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};
use vmm_sys_util::ioctl::{
    _IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val,
};

/// Its requests all say that they carry four bytes, whatever they carry.
const fn request(direction: u32, number: u32) -> libc::c_ulong {
    ioctl_expr(direction, 'T' as u32, number, 4)
}

const TUNSETOFFLOAD: libc::c_ulong = request(_IOC_WRITE, 208);
const TUNGETIFF: libc::c_ulong = request(_IOC_READ, 210);
const TUNSETVNETHDRSZ: libc::c_ulong = request(_IOC_WRITE, 216);
const TUNSETQUEUE: libc::c_ulong = request(_IOC_WRITE, 217);

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Why a file cannot be the device's tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host refuses a request.
    #[error("{request} failed")]
    Request {
        /// Which.
        request: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It was opened in another way.
    #[error("its flags are {flags:#06x}, but {required:#06x} must be set: {names}")]
    Flags {
        /// Those that TUNGETIFF gave.
        flags: u16,
        /// Those that are needed.
        required: u16,
        /// Their names.
        names: &'static str,
    },
}

/// `struct ifreq`, with flags.
#[repr(C)]
#[derive(Default)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    _rest: [u8; 22],
}

/// One queue of a tap.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// Takes a queue of a tap that was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with
    /// `IFF_MULTI_QUEUE` where there are `several`. It has no offloads then.
    pub(super) fn new(fd: OwnedFd, several: bool) -> Result<Self, TapError> {
        let tap = Self(fd);
        let flags = tap.flags().map_err(failed("TUNGETIFF"))?;
        let (required, names) = if several {
            let required = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
            (
                required,
                "IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE",
            )
        } else {
            let required = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
            (required, "IFF_TAP, IFF_NO_PI, IFF_VNET_HDR")
        };
        if flags & required != required {
            return Err(TapError::Flags {
                flags,
                required,
                names,
            });
        }
        tap.set_header_bytes().map_err(failed("TUNSETVNETHDRSZ"))?;
        tap.set_offloads(0).map_err(failed("TUNSETOFFLOAD"))?;
        rustix::io::ioctl_fionbio(&tap.0, true).map_err(|error| failed("FIONBIO")(error.into()))?;
        Ok(tap)
    }

    /// A datagram socket in its place.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn of_socket(fd: OwnedFd) -> Self {
        Self(fd)
    }

    fn flags(&self) -> io::Result<u16> {
        let mut interface = InterfaceRequest::default();
        // SAFETY: for any file, the request writes a `struct ifreq` at the most, which this is.
        check(unsafe { ioctl_with_mut_ref(&self.0, TUNGETIFF, &mut interface) })?;
        Ok(interface.flags)
    }

    fn set_header_bytes(&self) -> io::Result<()> {
        let bytes = libc::c_int::try_from(HEADER_BYTES).map_err(io::Error::other)?;
        // SAFETY: the request reads an int.
        check(unsafe { ioctl_with_ref(&self.0, TUNSETVNETHDRSZ, &bytes) })
    }

    /// Says what the device can deal with in packets of the host; holds for all queues of the tap.
    pub(super) fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the request takes a number.
        check(unsafe { ioctl_with_val(&self.0, TUNSETOFFLOAD, offloads.into()) })
    }

    /// Lets the host put packets into this queue of several, or not.
    pub(super) fn attach(&self, attached: bool) -> io::Result<()> {
        let interface = InterfaceRequest {
            flags: if attached {
                IFF_ATTACH_QUEUE
            } else {
                IFF_DETACH_QUEUE
            },
            ..InterfaceRequest::default()
        };
        // SAFETY: the request reads a `struct ifreq`.
        check(unsafe { ioctl_with_ref(&self.0, TUNSETQUEUE, &interface) })
    }

    /// Reads a packet with its header, which must have room; gives its length.
    pub(super) fn read(&self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        transfer(pieces, |vectors, count| {
            // SAFETY: each vector is guest memory of its length, borrowed as a slice until the end of this
            // function and only accessed as volatile bytes; the kernel writes no further.
            unsafe { libc::readv(self.as_raw_fd(), vectors, count) }
        })
    }

    /// Writes a packet with its header.
    pub(super) fn write(&self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        transfer(pieces, |vectors, count| {
            // SAFETY: as for `read`; the kernel reads no further.
            unsafe { libc::writev(self.as_raw_fd(), vectors, count) }
        })
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn transfer(
    pieces: &[Piece<'_>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let vectors: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        })
        .collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    loop {
        let Ok(bytes) = usize::try_from(call(vectors.as_ptr(), count)) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        return Ok(bytes);
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn failed(request: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Request { request, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_refused_by_name() {
        let memory = rustix::fs::memfd_create("no-tap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let error = Tap::new(memory, false).unwrap_err();
        assert_eq!(error.to_string(), "TUNGETIFF failed");
    }
}
