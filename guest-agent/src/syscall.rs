//! System calls that no safe wrapper of our dependencies offers, each as one safe function.
//!
//! The only file of the agent with unsafe code. Must not hold policy.
#![allow(
    unsafe_code,
    reason = "clone3, close_range, mount_setattr, bpf, seccomp, signal and kill by number have no safe wrapper"
)]

use crate::container::seccomp::Instruction;
use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
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

/// `bpf_attr` of `BPF_PROG_LOAD`, up to the last field that is used.
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface_index: u32,
    expected_attach_type: u32,
}

/// `bpf_attr` of `BPF_PROG_ATTACH`.
#[repr(C)]
struct ProgramAttach {
    target_fd: u32,
    program_fd: u32,
    kind: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The kernel's verifier gives up with EAGAIN when a signal comes, such as that of a child's end; the signal
/// has been handled when the call returns, so each attempt can only be disturbed by a further one.
const LOAD_ATTEMPTS: u32 = 100;

/// Loads a `BPF_PROG_TYPE_CGROUP_DEVICE` program of encoded instructions.
pub(crate) fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    let attributes = ProgramLoad {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"walnut_devices\0\0",
        interface_index: 0,
        expected_attach_type: BPF_CGROUP_DEVICE,
    };
    let load = || {
        // SAFETY: `instructions` and the license outlive the call, and the size passed is that of `attributes`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_LOAD,
                &raw const attributes,
                size_of::<ProgramLoad>(),
            )
        };
        match RawFd::try_from(result) {
            Ok(fd) if fd >= 0 => Ok(fd),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let fd = (1..LOAD_ATTEMPTS)
        .find_map(|_| match load() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            other => Some(other),
        })
        .unwrap_or_else(load)?;
    // SAFETY: the kernel has just made this file descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to a cgroup directory; it joins those of the parents, each of which can refuse.
pub(crate) fn attach_device_program(cgroup: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let attributes = ProgramAttach {
        target_fd: cgroup.as_fd().as_raw_fd().unsigned_abs(),
        program_fd: program.as_fd().as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the size passed is that of `attributes`, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            size_of::<ProgramAttach>(),
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
