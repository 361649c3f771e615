//! The operations of FUSE on the host's files.
//!
//! The guest's kernel checks permissions, locks and the limits of names before it asks. Operations that are not
//! here are refused with ENOSYS, after which Linux does without: ACCESS and locks are the guest's own affair, and
//! FLUSH would only delay `close`, as everything is written by then. Must not answer a message.

use super::{
    attributes,
    identity::lend,
    table::status,
    tree::{FRESHNESS, Files, checked},
};
use fuse_backend_rs::{
    abi::fuse_abi::{
        CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV,
        stat64, statvfs64,
    },
    abi::virtio_fs::{RemovemappingOne, SetupmappingFlags},
    api::filesystem::{
        Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
        ZeroCopyWriter,
    },
    transport::FsCacheReqHandler,
};
use rustix::{
    fs::{
        AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, fallocate,
        fstatvfs, ftruncate, linkat, mkdirat, mknodat, readlinkat_raw, renameat_with, seek,
        symlinkat, unlinkat,
    },
    io::Errno,
    path::DecInt,
};
use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

/// Bytes of the longest symbolic link: `PATH_MAX`.
const LINK_BYTES: usize = 4096;
/// What is asked of the guest's kernel, where it can.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::CACHE_SYMLINKS)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::READDIRPLUS_AUTO)
    // The host applies the umask, as a directory's default ACL stands in for it.
    .union(FsOptions::POSIX_ACL)
    .union(FsOptions::DONT_MASK)
    .union(FsOptions::SUBMOUNTS)
    // Without this Linux asks for `security.capability` before every write.
    .union(FsOptions::HANDLE_KILLPRIV_V2)
    .union(FsOptions::MAP_ALIGNMENT);

fn count(bytes: usize) -> io::Result<u32> {
    bytes.try_into().map_err(|_| Errno::OVERFLOW.into())
}

/// Answers what the crate answers where nothing is implemented.
struct Unimplemented;

impl FileSystem for Unimplemented {
    type Inode = u64;
    type Handle = u64;
}

