#![allow(
    unsafe_code,
    reason = "unshares namespaces, joins a keyring and sets the allocator up, which have no safe wrappers"
)]
//! The VMM's own confinement, entered before the first guest instruction and before any other thread exists:
//! namespaces of its own, a root that is the Pod's share, no new privileges, and no capabilities but
//! those that serving the share needs.
//!
//! Two steps, [`Apart::enter`] and [`Apart::confine`], because the file server prepares itself between them. The
//! share stays a slave of the host's mount, so that what the shim binds there later appears here.
//! Must not be entered twice.

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{CWD, Mode},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change,
        move_mount, unmount,
    },
    process::{
        DumpableBehavior, Resource, Rlimit, chdir, fchdir, getrlimit, pivot_root,
        set_dumpable_behavior, setrlimit, umask,
    },
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
        clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, unshare_unsafe,
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

/// This process in namespaces of its own, with the host's mounts still in sight and its privileges still there.
#[must_use]
pub struct Apart {
    kept: CapabilitySet,
}

/// Lets all threads share the heap. The allocator looks at `/proc/sys/vm/overcommit_memory` before it shrinks a heap
/// of its other arenas, on whatever thread frees memory of one, and the filters end a process for that.
fn keep_one_arena() {
    // SAFETY: sets a parameter of the allocator and touches no memory.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

impl Apart {
    /// Enters a mount, network, IPC and UTS namespace; the parent made the PID namespace. With a share, `/proc`
    /// becomes that of the PID namespace. Must be called while there is one thread.
    pub fn enter(root: Root) -> Result<Self, JailError> {
        keep_one_arena();
        let kept = match root {
            Root::Share(directory) => {
                // Entered first: what the working directory refers to moves to the copied mount together with the
                // namespace, while the descriptor stays with the original one, which nobody can pivot to.
                fchdir(&directory).map_err(failed("enter the shared directory"))?;
                unshare()?;
                private_proc().map_err(failed("mount a private /proc"))?;
                SHARE_CAPABILITIES
            }
            Root::Empty => {
                unshare()?;
                let empty = empty_file_system().map_err(failed("mount an empty file system"))?;
                fchdir(&empty).map_err(failed("enter the empty file system"))?;
                CapabilitySet::empty()
            }
        };
        Ok(Self { kept })
    }

    /// Leaves the host's root and gives up every privilege that isn't needed, for the rest of the process's life.
    pub fn confine(self) -> Result<(), JailError> {
        change_root()?;
        limit_resources()?;
        umask(Mode::RWXG | Mode::RWXO);
        set_thread_groups(&[]).map_err(failed("drop supplementary groups"))?;
        join_empty_keyring().map_err(failed("leave the session keyring"))?;
        drop_capabilities(self.kept)?;
        // The VMMs of other Pods run as the same user with the same capabilities: none may look into another, and
        // no core dump may hold a guest's memory.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(failed("forbid core dumps"))?;
        set_no_new_privs(true).map_err(failed("set no-new-privs"))
    }
}

/// A session keyring of its own, so that none of the parent's keys is found.
fn join_empty_keyring() -> Result<(), Errno> {
    // SAFETY: JOIN_SESSION_KEYRING with no name touches no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, 0) };
    match (result, std::io::Error::last_os_error().raw_os_error()) {
        // A kernel without keyrings has no keys.
        (0.., _) | (_, Some(libc::ENOSYS)) => Ok(()),
        (_, error) => Err(error.map_or(Errno::IO, Errno::from_raw_os_error)),
    }
}

fn limit_resources() -> Result<(), JailError> {
    // The file server has a descriptor for each file that the guest knows.
    let files = getrlimit(Resource::Nofile).maximum;
    // A core dump of at most one byte is none, also where a program takes the dumps: there, zero is no limit.
    for (resource, most) in [
        (Resource::Nofile, files),
        (Resource::Core, Some(1)),
        (Resource::Memlock, Some(0)),
        (Resource::Msgqueue, Some(0)),
    ] {
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        setrlimit(resource, limit).map_err(failed("limit its resources"))?;
    }
    Ok(())
}

/// The working directory becomes the root.
fn change_root() -> Result<(), JailError> {
    pivot_root(".", ".").map_err(failed("make the shared directory, a mount point, the root"))?;
    // Both roots are at "/" now, the old one on top.
    unmount(".", UnmountFlags::DETACH).map_err(failed("unmount the host's root"))?;
    chdir("/").map_err(failed("enter the new root"))
}

fn unshare() -> Result<(), JailError> {
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of these takes file descriptors away, and this is the only thread, so none is left behind.
    let result = unsafe { unshare_unsafe(flags) };
    result.map_err(failed(
        "make namespaces (walnut-vmm must be started by root)",
    ))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(failed("make all mounts slaves of the host's"))
}

/// Covers the host's /proc by that of this PID namespace, which shows this process alone.
fn private_proc() -> Result<(), Errno> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (option, value) in [("hidepid", "invisible"), ("subset", "pid")] {
        // Kernels before 5.8 know neither; the namespace is what keeps other processes out of sight.
        let _ = fsconfig_set_string(context.as_fd(), option, value);
    }
    attach(&context, MountAttrFlags::empty(), "/proc").map(drop)
}

fn empty_file_system() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    attach(&context, MountAttrFlags::MOUNT_ATTR_RDONLY, "/")
}

fn attach(context: &OwnedFd, attributes: MountAttrFlags, at: &str) -> Result<OwnedFd, Errno> {
    fsconfig_create(context.as_fd())?;
    let inert = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let mount = fsmount(context.as_fd(), flags, inert | attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), "", CWD, at, flags)?;
    Ok(mount)
}

fn drop_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    // User 0 is nobody special, and no capability comes back by exec. That a change of the user takes effective
    // capabilities away stays: it is how the file server acts as a guest's user.
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits).map_err(failed("lock how capabilities are gained"))?;
    clear_ambient_capability_set().map_err(failed("drop ambient capabilities"))?;
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
