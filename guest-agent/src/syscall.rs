//! System calls that no safe wrapper of our dependencies offers, each as one safe function.
//!
//! Beside `bpf/kernel.rs` the only file of the agent with unsafe code. Must not hold policy.
#![allow(
    unsafe_code,
    reason = "clone3, close_range, mount_setattr, signal and kill by number have no safe wrapper"
)]

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The C library's constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of [`fork_into`] runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The caller, with the new process's id as the caller's PID namespace sees it.
    Parent(i32),
    /// The new process.
    Child,
}

/// Proof that this process has one thread, from before it started any: a copy of one thread of many may
/// wait for ever for a lock that another held.
#[derive(Debug)]
pub(crate) struct SingleThread(());

impl SingleThread {
    /// Looks whether it is so.
    pub(crate) fn check() -> io::Result<Self> {
        if std::fs::read_dir("/proc/self/task")?.count() == 1 {
            return Ok(Self(()));
        }
        Err(io::Error::other("this process has threads"))
    }
}

/// Forks with clone3(2) a sibling of this process: it gets new namespaces by `flags` (`CLONE_NEW*`) and
/// starts its life in `cgroup`.
pub(crate) fn fork_into(
    _proof: SingleThread,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Side> {
    let into_cgroup = cgroup.map_or(0, |_| CLONE_INTO_CGROUP);
    let args = libc::clone_args {
        flags: flags | into_cgroup | u64::from(libc::CLONE_PARENT.unsigned_abs()),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        // With CLONE_PARENT it is that of this process, SIGCHLD, and must not be named.
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
    };
    // SAFETY: no stack and no CLONE_VM: the child runs on a copy of this thread's stack as after fork(2),
    // in a process that `_proof` says has no other thread. `args` outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match i32::try_from(result) {
        Ok(0) => Ok(Side::Child),
        Ok(pid) if pid > 0 => Ok(Side::Parent(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Marks every file descriptor above standard error to be closed by exec.
pub(crate) fn close_on_exec_above_stdio() -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: the call only sets a flag on this process's own file descriptors.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Gives SIGPIPE its default action back, which Rust's runtime takes away and exec would pass on.
pub(crate) fn restore_sigpipe() -> io::Result<()> {
    // SAFETY: SIG_DFL runs none of our code.
    let previous = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    if previous == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Changes attributes and propagation of the mount that `mount` refers to, and of those below it when
/// `recursive`. See mount_setattr(2) for the values.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and `attributes` has the size that is passed; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Sends a signal, by its number so that real-time ones can be sent too, to one process.
pub(crate) fn send_signal(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        // Not one process, but a group or all.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: the call touches no memory of this process.
    let result = unsafe { libc::kill(pid, signal) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID`, see vsock(7).
const GET_LOCAL_CID: libc::Ioctl = 0x7b9;

/// The context id that a vsock device has given this machine.
pub(crate) fn local_cid() -> io::Result<u32> {
    let device = std::fs::File::open("/dev/vsock")?;
    let mut cid = 0u32;
    // SAFETY: the kernel writes the four bytes of `cid`, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    if result == 0 {
        return Ok(cid);
    }
    Err(io::Error::last_os_error())
}

/// Lets the runtime wait for a file descriptor.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned file descriptor keeps its number as long as it lives, and lives in the result.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
