//! Makes inotify tell of what the host has changed in a volume.
//!
//! A thread of its own does again what the host did. The VMM's file server knows it by its number and by the
//! group of each request, and answers without touching the host (decision 10). Must not resolve a path of a
//! container: volumes are held open since before the container was made.

use nix::unistd::{Gid, setfsgid};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, StatxTimestamp, Timespec, Timestamps,
        UTIME_OMIT, getxattr, mkdirat, mknodat, open, openat, renameat, statx, unlinkat, utimensat,
    },
    io::Errno,
    mount::{UnmountFlags, unmount},
};
use std::{
    collections::HashMap,
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
};
use tokio::{sync::oneshot, task::spawn_blocking};
use walnut_agent_api::{
    SHARE_MOUNT_POINT,
    guest::{Change, change::Kind},
};

/// Reading it makes a thread the announcer.
const ANNOUNCER: &str = "trusted.walnut.announcer";
/// Groups of requests: no name exists, every name is a file's, every name is a directory's.
const NO_NAME: u32 = 0x7761_6c30;
const FILES: u32 = NO_NAME + 1;
const DIRECTORIES: u32 = NO_NAME + 2;
/// Volumes of a container, and changes of a call, at the most.
const MAX_VOLUMES: usize = 64;
const MAX_CHANGES: usize = 256;
/// Calls that wait for the announcer.
const MAX_WAITING: usize = 4;

/// Why volumes cannot be watched or changes not be told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    /// More than the contract allows.
    #[error("{0} {1} at once are too many")]
    TooMany(usize, &'static str),
    /// An id that isn't a directory's name.
    #[error("{0:?} is no container's id")]
    Container(String),
    /// A volume that cannot be opened.
    #[error("cannot open volume {number} of container {container:?}")]
    Volume {
        /// Whose.
        container: String,
        /// Which.
        number: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The announcer's thread.
    #[error("cannot announce changes")]
    Announcer(#[source] io::Error),
    /// The announcer is busy with earlier changes.
    #[error("earlier changes are still being announced")]
    Busy,
}

/// A volume, open since before its container was made: the container's mount is then of the same file system.
struct Volume {
    number: u32,
    place: PathBuf,
    file: Arc<OwnedFd>,
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Opening mounted the host's mount as one of its own here, unless the volume is a file.
        let _ = unmount(&self.place, UnmountFlags::DETACH);
    }
}

/// Changes, each with the volume that it is in.
struct Batch {
    changes: Vec<(Arc<OwnedFd>, Change)>,
    done: oneshot::Sender<()>,
}

/// The volumes whose changes are told.
#[derive(Default)]
pub(crate) struct Volumes {
    held: Mutex<HashMap<String, Vec<Volume>>>,
    announcer: Mutex<Option<SyncSender<Batch>>>,
}

// Nothing that can panic runs under these locks: their poison says nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volumes {
    /// Holds volumes of a container that is to be made.
    pub(crate) async fn watch(&self, id: &str, numbers: Vec<u32>) -> Result<(), ChangeError> {
        if numbers.len() > MAX_VOLUMES {
            return Err(ChangeError::TooMany(numbers.len(), "volumes"));
        }
        if !is_name(id.as_bytes()) {
            return Err(ChangeError::Container(id.to_owned()));
        }
        let container = id.to_owned();
        let opened = spawn_blocking(move || {
            let volumes = numbers.into_iter().map(|number| hold(&container, number));
            volumes.collect::<Result<Vec<_>, _>>()
        });
        let volumes = opened
            .await
            .map_err(|error| ChangeError::Announcer(error.into()))??;
        lock(&self.held).insert(id.to_owned(), volumes);
        Ok(())
    }

    /// Lets go of a container's volumes.
    pub(crate) fn release(&self, id: &str) {
        let released = lock(&self.held).remove(id);
        drop(released);
    }

    /// Tells of changes; those of volumes that aren't held concern nobody.
    pub(crate) async fn announce(&self, changes: Vec<Change>) -> Result<(), ChangeError> {
        if changes.len() > MAX_CHANGES {
            return Err(ChangeError::TooMany(changes.len(), "changes"));
        }
        let changes = changes.into_iter().filter_map(|change| {
            let held = lock(&self.held);
            let mut volumes = held.get(&change.container_id)?.iter();
            let volume = volumes.find(|volume| volume.number == change.volume)?;
            Some((volume.file.clone(), change))
        });
        let (done, told) = oneshot::channel();
        let batch = Batch {
            changes: changes.collect(),
            done,
        };
        self.hand_over(batch)?;
        let ended = || io::Error::other("the announcer has ended");
        told.await.map_err(|_| ChangeError::Announcer(ended()))
    }

    fn hand_over(&self, batch: Batch) -> Result<(), ChangeError> {
        let mut announcer = lock(&self.announcer);
        let to = match &*announcer {
            Some(to) => to,
            None => announcer.insert(start().map_err(ChangeError::Announcer)?),
        };
        match to.try_send(batch) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(ChangeError::Busy),
            Err(TrySendError::Disconnected(_)) => {
                // It could not present itself; another may.
                *announcer = None;
                let ended = io::Error::other("the announcer has ended");
                Err(ChangeError::Announcer(ended))
            }
        }
    }
}

