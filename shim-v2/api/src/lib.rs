//! The contract between the `walnut` command and the shims.
//!
//! Each Pod's shim serves [`pod`] by ttrpc on the socket that it serves containerd on. A Pod is found by its
//! directory, `<STATE_ROOT>/<containerd namespace>/<Pod id>`, whose file [`ADDRESS_FILE`] holds that socket's
//! path. This crate must not do I/O.
#![forbid(unsafe_code)]

/// Generated from `proto/pod.proto`: messages, client and server of the `Pod` service.
#[allow(
    missing_docs,
    clippy::all,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{pod, pod_ttrpc};

/// A machine's configuration, if it has one.
pub const CONFIG: &str = "/etc/walnut/config.toml";
/// The VMM's program, unless the configuration says otherwise.
pub const VMM: &str = "/usr/libexec/walnut/walnut-vmm";
/// The guest's kernel, likewise.
pub const KERNEL: &str = "/usr/share/walnut/vmlinux";
/// The guest's initramfs, likewise.
pub const INITRAMFS: &str = "/usr/share/walnut/initramfs.cpio";
/// Where the Pods of a machine have their directories.
pub const STATE_ROOT: &str = "/run/walnut";
/// File of a Pod's directory: the path of the shim's socket, and nothing else.
pub const ADDRESS_FILE: &str = "address";
