//! Filters of system calls, one for each kind of thread. A call that is not on its thread's list, or not with
//! these arguments, ends the process at once (SIGSYS).
//!
//! A thread inherits the filters of the one that starts it, and all of them must agree. So no thread that
//! works for the guest starts threads: the spawner does, whose list holds all of the workers' lists, and each
//! worker narrows it to its own before its first instruction of work. What each list holds and why is in
//! [`lists`]. Must not know what a thread does.

mod lists;

use self::lists::{Argument, Call};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use std::collections::BTreeMap;

/// Why a thread is not confined.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A list makes no program.
    #[error("cannot compile the system call filter of a {kind:?} thread")]
    Compile {
        /// Whose.
        kind: Kind,
        /// Why not.
        source: seccompiler::BackendError,
    },
    /// The kernel refused it.
    #[error("cannot install the system call filter of a {kind:?} thread")]
    Install {
        /// Whose.
        kind: Kind,
        /// Why not.
        source: seccompiler::Error,
    },
}

/// What a thread is for, and so what it may ask the kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The main thread: talks to the parent, stops the vCPUs.
    Control,
    /// Starts all other threads.
    Spawner,
    /// Runs the guest's processor and the registers of devices.
    Vcpu,
    /// Serves a disk.
    Block,
    /// Moves packets.
    Network,
    /// Obeys the network's control queue.
    NetworkControl,
    /// Serves the shared directory.
    Share,
    /// Serves the sockets.
    Vsock,
    /// Serves random numbers.
    Entropy,
    /// Takes back memory.
    Balloon,
    /// Adds and removes memory.
    Memory,
    /// Makes files that the guest maps durable.
    Pmem,
    /// Writes what the guest prints.
    Console,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::Control,
        Self::Spawner,
        Self::Vcpu,
        Self::Block,
        Self::Network,
        Self::NetworkControl,
        Self::Share,
        Self::Vsock,
        Self::Entropy,
        Self::Balloon,
        Self::Memory,
        Self::Pmem,
        Self::Console,
    ];

    fn calls(self) -> Vec<Call> {
        let own = match self {
            Self::Control => lists::CONTROL,
            Self::Vcpu => lists::VCPU,
            Self::Spawner => lists::SPAWNER,
            Self::Block => lists::BLOCK,
            Self::Network => lists::NETWORK,
            Self::NetworkControl => lists::NETWORK_CONTROL,
            Self::Share => lists::SHARE,
            Self::Vsock => lists::VSOCK,
            Self::Entropy => lists::ENTROPY,
            Self::Balloon | Self::Memory => lists::BALLOON,
            Self::Pmem => lists::PMEM,
            Self::Console => lists::CONSOLE,
        };
        let mut calls = [lists::EVERY, own].concat();
        if matches!(self, Self::Control | Self::Vcpu) {
            calls.extend(lists::DRIVER);
        }
        if self == Self::Spawner {
            let workers = Self::ALL.into_iter().filter(|kind| *kind > self);
            calls.extend(workers.flat_map(Self::calls));
        }
        calls
    }
}

/// What confines one thread.
#[derive(Debug, Clone)]
pub struct Filter {
    kind: Kind,
    programs: Vec<BpfProgram>,
}

impl Filter {
    /// The filter of threads of this kind.
    pub fn of(kind: Kind) -> Result<Self, SeccompError> {
        let failed = |source| SeccompError::Compile { kind, source };
        let mut programs = Vec::new();
        let refused = match kind {
            // The flags of clone3 are in memory, where no filter sees them. As if the kernel did not know that call,
            // the C library uses clone, whose flags are checked.
            Kind::Spawner => Some((libc::SYS_clone3, libc::ENOSYS)),
            // What a ring does no filter sees. Rings that know one file alone are made before the guest runs; a disk
            // that comes later is served without one.
            Kind::Control => Some((libc::SYS_io_uring_setup, libc::EPERM)),
            _ => None,
        };
        if let Some((call, errno)) = refused {
            programs.push(refuse(call, errno).map_err(failed)?);
        }
        // Last: it may not allow a further filter.
        programs.push(allow_only(&kind.calls()).map_err(failed)?);
        Ok(Self { kind, programs })
    }

