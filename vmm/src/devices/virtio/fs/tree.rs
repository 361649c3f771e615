//! The host's files and how the guest comes to know them: a name becomes a node, a node becomes an open file.
//!
//! No path of the guest is resolved here, only one name at a time, without following a link, in a directory that
//! is held open with `O_PATH`. Regular files and directories are opened for more than that; a device node, FIFO
//! or socket is shown and never opened, as its meaning is the guest kernel's. Must not know a message.

use super::{
    announce::Announcer,
    attributes,
    identity::Identity,
    table::{Handle, Handles, Inode, Inodes, ROOT, status},
};
use fuse_backend_rs::{
    abi::fuse_abi::{ATTR_SUBMOUNT, CreateIn},
    api::filesystem::{Context, DirEntry, Entry},
};
use rustix::{
    fs::{FileType, Mode, OFlags, RawDir, SeekFrom, Statx, openat, seek},
    io::Errno,
    path::DecInt,
};
use std::{
    ffi::CStr,
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// How long the guest may use names and attributes without asking again. A container's root file system
/// is changed by the guest alone, but a volume is also changed by the host, and its users expect to see
/// that at once. The guest keeps data and directories over an open (`KEEP_CACHE`), so that a
/// program that is started twice is read once; it drops them when it learns of another size or time of
/// modification (`AUTO_INVAL_DATA`), so they are as fresh as the attributes.
pub(super) const FRESHNESS: Duration = Duration::from_secs(1);
/// What the guest may decide about how a file is opened.
const OPEN_FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);
/// Bytes of directory that are read at once.
const DIRECTORY_BYTES: usize = 32 << 10;

/// The share.
pub(super) struct Files {
    /// Where everything is below.
    pub(super) root: OwnedFd,
    /// `/proc/self/fd`, where an `O_PATH` descriptor is a link to its file.
    pub(super) links: OwnedFd,
    /// Who executes requests.
    pub(super) identity: Identity,
    /// What the guest has looked up.
    pub(super) inodes: Inodes,
    /// What the guest has opened.
    pub(super) handles: Handles,
    /// Whether the guest may keep what it writes to itself for a while.
    pub(super) may_write_back: bool,
    /// Whether it does.
    pub(super) writes_back: AtomicBool,
    /// Who tells the guest what the host changed.
    pub(super) announcer: Announcer,
}

impl Files {
    /// The share whose root is `root`, for a process that may have this many descriptors.
    pub(super) fn new(
        root: OwnedFd,
        links: OwnedFd,
        may_write_back: bool,
        descriptors: u64,
    ) -> io::Result<Self> {
        let files = Self {
            root,
            links,
            identity: Identity::new()?,
            inodes: Inodes::new(descriptors),
            handles: Handles::new(descriptors),
            may_write_back,
            writes_back: AtomicBool::new(false),
            announcer: Announcer::default(),
        };
        files.inodes.start(files.root.try_clone()?)?;
        Ok(files)
    }

    /// Opens the file of an `O_PATH` descriptor for more than that.
    pub(super) fn reopen(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        if !matches!(inode.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::BADF.into());
        }
        let link = DecInt::from_fd(&inode.path);
        let file = openat(
            &self.links,
            link.as_c_str(),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(file.into())
    }

    /// What the host is to open for these flags of the guest. A guest that caches writes reads what it writes only
    /// a part of, and finds the end of a file by itself.
    fn flags(&self, flags: u32) -> OFlags {
        let flags = OFlags::from_bits_retain(flags);
        if self.writes_back.load(Ordering::Relaxed) && flags & OFlags::RWMODE == OFlags::WRONLY {
            return flags & OPEN_FLAGS.difference(OFlags::RWMODE) | OFlags::RDWR;
        }
        flags & OPEN_FLAGS
    }

    /// Keeps `file`, which was opened by `inode` with these flags of the guest.
    fn keep(&self, node: u64, inode: &Inode, file: File, flags: u32) -> io::Result<u64> {
        let appends = OFlags::from_bits_retain(flags).contains(OFlags::APPEND);
        let append = if appends && !self.writes_back.load(Ordering::Relaxed) {
            let flags = self.flags(flags).difference(OFlags::TRUNC) | OFlags::APPEND;
            Some(self.reopen(inode, flags)?)
        } else {
            None
        };
        let handle = Handle {
            node,
            file,
            append,
            position: Mutex::new(()),
        };
        Ok(self.handles.add(handle)?)
    }

    /// Looks up one name.
    pub(super) fn entry(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        let (path, status) = self.find(parent, name)?;
        let node = self.inodes.look_up(path, &status, parent.called(name))?;
        Ok(Self::entry_of(node, &status, parent))
    }

