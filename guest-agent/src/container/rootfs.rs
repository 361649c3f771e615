//! Makes a container's root file system and enters it.
//!
//! Runs in a mount namespace of its own. OCI runtime specification, `config.md`, "Root" and "Mounts", and
//! `config-linux.md`, "Masked Paths", "Readonly Paths", "Rootfs Mount Propagation". After [`enter`] nothing
//! of the guest can be reached by a path. Must not touch anything that is not the container's.

use super::{
    SetupError, devices, hooks,
    mount_options::root_propagation,
    mounts::{Deferred, MountContext, attach, clone_of, mount_entry, new_file_system},
    resolve::{Make, open_in_root, open_or_make},
    sources::{Source, Sources},
    spec::{Mount, Spec},
    wire::Identity,
};
use crate::syscall;
use rustix::{
    fs::{CWD, Mode, OFlags, open},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount},
};
use std::{
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

const READ_ONLY: u64 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits() as u64;

/// Makes everything that the configuration names and makes it the root of this process.
pub(super) fn enter(spec: &Spec, identity: &Identity, sources: Sources) -> Result<(), SetupError> {
    let root = sources.root;
    attach_root(&root)?;
    let deferred = mount_all(spec, &root, sources.mounts)?;
    if !is_bind(
        spec.mounts
            .iter()
            .rfind(|mount| mount.destination == Path::new("/dev")),
    ) {
        devices::make_devices(root.as_fd(), &spec.linux.devices, sources.devices)?;
    }
    // As runc: a first process finds its directory made, a later one does not.
    open_or_make(&root, &spec.process.cwd, Make::Directory)?;
    write_sysctls(spec)?;
    rustix::process::fchdir(&root)
        .map_err(SetupError::step("cannot enter the root file system"))?;
    let hooks = &spec.hooks.create_container;
    hooks::run("createContainer", hooks, spec, identity, "creating")?;
    pivot()?;
    drop(root);
    for mount in &deferred {
        mount.finish()?;
    }
    protect(spec)
}

/// Puts the root file system over the guest's, where every user may look for it, cut off from the guest's
/// propagation.
fn attach_root(root: &OwnedFd) -> Result<(), SetupError> {
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    mount_change("/", private)
        .map_err(SetupError::step("cannot make the guest's mounts private"))?;
    syscall::mount_setattr(root.as_fd(), true, 0, 0, libc::MS_PRIVATE)
        .map_err(SetupError::step("cannot make the root private"))?;
    open_root()
        .and_then(|guest| attach(root, &guest))
        .map_err(SetupError::step("cannot place the root file system"))
}

fn open_root() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open("/", flags, Mode::empty())
}

fn mount_all(
    spec: &Spec,
    root: &OwnedFd,
    sources: Vec<Source>,
) -> Result<Vec<Deferred>, SetupError> {
    let context = MountContext { root: root.as_fd() };
    let mut deferred = Vec::new();
    for (index, (mount, source)) in spec.mounts.iter().zip(sources).enumerate() {
        deferred.extend(mount_entry(&context, index, mount, source)?);
    }
    Ok(deferred)
}

/// Whether `/dev` is somebody else's, to be left as it is.
fn is_bind(dev: Option<&Mount>) -> bool {
    dev.is_some_and(|mount| {
        mount.kind == "bind"
            || mount
                .options
                .iter()
                .any(|option| option == "bind" || option == "rbind")
    })
}

/// Writes `linux.sysctl` through a proc file system of this process's own namespaces, which no mount of
/// the container can stand in for. Those of the network are written before: a container with users of its
/// own may not.
fn write_sysctls(spec: &Spec) -> Result<(), SetupError> {
    if spec.linux.sysctl.keys().all(|name| is_of_network(name)) {
        return Ok(());
    }
    let proc = new_file_system("proc", Path::new("proc"), &[]).map_err(SetupError::step(
        "cannot mount a proc file system for linux.sysctl",
    ))?;
    for (name, value) in &spec.linux.sysctl {
        if !is_of_network(name) {
            write_sysctl(proc.as_fd(), name, value)?;
        }
    }
    Ok(())
}

