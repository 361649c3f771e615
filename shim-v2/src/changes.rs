#![allow(
    unsafe_code,
    reason = "lets the runtime wait for an inotify instance, which has no safe wrapper"
)]
//! What the host changes in a Pod's read-only volumes, for inotify in the guest.
//!
//! Shallow and bounded: a volume, and the first directories in it, as Kubernetes keeps a ConfigMap in one. Only
//! read-only volumes: of others the guest's own changes would come back to it. What isn't watched, or comes too
//! fast, is still seen by who looks (decision 10). Nothing of the guest is believed here. Must not open a file.

use crate::{agent::Agent, log, spec::Volume};
use rustix::{
    fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch},
    io::Errno,
};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::unix::AsyncFd,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use walnut_agent_api::guest::{Change, change::Kind};

/// Directories that are watched in a volume, and volumes of a container, at the most.
const MAX_DIRECTORIES: usize = 16;
const MAX_VOLUMES: usize = 64;
/// Watches of a Pod at the most: the host's user has some ten thousands for all.
const MAX_WATCHES: usize = 1024;
/// Changes in one call: the contract's bound.
const MAX_CHANGES: usize = 256;
/// Between one call and the next, so that a busy volume costs the Pod little.
const PACE: Duration = Duration::from_millis(20);
/// Bytes of events that are read at once; each change takes 16 or more.
const EVENT_BYTES: usize = MAX_CHANGES * 16;

/// Where events of a watch come from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    container: String,
    volume: u32,
    /// A directory in it, or empty.
    directory: Vec<u8>,
    /// Where it is, to watch what is made in it.
    path: PathBuf,
}

/// The places by their watch: a file that is in several volumes has one watch.
type Places = HashMap<i32, Vec<Place>>;

/// The watches of a Pod.
pub(crate) struct Watches {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    inotify: AsyncFd<OwnedFd>,
    places: Mutex<Places>,
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The volumes that are watched, by their numbers.
pub(crate) fn watched(volumes: &[Volume]) -> Vec<u32> {
    let numbered = (0u32..).zip(volumes);
    let watched = numbered.filter(|(_, volume)| volume.read_only);
    watched
        .map(|(number, _)| number)
        .take(MAX_VOLUMES)
        .collect()
}

impl Watches {
    /// Watches nothing yet, and tells `agent` of what changes.
    pub(crate) fn start(agent: Arc<Agent>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new()?);
        let task = tokio::spawn(tell(Arc::clone(&shared), agent));
        Ok(Self { shared, task })
    }

    /// Watches volumes of a container, which are mounted at `mounts`.
    pub(crate) fn add(&self, container: &str, mounts: &Path, volumes: &[u32]) {
        for &volume in volumes {
            let place = Place {
                container: container.to_owned(),
                volume,
                directory: Vec::new(),
                path: mounts.join(volume.to_string()),
            };
            self.shared.watch_volume(place);
        }
    }

    /// Watches a container's volumes no longer.
    pub(crate) fn remove(&self, container: &str) {
        self.shared.places().retain(|&watch, places| {
            places.retain(|place| place.container != container);
            if places.is_empty() {
                // Fails when the kernel has removed it with its file.
                let _ = remove_watch(&self.shared.inotify, watch);
            }
            !places.is_empty()
        });
    }
}

