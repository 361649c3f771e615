//! Mounts one entry of `mounts` into a root file system that is not entered yet.
//!
//! Each mount is made detached, or comes so from `sources`, gets its attributes and propagation, and is
//! attached to a place that `resolve` has opened: nothing is visible half done, and no path is followed
//! twice. Must not know order.

use super::{
    SetupError, copy_up,
    mount_options::{Attributes, MountOptions},
    resolve::{Make, Place, open_or_make},
    sources::Source,
    spec::Mount,
};
use crate::{file_system, syscall};
use rustix::{
    fs::CWD,
    mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// A file system of the kernel's own that a container may mount.
const FILE_SYSTEMS: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue"];
const READ_ONLY: u64 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits() as u64;

/// What mounting needs beside the entry itself.
pub(super) struct MountContext<'a> {
    /// The root file system.
    pub(super) root: BorrowedFd<'a>,
}

/// A mount that becomes read-only once its contents are in place.
pub(super) struct Deferred(OwnedFd);

impl Deferred {
    /// Makes it read-only.
    pub(super) fn finish(&self) -> Result<(), SetupError> {
        syscall::mount_setattr(self.0.as_fd(), false, READ_ONLY, 0, 0)
            .map_err(SetupError::step("cannot make a tmpfs read-only"))
    }
}

/// Mounts `mount`, the entry at `index`. A read-only tmpfs is answered, so that the caller can still fill it.
pub(super) fn mount_entry(
    context: &MountContext<'_>,
    index: usize,
    mount: &Mount,
    source: Source,
) -> Result<Option<Deferred>, SetupError> {
    let attempted = attempted(mount);
    let Source {
        mut options,
        detached,
    } = source;
    let cut_off = detached.is_some();
    let detached = match detached {
        Some(detached) => detached,
        None => make(index, mount, &options, &attempted)?,
    };
    let defer = mount.kind == "tmpfs" && options.attributes.set & READ_ONLY != 0;
    if defer {
        options.attributes.set &= !READ_ONLY;
    }
    set_attributes(&detached, &options, cut_off).map_err(SetupError::named(attempted.clone()))?;
    let place = target(context, mount, &detached)?;
    if options.copy_up {
        copy_up::copy(&place.fd, &detached).map_err(SetupError::named(format!(
            "cannot copy what is in {} into its tmpfs",
            mount.destination.display()
        )))?;
    }
    attach(&detached, &place.fd).map_err(SetupError::named(attempted))?;
    Ok(defer.then_some(Deferred(detached)))
}

/// What mounting an entry is called when it fails.
pub(super) fn attempted(mount: &Mount) -> String {
    format!(
        "error mounting {:?} to rootfs at {:?}",
        mount.source, mount.destination
    )
}

/// Attaches a detached mount on a place.
pub(super) fn attach(mount: &OwnedFd, place: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", place, "", flags)
}

/// A detached copy of the mount at `place`, with what is mounted below it if `tree`.
pub(super) fn clone_of(place: &impl AsFd, tree: bool) -> rustix::io::Result<OwnedFd> {
    open_tree(place, "", OpenTreeFlags::AT_EMPTY_PATH | clone_flags(tree))
}

/// A detached copy of what is mounted at a path of the guest.
pub(super) fn clone_of_path(path: &Path, tree: bool) -> rustix::io::Result<OwnedFd> {
    open_tree(CWD, path, clone_flags(tree))
}

fn clone_flags(tree: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if tree {
        flags | OpenTreeFlags::AT_RECURSIVE
    } else {
        flags
    }
}

/// A new file system, detached.
pub(super) fn new_file_system(
    kind: &str,
    source: &Path,
    data: &[(String, Option<String>)],
) -> rustix::io::Result<OwnedFd> {
    file_system::create(kind, source, data, MountAttrFlags::empty())
}

fn make(
    index: usize,
    mount: &Mount,
    options: &MountOptions,
    attempted: &str,
) -> Result<OwnedFd, SetupError> {
    let made = match mount.kind.as_str() {
        "cgroup" | "cgroup2" => new_file_system("cgroup2", Path::new("cgroup"), &[]),
        kind if FILE_SYSTEMS.contains(&kind) => {
            let data: Vec<_> = options
                .data
                .iter()
                // devpts has known nothing else since Linux 4.7.
                .filter(|(key, _)| !(kind == "devpts" && key == "newinstance"))
                .cloned()
                .collect();
            new_file_system(kind, &mount.source, &data)
        }
        kind => {
            return Err(SetupError::Request(format!(
                "mounts[{index}].type {kind:?} is not supported"
            )));
        }
    };
    made.map_err(SetupError::named(attempted))
}

fn set_attributes(mount: &OwnedFd, options: &MountOptions, cut_off: bool) -> std::io::Result<()> {
    let mount = mount.as_fd();
    let set = |tree, Attributes { set, clear }| syscall::mount_setattr(mount, tree, set, clear, 0);
    if !options.tree_attributes.is_empty() {
        set(true, options.tree_attributes)?;
    }
    if !options.attributes.is_empty() {
        set(false, options.attributes)?;
    }
    // A copy is born with its source's propagation, which is the guest's business.
    if cut_off {
        syscall::mount_setattr(mount, true, 0, 0, libc::MS_PRIVATE)?;
    }
    for (kind, tree) in &options.propagation {
        syscall::mount_setattr(mount, *tree, 0, 0, *kind)?;
    }
    Ok(())
}

/// Opens the place for a mount, made like the mount's own root: a directory, or a file.
fn target(
    context: &MountContext<'_>,
    mount: &Mount,
    detached: &OwnedFd,
) -> Result<Place, SetupError> {
    let stat = rustix::fs::fstat(detached).map_err(SetupError::step(format!(
        "cannot look at the source of mount {:?}",
        mount.destination
    )))?;
    let make = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::Directory => Make::Directory,
        _ => Make::File,
    };
    let place = open_or_make(context.root, &mount.destination, make)?;
    let elsewhere = place.path != mount.destination;
    // An image could otherwise move what maskedPaths and readonlyPaths protect to another place.
    if matches!(mount.kind.as_str(), "proc" | "sysfs") && elsewhere {
        return Err(SetupError::Request(format!(
            "filesystem {:?} must be mounted on ordinary directory: {} leads to {}",
            mount.kind,
            mount.destination.display(),
            place.path.display()
        )));
    }
    Ok(place)
}
