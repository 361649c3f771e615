//! Profiles of AppArmor that a node's administrator adds to those of the guest's image: compiled policies, each in a
//! file of its profile's name.
//!
//! Must not look into them: the agent and the guest's kernel do. docs/decisions/0021-profiles-of-the-node.md.

use crate::agent::{Agent, AgentError};
use oci_spec::runtime::Process;
use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};
use walnut_agent_api::{MAX_POLICY_BYTES, features::APPARMOR_PROFILES};

/// The administrator's.
const FOLDER: &str = "/etc/walnut/apparmor.d";
/// The name that asks for no profile.
const UNCONFINED: &str = "unconfined";

/// Why a process can't have the profile that it asks for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    /// Nobody has it.
    #[error(
        "process.apparmorProfile {name:?} is neither one of the guest's own, {APPARMOR_PROFILES:?}, nor the name of a file in {folder:?}"
    )]
    Missing {
        /// What was asked for.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The file can't be read.
    #[error("the policy {path:?}, asked for as process.apparmorProfile, cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No policy is that long.
    #[error(
        "the policy {path:?}, asked for as process.apparmorProfile, is longer than {MAX_POLICY_BYTES} bytes"
    )]
    Long {
        /// The file.
        path: PathBuf,
    },
    /// The guest doesn't take it.
    #[error("the guest does not take {path:?}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// Its words.
        source: AgentError,
    },
}

/// A compiled profile.
#[derive(Debug)]
pub(crate) struct Policy {
    name: String,
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Policy {
    /// That of the profile that a process asks for, unless the guest has it and the administrator no other.
    pub(crate) fn of(process: Option<&Process>) -> Result<Option<Self>, ProfileError> {
        let name = process.and_then(|process| process.apparmor_profile().as_deref());
        Self::find(Path::new(FOLDER), name.unwrap_or_default())
    }

    fn find(folder: &Path, name: &str) -> Result<Option<Self>, ProfileError> {
        if matches!(name, "" | UNCONFINED) {
            return Ok(None);
        }
        let missing = || ProfileError::Missing {
            name: name.to_owned(),
            folder: folder.to_owned(),
        };
        if name.contains('/') || matches!(name, "." | "..") {
            return Err(missing());
        }
        let path = folder.join(name);
        let bytes = match read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return if APPARMOR_PROFILES.contains(&name) {
                    Ok(None)
                } else {
                    Err(missing())
                };
            }
            Err(source) => return Err(ProfileError::Read { path, source }),
        };
        if bytes.len() > MAX_POLICY_BYTES {
            return Err(ProfileError::Long { path });
        }
        Ok(Some(Self {
            name: name.to_owned(),
            path,
            bytes,
        }))
    }

    /// Gives it, where there is one, to the guest's kernel.
    pub(crate) async fn load(policy: Option<Self>, agent: &Agent) -> Result<(), ProfileError> {
        let Some(Self { name, path, bytes }) = policy else {
            return Ok(());
        };
        agent
            .load_profile(name, bytes)
            .await
            .map_err(|source| ProfileError::Refused { path, source })
    }
}

/// One byte more than is allowed at the most.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a FIFO would wait for who writes to it.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let limit = u64::try_from(MAX_POLICY_BYTES).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    File::open(path)?
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn words(folder: &Path, name: &str) -> String {
        Policy::find(folder, name).unwrap_err().to_string()
    }

    #[test]
    fn a_profile_is_the_guests_the_nodes_or_nobodys() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path();
        for name in ["", "unconfined", "docker-default"] {
            assert!(Policy::find(folder, name).unwrap().is_none(), "{name:?}");
        }
        for name in ["my-own", "../my-own", "..", "a//b"] {
            let text = words(folder, name);
            assert!(text.contains(&format!("{name:?} is neither")), "{text}");
            assert!(text.contains(&format!("{folder:?}")), "{text}");
        }
        for name in ["my-own", "docker-default"] {
            fs::write(folder.join(name), name).unwrap();
            let policy = Policy::find(folder, name).unwrap().unwrap();
            assert_eq!((&*policy.name, &*policy.bytes), (name, name.as_bytes()));
        }
    }

    #[test]
    fn what_is_no_policy_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path();
        fs::create_dir(folder.join("folder")).unwrap();
        assert!(words(folder, "folder").contains("folder\", asked for"));
        let long = File::create(folder.join("long")).unwrap();
        long.set_len(1 << 40).unwrap();
        assert!(words(folder, "long").contains("is longer than 2097152 bytes"));
    }
}
