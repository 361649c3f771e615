//! Makes the device nodes of a container's `/dev`.
//!
//! OCI runtime specification, `config-linux.md`, "Default Devices" and "Devices". `/dev/console` comes with
//! the terminal. Must not decide who may open a device: that is the cgroup's program.

use super::{
    SetupError,
    resolve::{Make, open_in_root, open_or_make},
    spec::{Device, DeviceKind},
};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat, statat, symlinkat,
    },
    io::Errno,
};
use std::{
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

const DEFAULTS: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the devices that every container has, those of `devices`, and the links beside them.
pub(super) fn make_devices(root: BorrowedFd<'_>, devices: &[Device]) -> Result<(), SetupError> {
    let umask = rustix::process::umask(Mode::empty());
    let listed = |path: &str| devices.iter().any(|device| device.path == Path::new(path));
    for (path, major, minor) in DEFAULTS {
        if !listed(path) {
            make_device(
                root,
                &Device {
                    path: PathBuf::from(path),
                    kind: DeviceKind::Character,
                    major: *major,
                    minor: *minor,
                    file_mode: 0o666,
                    uid: 0,
                    gid: 0,
                },
            )?;
        }
    }
    for device in devices {
        make_device(root, device)?;
    }
    make_links(root)?;
    rustix::process::umask(umask);
    Ok(())
}

fn make_device(root: BorrowedFd<'_>, device: &Device) -> Result<(), SetupError> {
    let attempted = || SetupError::named(format!("cannot make device {}", device.path.display()));
    let (Some(parent), Some(name)) = (device.path.parent(), device.path.file_name()) else {
        return Err(SetupError::Request(format!(
            "linux.devices[].path {:?} is not the path of a file",
            device.path
        )));
    };
    let parent = open_or_make(root, parent, Make::Directory)?.fd;
    let kind = match device.kind {
        DeviceKind::Character => FileType::CharacterDevice,
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Pipe => FileType::Fifo,
    };
    let number = makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(device.file_mode & 0o7777);
    match mknodat(&parent, name, kind, mode, number) {
        Err(Errno::EXIST) => {
            let found = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(attempted())?;
            let same = FileType::from_raw_mode(found.st_mode) == kind
                && (kind == FileType::Fifo || found.st_rdev == number);
            if !same {
                return Err(attempted()(Errno::EXIST));
            }
        }
        other => other.map_err(attempted())?,
    }
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    chownat(
        &parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(attempted())?;
    // Not subject to the umask that a container's parent might have had; the node is no link, as made above.
    chmodat(&parent, name, mode, AtFlags::empty()).map_err(attempted())
}

fn make_links(root: BorrowedFd<'_>) -> Result<(), SetupError> {
    let dev = open_in_root(root, Path::new("/dev"))
        .map_err(SetupError::step("cannot open the container's /dev"))?;
    for (name, target) in LINKS {
        match symlinkat(*target, &dev, *name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                return Err(SetupError::step(format!("cannot link /dev/{name}"))(error));
            }
        }
    }
    Ok(())
}
