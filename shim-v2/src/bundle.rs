//! What the shim's commands read from a bundle: which Pod its container belongs to.
//!
//! `config.json` may be absent (containerd's Sandbox API has bundles without one): then the container is a
//! Pod of its own. Where containerd has joined a container to a sandbox itself, it wrote the sandbox's id to the
//! bundle's `sandbox`.

use crate::args::is_name;
use serde::Deserialize;
use std::{collections::HashMap, io, path::Path};

/// CRI's annotations; containerd and CRI-O use the same two with different prefixes, and only containerd
/// runs this program.
const TYPE_ANNOTATION: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";
const SANDBOX_FILE: &str = "sandbox";

/// Why a bundle can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    /// The file.
    #[error("reading {0} of the bundle failed")]
    Read(&'static str, #[source] io::Error),
    /// Its content.
    #[error("config.json of the bundle is not an OCI configuration")]
    Json(#[from] serde_json::Error),
    /// A sandbox id that would be used as part of a path.
    #[error("sandbox {0:?} of the container is not a container's id")]
    Sandbox(String),
}

/// The Pod of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Membership {
    /// The container is the first of its Pod: the server is its own.
    Own,
    /// The container joins the Pod of that id.
    Joins(String),
}

#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

impl Membership {
    /// Reads the bundle's configuration.
    pub(crate) fn read(bundle: &Path, id: &str) -> Result<Self, BundleError> {
        if let Some(sandbox) =
            read_if_there(bundle, SANDBOX_FILE)?.filter(|name| name != id.as_bytes())
        {
            return Self::joins(&String::from_utf8_lossy(&sandbox));
        }
        match read_if_there(bundle, "config.json")? {
            Some(json) => Self::parse(&json, id),
            None => Ok(Self::Own),
        }
    }

    fn joins(sandbox: &str) -> Result<Self, BundleError> {
        match is_name(sandbox) {
            true => Ok(Self::Joins(sandbox.to_owned())),
            false => Err(BundleError::Sandbox(sandbox.to_owned())),
        }
    }

    /// The id of the Pod whose container is called `id`.
    pub(crate) fn sandbox_id<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Self::Own => id,
            Self::Joins(sandbox) => sandbox,
        }
    }

    fn parse(json: &[u8], id: &str) -> Result<Self, BundleError> {
        let Annotated { annotations } = serde_json::from_slice(json)?;
        let annotations = annotations.unwrap_or_default();
        let joins = annotations
            .get(TYPE_ANNOTATION)
            .is_some_and(|kind| kind == "container");
        match annotations.get(SANDBOX_ANNOTATION) {
            Some(sandbox) if joins && sandbox != id => Self::joins(sandbox),
            _ => Ok(Self::Own),
        }
    }
}

fn read_if_there(bundle: &Path, name: &'static str) -> Result<Option<Vec<u8>>, BundleError> {
    match std::fs::read(bundle.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(BundleError::Read(name, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(kind: &str, sandbox: &str) -> Result<Membership, BundleError> {
        let json = serde_json::json!({
            "annotations": { TYPE_ANNOTATION: kind, SANDBOX_ANNOTATION: sandbox },
        });
        Membership::parse(&serde_json::to_vec(&json).unwrap(), "c1")
    }

    #[test]
    fn only_a_container_of_a_pod_joins() {
        assert_eq!(
            parse("container", "pod").unwrap(),
            Membership::Joins("pod".into())
        );
        assert_eq!(parse("sandbox", "c1").unwrap(), Membership::Own);
        assert_eq!(Membership::parse(b"{}", "c1").unwrap(), Membership::Own);
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(
            Membership::read(directory.path(), "c1").unwrap(),
            Membership::Own
        );
    }

    #[test]
    fn a_container_that_containerd_has_joined_to_a_sandbox_is_known_by_a_file() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("sandbox"), "pod").unwrap();
        let read = || Membership::read(directory.path(), "c1");
        assert_eq!(read().unwrap(), Membership::Joins("pod".into()));
        std::fs::write(directory.path().join("sandbox"), "../pod").unwrap();
        assert!(matches!(read(), Err(BundleError::Sandbox(_))));
    }

    #[test]
    fn a_sandbox_id_is_not_a_path() {
        assert!(matches!(
            parse("container", "../x"),
            Err(BundleError::Sandbox(_))
        ));
    }

    proptest! {
        #[test]
        fn any_file_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Membership::parse(&bytes, "c1");
        }
    }
}