impl FileSystem for Files {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.destroy();
        let mut wanted = OPTIONS;
        wanted.set(FsOptions::WRITEBACK_CACHE, self.may_write_back);
        let writes_back = (capable & wanted).contains(FsOptions::WRITEBACK_CACHE);
        self.writes_back.store(writes_back, Ordering::Relaxed);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.announcer.forget();
        self.handles.clear();
        // Without a descriptor to be had the old root stays, and with it what was known.
        if let Ok(root) = self.root.try_clone() {
            let _ = self.inodes.start(root);
        }
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        checked(name)?;
        self.entry(&*self.inodes.get(parent)?, name)
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        self.inodes.forget(node, count);
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let status = status(&self.inodes.get(node)?.path)?;
        Ok((attributes::of(&status), FRESHNESS))
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        wanted: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let inode = self.inodes.get(node)?;
        if valid.contains(SetattrValid::SIZE) {
            let bytes = u64::try_from(wanted.st_size).map_err(|_| Errno::INVAL)?;
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            self.identity.without_privilege(kill, || match handle {
                Some(handle) => Ok(ftruncate(&self.handles.get(handle, node)?.file, bytes)?),
                None => Ok(ftruncate(self.reopen(&inode, OFlags::WRONLY)?, bytes)?),
            })?;
        }
        attributes::change(&inode.path, &self.links, &wanted, valid)?;
        self.getattr(context, node, handle)
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        let mut target = Vec::with_capacity(LINK_BYTES);
        let path = &self.inodes.get(node)?.path;
        readlinkat_raw(path, c"", rustix::buffer::spare_capacity(&mut target))?;
        Ok(target)
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, 0, |directory| {
            symlinkat(target, directory, name)
        })
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode));
        self.make(context, parent, name, umask, |directory| {
            mknodat(directory, name, kind, mode, device.into())
        })
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, umask, |directory| {
            mkdirat(directory, name, Mode::from_raw_mode(mode))
        })
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        checked(name)?;
        let directory = self.inodes.get(parent)?;
        Ok(unlinkat(&directory.path, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        checked(name)?;
        let directory = self.inodes.get(parent)?;
        Ok(unlinkat(&directory.path, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(
        &self,
        _: &Context,
        from: u64,
        from_name: &CStr,
        to: u64,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        checked(from_name)?;
        checked(to_name)?;
        let (from, to) = (self.inodes.get(from)?, self.inodes.get(to)?);
        let flags = RenameFlags::from_bits_retain(flags);
        Ok(renameat_with(
            &from.path, from_name, &to.path, to_name, flags,
        )?)
    }

    fn link(&self, _: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        checked(name)?;
        let (inode, parent) = (self.inodes.get(node)?, self.inodes.get(parent)?);
        let link = DecInt::from_fd(&inode.path);
        let follow = AtFlags::SYMLINK_FOLLOW;
        linkat(&self.links, link.as_c_str(), &parent.path, name, follow)?;
        self.entry(&parent, name)
    }

    fn open(
        &self,
        _: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let kill = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let handle = self.open_node(node, flags, kill)?;
        Ok((Some(handle), OpenOptions::KEEP_CACHE, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        checked(name)?;
        let exclusive = OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL);
        let (entry, handle) = match self.make_file(context, parent, Some(name), args) {
            // Made by the host since the guest looked.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && !exclusive => {
                let entry = self.lookup(context, parent, name)?;
                let kill = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                let handle = self.open_node(entry.inode, args.flags, kill);
                // The guest doesn't hear of the entry, so it can't forget it.
                let handle = handle.inspect_err(|_| self.inodes.forget(entry.inode, 1))?;
                (entry, handle)
            }
            made => made?,
        };
        Ok((entry, Some(handle), OpenOptions::KEEP_CACHE, None))
    }

    fn read(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, node)?;
        lend(&handle.file, |file| {
            to.write_from(file, size as usize, offset)
        })
    }

    fn write(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, node)?;
        // Pages of the guest's cache are written without the flag, where they belong.
        let appends = OFlags::from_bits_retain(flags).contains(OFlags::APPEND);
        let append = handle.append.as_ref().filter(|_| appends);
        let kill = fuse_flags & WRITE_KILL_PRIV != 0;
        self.identity.without_privilege(kill, || {
            lend(append.unwrap_or(&handle.file), |file| {
                from.read_to(file, size as usize, offset)
            })
        })
    }

    fn release(
        &self,
        _: &Context,
        node: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        Ok(self.handles.remove(handle, node)?)
    }

    fn fsync(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, node)?;
        match data_only {
            true => handle.file.sync_data(),
            false => handle.file.sync_all(),
        }
    }

    fn fallocate(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, node)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(fallocate(&handle.file, mode, offset, length)?)
    }

    /// Linux asks for data and holes only.
    fn lseek(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let handle = self.handles.get(handle, node)?;
        let _position = handle
            .position
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let target = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(seek(&handle.file, target)?)
    }

    fn statfs(&self, context: &Context, node: u64) -> io::Result<statvfs64> {
        let mut answer = Unimplemented.statfs(context, node)?;
        let host = fstatvfs(&self.inodes.get(node)?.path)?;
        answer.f_bsize = host.f_bsize;
        answer.f_frsize = host.f_frsize;
        answer.f_blocks = host.f_blocks;
        answer.f_bfree = host.f_bfree;
        answer.f_bavail = host.f_bavail;
        answer.f_files = host.f_files;
        answer.f_ffree = host.f_ffree;
        answer.f_namemax = host.f_namemax;
        Ok(answer)
    }

    fn setxattr(
        &self,
        _: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        attributes::set(&self.inodes.get(node)?.path, name, value, flags)
    }

    fn getxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        if self.announcer.meet(context.pid, name) {
            return Ok(GetxattrReply::Count(0));
        }
        let inode = self.inodes.get(node)?;
        Ok(match size {
            0 => GetxattrReply::Count(count(attributes::length(&inode.path, name)?)?),
            most => GetxattrReply::Value(attributes::get(&inode.path, name, most)?),
        })
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inodes.get(node)?;
        Ok(match size {
            0 => ListxattrReply::Count(count(attributes::list_length(&inode.path)?)?),
            most => ListxattrReply::Names(attributes::list(&inode.path, most)?),
        })
    }

    fn removexattr(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        attributes::remove(&self.inodes.get(node)?.path, name)
    }

    fn opendir(&self, _: &Context, node: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let handle = self.open_node(node, OFlags::RDONLY.bits(), false)?;
        let kept = OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR;
        Ok((Some(handle), kept))
    }

    fn readdir(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, node)?;
        self.list(&handle, offset, |entry, _| add(entry))
    }

    fn readdirplus(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (inode, handle) = (self.inodes.get(node)?, self.handles.get(handle, node)?);
        self.list(&handle, offset, |entry, name| {
            // The directory itself and its parent are listed only, and so is what went away meanwhile.
            let known = match checked(name) {
                Ok(()) => self.entry(&inode, name).unwrap_or_default(),
                Err(_) => Entry::default(),
            };
            let added = add(entry, known);
            if !matches!(added, Ok(1..)) && known.inode != 0 {
                self.inodes.forget(known.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(
        &self,
        context: &Context,
        node: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.fsync(context, node, data_only, handle)
    }

    fn releasedir(&self, _: &Context, node: u64, _: u32, handle: u64) -> io::Result<()> {
        Ok(self.handles.remove(handle, node)?)
    }

    fn setupmapping(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        offset: u64,
        length: u64,
        flags: u64,
        at: u64,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        let inode = self.inodes.get(node)?;
        let writes = flags & SetupmappingFlags::WRITE.bits() != 0;
        let file = self.reopen(&inode, if writes { OFlags::RDWR } else { OFlags::RDONLY })?;
        window.map(offset, at, length, flags, file.as_fd().as_raw_fd())
    }

    fn removemapping(
        &self,
        _: &Context,
        _: u64,
        requests: Vec<RemovemappingOne>,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        window.unmap(requests)
    }
}
