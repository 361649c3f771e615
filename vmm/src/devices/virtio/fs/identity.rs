#![allow(
    unsafe_code,
    reason = "gives a thread a working directory of its own, and borrows descriptors"
)]
//! As whom a request is executed, and what each thread that executes requests has for itself: a working
//! directory, a umask, a user and capabilities.
//!
//! What the guest creates is its user's from the first moment on, so a thread becomes that user while it
//! creates. It keeps its capabilities: whether the user may do it has been decided by the guest's kernel, which
//! knows the user's groups. Must not look at a request.

use rustix::{
    fs::Mode,
    process::{fchdir, getegid, geteuid, umask},
    thread::{
        CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities,
        set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
    },
};
use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd},
};

/// Who the VMM is, where it is nobody else.
pub(super) struct Identity {
    uid: rustix::fs::Uid,
    gid: rustix::fs::Gid,
    capabilities: CapabilitySets,
}

impl Identity {
    /// Who this thread is, and so all others.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            uid: geteuid(),
            gid: getegid(),
            capabilities: capabilities(None)?,
        })
    }

    /// Creates something as this user and group of the guest, with the umask that its process has. On a thread
    /// that was [`prepared`](prepare_thread).
    pub(super) fn create_as<T>(
        &self,
        (uid, gid): (u32, u32),
        mask: u32,
        create: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        umask(Mode::from_raw_mode(mask & 0o777));
        let (uid, gid) = (uid_of(uid)?, gid_of(gid)?);
        if (uid, gid) == (self.uid, self.gid) {
            return create();
        }
        let _restored = Restore(self);
        set_thread_res_gid(None, gid, None)?;
        set_thread_res_uid(None, uid, None)?;
        set_capabilities(None, self.capabilities)?;
        create()
    }

    /// Changes a file as somebody who may not keep the set-user-ID and set-group-ID bits of what they change.
    pub(super) fn without_privilege<T>(
        &self,
        wanted: bool,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if !wanted {
            return change();
        }
        let _restored = Restore(self);
        let mut limited = self.capabilities;
        limited.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, limited)?;
        change()
    }
}

/// Makes the thread who it was.
struct Restore<'a>(&'a Identity);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        let Identity {
            uid,
            gid,
            capabilities,
        } = *self.0;
        // The real user and group and the permitted capabilities never change, and going back to them is free.
        let restored = set_thread_res_uid(None, uid, None)
            .and_then(|()| set_thread_res_gid(None, gid, None))
            .and_then(|()| set_capabilities(None, capabilities));
        restored.expect("a thread may become who the process is");
    }
}

fn uid_of(uid: u32) -> io::Result<rustix::fs::Uid> {
    match uid {
        u32::MAX => Err(rustix::io::Errno::INVAL.into()),
        uid => Ok(rustix::fs::Uid::from_raw(uid)),
    }
}

fn gid_of(gid: u32) -> io::Result<rustix::fs::Gid> {
    match gid {
        u32::MAX => Err(rustix::io::Errno::INVAL.into()),
        gid => Ok(rustix::fs::Gid::from_raw(gid)),
    }
}

/// Gives this thread a umask and a working directory of its own, the latter being `directory`.
pub(super) fn prepare_thread(directory: impl AsFd) -> io::Result<()> {
    // SAFETY: FS takes no file descriptors away, and no other thread looks at this one's working directory.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    Ok(fchdir(directory)?)
}

/// Lends a file to what wants to own it mutably for positioned reads and writes, several threads at once.
pub(super) fn lend<T>(file: &File, with: impl FnOnce(&mut File) -> T) -> T {
    // SAFETY: the descriptor is open as long as `file` is borrowed, and is not closed here.
    let mut lent = ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) });
    with(&mut lent)
}

/// Borrows the descriptor that the message layer passes as a number.
pub(super) fn borrow(fd: &RawFd) -> BorrowedFd<'_> {
    // SAFETY: it is that of a file which `setupmapping` keeps open until its call has returned.
    unsafe { BorrowedFd::borrow_raw(*fd) }
}
