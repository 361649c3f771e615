//! Profiles of AppArmor: compiled in the initramfs, given to the kernel when the first container asks for one,
//! so that nobody else pays.
//!
//! Must not know containers. What applies a profile to a process is in `container`.

use rustix::mount::{MountFlags, mount};
use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    sync::{Mutex, PoisonError},
};

/// Where the initramfs has the profiles, each in a file of its name.
const POLICIES: &str = "/apparmor";
const SECURITYFS: &str = "/sys/kernel/security";
/// Where the kernel takes a profile, also one that it has.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";
/// Whether a name asks for a profile: there is a word for none at all.
pub(crate) fn confines(name: &str) -> bool {
    !matches!(name, "" | "unconfined")
}

/// Why a profile cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppArmorError {
    /// The initramfs does not have it.
    #[error("process.apparmorProfile {name:?} is not a profile of this guest, which has {known:?}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The kernel did not take it.
    #[error("cannot {attempted} for process.apparmorProfile {name:?}")]
    System {
        /// The step.
        attempted: &'static str,
        /// What was asked for.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// The profiles that the kernel has been given.
#[derive(Debug, Default)]
pub(crate) struct Profiles(Mutex<BTreeSet<String>>);

impl Profiles {
    /// Makes sure that the kernel has the profile, if the name asks for one.
    pub(crate) fn load(&self, name: &str) -> Result<(), AppArmorError> {
        let mut loaded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !confines(name) || loaded.contains(name) {
            return Ok(());
        }
        let known = known();
        if !known.iter().any(|each| each == name) {
            let name = name.to_owned();
            return Err(AppArmorError::Unknown { name, known });
        }
        let failed = |attempted| {
            let name = name.to_owned();
            move |source| AppArmorError::System {
                attempted,
                name,
                source,
            }
        };
        let policy = fs::read(Path::new(POLICIES).join(name)).map_err(failed("read the policy"))?;
        if !Path::new(REPLACE).exists() {
            let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
            mount("securityfs", SECURITYFS, "securityfs", flags, None)
                .map_err(io::Error::from)
                .map_err(failed("mount securityfs"))?;
        }
        fs::write(REPLACE, policy).map_err(failed("load the policy"))?;
        loaded.insert(name.to_owned());
        Ok(())
    }
}

fn known() -> Vec<String> {
    let entries = fs::read_dir(POLICIES).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_named_and_nothing_needs_no_loading() {
        let profiles = Profiles::default();
        profiles.load("").unwrap();
        profiles.load("unconfined").unwrap();
        for name in ["strict", "../init", "."] {
            let error = profiles.load(name).unwrap_err().to_string();
            assert!(error.starts_with(&format!("process.apparmorProfile {name:?} is not")));
        }
    }
}
