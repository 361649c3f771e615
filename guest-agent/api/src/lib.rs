//! The contract between the shim and `walnut-agent`.
//!
//! The agent listens on two vsock ports. On [`AGENT_PORT`] it serves ttrpc: containerd's own
//! `containerd.task.v3.Task` and the small [`guest`] service. On [`STDIO_PORT`] each connection is one
//! direction of one process's stdio, see [`StreamId`].
//!
//! Task messages keep containerd's meaning, with these differences:
//!
//! - `CreateTaskRequest.options` holds the container's OCI configuration as JSON with the type URL
//!   [`SPEC_TYPE_URL`]; `root.path` and the sources of bind mounts are paths of the guest. `rootfs` is empty.
//!   `ExecProcessRequest.spec` holds an OCI process as JSON with the type URL [`PROCESS_TYPE_URL`].
//! - `stdin`, `stdout` and `stderr` are empty (`/dev/null`) or the text of a [`StreamId`] that the shim
//!   has connected and whose acceptance byte it has read.
//! - `Wait` answers when the process has been reaped; its output may still be on its way. The end of a
//!   stream is the end of the output.
//! - Namespaces that containers share are named as [`namespace_path`] says, and nothing else can be joined.
//! - `CloseIO` is answered and does nothing: the half-close of the stdin stream is the message.
//!
//! This crate must not do I/O.
#![forbid(unsafe_code)]

pub mod features;
pub mod netlink;
mod pod;
mod stream;

pub use pod::{AGENT_PROGRAM, PAUSE_PROGRAM, PAUSE_ROOT, POD_SHM, namespace_owner, namespace_path};
pub use stream::{STREAM_ACCEPTED, StreamId, StreamIdError};

/// Generated from `proto/guest.proto`: messages, client and server of the `Guest` service.
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

pub use containerd_shim_protos as containerd;
pub use generated::{guest, guest_ttrpc};

/// vsock port of the agent's ttrpc server.
pub const AGENT_PORT: u32 = 1024;
/// vsock port where the agent accepts stdio streams.
pub const STDIO_PORT: u32 = 1025;
/// vsock port of the host to which the agent makes one connection, to be refused, once it listens on both
/// of its ports. The VMM tells the shim (`READY_PORT` of its own contract).
pub const READY_PORT: u32 = 1023;
/// Where the guest mounts the shared file system.
pub const SHARE_MOUNT_POINT: &str = "/run/walnut/share";
/// Connected streams that no process has claimed yet, at the most.
pub const MAX_UNCLAIMED_STREAMS: usize = 256;
/// Longest compiled policy of AppArmor; a message of ttrpc may be twice as long.
pub const MAX_POLICY_BYTES: usize = 2 * 1024 * 1024;
/// containerd's type URL for an OCI configuration as JSON.
pub const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// containerd's type URL for an OCI process as JSON.
pub const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
