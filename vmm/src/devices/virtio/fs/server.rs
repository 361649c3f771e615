//! From a descriptor chain to an answer: FUSE's messages.
//!
//! The crate parses and encodes them; those that it does not know yet are here. The directory that is shared is
//! the root of the VMM's own mount namespace, which is what confines the guest. Must not touch a file.

use super::{
    announce::Names,
    identity::{borrow, prepare_thread},
    tree::Files,
};
use crate::window::{Piece, Window};
use fuse_backend_rs::{
    abi::fuse_abi::{CreateIn, EntryOut, InHeader, OpenOptions, OpenOut, OutHeader, WriteOut},
    abi::virtio_fs::{RemovemappingOne, SetupmappingFlags},
    api::{
        filesystem::{Context, FileSystem},
        server::{MAX_BUFFER_SIZE, Server},
    },
    transport::{FsCacheReqHandler, Reader, VirtioFsWriter},
};
use rustix::{
    fs::{CWD, Mode, OFlags, open, openat},
    io::Errno,
    process::{Resource, getrlimit},
};
use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    path::PathBuf,
    sync::Arc,
};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

/// Bytes of a request or of an answer at the most: the largest payload and its headers.
const MAX_MESSAGE_BYTES: usize = MAX_BUFFER_SIZE as usize + 4096;
/// `FUSE_COPY_FILE_RANGE` and `FUSE_TMPFILE`.
const COPY_FILE_RANGE: u32 = 47;
const TMPFILE: u32 = 51;
/// Bytes that one request copies at the most: Linux asks again for the rest.
const MAX_COPY_BYTES: u64 = 64 << 20;

/// Why the share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The server could not prepare itself.
    #[error("cannot open /proc/self/fd, which the file server needs")]
    Prepare(#[source] io::Error),
    /// The root of the share could not be opened.
    #[error("cannot open {root}, the root of the share")]
    Root {
        /// Its path.
        root: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A server that has what it needs from outside the jail, and has not opened its root.
pub struct PendingShare {
    links: OwnedFd,
    root: PathBuf,
}

/// A server that can answer requests, from several threads at once.
pub struct ShareServer {
    server: Server<Arc<Files>>,
    files: Arc<Files>,
    window: Option<Arc<Window>>,
}

/// A server on a thread that was made ready for it.
pub(super) struct Session<'a>(&'a ShareServer);

impl ShareServer {
    /// Opens what the server needs of `/proc`; `root` is opened later, by [`PendingShare::after_jail`].
    pub fn before_jail(root: &str) -> Result<PendingShare, FsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let links = openat(CWD, "/proc/self/fd", flags, Mode::empty());
        Ok(PendingShare {
            links: links.map_err(|source| FsError::Prepare(source.into()))?,
            root: root.into(),
        })
    }

    /// Makes this thread one that may answer requests: it gets a working directory and a umask of its own.
    pub(super) fn enter_thread(&self) -> io::Result<Session<'_>> {
        prepare_thread(&self.files.links)?;
        Ok(Session(self))
    }

    /// Where the guest maps files.
    pub(super) fn window(&self) -> Option<&Arc<Window>> {
        self.window.as_ref()
    }

    /// Forgets every file that the guest has opened, mapped or looked up.
    pub(super) fn forget_all(&self) {
        FileSystem::destroy(&*self.files);
        if let Some(window) = &self.window {
            // Fails for want of memory only, and then the guest still sees what it was shown.
            let _ = window.clear();
        }
    }
}

impl PendingShare {
    /// Opens the root. `writeback` lets the guest keep what it writes to itself for a while.
    ///
    /// `window` is where the guest may map files.
    pub fn after_jail(
        self,
        writeback: bool,
        window: Option<Arc<Window>>,
    ) -> Result<ShareServer, FsError> {
        let Self { links, root } = self;
        // No limit is as many as there are.
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let files = open(&root, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|root| Files::new(root, links, writeback, descriptors));
        let files = Arc::new(files.map_err(|source| FsError::Root { root, source })?);
        Ok(ShareServer {
            server: Server::new(files.clone()),
            files,
            window,
        })
    }
}

/// Carries mappings from the messages to the window.
struct Mapper(Arc<Window>);

impl FsCacheReqHandler for Mapper {
    fn map(&mut self, offset: u64, at: u64, bytes: u64, flags: u64, fd: RawFd) -> io::Result<()> {
        let writable = flags & SetupmappingFlags::WRITE.bits() != 0;
        let piece = Piece { at, bytes };
        Ok(self.0.map(piece, borrow(&fd), offset, writable)?)
    }

