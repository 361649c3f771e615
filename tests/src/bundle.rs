//! Containers of a test's own: a root file system of one static busybox, and an OCI configuration.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

/// What the tests' containers run.
const APPLETS: [&str; 16] = [
    "cat", "dd", "echo", "env", "head", "hostname", "id", "ls", "nproc", "pwd", "sh", "sleep",
    "stty", "true", "uname", "wc",
];
/// What containerd grants by default, less what busybox never asks for.
const CAPABILITIES: [&str; 6] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
];

/// Fills `root` with a busybox and the directories that mounts need.
pub fn busybox_rootfs(busybox: &Path, root: &Path) -> Result<()> {
    for directory in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        let path = root.join(directory);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let program = root.join("bin/busybox");
    fs::copy(busybox, &program).context("cannot copy busybox")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .context("cannot make busybox executable")?;
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).context("cannot link an applet")?;
    }
    fs::write(root.join("etc/plain"), "not a program\n").context("cannot write a file")?;
    Ok(())
}

/// An OCI configuration.
#[derive(Debug, Clone)]
pub struct Spec(Value);

impl Spec {
    /// A container that runs `args` in `root`, as containerd's default would, with no resource limits.
    pub fn new(root: &str, args: &[&str]) -> Self {
        Self(json!({
            "ociVersion": "1.2.0",
            "process": process(args),
            "root": { "path": root },
            "hostname": "tested",
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc",
                  "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                  "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
            ],
            "linux": {
                "cgroupsPath": "/tests/container",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                ],
            },
        }))
    }

    /// With a network namespace, as containerd always asks for one, but for the host's network.
    #[must_use]
    pub fn networked(self) -> Self {
        let kinds = ["pid", "ipc", "uts", "mount", "network"];
        let namespaces = kinds.map(|kind| json!({ "type": kind }));
        self.with("/linux/namespaces", json!(namespaces))
    }

    /// Sets the value at a JSON pointer whose parent is there.
    #[must_use]
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let parent_and_key = pointer
            .rsplit_once('/')
            .and_then(|(parent, key)| Some((self.0.pointer_mut(parent)?.as_object_mut()?, key)));
        match parent_and_key {
            Some((parent, key)) => parent.insert(key.to_owned(), value),
            None => panic!("the configuration has no parent of {pointer}"),
        };
        self
    }

    /// The configuration as JSON.
    pub fn to_json(&self) -> Vec<u8> {
        self.0.to_string().into_bytes()
    }
}

/// An OCI process that runs `args` as root.
pub fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "env": ["PATH=/bin", "GREETING=hello"],
        "cwd": "/",
        "user": { "uid": 0, "gid": 0 },
        "noNewPrivileges": true,
        "capabilities": {
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_replaced_or_added() {
        let spec = Spec::new("/", &["true"])
            .with("/process/cwd", json!("/tmp"))
            .with("/linux/seccomp", json!({}));
        assert_eq!(spec.0.pointer("/process/cwd"), Some(&json!("/tmp")));
        assert_eq!(spec.0.pointer("/linux/seccomp"), Some(&json!({})));
    }
}
