//! Numbers of system calls, by name and way into the kernel.
//!
//! The names and numbers of x86-64 and i386 are those of the crate `syscalls`; here is what it does not have:
//! x32's own numbers (Linux, `arch/x86/entry/syscalls/syscall_64.tbl`), and the calls that i386 also makes
//! through socketcall(2) and ipc(2).

use std::str::FromStr;
use syscalls::{x86, x86_64};

/// In the number of an x32 call.
pub(super) const X32_BIT: u32 = 0x4000_0000;
/// The first of [`X32_OWN`].
const X32_OWN_FIRST: u32 = 512;
/// Calls for which x32 has a number of its own, in their order.
const X32_OWN: &[&str] = &[
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
/// First arguments of i386's socketcall(2), from 1 on.
const SOCKETCALLS: &[&str] = &[
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];
/// First arguments of i386's ipc(2).
const IPC_CALLS: &[(&str, u64)] = &[
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// Number of a call of a 64-bit program.
pub(super) fn x86_64(name: &str) -> Option<u32> {
    let number = x86_64::Sysno::from_str(name).ok()?.id();
    u32::try_from(number).ok()
}

/// Number of a call of an x32 program.
pub(super) fn x32(name: &str) -> Option<u32> {
    let own = (X32_OWN_FIRST..).zip(X32_OWN).find(|own| *own.1 == name);
    let number = own.map_or_else(|| x86_64(name), |own| Some(own.0))?;
    Some(number | X32_BIT)
}

/// Number of a call of a 32-bit program.
pub(super) fn x86(name: &str) -> Option<u32> {
    let number = x86::Sysno::from_str(name).ok()?.id();
    u32::try_from(number).ok()
}

/// The call that a 32-bit program may make instead, and what its first argument then is.
pub(super) fn x86_multiplexed(name: &str) -> Option<(u32, u64)> {
    let socket = (1..).zip(SOCKETCALLS).find(|call| *call.1 == name);
    if let Some((first, _)) = socket {
        return Some((x86("socketcall")?, first));
    }
    let (_, first) = IPC_CALLS.iter().find(|call| call.0 == name)?;
    Some((x86("ipc")?, *first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(x86_64("execve"), Some(59));
        assert_eq!(x86("execve"), Some(11));
        assert_eq!(x32("execve"), Some(520 | X32_BIT));
        assert_eq!(x32("pwritev2"), Some(547 | X32_BIT));
        assert_eq!(x32("read"), Some(X32_BIT));
        assert_eq!(x86_64("socketcall"), None);
        assert_eq!(x86("no_such_call"), None);
        assert_eq!(x86_multiplexed("accept"), Some((102, 5)));
        assert_eq!(x86_multiplexed("sendmmsg"), Some((102, 20)));
        assert_eq!(x86_multiplexed("shmctl"), Some((117, 24)));
        assert_eq!(x86_multiplexed("read"), None);
    }
}
