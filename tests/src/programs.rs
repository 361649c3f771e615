//! Where the built programs and the guest image are.
//!
//! The defaults are the paths at which a package installs them; each can be overridden by a variable of
//! the environment, so that a checkout can be tested without installing it.

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// The files under test.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `walnut-vmm`.
    pub vmm: PathBuf,
    /// `containerd-shim-walnut-v2`.
    pub shim: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// A static busybox, from which tests make guests and containers of their own.
    pub busybox: PathBuf,
}

impl Programs {
    /// Finds them all, or says which is missing.
    pub fn find() -> Result<Self> {
        Ok(Self {
            vmm: locate("WALNUT_VMM", "/usr/libexec/walnut/walnut-vmm")?,
            shim: locate("WALNUT_SHIM", "/usr/local/bin/containerd-shim-walnut-v2")?,
            kernel: locate("WALNUT_KERNEL", "/usr/share/walnut/vmlinux")?,
            initramfs: locate("WALNUT_INITRAMFS", "/usr/share/walnut/initramfs.cpio")?,
            busybox: locate("WALNUT_BUSYBOX", "/usr/bin/busybox")?,
        })
    }
}

fn locate(variable: &str, default: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| Path::new(default).into(), PathBuf::from);
    if !path.is_file() {
        bail!(
            "no file at {} (set {variable} to name another)",
            path.display()
        );
    }
    Ok(path)
}
