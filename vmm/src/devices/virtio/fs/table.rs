//! What the guest knows of the share: files by their node, open files by their handle.
//!
//! Each costs a descriptor, so both tables are bounded; what is beyond the bound is refused until the guest
//! forgets or closes something. Must not resolve a name.

use rustix::{
    fs::{AtFlags, FileType, Statx, StatxFlags, statx},
    io::Errno,
};
use std::{
    collections::HashMap,
    ffi::CStr,
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
};

/// The root's node.
pub(super) const ROOT: u64 = fuse_backend_rs::abi::fuse_abi::ROOT_ID;
/// Descriptors that are left to the rest of the process.
const RESERVED: u64 = 256;

/// What makes two paths the same file. The descriptor that each inode has keeps it from being reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    device: (u32, u32),
    number: u64,
    mount: u64,
}

/// A file of the host that the guest has looked up.
pub(super) struct Inode {
    /// Opened with `O_PATH`.
    pub(super) path: OwnedFd,
    /// What it is, which never changes.
    pub(super) kind: FileType,
    identity: Identity,
}

impl Inode {
    /// The mount that it was reached by.
    pub(super) fn mount(&self) -> u64 {
        self.identity.mount
    }

    /// What stands for `name` in this directory.
    pub(super) fn called(&self, name: &CStr) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.identity, name).hash(&mut hasher);
        hasher.finish()
    }
}

/// Attributes of an open file, and the mount that it was reached by.
pub(super) fn status(file: impl AsFd) -> Result<Statx, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(
        file,
        c"",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        wanted,
    )
}

struct Known {
    inode: Arc<Inode>,
    lookups: u64,
    /// The name by which it was last looked up.
    called: u64,
}

#[derive(Default)]
struct Index {
    nodes: HashMap<u64, Known>,
    by_identity: HashMap<Identity, u64>,
    last: u64,
}

/// All inodes that the guest knows. Nodes are never used again, so that what is forgotten stays unknown.
pub(super) struct Inodes {
    index: RwLock<Index>,
    most: usize,
}

// No code that can panic runs under the locks of this file: their poison says nothing.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Inodes {
    /// A table for a process that may have `descriptors` of them: half, as an open file may need two.
    pub(super) fn new(descriptors: u64) -> Self {
        Self {
            index: RwLock::default(),
            most: share_of(descriptors, 2),
        }
    }

    /// Forgets all but the root, which is `path`.
    pub(super) fn start(&self, path: OwnedFd) -> Result<(), Errno> {
        let status = status(&path)?;
        let mut index = write(&self.index);
        index.nodes.clear();
        index.by_identity.clear();
        index.last = index.last.max(ROOT);
        index.insert(ROOT, path, &status, 0);
        Ok(())
    }

    /// The file that `node` is.
    pub(super) fn get(&self, node: u64) -> Result<Arc<Inode>, Errno> {
        let known = read(&self.index);
        let known = known.nodes.get(&node).ok_or(Errno::STALE)?;
        Ok(known.inode.clone())
    }

    /// Counts a look-up of the file that `path` is open for and that was found by the name `called`.
    pub(super) fn look_up(&self, path: OwnedFd, status: &Statx, called: u64) -> Result<u64, Errno> {
        let mut index = write(&self.index);
        if let Some(&node) = index.by_identity.get(&Identity::of(status)) {
            let known = index.nodes.get_mut(&node).ok_or(Errno::STALE)?;
            known.lookups = known.lookups.saturating_add(1);
            known.called = called;
            return Ok(node);
        }
        if index.nodes.len() >= self.most {
            return Err(Errno::NFILE);
        }
        let node = index.next()?;
        index.insert(node, path, status, called);
        Ok(node)
    }

    /// Counts a look-up of what was last found by the name `called` and isn't the file that has it `now`.
    pub(super) fn recall(
        &self,
        called: u64,
        directory: bool,
        now: Option<&Statx>,
    ) -> Option<(u64, Arc<Inode>)> {
        let now = now.map(Identity::of);
        let mut index = write(&self.index);
        let fits = |known: &Known| {
            known.called == called
                && (known.inode.kind == FileType::Directory) == directory
                && Some(known.inode.identity) != now
        };
        let known = index.nodes.iter_mut().filter(|(_, known)| fits(known));
        let (&node, known) = known.max_by_key(|&(&node, _)| node)?;
        known.lookups = known.lookups.saturating_add(1);
        Some((node, known.inode.clone()))
    }

    /// A node that nothing is and nothing will be.
    pub(super) fn unused(&self) -> Result<u64, Errno> {
        write(&self.index).next()
    }

    /// Takes back `count` look-ups. The root is never forgotten.
    pub(super) fn forget(&self, node: u64, count: u64) {
        let mut index = write(&self.index);
        let Some(known) = index.nodes.get_mut(&node).filter(|_| node != ROOT) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            let identity = known.inode.identity;
            index.nodes.remove(&node);
            index.by_identity.remove(&identity);
        }
    }
}

impl Index {
    fn next(&mut self) -> Result<u64, Errno> {
        self.last = self.last.checked_add(1).ok_or(Errno::NFILE)?;
        Ok(self.last)
    }

    fn insert(&mut self, node: u64, path: OwnedFd, status: &Statx, called: u64) {
        let identity = Identity::of(status);
        let kind = FileType::from_raw_mode(status.stx_mode.into());
        let inode = Arc::new(Inode {
            path,
            kind,
            identity,
        });
        let known = Known {
            inode,
            lookups: 1,
            called,
        };
        self.nodes.insert(node, known);
        self.by_identity.insert(identity, node);
    }
}

impl Identity {
    fn of(status: &Statx) -> Self {
        Self {
            device: (status.stx_dev_major, status.stx_dev_minor),
            number: status.stx_ino,
            mount: status.stx_mnt_id,
        }
    }
}

/// A file or directory that the guest has opened.
pub(super) struct Handle {
    /// The node that it was opened by.
    pub(super) node: u64,
    /// What is read and written, at the positions that the guest says.
    pub(super) file: File,
    /// The same, opened with `O_APPEND`, where the guest did so: the host then finds the end, which other guests
    /// and the host itself may have moved.
    pub(super) append: Option<File>,
    /// Held while the file's own position is used.
    pub(super) position: Mutex<()>,
}

/// All open files.
pub(super) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
    most: usize,
}

impl Handles {
    /// A table for a process that may have `descriptors` of them.
    pub(super) fn new(descriptors: u64) -> Self {
        Self {
            open: RwLock::default(),
            next: AtomicU64::new(1),
            most: share_of(descriptors, 4),
        }
    }

    /// Keeps an open file.
    pub(super) fn add(&self, handle: Handle) -> Result<u64, Errno> {
        let mut open = write(&self.open);
        if open.len() >= self.most {
            return Err(Errno::NFILE);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The open file with this number, which must be of `node`.
    pub(super) fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let open = read(&self.open);
        let handle = open.get(&number).filter(|handle| handle.node == node);
        handle.cloned().ok_or(Errno::BADF)
    }

    /// Closes an open file.
    pub(super) fn remove(&self, number: u64, node: u64) -> Result<(), Errno> {
        self.get(number, node)?;
        write(&self.open).remove(&number);
        Ok(())
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        write(&self.open).clear();
    }
}

fn share_of(descriptors: u64, parts: u64) -> usize {
    let free = descriptors.saturating_sub(RESERVED) / parts;
    usize::try_from(free).unwrap_or(usize::MAX)
}
