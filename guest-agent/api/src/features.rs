//! What the guest enforces, in the words of the OCI runtime specification's `features.md`.
//!
//! The shim tells containerd, before there is a guest to ask; the agent's tests hold it to this.

/// `hooks`: those of the host are the shim's, the others the agent's.
pub const HOOKS: &[&str] = &[
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

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
pub const NAMESPACES: &[&str] = &["cgroup", "ipc", "mount", "pid", "time", "user", "uts"];

/// `linux.seccomp.enabled`.
pub const SECCOMP: bool = true;

/// `linux.apparmor.enabled`.
pub const APPARMOR: bool = true;

/// Profiles of AppArmor that the guest's image has: what containerd and Docker call their defaults.
pub const APPARMOR_PROFILES: &[&str] = &["cri-containerd.apparmor.d", "docker-default"];
