//! The guest's initramfs: the static agent as `/init`, a console for it, the profiles of AppArmor that it
//! loads when asked for, and empty directories to mount on. Uncompressed: unpacking costs a guest more than reading does.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use crate::apparmor::Policy;
use crate::cache::{Cache, CacheError, Key, Origin};
use crate::cpio::{Archive, Node};

/// Counts changes of this recipe.
const RECIPE: &str = "initramfs 2";

/// The directories that the agent mounts on.
const DIRECTORIES: [&str; 4] = ["dev", "proc", "sys", "run"];

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The agent can't be read.
    #[error("read the agent {}", path.display())]
    Agent {
        /// Where it was expected.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The archive can't be written.
    #[error("write {}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Makes the initramfs, or finds it in the cache.
pub fn build(
    cache: &Cache,
    agent: &Path,
    policies: &[Policy],
) -> Result<(PathBuf, Origin), InitramfsError> {
    let init = fs::read(agent).map_err(|source| InitramfsError::Agent {
        path: agent.to_owned(),
        source,
    })?;
    let key = policies
        .iter()
        .fold(Key::new(RECIPE).with("init", &init), |key, policy| {
            key.with(policy.name, &policy.bytes)
        });
    let (entry, origin) = cache.get_or_make("guest-image", &key, |folder| {
        let path = folder.join("initramfs.cpio");
        File::create(&path)
            .and_then(|file| write_archive(BufWriter::new(file), &init, policies))
            .map_err(|source| InitramfsError::Write { path, source })
    })?;
    Ok((entry.join("initramfs.cpio"), origin))
}

fn write_archive(to: impl io::Write, init: &[u8], policies: &[Policy]) -> io::Result<()> {
    let mut archive = Archive::new(to);
    for directory in DIRECTORIES {
        archive.add(directory, 0o755, Node::Directory)?;
    }
    archive.add(
        "dev/console",
        0o600,
        Node::CharacterDevice { major: 5, minor: 1 },
    )?;
    archive.add("init", 0o755, Node::File(init))?;
    archive.add("apparmor", 0o755, Node::Directory)?;
    for policy in policies {
        let path = format!("apparmor/{}", policy.name);
        archive.add(&path, 0o644, Node::File(&policy.bytes))?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_build_is_cached() {
        let folder = tempfile::tempdir().unwrap();
        let agent = folder.path().join("agent");
        fs::write(&agent, "not a program").unwrap();
        let cache = Cache::new(folder.path().join("cache"));
        let (first, origin) = build(&cache, &agent, &[]).unwrap();
        assert_eq!(origin, Origin::Made);
        let (second, origin) = build(&cache, &agent, &[]).unwrap();
        assert_eq!((first, Origin::Cached), (second, origin));
    }

    #[test]
    fn a_missing_agent_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        let error = build(&cache, Path::new("/nowhere/agent"), &[]).unwrap_err();
        assert!(error.to_string().contains("/nowhere/agent"));
    }
}
