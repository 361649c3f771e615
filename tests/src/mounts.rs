//! Mounts that a test makes, each undone when its owner goes.

use anyhow::{Context, Result};
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount as detach,
};
use std::path::{Path, PathBuf};

/// A bind mount that ends with this value.
#[derive(Debug)]
pub struct BindMount(PathBuf);

impl BindMount {
    /// Shows `source` at `target`.
    pub fn new(source: &Path, target: &Path) -> Result<Self> {
        mount_bind(source, target)
            .with_context(|| format!("cannot bind {} to {}", source.display(), target.display()))?;
        Ok(Self(target.to_owned()))
    }

    /// Makes `directory` a mount point whose later mounts appear in slaves of it, as the shim does with a
    /// Pod's share.
    pub fn shared(directory: &Path) -> Result<Self> {
        let bound = Self::new(directory, directory)?;
        mount_change(directory, MountPropagationFlags::SHARED)
            .with_context(|| format!("cannot share the mounts of {}", directory.display()))?;
        Ok(bound)
    }
}

impl Drop for BindMount {
    fn drop(&mut self) {
        // A mount that is gone already is as good as undone; a leak is for the leak check to find.
        let _ = detach(&self.0, UnmountFlags::DETACH);
    }
}
