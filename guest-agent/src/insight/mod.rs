//! What containers do to the guest's kernel: counts, errors and times of their system calls, and for a profile
//! which ones they are.
//!
//! Costs nothing until somebody asks: the first question attaches the programs, and when nobody has asked for
//! as long as the last one wanted, they go, with what they counted. Must not know tasks: containers are
//! cgroups here.

mod kept;
mod program;
mod record_program;
mod recorder;

pub(crate) use record_program::SETUP_NAME;
pub(crate) use recorder::{Record, Recorder};

use crate::cgroup::{CgroupError, Hierarchy};
use kept::Kept;
use std::{collections::HashMap, fs, io, os::fd::OwnedFd, time::Duration};
use tokio::time::Instant;
use walnut_bpf::kernel::{
    self, Map, MapKind, MapShape, NO_PREALLOCATION, ProgramKind, attach_to_tracepoint,
};

/// Threads whose calls can be in progress at once; more, and the call that has lasted longest isn't counted.
const MAX_THREADS: u32 = 8192;
/// Different calls of all containers together.
const MAX_COUNTS: u32 = 16384;
/// How long programs may stay unasked.
pub(crate) const MAX_KEEP: Duration = Duration::from_secs(600);

/// Why nothing can be counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InsightError {
    /// A time that is none.
    #[error("keep_ms {0} must be 1 to {max}", max = MAX_KEEP.as_millis())]
    Keep(u32),
    /// A container that isn't there, or has been deleted.
    #[error("container {0:?} not found")]
    Container(String),
    /// An annotation that says neither yes nor no.
    #[error("annotation {name} {value:?} is neither \"true\" nor \"false\"", name = recorder::ANNOTATION)]
    Annotation {
        /// What it says.
        value: String,
    },
    /// The kernel refuses.
    #[error("cannot {attempted}")]
    Kernel {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The containers can't be listed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// What one container did with one system call since counting began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// The container's id.
    pub(crate) container: String,
    /// The call's number on x86-64.
    pub(crate) number: u32,
    /// How often it ended.
    pub(crate) calls: u64,
    /// How often with an error.
    pub(crate) errors: u64,
    /// Nanoseconds of all together.
    pub(crate) total_ns: u64,
    /// Nanoseconds of the longest.
    pub(crate) longest_ns: u64,
}

/// Everything that was counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Time since counting began.
    pub(crate) elapsed: Duration,
    /// In no order.
    pub(crate) counts: Vec<Count>,
    /// Calls that no room was left for.
    pub(crate) missed: u64,
}

/// The counting of system calls.
#[derive(Debug, Clone)]
pub(crate) struct SyscallCounter {
    hierarchy: Hierarchy,
    active: Kept<Active>,
}

/// Programs that count.
#[derive(Debug)]
struct Active {
    began: Instant,
    counts: Map,
    missed: Map,
    _begun: Map,
    _links: [OwnedFd; 2],
}

impl SyscallCounter {
    /// Counts nothing yet.
    pub(crate) fn new(hierarchy: Hierarchy) -> Self {
        Self {
            hierarchy,
            active: Kept::default(),
        }
    }

    /// What was counted so far; begins to count if nobody has asked before. Counting goes on for `keep_ms`
    /// milliseconds after this, at the least.
    pub(crate) fn read(&self, keep_ms: u32) -> Result<Counts, InsightError> {
        self.active.ask(keep_ms, Active::start, |counting| {
            counting.collect(&self.hierarchy.containers()?)
        })
    }
}

impl Active {
    fn start() -> Result<Self, InsightError> {
        let begun = map(
            MapKind::LeastRecentlyUsedHash,
            8,
            program::BEGUN_BYTES,
            MAX_THREADS,
        )?;
        let (key, count) = (program::KEY_BYTES, program::COUNT_BYTES);
        let counts = map(MapKind::PerProcessorHash, key, count, MAX_COUNTS)?;
        let missed = map(MapKind::PerProcessorArray, 4, 8, 1)?;
        let maps = program::Maps {
            begun: begun.descriptor(),
            counts: counts.descriptor(),
            missed: missed.descriptor(),
        };
        // The end first: a beginning that is remembered must find its end.
        let exit = attach("walnut_sys_exit", c"sys_exit", &program::exit(maps))?;
        let enter = attach("walnut_sys_ent", c"sys_enter", &program::enter(maps))?;
        Ok(Self {
            began: Instant::now(),
            counts,
            missed,
            _begun: begun,
            _links: [exit, enter],
        })
    }