impl Shared {
    fn new() -> std::io::Result<Self> {
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self {
            // SAFETY: an owned file descriptor keeps its number as long as it lives, and lives in the result.
            inotify: unsafe { AsyncFd::register(inotify) }?,
            places: Mutex::default(),
        })
    }

    // Nothing that can panic runs under the lock: its poison says nothing.
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch_volume(&self, place: Place) {
        let inside = fs::read_dir(&place.path).into_iter().flatten().flatten();
        let directories = inside.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names: Vec<_> = directories
            .take(MAX_DIRECTORIES)
            .map(|entry| entry.file_name())
            .collect();
        self.watch(place.clone());
        for name in names {
            self.watch(inside_of(&place, name.as_bytes()));
        }
    }

    fn watch(&self, place: Place) {
        let mut places = self.places();
        if places.len() >= MAX_WATCHES {
            return;
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::EXCL_UNLINK
            | WatchFlags::DONT_FOLLOW;
        match add_watch(&self.inotify, &place.path, flags) {
            Ok(watch) => places.entry(watch).or_default().push(place),
            // Gone already.
            Err(Errno::NOENT) => {}
            Err(error) => log::line(&format!(
                "changes in {:?} are not announced to the guest: {error}",
                place.path
            )),
        }
    }

    /// Reads what has happened, at most so much as one call carries.
    fn read(&self) -> rustix::io::Result<Vec<Event>> {
        let mut buffer = [MaybeUninit::uninit(); EVENT_BYTES];
        let mut reader = Reader::new(self.inotify.get_ref(), &mut buffer);
        let mut events = Vec::new();
        loop {
            let event = reader.next()?;
            events.push(Event {
                watch: event.wd(),
                flags: event.events(),
                cookie: event.cookie(),
                name: event
                    .file_name()
                    .map_or_else(Vec::new, |name| name.to_bytes().to_owned()),
            });
            if reader.is_buffer_empty() {
                return Ok(events);
            }
        }
    }

    /// Changes by their places; follows directories that come and go in a volume.
    fn changes(&self, events: &[Event]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut made = Vec::new();
        {
            let mut places = self.places();
            for (index, event) in events.iter().enumerate() {
                if event.flags.contains(ReadFlags::IGNORED) {
                    places.remove(&event.watch);
                }
                if event.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                    log::line("so much changes in volumes that the guest isn't told of all");
                }
                for place in places.get(&event.watch).into_iter().flatten() {
                    let change = change(place, event, &events[..index], &events[index + 1..]);
                    // What is written piece by piece is told once.
                    changes.extend(change.filter(|change| changes.last() != Some(change)));
                    let comes = ReadFlags::CREATE | ReadFlags::MOVED_TO;
                    let directory = event.flags.contains(ReadFlags::ISDIR);
                    if directory && event.flags.intersects(comes) && place.directory.is_empty() {
                        made.push(inside_of(place, &event.name));
                    }
                }
            }
        }
        for place in made {
            self.watch_made(place);
        }
        changes
    }

    /// Watches a directory that has come, if its volume has room.
    fn watch_made(&self, place: Place) {
        let mut places = self.places();
        let same = |other: &Place| {
            (other.volume, &other.container) == (place.volume, &place.container)
                && !other.directory.is_empty()
        };
        for known in places.values_mut() {
            // Another directory by this name has gone.
            known.retain(|other| !same(other) || other.directory != place.directory);
        }
        let beside = places
            .values()
            .flatten()
            .filter(|other| same(other))
            .count();
        drop(places);
        if beside < MAX_DIRECTORIES {
            self.watch(place);
        }
    }
}

fn inside_of(place: &Place, name: &[u8]) -> Place {
    Place {
        directory: name.to_owned(),
        path: place.path.join(OsStr::from_bytes(name)),
        ..place.clone()
    }
}

/// An event, on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Event {
    watch: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Vec<u8>,
}

/// What the guest is told of an event that has others before and after it.
fn change(place: &Place, event: &Event, before: &[Event], after: &[Event]) -> Option<Change> {
    let half = |events: &[Event], flag: ReadFlags| {
        let mut events = events.iter();
        let other = events.find(|other| {
            (other.watch, other.cookie) == (event.watch, event.cookie) && other.flags.contains(flag)
        });
        other.map(|other| other.name.clone())
    };
    let mut new_name = Vec::new();
    let kind = match event.flags {
        flags if flags.contains(ReadFlags::MOVED_FROM) => match half(after, ReadFlags::MOVED_TO) {
            Some(name) => {
                new_name = name;
                Kind::MOVED
            }
            None => Kind::DELETED,
        },
        flags if flags.contains(ReadFlags::MOVED_TO) => {
            match half(before, ReadFlags::MOVED_FROM) {
                // Told with its first half.
                Some(_) => return None,
                None => Kind::CREATED,
            }
        }
        flags if flags.contains(ReadFlags::CREATE) => Kind::CREATED,
        flags if flags.contains(ReadFlags::DELETE) => Kind::DELETED,
        flags if flags.contains(ReadFlags::MODIFY) => Kind::MODIFIED,
        flags if flags.contains(ReadFlags::ATTRIB) => Kind::ATTRIBUTES,
        flags if flags.contains(ReadFlags::CLOSE_WRITE) => Kind::WRITTEN,
        _ => return None,
    };
    // The volume tells of its directories, too.
    if event.name.is_empty() && !place.directory.is_empty() {
        return None;
    }
    Some(Change {
        container_id: place.container.clone(),
        volume: place.volume,
        directory: place.directory.clone(),
        name: event.name.clone(),
        new_name,
        kind: kind.into(),
        is_directory: event.flags.contains(ReadFlags::ISDIR),
        ..Change::default()
    })
}

