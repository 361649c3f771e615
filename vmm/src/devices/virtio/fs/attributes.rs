//! Attributes and extended attributes of files that are open with `O_PATH` only.
//!
//! Such a descriptor takes no `fchmod` and no `fsetxattr`, but its link in `/proc/self/fd` does, whatever the
//! file is, and it leads to the file itself, symbolic link or not. Must not open a file.

use fuse_backend_rs::{
    abi::fuse_abi::{SetattrValid, stat64},
    api::filesystem::Entry,
};
use rustix::{
    buffer::spare_capacity,
    fs::{
        AtFlags, Gid, Mode, Statx, StatxTimestamp, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
        Uid, XattrFlags, chmodat, chownat, makedev, utimensat,
    },
    path::DecInt,
};
use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, OwnedFd},
};

/// Bytes of a value, and of all names, at the most: `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const MAX_BYTES: u32 = 65536;

/// What the guest is told of a file.
pub(super) fn of(status: &Statx) -> stat64 {
    let seconds = |time: StatxTimestamp| (time.tv_sec, i64::from(time.tv_nsec));
    let mut attributes = Entry::default().attr;
    attributes.st_ino = status.stx_ino;
    attributes.st_mode = status.stx_mode.into();
    attributes.st_nlink = status.stx_nlink.into();
    attributes.st_uid = status.stx_uid;
    attributes.st_gid = status.stx_gid;
    attributes.st_rdev = makedev(status.stx_rdev_major, status.stx_rdev_minor);
    attributes.st_size = status.stx_size.cast_signed();
    attributes.st_blksize = status.stx_blksize.into();
    attributes.st_blocks = status.stx_blocks.cast_signed();
    (attributes.st_atime, attributes.st_atime_nsec) = seconds(status.stx_atime);
    (attributes.st_mtime, attributes.st_mtime_nsec) = seconds(status.stx_mtime);
    (attributes.st_ctime, attributes.st_ctime_nsec) = seconds(status.stx_ctime);
    attributes
}

/// Changes owner, mode and times, in this order, as a change of owner clears bits of the mode.
pub(super) fn change(
    path: &OwnedFd,
    links: impl AsFd,
    wanted: &stat64,
    valid: SetattrValid,
) -> io::Result<()> {
    let link = DecInt::from_fd(path);
    if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
        // The number that means "as it is" is nobody's.
        let given = |bit, id: u32| {
            valid
                .contains(bit)
                .then_some(id)
                .filter(|&id| id != u32::MAX)
        };
        let owner = given(SetattrValid::UID, wanted.st_uid).map(Uid::from_raw);
        let group = given(SetattrValid::GID, wanted.st_gid).map(Gid::from_raw);
        chownat(path, c"", owner, group, AtFlags::EMPTY_PATH)?;
    }
    if valid.contains(SetattrValid::MODE) {
        let mode = Mode::from_raw_mode(wanted.st_mode & 0o7777);
        chmodat(&links, link.as_c_str(), mode, AtFlags::empty())?;
    }
    if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        let times = Timestamps {
            last_access: time(
                valid.contains(SetattrValid::ATIME),
                valid.contains(SetattrValid::ATIME_NOW),
                (wanted.st_atime, wanted.st_atime_nsec),
            ),
            last_modification: time(
                valid.contains(SetattrValid::MTIME),
                valid.contains(SetattrValid::MTIME_NOW),
                (wanted.st_mtime, wanted.st_mtime_nsec),
            ),
        };
        utimensat(&links, link.as_c_str(), &times, AtFlags::empty())?;
    }
    Ok(())
}

fn time(given: bool, now: bool, (tv_sec, tv_nsec): (i64, i64)) -> Timespec {
    let tv_nsec = match (given, now) {
        (false, _) => UTIME_OMIT,
        (true, true) => UTIME_NOW,
        (true, false) => tv_nsec,
    };
    Timespec { tv_sec, tv_nsec }
}

/// Reads an extended attribute. This and the following are for a thread whose working directory is
/// `/proc/self/fd`, as there are no such calls relative to a directory.
pub(super) fn get(path: &OwnedFd, name: &CStr, most: u32) -> io::Result<Vec<u8>> {
    let mut value = Vec::with_capacity(most.min(MAX_BYTES) as usize);
    let link = DecInt::from_fd(path);
    rustix::fs::getxattr(link.as_c_str(), name, spare_capacity(&mut value))?;
    Ok(value)
}

/// How long an extended attribute is.
pub(super) fn length(path: &OwnedFd, name: &CStr) -> io::Result<usize> {
    Ok(rustix::fs::getxattr_query(
        DecInt::from_fd(path).as_c_str(),
        name,
    )?)
}

/// The names of all extended attributes.
pub(super) fn list(path: &OwnedFd, most: u32) -> io::Result<Vec<u8>> {
    let mut names = Vec::with_capacity(most.min(MAX_BYTES) as usize);
    let link = DecInt::from_fd(path);
    rustix::fs::listxattr(link.as_c_str(), spare_capacity(&mut names))?;
    Ok(names)
}

/// How long all the names are.
pub(super) fn list_length(path: &OwnedFd) -> io::Result<usize> {
    Ok(rustix::fs::listxattr_query(
        DecInt::from_fd(path).as_c_str(),
    )?)
}

/// Writes an extended attribute.
pub(super) fn set(path: &OwnedFd, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    let flags = XattrFlags::from_bits_retain(flags);
    let link = DecInt::from_fd(path);
    Ok(rustix::fs::setxattr(link.as_c_str(), name, value, flags)?)
}

/// Removes an extended attribute.
pub(super) fn remove(path: &OwnedFd, name: &CStr) -> io::Result<()> {
    Ok(rustix::fs::removexattr(
        DecInt::from_fd(path).as_c_str(),
        name,
    )?)
}
