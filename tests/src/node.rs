//! Changes to the machine that a test makes, each undone when its owner goes.

use crate::mounts::BindMount;
use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

const CONFIG: &str = "/etc/walnut/config.toml";

/// The shim's configuration file, as a test wants it.
#[derive(Debug)]
pub struct NodeConfig {
    before: Option<String>,
}

impl NodeConfig {
    /// Puts `text` in its place.
    pub fn write(text: &str) -> Result<Self> {
        let before = fs::read_to_string(CONFIG).ok();
        fs::create_dir_all("/etc/walnut").context("cannot make /etc/walnut")?;
        fs::write(CONFIG, text).with_context(|| format!("cannot write {CONFIG}"))?;
        Ok(Self { before })
    }
}

impl Drop for NodeConfig {
    fn drop(&mut self) {
        // What cannot be put back fails the tests that come next.
        let _ = match &self.before {
            Some(text) => fs::write(CONFIG, text),
            None => fs::remove_file(CONFIG),
        };
    }
}

/// A file that is out of sight.
#[derive(Debug)]
pub struct Hidden {
    path: PathBuf,
    aside: PathBuf,
}

impl Hidden {
    /// Renames a file.
    pub fn new(path: &Path) -> Result<Self> {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".hidden-by-test");
        let aside = PathBuf::from(aside);
        fs::rename(path, &aside).with_context(|| format!("cannot hide {}", path.display()))?;
        let path = path.to_owned();
        Ok(Self { path, aside })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::rename(&self.aside, &self.path);
    }
}

/// Puts `/dev/null` in the place of a device.
pub fn nullify(device: &Path) -> Result<BindMount> {
    BindMount::new(Path::new("/dev/null"), device)
}