/// Tells the agent of what happens, until it can't be told.
async fn tell(shared: Arc<Shared>, agent: Arc<Agent>) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        let Ok(mut ready) = shared.inotify.readable().await else {
            return;
        };
        let events = match shared.read() {
            Ok(events) => events,
            Err(Errno::AGAIN | Errno::INTR) => {
                ready.clear_ready();
                continue;
            }
            Err(error) => return log::error("reading what changed in volumes", &error),
        };
        let changes = shared.changes(&events);
        for changes in changes.chunks(MAX_CHANGES) {
            if let Err(error) = agent.announce_changes(changes.to_owned()).await {
                return log::error("telling the guest what changed in its volumes", &error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> Shared {
        Shared::new().unwrap()
    }

    fn place(path: &Path) -> Place {
        Place {
            container: "c1".into(),
            volume: 3,
            directory: Vec::new(),
            path: path.to_owned(),
        }
    }

    /// What is told: kind, directory, name and new name.
    fn told(shared: &Shared) -> Vec<(Kind, String, String, String)> {
        let mut told = Vec::new();
        while let Ok(events) = shared.read() {
            told.extend(shared.changes(&events).into_iter().map(|change| {
                assert_eq!((change.container_id.as_str(), change.volume), ("c1", 3));
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                (
                    change.kind.enum_value().unwrap(),
                    text(&change.directory),
                    text(&change.name),
                    text(&change.new_name),
                )
            }));
        }
        told
    }

    fn names(told: &[(Kind, String, String, String)]) -> Vec<(Kind, &str, &str, &str)> {
        told.iter()
            .map(|(kind, directory, name, new)| (*kind, &**directory, &**name, &**new))
            .collect()
    }

    #[tokio::test]
    async fn the_update_of_a_config_map_is_told_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path();
        fs::create_dir(volume.join("..one")).unwrap();
        fs::write(volume.join("..one/key"), "1").unwrap();
        std::os::unix::fs::symlink("..one", volume.join("..data")).unwrap();
        let shared = shared();
        shared.watch_volume(place(volume));
        // As kubelet does it.
        fs::create_dir(volume.join("..two")).unwrap();
        std::os::unix::fs::symlink("..two", volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        fs::remove_file(volume.join("..one/key")).unwrap();
        fs::remove_dir(volume.join("..one")).unwrap();
        let first = told(&shared);
        assert_eq!(
            names(&first),
            [
                (Kind::CREATED, "", "..two", ""),
                (Kind::CREATED, "", "..data_tmp", ""),
                (Kind::MOVED, "", "..data_tmp", "..data"),
                (Kind::DELETED, "..one", "key", ""),
                (Kind::DELETED, "", "..one", ""),
            ]
        );
        // The directory that came is watched, the one that went isn't.
        fs::write(volume.join("..two/key"), "2").unwrap();
        let second = told(&shared);
        assert_eq!(
            names(&second),
            [
                (Kind::CREATED, "..two", "key", ""),
                (Kind::MODIFIED, "..two", "key", ""),
                (Kind::WRITTEN, "..two", "key", ""),
            ]
        );
        assert_eq!(shared.places().len(), 2);
    }

    #[tokio::test]
    async fn a_file_tells_of_itself_and_what_leaves_or_comes_alone_is_deleted_or_made() {
        let directory = tempfile::tempdir().unwrap();
        let (file, inside) = (directory.path().join("file"), directory.path().join("in"));
        fs::write(&file, "1").unwrap();
        fs::create_dir(&inside).unwrap();
        let shared = shared();
        shared.watch_volume(place(&file));
        fs::write(&file, "2").unwrap();
        let first = told(&shared);
        // Cut, and written.
        assert_eq!(
            names(&first),
            [(Kind::MODIFIED, "", "", ""), (Kind::WRITTEN, "", "", "")]
        );
        let shared = self::shared();
        shared.watch_volume(place(&inside));
        fs::rename(&file, inside.join("came")).unwrap();
        fs::rename(inside.join("came"), &file).unwrap();
        let second = told(&shared);
        assert_eq!(
            names(&second),
            [
                (Kind::CREATED, "", "came", ""),
                (Kind::DELETED, "", "came", "")
            ]
        );
    }

    #[tokio::test]
    async fn watches_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let shared = shared();
        for number in 0..2 * MAX_DIRECTORIES {
            fs::create_dir(directory.path().join(number.to_string())).unwrap();
        }
        shared.watch_volume(place(directory.path()));
        fs::create_dir(directory.path().join("late")).unwrap();
        assert_eq!(names(&told(&shared)), [(Kind::CREATED, "", "late", "")]);
        assert_eq!(shared.places().len(), 1 + MAX_DIRECTORIES);
        let volume = |read_only| Volume {
            source: "/".into(),
            recursive: true,
            read_only,
        };
        assert_eq!(watched(&[volume(false), volume(true)]), [1]);
        assert_eq!(watched(&vec![volume(true); 100]).len(), MAX_VOLUMES);
    }
}
