//! What each kind of thread may ask the kernel for, and why. One list for each kind; the threat model's table
//! is compared with them by a test.

/// What one argument of a call must be. All compared arguments are 32-bit values to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Argument {
    /// Nothing is asked of the arguments.
    Any,
    /// The argument of this index has this value.
    Is(u8, u32),
    /// The argument of this index has none of these bits.
    Lacks(u8, u32),
}

/// A system call that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    #[cfg(test)]
    pub(super) name: &'static str,
    pub(super) number: i64,
    pub(super) argument: Argument,
}

macro_rules! calls {
    ($($name:ident $(if $test:ident($index:literal, $value:expr))?),* $(,)?) => {
        &[$(Call {
            #[cfg(test)]
            name: stringify!($name),
            number: libc::$name,
            argument: calls!(@ $($test $index $value)?),
        }),*]
    };
    (@) => { Argument::Any };
    (@ $test:ident $index:literal $value:expr) => { Argument::$test($index, $value) };
}

const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const FIONBIO: u32 = 0x5421;
const PROT_EXEC: u32 = 4;
const MADV_DONTNEED: u32 = 4;
const MADV_NOHUGEPAGE: u32 = 15;
const F_DUPFD_CLOEXEC: u32 = 1030;
const F_GETFD: u32 = 1;
const F_GETFL: u32 = 3;
const F_SETFL: u32 = 4;
const PR_SET_NAME: u32 = 15;
const PR_SET_NO_NEW_PRIVS: u32 = 38;
const SECCOMP_SET_MODE_FILTER: u32 = 1;
/// The flags with which the C library starts a thread: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS,
/// PARENT_SETTID, CHILD_CLEARTID. Neither a process nor a namespace is made with them.
const THREAD_FLAGS: u32 = 0x003d_0f00;
const MADV_GUARD_INSTALL: u32 = 102;
const MADV_GUARD_REMOVE: u32 = 103;

/// Any thread of Rust and the C library.
pub(super) const EVERY: &[Call] = calls![
    // Memory of the allocator; nothing becomes executable.
    SYS_mmap if Lacks(2, PROT_EXEC),
    SYS_mprotect if Lacks(2, PROT_EXEC),
    SYS_mremap,
    SYS_munmap,
    SYS_brk,
    SYS_madvise if Is(2, MADV_DONTNEED),
    // The allocator's number of arenas, the ends of a stack, and a thread's own number.
    SYS_sched_getaffinity,
    SYS_gettid,
    // Locks, channels and joins; waits for events; time where it is no memory read.
    SYS_futex,
    SYS_sched_yield,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_clock_gettime,
    // Events, and what is written to standard error. A debug build looks at a descriptor before it closes it.
    SYS_read,
    SYS_write,
    SYS_close,
    SYS_fcntl if Is(1, F_GETFD),
    // Seeds of hash maps.
    SYS_getrandom,
    // The end of a thread and of the process, and the return from a signal's handler.
    SYS_sigaltstack,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_restart_syscall,
    SYS_exit,
    SYS_exit_group,
];

/// The control socket, and the signal that takes vCPUs out of the guest.
pub(super) const CONTROL: &[Call] = calls![SYS_recvfrom, SYS_sendto, SYS_getpid, SYS_tgkill,];

/// The guest's processor; the state of the processor for an error's text; the event by which a worker is stopped,
/// made when the guest's driver starts its device.
pub(super) const VCPU: &[Call] = calls![
    SYS_ioctl if Is(1, KVM_RUN),
    SYS_ioctl if Is(1, KVM_GET_REGS),
    SYS_eventfd2,
    SYS_fcntl if Is(1, F_DUPFD_CLOEXEC),
];

/// Starting a thread, which sets itself up and then narrows its filter.
pub(super) const SPAWNER: &[Call] = calls![
    SYS_clone if Is(0, THREAD_FLAGS),
    // Answered with ENOSYS by a filter of its own.
    SYS_clone3,
    SYS_set_robust_list,
    SYS_rseq,
    SYS_madvise if Is(2, MADV_GUARD_INSTALL),
    SYS_madvise if Is(2, MADV_GUARD_REMOVE),
    SYS_prctl if Is(0, PR_SET_NAME),
    SYS_prctl if Is(0, PR_SET_NO_NEW_PRIVS),
    SYS_seccomp if Is(0, SECCOMP_SET_MODE_FILTER),
];

/// The disk's file.
pub(super) const BLOCK: &[Call] = calls![SYS_pread64, SYS_pwrite64, SYS_fdatasync];

/// The files of the share, by descriptors below its root and in the guest's users' names. No handles of files: with
/// the capability to search directories they reach around the root.
pub(super) const SHARE: &[Call] = calls![
    // Opening, looking and listing.
    SYS_openat,
    SYS_newfstatat,
    SYS_fstat,
    SYS_statx,
    SYS_fstatfs,
    SYS_readlinkat,
    SYS_getdents64,
    SYS_lseek,
    // Data.
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_readv,
    SYS_writev,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_fsync,
    SYS_fdatasync,
    // Names.
    SYS_mkdirat,
    SYS_mknodat,
    SYS_symlinkat,
    SYS_linkat,
    SYS_unlinkat,
    SYS_renameat2,
    // Attributes.
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchown,
    SYS_fchownat,
    SYS_utimensat,
    // Descriptors of open files.
    SYS_dup,
    SYS_fcntl if Is(1, F_DUPFD_CLOEXEC),
    SYS_fcntl if Is(1, F_GETFL),
    SYS_fcntl if Is(1, F_SETFL),
    // At the start of a session the umask is set to zero.
    SYS_umask,
    // The guest's user, for the time of one request; set-user-ID bits that a write must clear.
    SYS_setresuid,
    SYS_setresgid,
    SYS_capget,
    SYS_capset,
];

/// Connections of the host's programs.
pub(super) const VSOCK: &[Call] = calls![
    SYS_accept4,
    SYS_recvfrom,
    SYS_sendto,
    SYS_shutdown,
    SYS_ioctl if Is(1, FIONBIO),
];

/// Nothing more: every thread may ask for random numbers.
pub(super) const ENTROPY: &[Call] = calls![];

/// Keeping a broken huge page broken.
pub(super) const BALLOON: &[Call] = calls![SYS_madvise if Is(2, MADV_NOHUGEPAGE)];
