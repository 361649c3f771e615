//! The messages on the control socket.
//!
//! One packet is one JSON value. Requests are answered in order; [`Message::GuestReady`] comes when it
//! comes. Must not do I/O: encoding and decoding work on byte slices.

use crate::VmConfig;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Where the VMM finds its end of the control socket.
pub const CONTROL_FD: i32 = 3;
/// Bytes of one message at the most.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// From the shim to the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Build the VM and run it. The first message, once; carries the file descriptors.
    /// Answered by [`Message::Booted`] or [`Message::Failed`].
    Boot(VmConfig),
    /// End the VM now. Not answered: the process ends with [`crate::VmmExit::Ended`].
    Stop,
    /// Answered by [`Message::Statistics`]. Also asks the guest for its numbers, which a later answer has.
    Statistics,
    /// Wish that the guest gives up so much of its memory, at most what it booted with; it does so as it can.
    /// Answered by [`Message::Done`] or [`Message::Failed`].
    SetBalloon {
        /// MiB that the balloon shall hold.
        mib: u32,
    },
    /// Wish that the guest has so much memory, between [`VmConfig::memory_mib`] and [`VmConfig::max_memory_mib`]; it
    /// takes more at once and gives back as it can. Answered by [`Message::Done`] or [`Message::Failed`].
    SetMemory {
        /// MiB of RAM that the guest shall have, differing from what it booted with by a multiple of 2.
        mib: u32,
    },
}

/// From the VMM to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// The vCPUs run.
    Booted,
    /// The guest's init listens; sent once, when the guest first asks to connect to [`crate::READY_PORT`].
    GuestReady,
    /// Counters since boot.
    Statistics(Statistics),
    /// What was asked for is done, or has begun.
    Done,
    /// The last request failed; after a failed boot the process ends with [`crate::VmmExit::Setup`].
    Failed {
        /// What a program can act on.
        kind: FailureKind,
        /// The chain of errors, one line, for people.
        error: String,
    },
}

/// The part of a failure that a program acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The configuration breaks this contract.
    Config,
    /// The kernel or the initramfs cannot be loaded.
    Image,
    /// KVM is missing or refuses.
    Kvm,
    /// Anything else: memory, jail, devices.
    Internal,
}

/// How often vCPUs came back from `KVM_RUN`, by reason, summed over all vCPUs; and what became of guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Port I/O.
    pub io_exits: u64,
    /// Memory-mapped I/O.
    pub mmio_exits: u64,
    /// Everything else.
    pub other_exits: u64,
    /// Guest memory.
    #[serde(default)]
    pub memory: MemoryStatistics,
}

/// What became of guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatistics {
    /// Bytes that the guest says its balloon holds.
    pub balloon_bytes: u64,
    /// Bytes of RAM that were added since the guest booted, and not removed.
    pub plugged_bytes: u64,
    /// What the guest said last about its memory, if it ever did.
    #[serde(default)]
    pub guest: Option<GuestMemory>,
}

/// What a guest says about its memory: nothing here can be relied on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// Bytes of RAM that it has.
    pub total_bytes: u64,
    /// Bytes that are not used for anything.
    pub free_bytes: u64,
    /// Bytes that programs could get without swapping.
    pub available_bytes: u64,
    /// Bytes of cached files.
    pub cache_bytes: u64,
    /// Bytes that came back from swap since it booted.
    pub swapped_in_bytes: u64,
    /// Bytes that went to swap since it booted.
    pub swapped_out_bytes: u64,
    /// Page faults that needed I/O since it booted.
    pub major_faults: u64,
    /// Other page faults since it booted.
    pub minor_faults: u64,
    /// Processes that were killed for want of memory since it booted.
    pub oom_kills: u64,
}

/// Why a packet is not a message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Larger than a packet may be.
    #[error("a control message of {0} bytes is larger than {MAX_MESSAGE_BYTES}")]
    TooLarge(usize),
    /// Not JSON, or not this contract's.
    #[error("control message cannot be read")]
    Malformed(#[from] serde_json::Error),
}

impl Request {
    /// One packet.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        encode(self)
    }

    /// Reads one packet.
    pub fn decode(packet: &[u8]) -> Result<Self, MessageError> {
        decode(packet)
    }
}

impl Message {
    /// One packet.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        encode(self)
    }

    /// Reads one packet.
    pub fn decode(packet: &[u8]) -> Result<Self, MessageError> {
        decode(packet)
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, MessageError> {
    let packet = serde_json::to_vec(value)?;
    if packet.len() > MAX_MESSAGE_BYTES {
        return Err(MessageError::TooLarge(packet.len()));
    }
    Ok(packet)
}

fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, MessageError> {
    if packet.len() > MAX_MESSAGE_BYTES {
        return Err(MessageError::TooLarge(packet.len()));
    }
    Ok(serde_json::from_slice(packet)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_the_wire() {
        let failed = Message::Failed {
            kind: FailureKind::Kvm,
            error: "no".into(),
        };
        let statistics = Message::Statistics(Statistics {
            memory: MemoryStatistics {
                guest: Some(GuestMemory::default()),
                ..MemoryStatistics::default()
            },
            ..Statistics::default()
        });
        for message in [Message::Booted, Message::Done, statistics, failed] {
            let packet = message.encode().unwrap();
            assert_eq!(Message::decode(&packet).unwrap(), message);
        }
        let packet = Request::Statistics.encode().unwrap();
        assert_eq!(Request::decode(&packet).unwrap(), Request::Statistics);
    }

    #[test]
    fn an_unknown_field_of_the_configuration_is_refused() {
        let packet = br#"{"boot":{"vcpus":1,"turbo":true}}"#;
        let error = Request::decode(packet).unwrap_err();
        assert!(matches!(error, MessageError::Malformed(_)), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Request::decode(&bytes);
            let _ = Message::decode(&bytes);
        }
    }
}