    /// What the host has by this name.
    pub(super) fn find(&self, parent: &Inode, name: &CStr) -> io::Result<(OwnedFd, Statx)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = openat(&parent.path, name, flags, Mode::empty())?;
        let status = status(&path)?;
        Ok((path, status))
    }

    /// What the guest is told of a file in `parent`.
    pub(super) fn entry_of(node: u64, status: &Statx, parent: &Inode) -> Entry {
        let directory = FileType::from_raw_mode(status.stx_mode.into()) == FileType::Directory;
        // Another file system of the host is another one in the guest too, or numbers of inodes would be those of
        // several files.
        let other = directory && status.stx_mnt_id != parent.mount();
        Entry {
            inode: node,
            generation: 0,
            attr: attributes::of(status),
            attr_flags: if other { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: FRESHNESS,
            entry_timeout: FRESHNESS,
        }
    }

    /// Makes a name in `parent` as the guest's user, and looks it up.
    pub(super) fn make(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        umask: u32,
        make: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> io::Result<Entry> {
        checked(name)?;
        let parent = self.inodes.get(parent)?;
        let user = (context.uid, context.gid);
        self.identity
            .create_as(user, umask, || Ok(make(&parent.path)?))?;
        self.entry(&parent, name)
    }

    /// Makes and opens a file; without a name, one that is in no directory.
    pub(super) fn make_file(
        &self,
        context: &Context,
        parent: u64,
        name: Option<&CStr>,
        args: CreateIn,
    ) -> io::Result<(Entry, u64)> {
        let directory = self.inodes.get(parent)?;
        let exclusive = match name {
            Some(_) => OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
            None => OFlags::TMPFILE,
        };
        let (flags, mode) = (self.flags(args.flags), Mode::from_raw_mode(args.mode));
        let (flags, name) = (flags | exclusive | OFlags::CLOEXEC, name.unwrap_or(c"."));
        let user = (context.uid, context.gid);
        let file = self.identity.create_as(user, args.umask, || {
            Ok(openat(&directory.path, name, flags, mode)?)
        })?;
        let link = DecInt::from_fd(&file);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = openat(&self.links, link.as_c_str(), flags, Mode::empty())?;
        let status = status(&path)?;
        let called = directory.called(name);
        let node = self.inodes.look_up(path, &status, called)?;
        let entry = Self::entry_of(node, &status, &directory);
        let inode = self.inodes.get(entry.inode)?;
        let handle = self.keep(entry.inode, &inode, file.into(), args.flags)?;
        Ok((entry, handle))
    }

    pub(super) fn open_node(&self, node: u64, flags: u32, kill: bool) -> io::Result<u64> {
        let inode = self.inodes.get(node)?;
        let file = self
            .identity
            .without_privilege(kill, || self.reopen(&inode, self.flags(flags)))?;
        self.keep(node, &inode, file, flags)
    }

    /// Copies within the host, at most `length` bytes.
    pub(super) fn copy(
        &self,
        (from_node, from, mut from_offset): (u64, u64, u64),
        (to_node, to, mut to_offset): (u64, u64, u64),
        length: usize,
    ) -> io::Result<usize> {
        let from = self.handles.get(from, from_node)?;
        let to = self.handles.get(to, to_node)?;
        Ok(rustix::fs::copy_file_range(
            &from.file,
            Some(&mut from_offset),
            &to.file,
            Some(&mut to_offset),
            length,
        )?)
    }

    /// Calls `add` with each entry from `offset` on, until it says that there is no more room.
    pub(super) fn list(
        &self,
        handle: &Handle,
        offset: u64,
        mut add: impl FnMut(DirEntry<'_>, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        // Poisoned by a panic only, which ends the process.
        let _position = handle
            .position
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        seek(&handle.file, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); DIRECTORY_BYTES];
        let mut directory = RawDir::new(&handle.file, &mut buffer);
        let mut added = false;
        while let Some(found) = directory.next() {
            let found = found?;
            let name = found.file_name();
            let entry = DirEntry {
                // The parent of the share is not the guest's to know.
                ino: match handle.node {
                    ROOT if name == c".." => status(&self.root)?.stx_ino,
                    _ => found.ino(),
                },
                offset: found.next_entry_cookie(),
                type_: found.file_type().as_raw_mode() >> 12,
                name: name.to_bytes(),
            };
            match add(entry, name) {
                Ok(0) => break,
                Ok(_) => added = true,
                // An error would take back what was added, which the guest is to know.
                Err(_) if added => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A name that stays in its directory.
pub(super) fn checked(name: &CStr) -> Result<(), Errno> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes.contains(&b'/') || matches!(bytes, b"." | b"..") {
        return Err(Errno::INVAL);
    }
    Ok(())
}
