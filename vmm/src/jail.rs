#![allow(unsafe_code, reason = "unshares the mount namespace")]
//! The VMM's own confinement, entered before the first guest instruction and before any other thread exists:
//! a mount namespace whose root is the Pod's share, no new privileges, and no capabilities but
//! those that serving the share needs.
//!
//! The share stays a slave of the host's mount, so that what the shim binds there later appears here.
//! Must not be entered twice.

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
    },
    process::{
        DumpableBehavior, Resource, Rlimit, chdir, fchdir, getrlimit, pivot_root,
        set_dumpable_behavior, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set,
        set_capabilities, set_no_new_privs, set_thread_groups, unshare_unsafe,
    },
};

/// What serving files as their users needs: owners, modes, device nodes and file capabilities.
const SHARE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);
/// Bits of a capability set.
const CAPABILITY_BITS: u32 = 64;

/// Why the jail cannot be entered.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct JailError {
    step: &'static str,
    source: Errno,
}

fn failed(step: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |source| JailError { step, source }
}

/// What the VMM may still reach.
pub enum Root {
    /// The Pod's share, a mount point.
    Share(OwnedFd),
    /// Nothing.
    Empty,
}

/// Enters the jail for the rest of the process's life.
pub fn enter(root: Root) -> Result<(), JailError> {
    raise_file_limit()?;
    let capabilities = match &root {
        Root::Share(_) => SHARE_CAPABILITIES,
        Root::Empty => CapabilitySet::empty(),
    };
    change_root(root)?;
    set_thread_groups(&[]).map_err(failed("drop supplementary groups"))?;
    drop_capabilities(capabilities)?;
    // The VMMs of other Pods run as the same user with the same capabilities: none may look into another, and
    // no core dump may hold a guest's memory.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid core dumps"))?;
    set_no_new_privs(true).map_err(failed("set no-new-privs"))
}

/// The file server has a descriptor for each file that the guest knows.
fn raise_file_limit() -> Result<(), JailError> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).map_err(failed("raise the limit of open files"))
}

fn change_root(root: Root) -> Result<(), JailError> {
    match root {
        Root::Share(directory) => {
            // Entered first: what the working directory refers to moves to the copied mount together with the
            // namespace, while the descriptor stays with the original one, which nobody can pivot to.
            fchdir(&directory).map_err(failed("enter the shared directory"))?;
            unshare_mounts()?;
        }
        Root::Empty => {
            unshare_mounts()?;
            let empty = empty_file_system().map_err(failed("mount an empty file system"))?;
            fchdir(&empty).map_err(failed("enter the empty file system"))?;
        }
    }
    pivot_root(".", ".").map_err(failed("make the shared directory, a mount point, the root"))?;
    // Both roots are at "/" now, the old one on top.
    unmount(".", UnmountFlags::DETACH).map_err(failed("unmount the host's root"))?;
    chdir("/").map_err(failed("enter the new root"))
}

fn unshare_mounts() -> Result<(), JailError> {
    // SAFETY: NEWNS takes no file descriptors away and this is the only thread, so none is left behind.
    let result = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
    result.map_err(failed(
        "make a mount namespace (walnut-vmm must be started by root)",
    ))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(failed("make all mounts slaves of the host's"))
}

fn empty_file_system() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), "", CWD, "/", flags)?;
    Ok(mount)
}

fn drop_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    for bit in 0..CAPABILITY_BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The host's kernel has no capability of this number, nor of any above it.
            Err(Errno::INVAL) => break,
            Err(source) => return Err(failed("limit capabilities")(source)),
        }
    }
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(failed("drop capabilities"))
}
