//! A network namespace of the host, and how the shim works in one.
//!
//! A thread enters it, works and ends: no thread of the runtime is ever in another namespace than the host's.

use super::NetworkError;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

/// The shim's own, which is the host's.
const OWN: &str = "/proc/self/ns/net";

/// An open network namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    path: PathBuf,
}

/// What a namespace is told apart by as long as it exists.
pub(super) type Identity = (u64, u64);

impl Namespace {
    /// Opens the namespace at a path.
    pub(super) fn open(path: &Path) -> Result<Self, NetworkError> {
        let open = || -> io::Result<(File, bool)> {
            let file = File::open(path)?;
            let is_hosts = identity(&file)? == identity(&File::open(OWN)?)?;
            Ok((file, is_hosts))
        };
        let (file, is_hosts) = open().map_err(|source| NetworkError::Namespace {
            path: path.to_owned(),
            source,
        })?;
        if is_hosts {
            return Err(NetworkError::HostNetwork(path.to_owned()));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn identity(&self) -> Result<Identity, NetworkError> {
        identity(&self.file).map_err(|source| self.failed(source))
    }

    /// Works in it, on a thread of its own. Blocks.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        let enter_and_work = || {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| self.failed(error.into()))?;
            work()
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("pod-network".to_owned())
                .spawn_scoped(scope, enter_and_work)
                .map_err(|source| self.failed(source))?;
            let panicked = |_| Err(self.failed(io::Error::other("the thread in it panicked")));
            thread.join().unwrap_or_else(panicked)
        })
    }

    fn failed(&self, source: io::Error) -> NetworkError {
        NetworkError::Namespace {
            path: self.path.clone(),
            source,
        }
    }
}

fn identity(file: &File) -> io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_is_refused_however_it_is_named() {
        let error = Namespace::open(Path::new("/proc/thread-self/ns/net")).unwrap_err();
        assert!(matches!(error, NetworkError::HostNetwork(_)), "{error}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = Namespace::open(Path::new("/run/netns/none")).unwrap_err();
        assert!(error.to_string().contains("/run/netns/none"), "{error}");
    }
}