    fn unmap(&mut self, requests: Vec<RemovemappingOne>) -> io::Result<()> {
        for RemovemappingOne { moffset: at, len } in requests {
            // The whole window, in the words of virtiofsd.
            let bytes = if len == u64::MAX {
                self.0.region().bytes
            } else {
                len
            };
            self.0.unmap(Piece { at, bytes })?;
        }
        Ok(())
    }
}

impl Session<'_> {
    /// Answers the request in `chain`; gives how many bytes were written to it. Zero is the answer to a
    /// request that needs none, and to a chain that holds no request.
    pub(super) fn answer(
        &self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> u32 {
        let Ok(request) = Reader::from_descriptor_chain(memory, chain.clone()) else {
            return 0;
        };
        let Ok(answer) = VirtioFsWriter::new(memory, chain) else {
            return 0;
        };
        // Descriptors may overlap, so a small guest can describe more than it has, and the server
        // allocates by what is described.
        if request.available_bytes() > MAX_MESSAGE_BYTES
            || answer.available_bytes() > MAX_MESSAGE_BYTES
        {
            return 0;
        }
        let header = request.clone().read_obj::<InHeader>().ok();
        let announced = header.and_then(|header| self.files().announcer.announces(&header));
        let written = match header {
            Some(header)
                if announced.is_some() || matches!(header.opcode, COPY_FILE_RANGE | TMPFILE) =>
            {
                self.answer_extension(&header, announced, request, answer)
            }
            _ => {
                let mut mapper = self.0.window.clone().map(Mapper);
                let mapper = mapper
                    .as_mut()
                    .map(|mapper| mapper as &mut dyn FsCacheReqHandler);
                let server = &self.0.server;
                let written = server.handle_message(request, answer.into(), mapper, None);
                written.map_err(io::Error::other)
            }
        };
        written
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or(0)
    }

    /// The share.
    pub(super) fn files(&self) -> &Files {
        &self.0.files
    }

    fn answer_extension(
        &self,
        header: &InHeader,
        announced: Option<Names>,
        mut request: Reader<'_>,
        mut answer: VirtioFsWriter<'_>,
    ) -> io::Result<usize> {
        request.read_obj::<InHeader>()?;
        let mut body = answer
            .split_at(size_of::<OutHeader>())
            .map_err(io::Error::other)?;
        let result = match (announced, header.opcode) {
            (Some(names), _) => self.pretend(names, header, &mut request, &mut body),
            (None, TMPFILE) => self.make_unnamed(header, &mut request, &mut body),
            (None, _) => self.copy(header, &mut request, &mut body),
        };
        let error = result
            .err()
            .map_or(0, |error| -error.raw_os_error().unwrap_or(libc::EIO));
        let bytes = match error {
            0 => body.bytes_written() + size_of::<OutHeader>(),
            _ => size_of::<OutHeader>(),
        };
        answer.write_obj(OutHeader {
            len: bytes.try_into().map_err(|_| Errno::OVERFLOW)?,
            error,
            unique: header.unique,
        })?;
        Ok(bytes)
    }

    /// `O_TMPFILE`: as CREATE, but for the name.
    fn make_unnamed(
        &self,
        header: &InHeader,
        request: &mut Reader<'_>,
        body: &mut VirtioFsWriter<'_>,
    ) -> io::Result<()> {
        let args: CreateIn = request.read_obj()?;
        let context = Context::from(header);
        let files = &self.0.files;
        let (entry, handle) = files.make_file(&context, header.nodeid, None, args)?;
        body.write_obj(EntryOut::from(entry))?;
        body.write_obj(OpenOut {
            fh: handle,
            open_flags: OpenOptions::KEEP_CACHE.bits(),
            ..OpenOut::default()
        })
    }

    /// `copy_file_range`, within the share and without the bytes entering the guest.
    fn copy(
        &self,
        header: &InHeader,
        request: &mut Reader<'_>,
        body: &mut VirtioFsWriter<'_>,
    ) -> io::Result<()> {
        let mut fields = [0u64; 7];
        for field in &mut fields {
            *field = request.read_obj()?;
        }
        let [from, from_offset, to_node, to, to_offset, bytes, flags] = fields;
        if flags != 0 {
            return Err(Errno::INVAL.into());
        }
        let bytes = bytes.min(MAX_COPY_BYTES);
        let copied = self.0.files.copy(
            (header.nodeid, from, from_offset),
            (to_node, to, to_offset),
            bytes.try_into().map_err(|_| Errno::INVAL)?,
        )?;
        body.write_obj(WriteOut {
            size: copied.try_into().map_err(|_| Errno::OVERFLOW)?,
            ..WriteOut::default()
        })
    }
}
