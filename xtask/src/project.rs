//! Where things are in this checkout.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use walnut_guest_image::cache::Cache;

/// Names another folder for what is cached by hash, so that checkouts can share it.
const CACHE_VARIABLE: &str = "WALNUT_CACHE";

/// A checkout.
#[derive(Debug, Clone)]
pub(crate) struct Project {
    /// The checkout itself.
    pub(crate) root: PathBuf,
    /// cargo's target folder.
    pub(crate) target: PathBuf,
    /// Kernels, node images, container images, lab templates: each named by its hash.
    pub(crate) cache: Cache,
    /// The checkout that this program was built from: the lab's own parts come from there.
    pub(crate) tools_root: PathBuf,
}

impl Project {
    /// The checkout around the current directory.
    pub(crate) fn find() -> Result<Self> {
        let here = std::env::current_dir().context("find the current directory")?;
        let Some(root) = here.ancestors().find(|folder| is_checkout(folder)) else {
            bail!("{} is not inside a checkout of Walnut", here.display());
        };
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => here.join(target),
            None => root.join("target"),
        };
        let cache = std::env::var_os(CACHE_VARIABLE).map_or(target.clone(), PathBuf::from);
        let own_manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        Ok(Self {
            root: root.to_owned(),
            target,
            cache: Cache::new(cache),
            tools_root: own_manifest.parent().unwrap_or(own_manifest).to_owned(),
        })
    }

    /// Where the logs of long steps go.
    pub(crate) fn logs(&self) -> PathBuf {
        self.target.join("logs")
    }

    /// Where this checkout's running lab keeps its state.
    pub(crate) fn lab(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// A program that cargo built in the release profile.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.target.join("release").join(name)
    }

    /// A part of the guest image.
    pub(crate) fn guest_image(&self, name: &str) -> PathBuf {
        self.target.join("guest-image").join(name)
    }
}

fn is_checkout(folder: &Path) -> bool {
    folder.join("Cargo.toml").is_file() && folder.join("guest-image/kernel.fragment").is_file()
}
