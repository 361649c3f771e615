#![allow(
    unsafe_code,
    reason = "asks the kernel by number for what no safe function offers"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test, of which the lint knows only the functions marked so"
)]
//! The jail from inside: what a VMM that was taken over would ask the kernel for, asked by each kind of thread.
//!
//! A process can't leave the jail, and a forbidden call ends it, so that each question is asked by a child: this
//! program again, told by its environment.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus, exit},
};
use walnut_vmm::{
    jail::{Apart, Root},
    seccomp::{Filter, Kind},
};

/// Tells a child what to ask: thread kind and call, by index.
const QUESTION: &str = "WALNUT_JAIL_QUESTION";
const PATH: &[u8] = b"/etc/passwd\0";
const EMPTY: &[u8] = &[0; 256];
/// `file_handle` with eight bytes.
const HANDLE: &[u8] = &[8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// `sockaddr_in` of 10.0.0.1, port 80.
const ADDRESS: &[u8] = &[2, 0, 0, 80, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
/// `cap_user_header` of version 3 and then all capabilities, effective and permitted.
const HEADER: &[u8] = &[0x22, 0x05, 0x08, 0x20, 0, 0, 0, 0];
const ALL_CAPABILITIES: &[u8] = &[0xff; 24];

/// What a thread without a filter is told, by the jail alone.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Alone {
    Errno(i32),
    /// The jail alone does not stop it.
    Allowed,
    /// The host's settings decide.
    Settings,
}
use Alone::{Allowed, Errno, Settings};

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
enum Argument {
    At(&'static [u8]),
    Is(usize),
}
use Argument::{At, Is};

/// A call by its name for people, number and arguments, and what the jail alone says to it.
type Question = (&'static str, i64, &'static [Argument], Alone);

const HERE: Argument = Is(usize::MAX - 99); // AT_FDCWD
/// A process that does not exist.
const OTHER: Argument = Is(4_194_303);

const QUESTIONS: &[Question] = &[
    (
        "open",
        libc::SYS_openat,
        &[HERE, At(PATH)],
        Errno(libc::ENOENT),
    ),
    (
        "open, the old call",
        libc::SYS_open,
        &[At(PATH)],
        Errno(libc::ENOENT),
    ),
    ("exec", libc::SYS_execve, &[At(PATH)], Errno(libc::ENOENT)),
    (
        "mount",
        libc::SYS_mount,
        &[At(b"/\0"), At(b"/\0"), Is(0), Is(4096)],
        Errno(libc::EPERM),
    ),
    ("fsopen", libc::SYS_fsopen, &[At(PATH)], Errno(libc::EPERM)),
    (
        "pivot_root",
        libc::SYS_pivot_root,
        &[At(PATH), At(PATH)],
        Errno(libc::EPERM),
    ),
    (
        "chroot",
        libc::SYS_chroot,
        &[At(b"/\0")],
        Errno(libc::EPERM),
    ),
    (
        "unshare",
        libc::SYS_unshare,
        &[Is(0x0002_0000)],
        Errno(libc::EPERM),
    ),
    (
        "capset",
        libc::SYS_capset,
        &[At(HEADER), At(ALL_CAPABILITIES)],
        Errno(libc::EPERM),
    ),
    (
        "file handles",
        libc::SYS_open_by_handle_at,
        &[HERE, At(HANDLE)],
        Errno(libc::EPERM),
    ),
    (
        "device node",
        libc::SYS_mknodat,
        &[HERE, At(PATH), Is(0o60_600), Is(0x800)],
        Errno(libc::ENOENT),
    ),
    (
        "reboot",
        libc::SYS_reboot,
        &[Is(0xfee1_dead), Is(672_274_793)],
        Errno(libc::EPERM),
    ),
    (
        "sethostname",
        libc::SYS_sethostname,
        &[At(PATH), Is(3)],
        Errno(libc::EPERM),
    ),
    (
        "ptrace",
        libc::SYS_ptrace,
        &[Is(16), OTHER],
        Errno(libc::ESRCH),
    ),
    (
        "another's memory",
        libc::SYS_process_vm_readv,
        &[OTHER],
        Settings,
    ),
    ("socket", libc::SYS_socket, &[Is(2), Is(1)], Allowed),
    (
        "connect",
        libc::SYS_connect,
        &[Is(3), At(ADDRESS), Is(16)],
        Errno(libc::EBADF),
    ),
    ("bpf", libc::SYS_bpf, &[Is(0), At(EMPTY), Is(128)], Settings),
    (
        "keyctl",
        libc::SYS_keyctl,
        &[Is(0), Is(usize::MAX - 2)],
        Allowed,
    ),
    (
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        &[Is(0), At(EMPTY)],
        Errno(libc::EINVAL),
    ),
    ("userfaultfd", libc::SYS_userfaultfd, &[Is(1)], Settings),
    (
        "perf_event_open",
        libc::SYS_perf_event_open,
        &[At(EMPTY)],
        Settings,
    ),
    (
        "memfd",
        libc::SYS_memfd_create,
        &[At(PATH), Is(usize::MAX)],
        Errno(libc::EINVAL),
    ),
    ("fork", libc::SYS_clone, &[Is(17)], Allowed),
    (
        "fork with its new call",
        libc::SYS_clone3,
        &[At(EMPTY), Is(1)],
        Errno(libc::EINVAL),
    ),
    (
        "executable memory",
        libc::SYS_mmap,
        &[Is(0), Is(4096), Is(5), Is(0x22), Is(usize::MAX)],
        Allowed,
    ),
    (
        "memory made executable",
        libc::SYS_mprotect,
        &[Is(0), Is(0), Is(4)],
        Allowed,
    ),
    (
        "a terminal's ioctl",
        libc::SYS_ioctl,
        &[Is(2), Is(0x5412)],
        Errno(libc::ENOTTY),
    ),
    ("dumpable", libc::SYS_prctl, &[Is(4), Is(1)], Allowed),
    (
        "no filter of x32",
        0x4000_0000 | libc::SYS_read,
        &[],
        Errno(libc::ENOSYS),
    ),
];

/// What is not the same for every thread that has a filter: all others are killed.
fn exception(kind: Kind, name: &str) -> Option<Alone> {
    let shares = matches!(kind, Kind::Share | Kind::Spawner);
    match (name, kind) {
        ("open" | "device node", _) if shares => Some(Errno(libc::ENOENT)),
        ("capset", _) if shares => Some(Errno(libc::EPERM)),
        ("fork with its new call", Kind::Spawner) => Some(Errno(libc::ENOSYS)),
        ("io_uring_setup", Kind::Control) => Some(Errno(libc::EPERM)),
        _ => None,
    }
}

fn ask((_, number, arguments, _): Question) -> Alone {
    let mut given = [0; 6];
    for (place, argument) in given.iter_mut().zip(arguments) {
        *place = match argument {
            At(bytes) => bytes.as_ptr().addr(),
            Is(value) => *value,
        };
    }
    let [a, b, c, d, e, f] = given;
    // SAFETY: what pointers are asked with lasts for the program's life, and none of the calls writes to it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match result {
        0.. => Allowed,
        _ => Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

/// The child: enters the jail, and with a kind also its filter, asks, and ends with what the kernel said.
fn answer(question: &str) -> ! {
    let mut words = question
        .split(' ')
        .map(|word| word.parse::<usize>().unwrap());
    let (kind, index) = (words.next().unwrap(), words.next().unwrap());
    let question = QUESTIONS[index];
    Apart::enter(Root::Empty).unwrap().confine().unwrap();
    if let Some(kind) = Kind::ALL.get(kind) {
        Filter::of(*kind).unwrap().enter().unwrap();
    }
    match ask(question) {
        Allowed | Settings => exit(0),
        Errno(number) => exit(number),
    }
}

fn child(kind: usize, index: usize) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "what_is_forbidden_is_refused", "--nocapture"]);
    command.env(QUESTION, format!("{kind} {index}"));
    command.output().unwrap().status
}

#[test]
fn what_is_forbidden_is_refused() {
    if let Ok(question) = std::env::var(QUESTION) {
        answer(&question);
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: what_is_forbidden_is_refused: only root can enter the jail");
        return;
    }
    let mut wrong = Vec::new();
    for (index, (name, _, _, alone)) in QUESTIONS.iter().copied().enumerate() {
        let kinds = Kind::ALL.iter().map(|kind| Some(*kind)).chain([None]);
        for (number, kind) in kinds.enumerate() {
            let status = child(number, index);
            let expected = match kind {
                None => Some(alone),
                Some(kind) => exception(kind, name),
            };
            let as_expected = match expected {
                Some(Errno(errno)) => status.code() == Some(errno),
                Some(Allowed) => status.success(),
                Some(Settings) => status.code().is_some(),
                None => status.signal() == Some(libc::SIGSYS),
            };
            if !as_expected {
                wrong.push(format!("{name} by {kind:?}: {status}, not {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