fn hold(container: &str, number: u32) -> Result<Volume, ChangeError> {
    let below = Path::new(SHARE_MOUNT_POINT).join(container).join("mounts");
    let place = below.join(number.to_string());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // Asking for a directory makes the kernel mount what the host has mounted there.
    let opened = match open(&place, flags | OFlags::DIRECTORY, Mode::empty()) {
        Err(Errno::NOTDIR) => open(&place, flags | OFlags::NOFOLLOW, Mode::empty()),
        opened => opened,
    };
    let file = opened.map_err(|error| ChangeError::Volume {
        container: container.to_owned(),
        number,
        source: error.into(),
    })?;
    Ok(Volume {
        number,
        place,
        file: Arc::new(file),
    })
}

/// One component of a path.
fn is_name(bytes: &[u8]) -> bool {
    !matches!(bytes, b"" | b"." | b"..") && !bytes.contains(&b'/') && bytes.len() <= 255
}

fn start() -> io::Result<SyncSender<Batch>> {
    let (sender, batches) = sync_channel(MAX_WAITING);
    std::thread::Builder::new()
        .name("announcer".to_owned())
        .spawn(move || announce_all(&batches))?;
    Ok(sender)
}

fn announce_all(batches: &Receiver<Batch>) {
    let presented = getxattr(SHARE_MOUNT_POINT, ANNOUNCER, &mut [0u8; 0][..]);
    if let Err(error) = presented {
        eprintln!("walnut-agent: the file server knows no announcer: {error}");
        return;
    }
    for Batch { changes, done } in batches {
        for (volume, change) in changes {
            // What is overtaken by a later change can't be told any more, and needn't.
            let _ = announce(volume.as_fd(), &change);
        }
        // Who asked may have gone.
        let _ = done.send(());
    }
}

/// Does what the requests of `work` are to be answered by.
fn as_if<T>(names: u32, work: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    let own = setfsgid(Gid::from_raw(names));
    let result = work();
    setfsgid(own);
    result
}