/// Writes those of `linux.sysctl` that are of the network, which is the guest's, by the guest's `/proc`.
pub(super) fn write_network_sysctls(spec: &Spec) -> Result<(), SetupError> {
    let sysctls = spec.linux.sysctl.iter();
    for (name, value) in sysctls.filter(|(name, _)| is_of_network(name)) {
        let proc = open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(SetupError::step("cannot open the guest's /proc"))?;
        write_sysctl(proc.as_fd(), name, value)?;
    }
    Ok(())
}

fn is_of_network(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
}

fn write_sysctl(proc: BorrowedFd<'_>, name: &str, value: &str) -> Result<(), SetupError> {
    let path = format!("sys/{}", name.replace('.', "/"));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(proc, &path, flags, Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|file| std::fs::File::from(file).write_all(value.as_bytes()))
        .map_err(SetupError::named(format!(
            "cannot set linux.sysctl {name} to {value:?}"
        )))
}

/// Swaps the root under this process, whose directory is the new one, and lets the old one go.
fn pivot() -> Result<(), SetupError> {
    let attempted = || SetupError::step("cannot enter the root file system");
    // pivot_root(2): with the same path twice, the old root is stacked over the new one.
    rustix::process::pivot_root(".", ".").map_err(attempted())?;
    unmount(".", UnmountFlags::DETACH).map_err(attempted())?;
    rustix::process::chdir("/").map_err(attempted())
}

/// The last touches, from inside: propagation and read-only root, masked and read-only paths.
fn protect(spec: &Spec) -> Result<(), SetupError> {
    let root = open_root().map_err(SetupError::step("cannot open the new root"))?;
    let (propagation, tree) =
        root_propagation(&spec.linux.rootfs_propagation).ok_or_else(|| {
            SetupError::Request(format!(
                "linux.rootfsPropagation {:?} is not a propagation",
                spec.linux.rootfs_propagation
            ))
        })?;
    // Everything is private already; the default must not undo what a mount asked for.
    if propagation != libc::MS_PRIVATE {
        syscall::mount_setattr(root.as_fd(), tree, 0, 0, propagation)
            .map_err(SetupError::step("cannot set linux.rootfsPropagation"))?;
    }
    if spec.root.readonly {
        syscall::mount_setattr(root.as_fd(), false, READ_ONLY, 0, 0)
            .map_err(SetupError::step("cannot make the root read-only"))?;
    }
    for path in &spec.linux.readonly_paths {
        make_read_only(&root, path)?;
    }
    for path in &spec.linux.masked_paths {
        mask(&root, path)?;
    }
    Ok(())
}

/// Opens a path to protect; one that does not exist needs no protection.
fn open_present(root: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>, Errno> {
    match open_in_root(root, path) {
        Ok(place) => Ok(Some(place)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

fn make_read_only(root: &OwnedFd, path: &Path) -> Result<(), SetupError> {
    let attempted = || format!("cannot make {} read-only", path.display());
    let Some(place) = open_present(root, path).map_err(SetupError::named(attempted()))? else {
        return Ok(());
    };
    let copy = clone_of(&place, true).map_err(SetupError::named(attempted()))?;
    syscall::mount_setattr(copy.as_fd(), true, READ_ONLY, 0, 0)
        .map_err(SetupError::named(attempted()))?;
    attach(&copy, &place).map_err(SetupError::named(attempted()))
}

fn mask(root: &OwnedFd, path: &Path) -> Result<(), SetupError> {
    let attempted = || format!("cannot mask {}", path.display());
    let Some(place) = open_present(root, path).map_err(SetupError::named(attempted()))? else {
        return Ok(());
    };
    let stat = rustix::fs::fstat(&place).map_err(SetupError::named(attempted()))?;
    let cover =
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
            let cover = new_file_system("tmpfs", Path::new("tmpfs"), &[])
                .map_err(SetupError::named(attempted()))?;
            syscall::mount_setattr(cover.as_fd(), false, READ_ONLY, 0, 0)
                .map_err(SetupError::named(attempted()))?;
            cover
        } else {
            let null = rustix::fs::openat(
                CWD,
                "/dev/null",
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(SetupError::named(attempted()))?;
            clone_of(&null, false).map_err(SetupError::named(attempted()))?
        };
    attach(&cover, &place).map_err(SetupError::named(attempted()))
}
