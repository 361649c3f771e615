//! What is known about this checkout's running lab, kept in `target/lab/state.json`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::lab::client::Client;
use crate::lab::delivery::Delivered;

/// A running lab.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Running {
    /// QEMU's process.
    pub(crate) pid: i32,
    /// When it started, in clock ticks since boot: process numbers are used again.
    pub(crate) start_ticks: u64,
    /// The command server's port on this host.
    pub(crate) port: u16,
    /// What it wants to hear.
    pub(crate) token: String,
    /// The template that it was restored from.
    pub(crate) template: String,
    /// What was brought into it.
    pub(crate) delivered: Delivered,
}

impl Running {
    fn path(folder: &Path) -> PathBuf {
        folder.join("state.json")
    }

    /// The lab of this folder, if there is one and its process still lives.
    pub(crate) fn load(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(Self::path(folder)).ok()?;
        let running: Self = serde_json::from_str(&text).ok()?;
        (start_ticks(running.pid) == Some(running.start_ticks)).then_some(running)
    }

    /// Writes it down, readable by its owner only: it holds the token.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context("encode the lab's state")?;
        let path = Self::path(folder);
        let partial = folder.join("state.json.partial");
        write_private(&partial, &text)?;
        fs::rename(&partial, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Forgets it.
    pub(crate) fn forget(folder: &Path) {
        let _ = fs::remove_file(Self::path(folder));
    }

    /// How to reach it.
    pub(crate) fn client(&self) -> Client {
        Client {
            port: self.port,
            token: self.token.clone(),
        }
    }
}

/// Writes a file that only its owner can read.
pub(crate) fn write_private(path: &Path, contents: &[u8]) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let _ = fs::remove_file(path);
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(contents))
        .with_context(|| format!("write {}", path.display()))
}

/// When a process started; `None` if there is none, or only its zombie (proc_pid_stat(5)).
pub(crate) fn start_ticks(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces: count from its end, where field 3 follows.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_has_a_start() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_ticks(own).is_some());
        assert_eq!(start_ticks(i32::MAX), None);
    }

    #[test]
    fn state_of_a_dead_process_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let mut running = Running {
            pid: i32::try_from(std::process::id()).unwrap(),
            start_ticks: 0,
            port: 1,
            token: "t".to_owned(),
            template: "x".to_owned(),
            delivered: Delivered::new(),
        };
        running.save(folder.path()).unwrap();
        assert!(Running::load(folder.path()).is_none());
        running.start_ticks = start_ticks(running.pid).unwrap();
        running.save(folder.path()).unwrap();
        assert!(Running::load(folder.path()).is_some());
        Running::forget(folder.path());
        assert!(Running::load(folder.path()).is_none());
    }
}
