//! Which system calls each container makes, as far as a profile can tell them apart.
//!
//! Recording begins with the first question or, where a container's annotation says so, before the container is
//! made, and is then for as long as the guest lives. Must not know profiles: the command writes them.

use super::{
    Hierarchy, InsightError, Kept, map, numbers, possible_processors, record_program, sum,
};
use crate::file_system;
use rustix::{
    fs::{Mode, OFlags, openat},
    mount::MountAttrFlags,
};
use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
    time::Duration,
};
use tokio::time::{Instant, timeout};
use walnut_bpf::kernel::{self, Map, MapKind, ProgramKind, attach_to_trace_event};

/// For one answer to wait for a container's end.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Of a container: whether to record from its beginning.
pub(super) const ANNOTATION: &str = "walnut.record";
/// Different calls of all containers together.
const MAX_SEEN: u32 = 16384;
/// The trace event's number, in a tracefs.
const EVENT: &str = "events/raw_syscalls/sys_enter/id";

/// What a container has called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// Since recording began.
    pub(crate) elapsed: Duration,
    /// Whether it began before the container's own program did.
    pub(crate) whole: bool,
    /// Whether the container's first process has ended.
    pub(crate) ended: bool,
    /// Numbers of calls on x86-64 with classes of their arguments, sorted.
    pub(crate) uses: Vec<(u32, u32)>,
    /// Calls of all containers that no room was left for.
    pub(crate) missed: u64,
}

/// The recording of system calls.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    hierarchy: Hierarchy,
    active: Kept<Active>,
}

/// A program that records.
#[derive(Debug)]
struct Active {
    began: Instant,
    /// Containers that were made since.
    whole: HashSet<String>,
    seen: Map,
    missed: Map,
    _link: OwnedFd,
}

impl Recorder {
    /// Records nothing yet.
    pub(crate) fn new(hierarchy: Hierarchy) -> Self {
        Self {
            hierarchy,
            active: Kept::default(),
        }
    }

    /// A container is about to be set up, with these annotations: the one that asks for it starts the recording.
    pub(crate) fn begins(
        &self,
        id: &str,
        annotations: &BTreeMap<String, String>,
    ) -> Result<(), InsightError> {
        match annotations.get(ANNOTATION).map(String::as_str) {
            Some("true") => self.active.keep_for_good(Active::start)?,
            None | Some("false") => {}
            Some(value) => {
                let value = value.to_owned();
                return Err(InsightError::Annotation { value });
            }
        }
        let add = |active: &mut Active| {
            active.forget_deleted(&self.hierarchy)?;
            active.whole.insert(id.to_owned());
            Ok(())
        };
        self.active.if_there(add).unwrap_or(Ok(()))
    }

    /// What the container has called, once `end` comes, its first process's, or after `wait_ms` milliseconds. Begins to
    /// record if nobody has asked before; recording goes on for `keep_ms` milliseconds after the last question.
    pub(crate) async fn record<E>(
        &self,
        id: &str,
        keep_ms: u32,
        wait_ms: u32,
        end: impl Future<Output = E>,
    ) -> Result<Record, InsightError> {
        let wait = Duration::from_millis(wait_ms.into()).min(MAX_WAIT);
        let cgroups = self.hierarchy.containers()?;
        let found = cgroups.iter().find(|(_, name)| *name == id);
        let missing = || InsightError::Container(id.to_owned());
        let cgroup = *found.ok_or_else(missing)?.0;
        self.active.ask(keep_ms, Active::start, |_| Ok(()))?;
        let ended = timeout(wait, end).await.is_ok();
        self.active.ask(keep_ms, Active::start, |active| {
            let record = active.collect(cgroup)?;
            let whole = active.whole.contains(id);
            Ok(Record {
                whole,
                ended,
                ..record
            })
        })
    }
}

impl Active {
    fn start() -> Result<Self, InsightError> {
        let (key, value) = (record_program::KEY_BYTES, record_program::VALUE_BYTES);
        let seen = map(MapKind::Hash, key, value, MAX_SEEN)?;
        let missed = map(MapKind::PerProcessorArray, 4, 8, 1)?;
        let program = record_program::enter(seen.descriptor(), missed.descriptor());
        let link = event_number().and_then(|event| {
            let program = kernel::load(ProgramKind::Tracepoint, "walnut_record", &program)?;
            attach_to_trace_event(event, &program)
        });
        let failed = |source| InsightError::Kernel {
            attempted: "attach the program that records system calls",
            source,
        };
        Ok(Self {
            began: Instant::now(),
            whole: HashSet::new(),
            seen,
            missed,
            _link: link.map_err(failed)?,
        })
    }

    fn collect(&self, container: u64) -> Result<Record, InsightError> {
        let keys = self.seen.keys().map_err(reading)?;
        let uses = keys.iter().filter_map(|key| {
            let [cgroup, call] = numbers(key);
            let [n0, n1, n2, n3, c0, c1, c2, c3] = call.to_le_bytes();
            let number = u32::from_le_bytes([n0, n1, n2, n3]);
            (cgroup == container).then(|| (number, u32::from_le_bytes([c0, c1, c2, c3])))
        });
        let mut uses: Vec<_> = uses.collect();
        uses.sort_unstable();
        let processors = possible_processors().map_err(reading)?;
        Ok(Record {
            elapsed: self.began.elapsed(),
            uses,
            missed: sum(&self.missed, processors).map_err(reading)?,
            ..Record::default()
        })
    }

    /// Makes room that containers leave which are there no more.
    fn forget_deleted(&mut self, hierarchy: &Hierarchy) -> Result<(), InsightError> {
        let containers = hierarchy.containers()?;
        self.whole
            .retain(|id| containers.values().any(|name| name == id));
        for key in self.seen.keys().map_err(reading)? {
            if !containers.contains_key(&numbers::<1>(&key)[0]) {
                self.seen.remove(&key).map_err(reading)?;
            }
        }
        Ok(())
    }
}

fn reading(source: io::Error) -> InsightError {
    InsightError::Kernel {
        attempted: "read the recorded system calls",
        source,
    }
}

/// Read in a tracefs that is mounted nowhere.
fn event_number() -> io::Result<u64> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    let root = file_system::create("tracefs", Path::new(""), &[], attributes)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut text = String::new();
    File::from(openat(&root, EVENT, flags, Mode::empty())?).read_to_string(&mut text)?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotated(value: &str) -> BTreeMap<String, String> {
        [(ANNOTATION.to_owned(), value.to_owned())].into()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_cannot_be_recorded_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::new(Hierarchy::at(folder.path()));
        let error = recorder.begins("a", &annotated("yes")).unwrap_err();
        let words = "annotation walnut.record \"yes\" is neither \"true\" nor \"false\"";
        assert_eq!(error.to_string(), words);
        recorder.begins("a", &annotated("false")).unwrap();
        let nobody = recorder.record("a", 1000, 0, std::future::ready(())).await;
        let words = "container \"a\" not found";
        assert_eq!(nobody.unwrap_err().to_string(), words);
    }
}
