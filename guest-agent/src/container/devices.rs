//! Makes the device nodes of a container's `/dev`.
//!
//! OCI runtime specification, `config-linux.md`, "Default Devices" and "Devices". `/dev/console` comes with
//! the terminal. Must not decide who may open a device: that is the cgroup's program.

use super::{
    SetupError,
    mounts::{attach, new_file_system},
    resolve::{Make, open_in_root, open_or_make},
    spec::{Device, DeviceKind},
};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, makedev, mknodat, open,
        statat, symlinkat,
    },
    io::Errno,
    mount::{OpenTreeFlags, open_tree},
};
use std::{
    ffi::OsStr,
    os::fd::{BorrowedFd, OwnedFd},
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

/// A device node that was made where it may be made, to be mounted on its place: with users of its own a
/// container cannot make one.
pub(super) struct ReadyDevice {
    path: PathBuf,
    node: OwnedFd,
}

/// The devices that every container has, and those of `devices`.
fn all(devices: &[Device]) -> Vec<Device> {
    let listed = |path: &str| devices.iter().any(|device| device.path == Path::new(path));
    let default = |(path, major, minor): &(&str, u32, u32)| Device {
        path: PathBuf::from(path),
        kind: DeviceKind::Character,
        major: *major,
        minor: *minor,
        file_mode: 0o666,
        uid: 0,
        gid: 0,
    };
    let missing = DEFAULTS.iter().filter(|(path, ..)| !listed(path));
    missing
        .map(default)
        .chain(devices.iter().cloned())
        .collect()
}

/// Makes the nodes for a container with users of its own, on a file system in this process's own mount
/// namespace. `host_ids` says who a user and a group of the container are here.
pub(super) fn make_ready(
    devices: &[Device],
    host_ids: impl Fn(u32, u32) -> Option<(u32, u32)>,
) -> Result<Vec<ReadyDevice>, SetupError> {
    let attempted = || SetupError::step("cannot make a file system for device nodes");
    let place = new_file_system("tmpfs", Path::new("devices"), &[]).map_err(attempted())?;
    let dev = open("/dev", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(attempted())?;
    attach(&place, &dev).map_err(attempted())?;
    let devices = all(devices).into_iter().enumerate();
    let nodes = devices.filter(|(_, device)| device.kind != DeviceKind::Pipe);
    nodes
        .map(|(number, mut device)| {
            (device.uid, device.gid) = host_ids(device.uid, device.gid).ok_or_else(|| {
                SetupError::Request(format!(
                    "linux.devices: the owner of {} is not in the user namespace's mappings",
                    device.path.display()
                ))
            })?;
            let name = number.to_string();
            make_node(&place, OsStr::new(&name), &device)?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let node = open_tree(&place, &name, flags).map_err(attempted())?;
            Ok(ReadyDevice {
                path: device.path,
                node,
            })
        })
        .collect()
}

/// Makes the devices that every container has, those of `devices`, and the links beside them. Those that
/// are `ready` are mounted.
pub(super) fn make_devices(
    root: BorrowedFd<'_>,
    devices: &[Device],
    ready: Option<Vec<ReadyDevice>>,
) -> Result<(), SetupError> {
    let umask = rustix::process::umask(Mode::empty());
    let are_ready = ready.is_some();
    for ReadyDevice { path, node } in ready.into_iter().flatten() {
        let place = open_or_make(root, &path, Make::File)?;
        attach(&node, &place.fd).map_err(SetupError::named(format!(
            "cannot mount device {}",
            path.display()
        )))?;
    }
    for device in all(devices) {
        if !are_ready || device.kind == DeviceKind::Pipe {
            make_device(root, &device)?;
        }
    }
    make_links(root)?;
    rustix::process::umask(umask);
    Ok(())
}

fn make_device(root: BorrowedFd<'_>, device: &Device) -> Result<(), SetupError> {
    let (Some(parent), Some(name)) = (device.path.parent(), device.path.file_name()) else {
        return Err(SetupError::Request(format!(
            "linux.devices[].path {:?} is not the path of a file",
            device.path
        )));
    };
    make_node(
        &open_or_make(root, parent, Make::Directory)?.fd,
        name,
        device,
    )
}

fn make_node(parent: &OwnedFd, name: &OsStr, device: &Device) -> Result<(), SetupError> {
    let attempted = || SetupError::named(format!("cannot make device {}", device.path.display()));
    let kind = match device.kind {
        DeviceKind::Character => FileType::CharacterDevice,
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Pipe => FileType::Fifo,
    };
    let number = makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(device.file_mode & 0o7777);
    match mknodat(parent, name, kind, mode, number) {
        Err(Errno::EXIST) => {
            let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(attempted())?;
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
        parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(attempted())?;
    // Not subject to the umask that a container's parent might have had; the node is no link, as made above.
    chmodat(parent, name, mode, AtFlags::empty()).map_err(attempted())
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
