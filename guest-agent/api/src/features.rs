//! What the guest enforces, in the words of the OCI runtime specification's `features.md`.
//!
//! The shim tells containerd, before there is a guest to ask; the agent's tests hold it to this.

/// `hooks`.
pub const HOOKS: &[&str] = &[];

/// `mountOptions`: none that a file system takes for itself.
pub const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "unbindable",
];

/// `linux.namespaces` that the agent makes or joins. The network's is the guest itself.
pub const NAMESPACES: &[&str] = &["cgroup", "ipc", "mount", "pid", "uts"];

/// `linux.seccomp.enabled`.
pub const SECCOMP: bool = false;

/// `linux.apparmor.enabled`.
pub const APPARMOR: bool = false;
