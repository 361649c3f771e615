//! What a sandbox has changed in a namespace that isn't its own, on disk, so that `delete` can undo it.

use super::{
    NetworkError,
    namespace::{Identity, Namespace},
    netlink::Socket,
    redirect::{self, IFF_ALLMULTI},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Where the namespace is,
    pub(super) namespace: PathBuf,
    /// and which one it was, as its path may be another's by now.
    pub(super) identity: Identity,
    pub(super) interfaces: Vec<Touched>,
}

/// An interface of the Pod's, and what was done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Touched {
    pub(super) index: u32,
    /// Whether the place for its filter was made too.
    pub(super) place_made: bool,
    /// Whether it was told to take all multicast packets.
    pub(super) all_multicast: bool,
}

impl Record {
    pub(super) fn write(&self, file: &Path) -> Result<(), NetworkError> {
        let written = serde_json::to_vec(self)
            .map_err(io::Error::from)
            .and_then(|json| fs::write(file, json));
        written.map_err(|source| failed("writing", file, source))
    }
}

impl Touched {
    /// Leaves the interface as it was found. What has gone is fine.
    pub(super) fn undo(self, socket: &Socket) -> io::Result<()> {
        redirect::undo(socket, self.index, self.place_made)?;
        if self.all_multicast {
            let undone = redirect::set_link(socket, self.index, 0, IFF_ALLMULTI, None);
            redirect::absent_is_fine(undone)?;
        }
        Ok(())
    }
}

/// Undoes what a record tells of, and removes it. A second time does nothing; nor does a namespace that is gone.
pub(crate) fn undo(file: &Path) -> Result<(), NetworkError> {
    let json = match fs::read(file) {
        Ok(json) => json,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed("reading", file, source)),
    };
    let record: Record =
        serde_json::from_slice(&json).map_err(|error| failed("reading", file, error.into()))?;
    let namespace = match Namespace::open(&record.namespace) {
        Ok(namespace) if namespace.identity()? == record.identity => Some(namespace),
        Ok(_) => None,
        Err(NetworkError::Namespace { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            None
        }
        Err(error) => return Err(error),
    };
    if let Some(namespace) = namespace {
        namespace.run(|| {
            let undo = || {
                let socket = Socket::new()?;
                record
                    .interfaces
                    .iter()
                    .try_for_each(|touched| touched.undo(&socket))
            };
            undo().map_err(|source| failed("undoing", file, source))
        })?;
    }
    fs::remove_file(file).map_err(|source| failed("removing", file, source))
}

fn failed(what: &'static str, file: &Path, source: io::Error) -> NetworkError {
    NetworkError::Record {
        what,
        file: file.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_a_namespace_that_is_gone_is_removed_and_a_second_time_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("network");
        let record = Record {
            namespace: directory.path().join("gone"),
            identity: (1, 2),
            interfaces: vec![Touched {
                index: 7,
                place_made: true,
                all_multicast: false,
            }],
        };
        record.write(&file).unwrap();
        let read: Record = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(read, record);
        undo(&file).unwrap();
        assert!(!file.exists());
        undo(&file).unwrap();
        fs::write(&file, "nonsense").unwrap();
        assert!(undo(&file).unwrap_err().to_string().contains("network"));
    }
}