    fn collect(&self, containers: &HashMap<u64, String>) -> Result<Counts, InsightError> {
        let failed = |source| InsightError::Kernel {
            attempted: "read the counts of system calls",
            source,
        };
        let processors = possible_processors().map_err(failed)?;
        let mut counts = Vec::new();
        for key in self.counts.keys().map_err(failed)? {
            let values = self.counts.values(&key, processors).map_err(failed)?;
            let [cgroup, number] = numbers(&key);
            if let (Some(values), Some(container)) = (values, containers.get(&cgroup)) {
                let mut count = Count {
                    container: container.clone(),
                    number: u32::try_from(number).unwrap_or(u32::MAX),
                    ..Count::default()
                };
                for value in values.chunks_exact(32) {
                    count.add(numbers(value));
                }
                counts.push(count);
            }
        }
        Ok(Counts {
            elapsed: self.began.elapsed(),
            counts,
            missed: sum(&self.missed, processors).map_err(failed)?,
        })
    }
}

impl Count {
    fn add(&mut self, [calls, errors, total_ns, longest_ns]: [u64; 4]) {
        self.calls = self.calls.saturating_add(calls);
        self.errors = self.errors.saturating_add(errors);
        self.total_ns = self.total_ns.saturating_add(total_ns);
        self.longest_ns = self.longest_ns.max(longest_ns);
    }
}

fn map(kind: MapKind, key: u32, value: u32, entries: u32) -> Result<Map, InsightError> {
    let flags = if kind == MapKind::PerProcessorHash {
        NO_PREALLOCATION
    } else {
        0
    };
    let shape = MapShape {
        kind,
        key,
        value,
        entries,
        flags,
    };
    Map::create(shape).map_err(|source| InsightError::Kernel {
        attempted: "make a map for the counts of system calls",
        source,
    })
}

fn attach(
    name: &'static str,
    tracepoint: &'static std::ffi::CStr,
    program: &[u64],
) -> Result<OwnedFd, InsightError> {
    kernel::load(ProgramKind::RawTracepoint, name, program)
        .and_then(|program| attach_to_tracepoint(tracepoint, &program))
        .map_err(|source| InsightError::Kernel {
            attempted: "attach the programs that count system calls",
            source,
        })
}

/// What all processors have counted together.
fn sum(missed: &Map, processors: usize) -> io::Result<u64> {
    let values = missed.values(&0u32.to_ne_bytes(), processors)?;
    let values = values.unwrap_or_default();
    Ok(values
        .chunks_exact(8)
        .map(|value| numbers::<1>(value)[0])
        .sum())
}

/// The numbers of which the kernel's memory consists.
fn numbers<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut numbers = [0; N];
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    numbers
}

/// How many processors the kernel makes room for: one more than the highest in a list such as `0-7`.
fn possible_processors() -> io::Result<usize> {
    let list = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = list.trim().rsplit(['-', ',']).next().unwrap_or_default();
    let last: usize = last.parse().map_err(io::Error::other)?;
    Ok(last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_add_up_and_the_longest_stays() {
        let mut count = Count::default();
        count.add([2, 1, 30, 20]);
        count.add([u64::MAX, 0, 5, 5]);
        assert_eq!(count.calls, u64::MAX);
        assert_eq!(
            (count.errors, count.total_ns, count.longest_ns),
            (1, 35, 20)
        );
    }

    #[test]
    fn memory_becomes_numbers() {
        let bytes: Vec<u8> = [7u64, 9].iter().flat_map(|n| n.to_ne_bytes()).collect();
        assert_eq!(numbers::<2>(&bytes), [7, 9]);
        assert_eq!(numbers::<2>(&bytes[..8]), [7, 0]);
    }
}
