//! The messages on the control socket.
//!
//! One packet is one JSON value. Requests are answered in order; [`Message::GuestReady`] comes when it
//! comes. Must not do I/O: encoding and decoding work on byte slices.

use crate::{DiskConfig, NetworkConfig, VmConfig};
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
    /// Answered by [`Message::Statistics`], also while the VM is paused. Also asks the guest for its numbers, which a
    /// later answer has.
    Statistics,
    /// Let no vCPU execute until [`Request::Resume`]. Devices finish what the guest asked of them. Answered by
    /// [`Message::Done`] once all vCPUs stand still; [`FailureKind::State`] when they do already.
    Pause,
    /// The end of a pause. Answered by [`Message::Done`]; [`FailureKind::State`] when the VM runs already.
    Resume,
    /// Press the power button. Answered by [`Message::Done`]; what comes of it is the guest's decision.
    PowerButton,
    /// Attach a disk; carries its file, whose slot is its place in this packet. Answered by
    /// [`Message::Attached`]; [`FailureKind::Full`] when no place for a device is free.
    AttachDisk(DiskConfig),
    /// Attach a network interface, as [`Request::AttachDisk`].
    AttachNetwork(NetworkConfig),
    /// Remove what was attached under this name, at once: the guest's driver has let go of it before. Answered by
    /// [`Message::Done`]; [`FailureKind::NotFound`] when nothing has this name.
    Detach {
        /// As [`Message::Attached`] said.
        name: String,
    },
    /// Change the size of the VM. Answered by [`Message::Done`] once the guest has been told.
    Resize {
        /// vCPUs from now on: not fewer than there are, and at most [`VmConfig::max_vcpus`].
        #[serde(default)]
        vcpus: Option<u8>,
        /// MiB of RAM that the guest shall have, between [`VmConfig::memory_mib`] and [`VmConfig::max_memory_mib`], and
        /// more than the former by a multiple of 2; it takes more at once and gives back as it can.
        #[serde(default)]
        memory_mib: Option<u32>,
    },
    /// Wish that the guest gives up so much of its memory, at most what it booted with; it does so as it can.
    /// Answered by [`Message::Done`].
    SetBalloon {
        /// MiB that the balloon shall hold.
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
    /// The request was carried out, and there is nothing to say about it.
    Done,
    /// The device is there. The guest finds it under `/sys/bus/acpi/devices` by its `path`, which is
    /// `\\_SB_.HOTP.` and this name.
    Attached {
        /// Four characters, for [`Request::Detach`].
        name: String,
    },
    /// Counters since boot.
    Statistics(Statistics),
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
    /// The VM is not in the state that the request wants.
    State,
    /// Nothing has this name.
    NotFound,
    /// This VM cannot do this.
    Unsupported,
    /// There is no room for more.
    Full,
    /// Anything else: memory, jail, devices.
    Internal,
}

/// What the VM did since boot, and how it stands. Its packet has room for [`crate::MAX_VCPUS`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Whether the VM is paused.
    pub paused: bool,
    /// MiB of RAM that the guest booted with.
    pub memory_mib: u32,
    /// How often each vCPU came back from `KVM_RUN`, by its number.
    pub vcpus: Vec<Exits>,
    /// What became of guest memory.
    #[serde(default)]
    pub memory: MemoryStatistics,
}

impl Statistics {
    /// The exits of all vCPUs.
    pub fn exits(&self) -> Exits {
        let mut sum = Exits::default();
        for vcpu in &self.vcpus {
            sum.io = sum.io.wrapping_add(vcpu.io);
            sum.mmio = sum.mmio.wrapping_add(vcpu.mmio);
            sum.other = sum.other.wrapping_add(vcpu.other);
        }
        sum
    }
}

/// How often a vCPU came back from `KVM_RUN`, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// Port I/O.
    pub io: u64,
    /// Memory-mapped I/O.
    pub mmio: u64,
    /// Everything else.
    pub other: u64,
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
        let resize = Request::Resize {
            vcpus: Some(3),
            memory_mib: None,
        };
        for request in [Request::Statistics, Request::Pause, resize] {
            let packet = request.encode().unwrap();
            assert_eq!(Request::decode(&packet).unwrap(), request);
        }
    }

    #[test]
    fn the_largest_statistics_fit_a_packet() {
        let most = Exits {
            io: u64::MAX,
            mmio: u64::MAX,
            other: u64::MAX,
        };
        let statistics = Statistics {
            paused: false,
            memory_mib: u32::MAX,
            vcpus: vec![most; crate::MAX_VCPUS.into()],
            ..Statistics::default()
        };
        assert!(Message::Statistics(statistics).encode().is_ok());
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