    /// Confines the calling thread for the rest of its life.
    pub fn enter(&self) -> Result<(), SeccompError> {
        let kind = self.kind;
        for program in &self.programs {
            apply_filter(program).map_err(|source| SeccompError::Install { kind, source })?;
        }
        Ok(())
    }
}

fn allow_only(calls: &[Call]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for call in calls {
        if let Some(rule) = call.rule()? {
            rules.entry(call.number).or_default().push(rule);
        }
    }
    // A call without a condition is allowed with any arguments, whatever another list says of it.
    let free = calls.iter().filter(|call| call.argument == Argument::Any);
    rules.extend(free.map(|call| (call.number, Vec::new())));
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    SeccompFilter::new(rules, kill, allow, TargetArch::x86_64)?.try_into()
}

/// Answers a call with an error; what else is asked for is another program's business.
fn refuse(call: i64, errno: i32) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(call, Vec::new())]);
    let refusal = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refusal, TargetArch::x86_64)?.try_into()
}

impl Call {
    fn rule(&self) -> Result<Option<SeccompRule>, seccompiler::BackendError> {
        let (index, operator, value) = match self.argument {
            Argument::Any => return Ok(None),
            Argument::Is(index, value) => (index, SeccompCmpOp::Eq, value),
            Argument::Lacks(index, mask) => (index, SeccompCmpOp::MaskedEq(mask.into()), 0),
            Argument::OfType(index, kind) => (index, SeccompCmpOp::MaskedEq(0xff00), kind << 8),
        };
        // The kernel looks at the low half of each of these arguments only.
        let length = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(index, length, operator, value.into())?;
        SeccompRule::new(vec![condition]).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const THREAT_MODEL: &str = include_str!("../../../docs/threat-model.md");

    fn names(calls: &[Call]) -> BTreeSet<&str> {
        let names = calls.iter().map(|call| &call.name["SYS_".len()..]);
        names.collect()
    }

    /// The calls of the row of the threat model's table that begins so.
    fn documented(row: &str) -> BTreeSet<&'static str> {
        let begin = format!("| {row} |");
        let line = THREAT_MODEL.lines().find(|line| line.starts_with(&begin));
        let line = line.unwrap_or_else(|| panic!("no row {row}"));
        let column = line.split('|').nth(2).unwrap();
        let quoted = column.split('`').skip(1).step_by(2);
        // Constants, which are in capitals, say what an argument is.
        quoted.filter(|word| *word == word.to_lowercase()).collect()
    }

    #[test]
    fn the_threat_model_names_the_calls_of_each_kind_of_thread() {
        for (row, calls) in [
            ("every thread", lists::EVERY),
            ("control and vcpu", lists::DRIVER),
            ("control", lists::CONTROL),
            ("vcpu", lists::VCPU),
            ("spawner", lists::SPAWNER),
            ("block", lists::BLOCK),
            ("share", lists::SHARE),
            ("vsock", lists::VSOCK),
            ("entropy", lists::ENTROPY),
            ("balloon", lists::BALLOON),
            ("network", lists::NETWORK),
            ("net-control", lists::NETWORK_CONTROL),
            ("pmem", lists::PMEM),
            ("console", lists::CONSOLE),
        ] {
            assert_eq!(documented(row), names(calls), "{row}");
        }
    }

    #[test]
    fn every_kind_has_a_filter_and_the_spawner_allows_what_its_workers_may() {
        for kind in Kind::ALL {
            Filter::of(kind).unwrap();
        }
        let spawner = Kind::Spawner.calls();
        for worker in Kind::ALL.into_iter().filter(|kind| *kind > Kind::Spawner) {
            for call in worker.calls() {
                assert!(spawner.contains(&call), "{worker:?} needs {call:?}");
            }
        }
        for forbidden in ["execve", "socket", "mount", "ptrace", "open_by_handle_at"] {
            assert!(!names(&spawner).contains(forbidden));
        }
    }
}
