//! Where a sandbox keeps its files, and where its server listens.
//!
//! `/run/walnut/<namespace>/<sandbox>/` holds everything that must survive the server's death so that the
//! `delete` command can undo it. This module knows the names; what is in the files belongs to their owners.

use sha2::{Digest as _, Sha256};
use std::{
    fmt::Write as _,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};
use walnut_shim_api::{ADDRESS_FILE, STATE_ROOT};

/// containerd's own place for shim sockets; short, as a Unix socket's path has 107 bytes at the most.
const SOCKET_ROOT: &str = "/run/containerd/s";

/// The directory of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Names the directory; creates nothing. Both names are single path components.
    pub(crate) fn new(namespace: &str, sandbox_id: &str) -> Self {
        Self::at(Path::new(STATE_ROOT).join(namespace).join(sandbox_id))
    }

    /// A directory anywhere.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the directory, for root only: it holds the VM's sockets and the containers' files.
    pub(crate) fn create(&self) -> io::Result<()> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Process id of the server.
    pub(crate) fn server_pid(&self) -> PathBuf {
        self.path.join("server.pid")
    }

    /// The path of the server's socket, for the `walnut` command.
    pub(crate) fn address(&self) -> PathBuf {
        self.path.join(ADDRESS_FILE)
    }

    /// Process id of the VMM.
    pub(crate) fn vmm_pid(&self) -> PathBuf {
        self.path.join("vmm.pid")
    }

    /// Which host cgroups were made.
    pub(crate) fn cgroup(&self) -> PathBuf {
        self.path.join("cgroup")
    }

    /// What was changed in the Pod's network namespace.
    pub(crate) fn network(&self) -> PathBuf {
        self.path.join("network")
    }

    /// What the guest's kernel and agent print.
    pub(crate) fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// The Unix socket that leads to the guest's vsock ports.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// The directory that the guest sees.
    pub(crate) fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// Where the mount points of the share are made.
    pub(crate) fn tree(&self) -> PathBuf {
        self.path.join("tree")
    }

    /// What a Pod without a pause container shows its containers in `/etc`.
    pub(crate) fn etc(&self) -> PathBuf {
        self.path.join("etc")
    }

    /// Removes the directory of a namespace when its last sandbox went.
    pub(crate) fn remove_empty_parent(&self) {
        if let Some(parent) = self.path.parent() {
            // Another sandbox of the namespace keeps it; that is the usual reason for a failure here.
            let _ = std::fs::remove_dir(parent);
        }
    }
}

/// The socket of a sandbox's server, where containerd's own shims have theirs, so that `ctr shim` finds it. `containerd`
/// tells apart several daemons on one machine.
pub(crate) fn socket_path(containerd: &str, namespace: &str, sandbox_id: &str) -> PathBuf {
    let hash = Sha256::new_with_prefix(format!("{containerd}/{namespace}/{sandbox_id}"));
    let mut name = String::with_capacity(64);
    for byte in hash.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    Path::new(SOCKET_ROOT).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn sockets_are_short_and_differ_by_every_part() {
        let one = socket_path("/run/containerd/containerd.sock", "default", "a");
        assert!(one.as_os_str().len() <= 107);
        // `SocketAddress` of containerd's pkg/shim: the hash of the three as one path.
        let name = "82795ca4b9b166c1139546afbf9dfd59d74776e0b49c8edfbb195f9d8b9e94a6";
        assert_eq!(one, Path::new(SOCKET_ROOT).join(name));
        for (containerd, namespace, id) in [
            ("/other", "default", "a"),
            ("/run/containerd/containerd.sock", "defaulta", ""),
        ] {
            assert_ne!(one, socket_path(containerd, namespace, id));
        }
    }

    #[test]
    fn the_directory_is_for_its_owner_only() {
        let temporary = tempfile::tempdir().unwrap();
        let state = StateDir::at(temporary.path().join("ns/id"));
        state.create().unwrap();
        state.create().unwrap();
        let mode = std::fs::metadata(state.path())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
