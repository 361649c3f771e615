//! What a test must not leave behind: processes, mounts, cgroups, files, containers, snapshots.
//!
//! Compares two moments, so that whatever was there before is nobody's leak.

use crate::{
    ctr::ctr,
    deadline::{self, Deadline},
    processes,
};
use anyhow::{Context, Result};
use std::{cell::RefCell, collections::BTreeSet, fs, path::Path};

/// Directories in which Walnut or containerd keep what belongs to one Pod.
const STATE: [&str; 9] = [
    "/run/walnut",
    "/run/containerd/io.containerd.grpc.v1.cri",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim",
    "/run/containerd/s",
    "/run/netns",
    "/var/lib/cni/results",
    "/var/lib/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
];
/// Where the Pods' network keeps the addresses that are taken, beside files of its own.
const ADDRESSES: &str = "/run/cni/networks/pods";
const LINKS: &str = "/sys/class/net";
/// Where their mounts are.
const MOUNTS: [&str; 2] = ["/run/walnut", "/run/containerd"];
const CGROUPS: &str = "/sys/fs/cgroup";
/// containerd's namespaces: of `ctr`, and of the CRI.
const NAMESPACES: [&str; 2] = ["default", "k8s.io"];
/// What is named so belongs to all Pods, and stays.
const COMMON: [&str; 10] = [
    "default",
    "k8s.io",
    "walnut-pods",
    "sandboxes",
    "containers",
    "cni0",
    "pods",
    "lock",
    "last_reserved_ip.0",
    "last_reserved_ip.1",
];

/// What was there at one moment.
#[derive(Debug)]
pub struct Leak {
    before: BTreeSet<String>,
}

impl Leak {
    /// Takes note of what is there now.
    pub fn watch() -> Result<Self> {
        Ok(Self { before: observe()? })
    }

    /// Fails if something is there that wasn't before. A runtime may clean up after its answer, so this
    /// waits for the last of it.
    pub fn nothing_left(&self) -> Result<()> {
        let left = RefCell::new(Vec::new());
        let gone = deadline::until(
            "everything to be cleaned up",
            Deadline::after(deadline::REQUEST),
            || {
                let now = observe()?;
                left.replace(now.difference(&self.before).cloned().collect());
                Ok(left.borrow().is_empty().then_some(()))
            },
        );
        gone.with_context(|| format!("left behind: {:#?}", left.into_inner()))
    }
}

fn observe() -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for process in processes::list()? {
        if process.runs("walnut-vmm") || process.command.contains("containerd-shim-") {
            seen.insert(format!("process {} {}", process.pid, process.command));
        }
    }
    for path in mount_points()? {
        if MOUNTS.iter().any(|parent| path.starts_with(parent)) {
            seen.insert(format!("mount {path}"));
        }
    }
    walk(Path::new(CGROUPS), "cgroup", true, &mut seen);
    for directory in STATE {
        walk(Path::new(directory), "file", false, &mut seen);
    }
    walk(Path::new(ADDRESSES), "address", false, &mut seen);
    for link in fs::read_dir(LINKS)
        .context("cannot list the links")?
        .flatten()
    {
        if COMMON.iter().all(|&name| link.file_name() != name) {
            seen.insert(format!("link {}", link.file_name().display()));
        }
    }
    for namespace in NAMESPACES {
        let list = |words: [&str; 2]| -> Result<String> {
            let output = ctr(&["--namespace", namespace, words[0], words[1]])?;
            Ok(output.success()?.text())
        };
        for line in list(["container", "ls"])?.lines().skip(1) {
            seen.insert(format!("container {line}"));
        }
        // Committed snapshots are the images', which stay.
        for line in list(["snapshot", "ls"])?.lines() {
            if line.ends_with("Active") {
                seen.insert(format!("snapshot {line}"));
            }
        }
    }
    Ok(seen)
}

fn mount_points() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(str::to_owned)
        .collect())
}

/// Lists what is below a directory; what vanishes meanwhile isn't there.
fn walk(directory: &Path, kind: &str, directories_only: bool, seen: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let is_common = COMMON.iter().any(|&name| entry.file_name() == name);
        if (is_directory || !directories_only) && !is_common {
            seen.insert(format!("{kind} {}", path.display()));
        }
        // A container's root file system is the mount's business.
        if is_directory && entry.file_name() != "rootfs" {
            walk(&path, kind, directories_only, seen);
        }
    }
}
