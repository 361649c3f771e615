//! The node image: a Debian root file system that has what a node has, as one ext4 file, and the
//! kernel that boots it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use walnut_guest_image::cache::Key;

use crate::debian::{Format, RootFileSystem};
use crate::progress::Progress;
use crate::project::Project;

/// Counts changes of this recipe.
const RECIPE: &str = "node 1";

/// The release that has containerd 2.1 and runc 1.3.
const SUITE: &str = "sid";

const PACKAGES: [&str; 29] = [
    "containerd",
    "containernetworking-plugins",
    "runc",
    "linux-image-cloud-amd64",
    // What tests and the person at `lab shell` use.
    "acl",
    "attr",
    "busybox-static",
    "dmsetup",
    "e2fsprogs",
    "erofs-utils",
    "ethtool",
    "fio",
    "iperf3",
    "iproute2",
    "iptables",
    "iputils-ping",
    "jq",
    "kmod",
    "libcap2-bin",
    "nftables",
    "procps",
    "python3-minimal",
    "socat",
    "sqlite3",
    "strace",
    "util-linux",
    "wireguard-tools",
    // The peers of the benchmarks.
    "qemu-system-x86",
    "virtiofsd",
];

/// Kernel modules that the lab's initramfs needs to find and mount the node image.
const EARLY_MODULES: [&str; 2] = ["virtio_blk", "overlay"];

/// Room for nothing: the image is read-only, what is written goes to RAM.
const SLACK_MIB: u64 = 64;

/// A node image's files.
#[derive(Debug, Clone)]
pub(crate) struct NodeImage {
    folder: PathBuf,
}

impl NodeImage {
    /// The root file system.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("node.ext4")
    }

    /// The kernel.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The modules that come before the root file system, in order.
    pub(crate) fn early_modules(&self) -> Vec<(String, PathBuf)> {
        let file = |name: &&str| {
            let file = format!("{name}.ko.xz");
            let path = self.folder.join(&file);
            (file, path)
        };
        EARLY_MODULES.iter().map(file).collect()
    }

    /// The image's name in the cache.
    pub(crate) fn key() -> Key {
        let mut key = Key::new(RECIPE).with("suite", SUITE.as_bytes());
        for name in PACKAGES.iter().chain(&EARLY_MODULES) {
            key = key.with("name", name.as_bytes());
        }
        key
    }

    /// Makes the image, or finds it in the cache.
    pub(crate) fn get(project: &Project, progress: Progress) -> Result<Self> {
        let key = Self::key();
        let (folder, _) = project.cache.get_or_make("node-image", &key, |folder| {
            progress.step(
                "node image",
                "installing Debian packages into a folder",
                || make(project, folder, progress),
            )
        })?;
        Ok(Self { folder })
    }
}

fn make(project: &Project, folder: &Path, progress: Progress) -> Result<()> {
    let root = folder.join("root");
    let recipe = RootFileSystem {
        suite: SUITE,
        packages: &PACKAGES,
    };
    let log = project.logs().join("node-image.log");
    recipe.make(&root, Format::Folder, "node image", &log, progress)?;
    take_kernel(&root, folder)?;
    let disk = folder.join("node.ext4");
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"]);
    mke2fs
        .arg(&root)
        .arg(&disk)
        .arg(format!("{}M", used_mib(&root)? + SLACK_MIB));
    progress.run(
        "node image",
        &mut mke2fs,
        &project.logs().join("node-image-disk.log"),
    )?;
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))
}

/// Copies the kernel and the early modules out of the image, and drops what the lab never boots.
fn take_kernel(root: &Path, folder: &Path) -> Result<()> {
    let kernel = find(&root.join("boot"), "vmlinuz-")?;
    fs::copy(&kernel, folder.join("vmlinuz")).context("copy the node's kernel")?;
    let modules = find(&root.join("usr/lib/modules"), "")?;
    let index = fs::read_to_string(modules.join("modules.dep")).context("read modules.dep")?;
    for name in EARLY_MODULES {
        let file = format!("{name}.ko.xz");
        let line = index.lines().find_map(|line| {
            line.split_once(':')
                .filter(|(path, _)| path.ends_with(&format!("/{file}")))
        });
        let Some((path, needs)) = line else {
            bail!("the node's kernel has no module {name}")
        };
        if !needs.trim().is_empty() {
            bail!("module {name} needs {needs}: name those first in EARLY_MODULES");
        }
        fs::copy(modules.join(path), folder.join(&file))
            .with_context(|| format!("copy module {name}"))?;
    }
    fs::remove_dir_all(root.join("boot")).context("remove the node's /boot")?;
    fs::create_dir(root.join("boot")).context("create the node's /boot")
}

fn find(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    names.sort();
    names
        .into_iter()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .with_context(|| format!("{} has no {prefix}*", folder.display()))
}

fn used_mib(root: &Path) -> Result<u64> {
    let output = Command::new("du")
        .args(["-s", "-m"])
        .arg(root)
        .output()
        .context("run du")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let size = text
        .split_whitespace()
        .next()
        .and_then(|size| size.parse().ok());
    size.with_context(|| format!("measure {}", root.display()))
}
