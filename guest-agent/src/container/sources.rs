//! What a container's mounts come from, opened while this process still has the guest's privileges.
//!
//! A container with users of its own may neither reach the guest's directories, nor copy mounts that show
//! other owners, nor make device nodes: all that is done here, before it is born, and is handed on as
//! detached mounts. OCI runtime specification, `config.md`, "Mounts". Must not attach to the container's root.

use super::{
    SetupError,
    devices::{self, ReadyDevice},
    mount_options::{Bind, MountOptions, UnsupportedOption, parse},
    mounts::{attempted, clone_of_path, new_file_system},
    spec::{Mount, Namespace, NamespaceKind, Spec},
    user_namespace,
    validate::host_id,
};
use crate::syscall::{self, SingleThread};
use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{FileType, readlink},
    mount::{MountPropagationFlags, mount_change},
};
use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// All that a container's file system is made of.
pub(super) struct Sources {
    /// The root file system.
    pub(super) root: OwnedFd,
    /// One for each of `mounts`.
    pub(super) mounts: Vec<Source>,
    /// Device nodes, if the container cannot make them.
    pub(super) devices: Option<Vec<ReadyDevice>>,
}

/// One of `mounts`, understood.
pub(super) struct Source {
    pub(super) options: MountOptions,
    /// What it shows, unless it is a file system that the container makes.
    pub(super) detached: Option<OwnedFd>,
}

/// Opens everything. `cgroup` is the container's cgroup directory.
pub(super) fn open(
    alone: &SingleThread,
    spec: &Spec,
    cgroup: BorrowedFd<'_>,
) -> Result<Sources, SetupError> {
    let mounts = spec.mounts.iter().enumerate();
    let mounts = mounts
        .map(|(index, mount)| open_one(alone, spec, cgroup, index, mount))
        .collect::<Result<_, _>>()?;
    Ok(Sources {
        root: open_root(&spec.root.path)?,
        mounts,
        devices: make_devices(spec)?,
    })
}

fn open_root(path: &Path) -> Result<OwnedFd, SetupError> {
    let attempted = || {
        SetupError::named(format!(
            "cannot use root.path {} as a root file system",
            path.display()
        ))
    };
    let root = clone_of_path(path, true).map_err(attempted())?;
    let stat = rustix::fs::fstat(&root).map_err(attempted())?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(root),
        _ => Err(attempted()(rustix::io::Errno::NOTDIR)),
    }
}

fn open_one(
    alone: &SingleThread,
    spec: &Spec,
    cgroup: BorrowedFd<'_>,
    index: usize,
    mount: &Mount,
) -> Result<Source, SetupError> {
    let options = parse(&mount.kind, &mount.options).map_err(|UnsupportedOption(option)| {
        SetupError::Request(format!(
            "mounts[{index}].options: {option:?} is not supported"
        ))
    })?;
    let has_users = spec.has(NamespaceKind::User);
    let is_joined = |kind| {
        let has_path = |namespace: &Namespace| !namespace.path.as_os_str().is_empty();
        spec.namespace(kind).is_none_or(has_path)
    };
    let detached = match (options.bind, mount.kind.as_str()) {
        (Bind::One | Bind::Tree, _) => {
            Some(clone_of_path(&mount.source, options.bind == Bind::Tree))
        }
        (Bind::No, "cgroup" | "cgroup2") if !spec.has(NamespaceKind::Cgroup) => {
            let link = format!("/proc/self/fd/{}", cgroup.as_raw_fd());
            let path = readlink(link, Vec::new());
            Some(path.and_then(|path| clone_of_path(Path::new(&*path.to_string_lossy()), false)))
        }
        // These show a namespace that belongs to the guest, so that only the guest can mount them.
        (Bind::No, "sysfs") if has_users => Some(new_file_system("sysfs", &mount.source, &[])),
        (Bind::No, "mqueue") if has_users && is_joined(NamespaceKind::Ipc) => {
            Some(new_file_system("mqueue", &mount.source, &[]))
        }
        _ => None,
    };
    let detached = detached
        .transpose()
        .map_err(SetupError::named(attempted(mount)))?;
    if let Some(detached) = &detached {
        show_owners(alone, spec, index, mount, options.idmap, detached)?;
    }
    Ok(Source { options, detached })
}

/// Makes a mount show other owners than its files have, where the entry asks for it.
fn show_owners(
    alone: &SingleThread,
    spec: &Spec,
    index: usize,
    mount: &Mount,
    idmap: Bind,
    detached: &OwnedFd,
) -> Result<(), SetupError> {
    let has_own = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    if idmap == Bind::No && !has_own {
        return Ok(());
    }
    let (uids, gids) = if has_own {
        (&mount.uid_mappings, &mount.gid_mappings)
    } else {
        (&spec.linux.uid_mappings, &spec.linux.gid_mappings)
    };
    if uids.is_empty() || gids.is_empty() {
        return Err(SetupError::Request(format!(
            "mounts[{index}]: an idmapped mount needs mappings of users and of groups, its own or the container's"
        )));
    }
    let attempted = format!(
        "cannot map the owners of mounts[{index}], {:?}",
        mount.source
    );
    user_namespace::with_mappings(alone, uids, gids)
        .and_then(|users| {
            syscall::map_mount_owners(detached.as_fd(), idmap == Bind::Tree, users.as_fd())
        })
        .map_err(SetupError::named(attempted))
}

fn make_devices(spec: &Spec) -> Result<Option<Vec<ReadyDevice>>, SetupError> {
    if !spec.has(NamespaceKind::User) {
        return Ok(None);
    }
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    unshare(CloneFlags::CLONE_NEWNS).map_err(SetupError::step("cannot make a mount namespace"))?;
    mount_change("/", private)
        .map_err(SetupError::step("cannot make the guest's mounts private"))?;
    let linux = &spec.linux;
    devices::make_ready(&linux.devices, |uid, gid| {
        Some((
            host_id(&linux.uid_mappings, uid)?,
            host_id(&linux.gid_mappings, gid)?,
        ))
    })
    .map(Some)
}
