//! The file server behind the device: a directory of the host, as FUSE.
//!
//! The directory is the root of the VMM's own mount namespace, which is what confines the guest: no path
//! of the server is resolved outside it, whatever `..` or symbolic links it meets. Inside it the server
//! opens by name with `O_NOFOLLOW`, and opens regular files and directories only: a device node, FIFO or
//! socket is shown and never opened (its meaning is the guest kernel's).
//!
//! Limits: no extended attributes, and so no POSIX ACLs (the crate reaches them by a path below `/proc`,
//! which the jail does not have); no locks that the host or another guest would see; changes on the host
//! are seen after [`FRESHNESS`]. Inode numbers do not fit 32 bits, so 32-bit programs need large-file
//! support. The crate keeps some 50 bytes for each file that the guest ever looked up.

use fuse_backend_rs::{
    abi::fuse_abi::FsOptions,
    api::{
        Vfs, VfsOptions,
        filesystem::FileSystem,
        server::{MAX_BUFFER_SIZE, Server},
        vfs::VfsError,
    },
    passthrough::{CachePolicy, Config, PassthroughFs},
    transport::{Reader, VirtioFsWriter},
};
use std::{io, path::PathBuf, sync::Arc, time::Duration};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

/// How long the guest may use names and attributes without asking again. A container's root file system
/// is changed by the guest alone, but a volume is also changed by the host, and its users expect to see
/// that at once. The guest keeps data and directories over an open (`CachePolicy::Always`), so that a
/// program that is started twice is read once; it drops them when it learns of another size or time of
/// modification (AUTO_INVAL_DATA), so they are as fresh as the attributes.
const FRESHNESS: Duration = Duration::from_secs(1);
/// Bytes of a request or of an answer at the most: the largest payload and its headers.
const MAX_MESSAGE_BYTES: usize = MAX_BUFFER_SIZE as usize + 4096;

/// Why the share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The server could not prepare itself: it opens `/proc/self/fd` and `/proc/self/mountinfo`.
    #[error("cannot prepare the file server, which needs /proc")]
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
    /// The server refused its root.
    #[error("cannot serve the root of the share")]
    Serve(#[source] VfsError),
}

/// A server that has what it needs from outside the jail, and has not opened its root.
pub struct PendingShare {
    files: PassthroughFs,
    root: PathBuf,
}

/// A server that can answer requests, from several threads at once.
pub struct ShareServer {
    server: Server<Arc<Vfs>>,
    files: Arc<Vfs>,
}

impl ShareServer {
    /// Opens what the server needs of `/proc`; `root` is opened later, by [`PendingShare::after_jail`].
    pub fn before_jail(root: &str) -> Result<PendingShare, FsError> {
        let config = Config {
            root_dir: root.to_owned(),
            entry_timeout: FRESHNESS,
            attr_timeout: FRESHNESS,
            cache_policy: CachePolicy::Always,
            // The guest's page cache would hold what the host cannot see.
            writeback: false,
            // Options are negotiated by `Vfs`.
            do_import: false,
            // The guest's own cache and the host's are enough: O_DIRECT on the host would demand an
            // alignment of which the guest knows nothing.
            allow_direct_io: false,
            enable_mntid: true,
            ..Config::default()
        };
        let files = PassthroughFs::new(config).map_err(FsError::Prepare)?;
        let root = root.into();
        Ok(PendingShare { files, root })
    }

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
        let written = self
            .server
            .handle_message(request, answer.into(), None, None);
        written
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or(0)
    }

    /// Forgets every file that the guest has opened or looked up.
    pub(super) fn forget_all(&self) {
        self.files.destroy();
    }
}

impl PendingShare {
    /// Opens the root. Sets the process's umask to zero, as the guest applies the umask of its processes.
    pub fn after_jail(self) -> Result<ShareServer, FsError> {
        let Self { files, root } = self;
        files
            .import()
            .map_err(|source| FsError::Root { root, source })?;
        let options = VfsOptions {
            no_open: false,
            no_opendir: false,
            no_writeback: true,
            killpriv_v2: false,
            out_opts: FsOptions::ASYNC_READ
                | FsOptions::PARALLEL_DIROPS
                | FsOptions::BIG_WRITES
                | FsOptions::MAX_PAGES
                | FsOptions::ASYNC_DIO
                | FsOptions::AUTO_INVAL_DATA
                | FsOptions::ATOMIC_O_TRUNC
                | FsOptions::CACHE_SYMLINKS
                | FsOptions::DO_READDIRPLUS
                | FsOptions::READDIRPLUS_AUTO,
            ..VfsOptions::default()
        };
        let vfs = Arc::new(Vfs::new(options));
        vfs.mount(Box::new(files), "/").map_err(FsError::Serve)?;
        Ok(ShareServer {
            server: Server::new(vfs.clone()),
            files: vfs,
        })
    }
}
