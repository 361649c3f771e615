//! What a VM is made of, checked before anything is built from it.
//!
//! Must not open or look at a file: a [`FdSlot`] is only a position in the array of file descriptors
//! that travels with the configuration.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// File descriptors in one message at the most (the kernel's own limit is `SCM_MAX_FD`, 253).
pub const MAX_FDS: usize = 64;
/// vCPUs of one VM at the most; the guest kernel is built with `NR_CPUS=256`, APIC ids end at 254.
pub const MAX_VCPUS: u8 = 254;
/// Guest RAM in MiB at the least: below it the guest kernel does not reach its init.
pub const MIN_MEMORY_MIB: u32 = 96;
/// Guest RAM in MiB at the most: 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;
/// Block devices of one VM at the most, by the interrupts that one IOAPIC has.
pub const MAX_DISKS: usize = 12;
/// Longest kernel command line in bytes: `COMMAND_LINE_SIZE` of x86 without its terminating zero.
const MAX_CMDLINE_BYTES: usize = 2047;
/// virtio 1.3, section 5.11.4: the tag is 36 bytes, padded with zeroes.
const MAX_TAG_BYTES: usize = 36;
/// virtio 1.3, section 5.2.6: VIRTIO_BLK_T_GET_ID answers up to 20 bytes.
const MAX_SERIAL_BYTES: usize = 20;
/// Linux' `VMADDR_CID_HOST` is 2; guests start above it. `u32::MAX` is `VMADDR_CID_ANY`.
const MIN_GUEST_CID: u32 = 3;

/// Position of a file descriptor in the array that travels with [`VmConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdSlot(pub u8);

/// One VM: its machine, its devices, and where the files of each stand in the array.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Kernel command line, printable ASCII, at most 2047 bytes.
    pub cmdline: String,
    /// `/dev/kvm`, opened read-write.
    pub kvm: FdSlot,
    /// An uncompressed x86-64 ELF kernel with a PVH entry note, opened read-only.
    pub kernel: FdSlot,
    /// Initramfs, opened read-only.
    #[serde(default)]
    pub initramfs: Option<FdSlot>,
    /// Where the guest's serial console is written, opened for appending.
    pub console: FdSlot,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// The shared directory.
    #[serde(default)]
    pub share: Option<ShareConfig>,
    /// Block devices, in the order in which the guest sees them (`vda`, `vdb`, …).
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
}

/// The virtio socket device: host programs connect to `listener`, see [`crate::connect_line`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to `u32::MAX - 1`.
    pub cid: u32,
    /// A listening Unix stream socket.
    pub listener: FdSlot,
}

/// The virtio file system device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Mount tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory that becomes the root of the VMM's mount namespace, opened `O_PATH`. It is a mount point.
    pub directory: FdSlot,
}

/// A virtio block device backed by a file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The backing file, opened read-only or read-write as `read_only` says.
    pub file: FdSlot,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest reads as the device's serial, at most 20 bytes of printable ASCII.
    pub serial: String,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A number is outside its range.
    #[error("{field} is {value}, but must be between {min} and {max}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// The least that is allowed.
        min: u64,
        /// The most that is allowed.
        max: u64,
    },
    /// A string is too long or has characters that its consumer cannot take.
    #[error("{field} {value:?} must be {rule}")]
    Text {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What would be accepted.
        rule: &'static str,
    },
    /// A slot that no file descriptor fills.
    #[error(
        "{field} names file descriptor {slot}, but only {received} came with the configuration"
    )]
    MissingFd {
        /// Name of the field.
        field: &'static str,
        /// The slot it names.
        slot: u8,
        /// How many came.
        received: usize,
    },
    /// Two fields name the same slot.
    #[error("{field} names file descriptor {slot}, which another field has already")]
    SharedFd {
        /// Name of the second field.
        field: &'static str,
        /// The slot.
        slot: u8,
    },
}

impl VmConfig {
    /// The smallest VM that these files make: one vCPU, [`MIN_MEMORY_MIB`], an empty command line, no device but
    /// the console.
    pub fn new(kvm: FdSlot, kernel: FdSlot, console: FdSlot) -> Self {
        Self {
            vcpus: 1,
            memory_mib: MIN_MEMORY_MIB,
            cmdline: String::new(),
            kvm,
            kernel,
            initramfs: None,
            console,
            vsock: None,
            share: None,
            disks: Vec::new(),
        }
    }

