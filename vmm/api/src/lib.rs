//! The contract between the shim and `walnut-vmm`.
//!
//! The shim spawns `walnut-vmm` with one end of a `SOCK_SEQPACKET` socket pair as file descriptor
//! [`CONTROL_FD`]. Each packet holds one JSON message of at most [`MAX_MESSAGE_BYTES`]; the first one,
//! [`Request::Boot`], also carries (`SCM_RIGHTS`) every file that the VM needs, and names them by their
//! position in that array ([`FdSlot`]). The VMM opens nothing by itself.
//!
//! This crate must not do I/O and must not know KVM.
#![forbid(unsafe_code)]

mod config;
mod device;
mod exit;
mod message;
mod vsock;

pub use config::{
    ConfigError, FdSlot, MAX_DEVICES, MAX_FDS, MAX_MEMORY_MIB, MAX_VCPUS, MEMORY_STEP_MIB,
    MIN_MEMORY_MIB, VmConfig,
};
pub use device::{
    DiskConfig, MAX_BLOCK_BYTES, MAX_QUEUES, MAX_WINDOW_MIB, NetworkConfig, PmemConfig, RateLimit,
    ShareConfig, TokenBucket, VsockConfig,
};
pub use exit::{CONSOLE_TAIL_BYTES, VmmExit};
pub use message::{
    CONTROL_FD, Exits, FailureKind, GuestMemory, MAX_MESSAGE_BYTES, MemoryStatistics, Message,
    MessageError, Request, Statistics,
};
pub use vsock::{
    HandshakeError, MAX_HANDSHAKE_BYTES, READY_PORT, connect_line, ok_line, parse_connect, parse_ok,
};
