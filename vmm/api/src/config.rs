//! What a VM is made of, checked before anything is built from it.
//!
//! Must not open or look at a file: a [`FdSlot`] is only a position in the array of file descriptors
//! that travels with the configuration.

use crate::device::{DiskConfig, NetworkConfig, PmemConfig, ShareConfig, VsockConfig};
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
/// MiB by which RAM can be added: the guest kernel adds and removes memory in blocks of this size.
pub const MEMORY_STEP_MIB: u32 = 128;
/// Disks, networks and persistent memories of one VM at the most, by the interrupts that one IOAPIC has.
pub const MAX_DEVICES: usize = 12;
/// Names the virtio console to the guest's kernel.
const VIRTIO_CONSOLE_WORD: &str = "console=hvc0";
/// Longest kernel command line in bytes: `COMMAND_LINE_SIZE` of x86 without its terminating zero.
const MAX_CMDLINE_BYTES: usize = 2047;

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
    /// vCPUs that it may have after some were added, `vcpus` to [`MAX_VCPUS`]; `vcpus` where absent.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// Guest RAM in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Guest RAM in MiB that it may have after some was added, `memory_mib` to [`MAX_MEMORY_MIB`] and more than that by
    /// a multiple of [`MEMORY_STEP_MIB`]; `memory_mib` where absent.
    #[serde(default)]
    pub max_memory_mib: Option<u32>,
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
    /// Network interfaces, in the order in which the guest sees them (`eth0`, `eth1`, …).
    #[serde(default)]
    pub networks: Vec<NetworkConfig>,
    /// Persistent memories, in the order in which the guest sees them (`pmem0`, `pmem1`, …).
    #[serde(default)]
    pub pmems: Vec<PmemConfig>,
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
    /// A number breaks a rule other than a range.
    #[error("{field} is {value}, but must be {rule}")]
    Number {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What would be accepted.
        rule: &'static str,
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
            max_vcpus: None,
            memory_mib: MIN_MEMORY_MIB,
            max_memory_mib: None,
            cmdline: String::new(),
            kvm,
            kernel,
            initramfs: None,
            console,
            vsock: None,
            share: None,
            disks: Vec::new(),
            networks: Vec::new(),
            pmems: Vec::new(),
        }
    }

    /// Whether the guest is told to use the virtio console, by its name on the command line.
    pub fn has_virtio_console(&self) -> bool {
        let mut words = self.cmdline.split(' ');
        words.any(|word| word == VIRTIO_CONSOLE_WORD)
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
        self.validate_growth()?;
        let devices = self.disks.len() + self.networks.len() + self.pmems.len();
        in_range(
            "number of disks, networks and pmems",
            devices as u64,
            0,
            MAX_DEVICES as u64,
        )?;
        printable(
            "cmdline",
            &self.cmdline,
            MAX_CMDLINE_BYTES,
            "at most 2047 printable ASCII characters",
        )?;
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        if let Some(share) = &self.share {
            share.validate()?;
        }
        self.disks.iter().try_for_each(DiskConfig::validate)?;
        self.networks.iter().try_for_each(NetworkConfig::validate)?;
        self.validate_slots(received)
    }

    /// What the VM may become.
    fn validate_growth(&self) -> Result<(), ConfigError> {
        let (vcpus, mib) = (self.vcpus, self.memory_mib);
        let most = self.max_vcpus.unwrap_or(vcpus);
        in_range("max_vcpus", most.into(), vcpus.into(), MAX_VCPUS.into())?;
        let most = self.max_memory_mib.unwrap_or(mib);
        let limit = MAX_MEMORY_MIB.into();
        in_range("max_memory_mib", most.into(), mib.into(), limit)?;
        if !(most - mib).is_multiple_of(MEMORY_STEP_MIB) {
            return Err(ConfigError::Number {
                field: "max_memory_mib",
                value: most.into(),
                rule: "memory_mib and a multiple of 128",
            });
        }
        Ok(())
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
        slots.extend(self.disks.iter().flat_map(DiskConfig::slots));
        slots.extend(self.networks.iter().flat_map(NetworkConfig::slots));
        slots.extend(self.pmems.iter().flat_map(PmemConfig::slots));
        slots
    }
}

pub(crate) fn in_range(
    field: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<(), ConfigError> {
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

pub(crate) fn printable(
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
            share: Some(ShareConfig::new("walnut", FdSlot(5))),
            disks: vec![DiskConfig::new(FdSlot(6), true, "root")],
            ..VmConfig::new(FdSlot(0), FdSlot(1), FdSlot(3))
        }
    }

    #[test]
    fn a_complete_configuration_is_accepted() {
        assert_eq!(config().validate(7), Ok(()));
    }

    #[test]
    fn the_virtio_console_is_there_for_who_names_it() {
        let named = |cmdline: &str| {
            let cmdline = cmdline.into();
            VmConfig {
                cmdline,
                ..config()
            }
            .has_virtio_console()
        };
        assert!(named("quiet console=ttyS0 console=hvc0") && named("console=hvc0"));
        assert!(!named("quiet console=ttyS0") && !named("xconsole=hvc01"));
    }

    #[test]
    fn numbers_outside_their_range_are_named() {
        type Change = fn(&mut VmConfig);
        let cases: [(&str, Change); 7] = [
            ("vcpus is 0", |c| c.vcpus = 0),
            ("vcpus is 255", |c| c.vcpus = 255),
            ("memory_mib is 1", |c| c.memory_mib = 1),
            ("max_vcpus is 1", |c| (c.vcpus, c.max_vcpus) = (2, Some(1))),
            ("max_memory_mib is 95", |c| c.max_memory_mib = Some(95)),
            ("max_memory_mib is 97", |c| c.max_memory_mib = Some(97)),
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