    /// Checks every field, given that `received` file descriptors came with the message.
    pub fn validate(&self, received: usize) -> Result<(), ConfigError> {
        in_range("vcpus", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        in_range(
            "memory_mib",
            self.memory_mib.into(),
            MIN_MEMORY_MIB.into(),
            MAX_MEMORY_MIB.into(),
        )?;
        in_range(
            "number of disks",
            self.disks.len() as u64,
            0,
            MAX_DISKS as u64,
        )?;
        printable(
            "cmdline",
            &self.cmdline,
            MAX_CMDLINE_BYTES,
            "at most 2047 printable ASCII characters",
        )?;
        if let Some(vsock) = &self.vsock {
            in_range(
                "vsock.cid",
                vsock.cid.into(),
                MIN_GUEST_CID.into(),
                u64::from(u32::MAX) - 1,
            )?;
        }
        if let Some(share) = &self.share {
            let rule = "1 to 36 printable ASCII characters";
            printable("share.tag", &share.tag, MAX_TAG_BYTES, rule)?;
            if share.tag.is_empty() {
                return Err(ConfigError::Text {
                    field: "share.tag",
                    value: String::new(),
                    rule,
                });
            }
        }
        for disk in &self.disks {
            printable(
                "disk.serial",
                &disk.serial,
                MAX_SERIAL_BYTES,
                "at most 20 printable ASCII characters",
            )?;
        }
        self.validate_slots(received)
    }

    fn validate_slots(&self, received: usize) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        for (field, slot) in self.slots() {
            if usize::from(slot.0) >= received {
                return Err(ConfigError::MissingFd {
                    field,
                    slot: slot.0,
                    received,
                });
            }
            if !seen.insert(slot) {
                return Err(ConfigError::SharedFd {
                    field,
                    slot: slot.0,
                });
            }
        }
        Ok(())
    }

    fn slots(&self) -> Vec<(&'static str, FdSlot)> {
        let mut slots = vec![
            ("kvm", self.kvm),
            ("kernel", self.kernel),
            ("console", self.console),
        ];
        slots.extend(self.initramfs.map(|slot| ("initramfs", slot)));
        slots.extend(
            self.vsock
                .iter()
                .map(|vsock| ("vsock.listener", vsock.listener)),
        );
        slots.extend(
            self.share
                .iter()
                .map(|share| ("share.directory", share.directory)),
        );
        slots.extend(self.disks.iter().map(|disk| ("disk.file", disk.file)));
        slots
    }
}

fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::OutOfRange {
        field,
        value,
        min,
        max,
    })
}

fn printable(
    field: &'static str,
    value: &str,
    max_bytes: usize,
    rule: &'static str,
) -> Result<(), ConfigError> {
    if value.len() <= max_bytes && value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Ok(());
    }
    Err(ConfigError::Text {
        field,
        value: value.to_owned(),
        rule,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            cmdline: "quiet".into(),
            initramfs: Some(FdSlot(2)),
            vsock: Some(VsockConfig {
                cid: 3,
                listener: FdSlot(4),
            }),
            share: Some(ShareConfig {
                tag: "walnut".into(),
                directory: FdSlot(5),
            }),
            disks: vec![DiskConfig {
                file: FdSlot(6),
                read_only: true,
                serial: "root".into(),
            }],
            ..VmConfig::new(FdSlot(0), FdSlot(1), FdSlot(3))
        }
    }

    #[test]
    fn a_complete_configuration_is_accepted() {
        assert_eq!(config().validate(7), Ok(()));
    }

    #[test]
    fn numbers_outside_their_range_are_named() {
        type Change = fn(&mut VmConfig);
        let cases: [(&str, Change); 4] = [
            ("vcpus is 0", |c| c.vcpus = 0),
            ("vcpus is 255", |c| c.vcpus = 255),
            ("memory_mib is 1", |c| c.memory_mib = 1),
            ("vsock.cid is 2", |c| c.vsock.as_mut().unwrap().cid = 2),
        ];
        for (message, change) in cases {
            let mut changed = config();
            change(&mut changed);
            let error = changed.validate(7).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn text_that_the_guest_could_misread_is_refused() {
        let mut long = config();
        long.cmdline = "x".repeat(MAX_CMDLINE_BYTES + 1);
        let mut newline = config();
        newline.cmdline = "quiet\ninit=/bin/sh".into();
        let mut untagged = config();
        untagged.share.as_mut().unwrap().tag = String::new();
        for bad in [long, newline, untagged] {
            assert!(
                matches!(bad.validate(7), Err(ConfigError::Text { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn every_slot_has_its_own_file_descriptor() {
        assert_eq!(
            config().validate(6),
            Err(ConfigError::MissingFd {
                field: "disk.file",
                slot: 6,
                received: 6
            })
        );
        let mut twice = config();
        twice.console = FdSlot(1);
        assert_eq!(
            twice.validate(7),
            Err(ConfigError::SharedFd {
                field: "console",
                slot: 1
            })
        );
    }
}
