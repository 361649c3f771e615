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
    /// The argument of this index is a request of an ioctl of this type (its second byte).
    OfType(u8, u32),
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
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_SET_CPUID2: u32 = 0x4008_ae90;
const KVM_SET_MSRS: u32 = 0x4008_ae89;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_SET_LAPIC: u32 = 0x4400_ae8f;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETQUEUE: u32 = 0x4004_54d9;
/// Type of the requests of `/dev/vhost-net`.
const VHOST: u32 = 0xaf;
const BLKDISCARD: u32 = 0x1277;
const FIONBIO: u32 = 0x5421;
const CLONE_FS: u32 = 0x200;
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

/// What a device does when its driver starts it or lets go of it: events and timers of its workers, what the tap and
/// the host's kernel are told of the driver's wishes, memory that the driver no longer has.
pub(super) const DRIVER: &[Call] = calls![
    SYS_eventfd2,
    SYS_fcntl if Is(1, F_DUPFD_CLOEXEC),
    SYS_timerfd_create,
    SYS_ioctl if Is(1, TUNSETOFFLOAD),
    SYS_ioctl if Is(1, TUNSETQUEUE),
    SYS_ioctl if OfType(1, VHOST),
    SYS_madvise if Is(2, MADV_NOHUGEPAGE),
];

/// The control socket; the signal that takes vCPUs out of the guest; devices and vCPUs that come and go while the
/// VM runs, whose files the parent sends.
pub(super) const CONTROL: &[Call] = calls![
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendto,
    SYS_getpid,
    SYS_tgkill,
    SYS_ioctl if Is(1, KVM_IRQFD),
    SYS_ioctl if Is(1, KVM_IOEVENTFD),
    SYS_ioctl if Is(1, KVM_CREATE_VCPU),
    SYS_ioctl if Is(1, KVM_SET_CPUID2),
    SYS_ioctl if Is(1, KVM_SET_MSRS),
    SYS_ioctl if Is(1, KVM_GET_LAPIC),
    SYS_ioctl if Is(1, KVM_SET_LAPIC),
    SYS_ioctl if Is(1, TUNGETIFF),
    SYS_ioctl if Is(1, TUNSETVNETHDRSZ),
    SYS_ioctl if Is(1, BLKDISCARD),
    SYS_ioctl if Is(1, FIONBIO),
    SYS_lseek,
    SYS_fstat,
    SYS_newfstatat,
    SYS_fallocate,
    // Answered with EPERM by a filter of its own.
    SYS_io_uring_setup,
];

/// The guest's processor, its clock after a pause, and its state for an error's text.
pub(super) const VCPU: &[Call] = calls![
    SYS_ioctl if Is(1, KVM_RUN),
    SYS_ioctl if Is(1, KVM_KVMCLOCK_CTRL),
    SYS_ioctl if Is(1, KVM_GET_REGS),
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

/// The disk's file, by a ring that was made before and knows that file alone, or without one; the rate's timer.
pub(super) const BLOCK: &[Call] = calls![
    SYS_io_uring_enter,
    SYS_pread64,
    SYS_pwrite64,
    SYS_fdatasync,
    SYS_fallocate,
    SYS_ioctl if Is(1, BLKDISCARD),
    SYS_timerfd_settime,
];

/// Packets from and to the tap; the rates' timers.
pub(super) const NETWORK: &[Call] = calls![SYS_readv, SYS_writev, SYS_timerfd_settime];

/// The number of the tap's queues, and its offloads.
pub(super) const NETWORK_CONTROL: &[Call] = calls![
    SYS_ioctl if Is(1, TUNSETOFFLOAD),
    SYS_ioctl if Is(1, TUNSETQUEUE),
    SYS_ioctl if OfType(1, VHOST),
];

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
    // A thread's own working directory, the private list of descriptors: an extended attribute is reached by it.
    SYS_unshare if Is(0, CLONE_FS),
    SYS_fchdir,
    SYS_getxattr,
    SYS_listxattr,
    SYS_setxattr,
    SYS_removexattr,
    // Data.
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_readv,
    SYS_writev,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_copy_file_range,
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
    // The guest's user and umask, for the time of one request; set-user-ID bits that a write must clear.
    SYS_umask,
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

/// The file that the guest maps.
pub(super) const PMEM: &[Call] = calls![SYS_fdatasync];

/// Nothing more: every thread may write to what is open.
pub(super) const CONSOLE: &[Call] = calls![];
