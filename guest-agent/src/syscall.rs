//! System calls that no safe wrapper of our dependencies offers, each as one safe function.
//!
//! Beside `bpf/kernel.rs` the only file of the agent with unsafe code. Must not hold policy.
#![allow(
    unsafe_code,
    reason = "clone3, close_range, BLKPG, mount_setattr, sched_setattr, ioprio_set, seccomp, signal and kill by number have no safe wrapper"
)]

use crate::container::seccomp::Instruction;
use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// linux/blkpg.h.
const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct PartitionRequest<'a> {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: &'a Partition,
}

/// Makes a part of a disk a block device of its own, whatever is on the disk.
pub(crate) fn add_partition(
    disk: &impl AsFd,
    number: u32,
    start: u64,
    bytes: u64,
) -> io::Result<()> {
    let wrong = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let partition = Partition {
        start: start.try_into().map_err(wrong)?,
        length: bytes.try_into().map_err(wrong)?,
        number: number.try_into().map_err(wrong)?,
        names: [0; 128],
    };
    let request = PartitionRequest {
        operation: BLKPG_ADD_PARTITION,
        flags: 0,
        length: size_of::<Partition>().try_into().map_err(wrong)?,
        data: &partition,
    };
    // SAFETY: BLKPG reads both structures, which are laid out as linux/blkpg.h says and outlive the call.
    let result = unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), BLKPG, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

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
    proof: &SingleThread,
    flags: u64,
    cgroup: BorrowedFd<'_>,
) -> io::Result<Side> {
    let flags = flags | CLONE_INTO_CGROUP | u64::from(libc::CLONE_PARENT.unsigned_abs());
    // With CLONE_PARENT the signal is that of this process, SIGCHLD, and must not be named.
    fork(proof, flags, 0, Some(cgroup))
}

/// Forks with clone3(2) a child of this process, with new namespaces by `flags`.
pub(crate) fn fork_child(proof: &SingleThread, flags: u64) -> io::Result<Side> {
    fork(proof, flags, u64::from(libc::SIGCHLD.unsigned_abs()), None)
}

fn fork(
    _proof: &SingleThread,
    flags: u64,
    exit_signal: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Side> {
    let args = libc::clone_args {
        flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal,
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
    set_mount(
        mount,
        recursive,
        &libc::mount_attr {
            attr_set: set,
            attr_clr: clear,
            propagation,
            userns_fd: 0,
        },
    )
}

/// Makes a mount, and those below it when `recursive`, show its files' owners as the mappings of a user
/// namespace say.
pub(crate) fn map_mount_owners(
    mount: BorrowedFd<'_>,
    recursive: bool,
    users: BorrowedFd<'_>,
) -> io::Result<()> {
    set_mount(
        mount,
        recursive,
        &libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::from(users.as_raw_fd().unsigned_abs()),
        },
    )
}

fn set_mount(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and `attributes` has the size that is passed; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const *attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// What sched_setattr(2) takes.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct SchedulerAttributes {
    /// Its own, which [`set_scheduler`] fills in.
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// Sets how the kernel schedules a process.
pub(crate) fn set_scheduler(pid: i32, attributes: &SchedulerAttributes) -> io::Result<()> {
    let attributes = SchedulerAttributes {
        size: u32::try_from(size_of::<SchedulerAttributes>()).map_err(io::Error::other)?,
        ..*attributes
    };
    // SAFETY: `attributes` outlives the call and says its own size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Sets the priority of a process's input and output; see ioprio_set(2) for the value.
pub(crate) fn set_io_priority(pid: i32, priority: i32) -> io::Result<()> {
    const OF_PROCESS: i32 = 1;
    // SAFETY: the call touches no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, OF_PROCESS, pid, priority) };
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

/// Installs a filter of system calls for the calling thread, for ever; `flags` are those of seccomp(2).
pub(crate) fn install_filter(flags: libc::c_ulong, program: &[Instruction]) -> io::Result<()> {
    let mut program: Vec<_> = program
        .iter()
        .map(|instruction| libc::sock_filter {
            code: instruction.code,
            jt: instruction.if_true,
            jf: instruction.if_false,
            k: instruction.value,
        })
        .collect();
    let described = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter`, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const described,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Lets the runtime wait for a file descriptor.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned file descriptor keeps its number as long as it lives, and lives in the result.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