fn announce(volume: BorrowedFd<'_>, change: &Change) -> rustix::io::Result<()> {
    let names = [&change.directory, &change.name, &change.new_name];
    if names.iter().any(|name| !name.is_empty() && !is_name(name)) {
        return Err(Errno::INVAL);
    }
    let [directory, name, new_name] = names.map(|name| CString::new(name.as_slice()));
    let bad = |_| Errno::INVAL;
    let (directory, name) = (directory.map_err(bad)?, name.map_err(bad)?);
    let opened = match directory.is_empty() {
        true => None,
        false => Some(open_directory(volume, &directory)?),
    };
    let place = opened.as_ref().map_or(volume, AsFd::as_fd);
    let present = if change.is_directory {
        DIRECTORIES
    } else {
        FILES
    };
    match change.kind.enum_value_or_default() {
        Kind::CREATED if change.is_directory => {
            as_if(NO_NAME, || mkdirat(place, &name, Mode::empty()))
        }
        Kind::CREATED => as_if(NO_NAME, || {
            mknodat(place, &name, FileType::RegularFile, Mode::empty(), 0)
        }),
        Kind::DELETED => {
            let kind = match change.is_directory {
                true => AtFlags::REMOVEDIR,
                false => AtFlags::empty(),
            };
            as_if(present, || unlinkat(place, &name, kind))
        }
        Kind::MOVED => {
            let new_name = new_name.map_err(bad)?;
            as_if(present, || renameat(place, &name, place, &new_name))
        }
        kind => touch(place, &name, kind),
    }
}

/// A directory that the host has, or one that the guest has known.
fn open_directory(volume: BorrowedFd<'_>, name: &CString) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || openat(volume, name, flags, Mode::empty());
    match open() {
        Err(Errno::NOENT) => as_if(DIRECTORIES, open),
        opened => opened,
    }
}

/// Tells of what happened to a file itself. Its attributes are asked for first, so that who hears of a change
/// also sees it.
fn touch(place: BorrowedFd<'_>, name: &CString, kind: Kind) -> rustix::io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match name.is_empty() {
        true => None,
        false => Some(openat(place, name, flags, Mode::empty())?),
    };
    let file = opened.as_ref().map_or(place, AsFd::as_fd);
    let fresh = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    let status = statx(file, c"", fresh, StatxFlags::BASIC_STATS)?;
    if kind == Kind::WRITTEN {
        if FileType::from_raw_mode(status.stx_mode.into()) == FileType::RegularFile {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            as_if(FILES, || openat(CWD, link, flags, Mode::empty()))?;
        }
        return Ok(());
    }
    let time = |StatxTimestamp {
                    tv_sec, tv_nsec, ..
                }| Timespec {
        tv_sec,
        tv_nsec: tv_nsec.into(),
    };
    let omitted = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    // The time of modification alone is data to inotify, both times are attributes.
    let times = Timestamps {
        last_access: match kind {
            Kind::ATTRIBUTES => time(status.stx_atime),
            _ => omitted,
        },
        last_modification: time(status.stx_mtime),
    };
    as_if(FILES, || utimensat(file, c"", &times, AtFlags::EMPTY_PATH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_component() {
        for name in [&b""[..], b".", b"..", b"a/b", b"/", &[b'x'; 256]] {
            assert!(!is_name(name), "{name:?}");
        }
        for name in [&b"..data"[..], b"a b", b"\xff"] {
            assert!(is_name(name), "{name:?}");
        }
    }

    #[test]
    fn what_leaves_its_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let volume = std::fs::File::open(directory.path()).unwrap();
        let change = Change {
            name: b"..".to_vec(),
            ..Change::default()
        };
        assert_eq!(announce(volume.as_fd(), &change), Err(Errno::INVAL));
        let zero = Change {
            name: b"a\0b".to_vec(),
            ..Change::default()
        };
        assert_eq!(announce(volume.as_fd(), &zero), Err(Errno::INVAL));
    }

    #[tokio::test]
    async fn only_so_much_is_taken_at_once() {
        let volumes = Volumes::default();
        let many = vec![Change::default(); MAX_CHANGES + 1];
        let error = volumes.announce(many).await.unwrap_err();
        assert!(matches!(error, ChangeError::TooMany(257, "changes")));
        let error = volumes.watch("c1", vec![0; 65]).await.unwrap_err();
        assert!(matches!(error, ChangeError::TooMany(65, "volumes")));
        let error = volumes.watch("../c1", vec![0]).await.unwrap_err();
        assert!(matches!(error, ChangeError::Container(_)));
    }
}
