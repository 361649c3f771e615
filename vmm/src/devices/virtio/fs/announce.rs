//! What the host changed, told to the guest's kernel as if the guest had done it.
//!
//! inotify in the guest hears of what its own kernel does, so the agent does again what the host has done: it
//! makes, moves, removes and touches names. Its kernel asks this server for each of these, and the server answers
//! without touching the host (decision 10). The thread that may ask so says who it is by reading an extended
//! attribute that only `CAP_SYS_ADMIN` of the guest may read; its number is the guest kernel's word, which no
//! container can give. Must not change a file.

use super::{server::Session, table::status, tree::Files};
use fuse_backend_rs::{
    abi::fuse_abi::{Attr, AttrOut, EntryOut, InHeader, Opcode, OpenOptions, OpenOut},
    api::filesystem::Entry,
    transport::{Reader, VirtioFsWriter},
};
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};
use std::{
    ffi::CStr,
    io::{self, Read},
    sync::atomic::{AtomicU32, Ordering},
};

/// The extended attribute whose reader becomes the announcer.
const ANNOUNCER: &CStr = c"trusted.walnut.announcer";
/// Group of a request for which no name exists; the next two are those for which every name does, as a file or as
/// a directory.
const NO_NAME: u32 = 0x7761_6c30;
/// Bytes of the longest name, and its end.
const NAME_BYTES: u64 = 256;

/// Which names the guest is to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// None, so that one can be made.
    Absent,
    /// All, as files or as directories, so that one can be moved or removed.
    Present {
        /// Which of both.
        directory: bool,
    },
}

/// The thread of the guest that announces; 0 is nobody, as no thread of the guest has this number.
#[derive(Debug, Default)]
pub(super) struct Announcer(AtomicU32);

impl Announcer {
    /// Makes the sender of `header` the announcer, if that is what it asks for.
    pub(super) fn meet(&self, reader: i32, attribute: &CStr) -> bool {
        let asks = attribute == ANNOUNCER;
        if let Some(reader) = u32::try_from(reader).ok().filter(|_| asks) {
            self.0.store(reader, Ordering::Relaxed);
        }
        asks
    }

    /// Whoever it was, the guest has begun anew.
    pub(super) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// What `header` announces, if it does.
    pub(super) fn announces(&self, header: &InHeader) -> Option<Names> {
        let announcer = self.0.load(Ordering::Relaxed);
        if announcer == 0 || header.pid != announcer {
            return None;
        }
        let names = match header.gid.checked_sub(NO_NAME)? {
            0 => Names::Absent,
            1 => Names::Present { directory: false },
            2 => Names::Present { directory: true },
            _ => return None,
        };
        let operations = [
            Opcode::Lookup,
            Opcode::Mknod,
            Opcode::Mkdir,
            Opcode::Unlink,
            Opcode::Rmdir,
            Opcode::Rename,
            Opcode::Rename2,
            Opcode::Setattr,
            Opcode::Open,
        ];
        let announced = operations.map(|operation| operation as u32);
        announced.contains(&header.opcode).then_some(names)
    }
}

impl Session<'_> {
    /// Answers as if the announcer's request had been done.
    pub(super) fn pretend(
        &self,
        names: Names,
        header: &InHeader,
        request: &mut Reader<'_>,
        body: &mut VirtioFsWriter<'_>,
    ) -> io::Result<()> {
        let files = self.files();
        let is = |opcode: Opcode| header.opcode == opcode as u32;
        if is(Opcode::Lookup) {
            let mut name = Vec::new();
            request.take(NAME_BYTES).read_to_end(&mut name)?;
            let name = CStr::from_bytes_until_nul(&name).map_err(|_| Errno::INVAL)?;
            body.write_obj(EntryOut::from(files.recall(header.nodeid, name, names)?))
        } else if is(Opcode::Mknod) || is(Opcode::Mkdir) {
            files.inodes.get(header.nodeid)?;
            body.write_obj(EntryOut::from(files.invent(is(Opcode::Mkdir))?))
        } else if is(Opcode::Setattr) {
            let status = status(&files.inodes.get(header.nodeid)?.path)?;
            body.write_obj(AttrOut {
                attr: Attr::from(super::attributes::of(&status)),
                ..AttrOut::default()
            })
        } else if is(Opcode::Open) {
            // To be closed again: the guest's kernel then says that a file was written and closed.
            let handle = files.open_node(header.nodeid, OFlags::RDONLY.bits(), false)?;
            body.write_obj(OpenOut {
                fh: handle,
                open_flags: OpenOptions::KEEP_CACHE.bits(),
                ..OpenOut::default()
            })
        } else {
            Ok(())
        }
    }
}

impl Files {
    /// The file that the guest knows by this name and that the host no longer has there; if there is none, one
    /// that exists for this announcement only. The guest asks again for the name at its next use.
    fn recall(&self, parent: u64, name: &CStr, names: Names) -> io::Result<Entry> {
        let Names::Present { directory } = names else {
            return Err(Errno::NOENT.into());
        };
        let parent = self.inodes.get(parent)?;
        let now = self.find(&parent, name).ok();
        let now = now.as_ref().map(|(_, status)| status);
        let known = self.inodes.recall(parent.called(name), directory, now);
        let Some((node, inode)) = known else {
            return self.invent(directory);
        };
        let mut entry = Self::entry_of(node, &status(&inode.path)?, &parent);
        (entry.attr_timeout, entry.entry_timeout) = Default::default();
        Ok(entry)
    }

    /// A file that does not exist.
    fn invent(&self, directory: bool) -> io::Result<Entry> {
        let kind = match directory {
            true => FileType::Directory,
            false => FileType::RegularFile,
        };
        let mut entry = Entry {
            inode: self.inodes.unused()?,
            ..Entry::default()
        };
        entry.attr.st_ino = entry.inode;
        entry.attr.st_mode = kind.as_raw_mode();
        entry.attr.st_nlink = 1;
        Ok(entry)
    }
}
