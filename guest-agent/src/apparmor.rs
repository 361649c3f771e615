//! Profiles of AppArmor: compiled in the initramfs or by the host, given to the kernel when a container asks for
//! one, so that nobody else pays.
//!
//! Must not know containers. What applies a profile to a process is in `container`.

use rustix::mount::{MountFlags, mount};
use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    sync::{Mutex, PoisonError},
};
use walnut_agent_api::MAX_POLICY_BYTES;

/// Where the initramfs has the profiles, each in a file of its name.
const POLICIES: &str = "/apparmor";
const SECURITYFS: &str = "/sys/kernel/security";
/// Where the kernel takes a profile, also one that it has.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";
/// What the kernel has: a line for each, its name and its mode.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// What stands before a profile's name in a policy, which is a string with its length before it and a zero behind
/// (`unpack_profile` in the kernel's `security/apparmor/policy_unpack.c`).
const BEFORE_NAME: &[u8] = b"\x04\x08\x00profile\x00\x07\x05";

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
    /// A policy of the host that is not this profile's.
    #[error("the policy for process.apparmorProfile {name:?} {problem}")]
    Policy {
        /// What was asked for.
        name: String,
        /// What is wrong with it.
        problem: String,
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
        let policy =
            fs::read(Path::new(POLICIES).join(name)).map_err(failed("read the policy", name))?;
        mount_securityfs(name)?;
        fs::write(REPLACE, policy).map_err(failed("load the policy", name))?;
        loaded.insert(name.to_owned());
        Ok(())
    }

    /// Gives the kernel a policy of the host: that of the profile of this name, in the place of any that it has.
    pub(crate) fn replace(&self, name: &str, policy: &[u8]) -> Result<(), AppArmorError> {
        let wrong = |problem: String| {
            let name = name.to_owned();
            AppArmorError::Policy { name, problem }
        };
        check_policy(name, policy).map_err(wrong)?;
        let mut loaded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mount_securityfs(name)?;
        fs::write(REPLACE, policy)
            .map_err(|error| wrong(format!("is not one that the guest's kernel takes: {error}")))?;
        let has = fs::read_to_string(LOADED).map_err(failed("look for the profile", name))?;
        let is_there = |line: &str| line.rsplit_once(" (").is_some_and(|(each, _)| each == name);
        if !has.lines().any(is_there) {
            return Err(wrong(
                "gave the guest's kernel none of this name".to_owned(),
            ));
        }
        loaded.insert(name.to_owned());
        Ok(())
    }
}

fn failed(attempted: &'static str, name: &str) -> impl FnOnce(io::Error) -> AppArmorError {
    let name = name.to_owned();
    move |source| AppArmorError::System {
        attempted,
        name,
        source,
    }
}

fn mount_securityfs(name: &str) -> Result<(), AppArmorError> {
    if Path::new(REPLACE).exists() {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount("securityfs", SECURITYFS, "securityfs", flags, None)
        .map_err(io::Error::from)
        .map_err(failed("mount securityfs", name))
}

/// A policy of one name must not replace the profiles of another.
pub(crate) fn check_policy(name: &str, policy: &[u8]) -> Result<(), String> {
    if policy.len() > MAX_POLICY_BYTES {
        return Err(format!("is longer than {MAX_POLICY_BYTES} bytes"));
    }
    let is_of_name = |each: &String| {
        let rest = each.strip_prefix(name);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("//"))
    };
    let found = profiles_in(policy);
    if found.iter().any(|each| each == name) && found.iter().all(is_of_name) {
        return Ok(());
    }
    Err(format!("holds the profiles {found:?}"))
}

fn profiles_in(policy: &[u8]) -> Vec<String> {
    let places = policy.windows(BEFORE_NAME.len()).enumerate();
    let names = places.filter_map(|(place, bytes)| {
        let rest = policy.get(place + BEFORE_NAME.len()..)?;
        let (length, rest) = rest.split_first_chunk()?;
        let name = rest.get(..usize::from(u16::from_le_bytes(*length)))?;
        let name = name.strip_suffix(&[0]).filter(|_| bytes == BEFORE_NAME)?;
        Some(String::from_utf8_lossy(name).into_owned())
    });
    names.collect()
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

    const POLICY: &[u8] = include_bytes!("../../tests/apparmor/walnut-deny-write");

    #[test]
    fn a_policy_is_of_one_name() {
        assert_eq!(profiles_in(POLICY), ["walnut-deny-write"]);
        check_policy("walnut-deny-write", POLICY).unwrap();
        for name in ["walnut-deny", "docker-default", ""] {
            let problem = check_policy(name, POLICY).unwrap_err();
            assert_eq!(problem, "holds the profiles [\"walnut-deny-write\"]");
        }
        let child = [BEFORE_NAME, b"\x19\0walnut-deny-write//child\0"].concat();
        let both = [POLICY, &child].concat();
        check_policy("walnut-deny-write", &both).unwrap();
        let other = [BEFORE_NAME, b"\x13\0walnut-deny-writer\0"].concat();
        let both = [POLICY, &other].concat();
        check_policy("walnut-deny-write", &both).unwrap_err();
        let long = vec![0; MAX_POLICY_BYTES + 1];
        let problem = Profiles::default().replace("long", &long).unwrap_err();
        assert!(problem.to_string().contains("is longer than"), "{problem}");
        assert_eq!(profiles_in(&POLICY[..30]), Vec::<String>::new());
    }

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
