//! The devices of a VM: those that a configuration lists, and those that are attached while the VM runs.
//!
//! Plain data with its rules. Must not open or look at a file.

use crate::config::{ConfigError, FdSlot, in_range, printable};
use serde::{Deserialize, Serialize};

/// Queues, or pairs of queues, of one device at the most.
pub const MAX_QUEUES: usize = 16;
/// Bytes of a block, logical or physical, at the most.
pub const MAX_BLOCK_BYTES: u32 = 4096;
/// Bytes of a block at the least: virtio 1.3, section 5.2.4.
const MIN_BLOCK_BYTES: u32 = 512;
/// MiB of a DAX window at the most.
pub const MAX_WINDOW_MIB: u32 = 64 * 1024;
/// virtio 1.3, section 5.11.4: the tag is 36 bytes, padded with zeroes.
const MAX_TAG_BYTES: usize = 36;
/// virtio 1.3, section 5.2.6: VIRTIO_BLK_T_GET_ID answers up to 20 bytes.
const MAX_SERIAL_BYTES: usize = 20;
/// Linux' `VMADDR_CID_HOST` is 2; guests start above it. `u32::MAX` is `VMADDR_CID_ANY`.
const MIN_GUEST_CID: u32 = 3;
/// The least that IPv4 needs of a link (RFC 791), and virtio 1.3, section 5.1.4.1.
const MIN_MTU: u16 = 68;
/// Bit 0 of the first byte of a MAC address: not one interface's but a group's.
const GROUP_ADDRESS: u8 = 1;
/// What a bucket refills in at the most: a day.
const MAX_REFILL_MS: u64 = 24 * 60 * 60 * 1000;

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
    /// MiB of guest-physical addresses through which the guest maps files of the host (DAX), 0 for none, else a
    /// multiple of 2.
    #[serde(default)]
    pub window_mib: u32,
    /// Whether the guest may keep what it writes in its own page cache for a while, where the host cannot see it.
    #[serde(default)]
    pub writeback: bool,
}

/// A virtio block device backed by a file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The backing file, opened read-only or read-write as `read_only` says.
    pub file: FdSlot,
    /// Files that follow it on the disk, for a disk that is read only: each before the last has a multiple of 4096 bytes,
    /// and no request crosses from one to the next.
    #[serde(default)]
    pub joined: Vec<FdSlot>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest reads as the device's serial, at most 20 bytes of printable ASCII.
    pub serial: String,
    /// Request queues, 1 to [`MAX_QUEUES`].
    #[serde(default = "one")]
    pub queues: u8,
    /// Bytes of a logical block, the unit of the guest's requests: a power of two, 512 to [`MAX_BLOCK_BYTES`].
    #[serde(default = "sector")]
    pub logical_block_bytes: u32,
    /// Bytes of a physical block, below which a write costs the host a read: a power of two, not below the logical
    /// one, at most [`MAX_BLOCK_BYTES`].
    #[serde(default = "sector")]
    pub physical_block_bytes: u32,
    /// How much all queues together may do.
    #[serde(default)]
    pub rate: Option<RateLimit>,
}

/// A virtio network device backed by a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// A queue of the same tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, with `IFF_MULTI_QUEUE` for several) for each
    /// pair of queues that the guest gets, 1 to [`MAX_QUEUES`].
    pub taps: Vec<FdSlot>,
    /// `/dev/vhost-net`, opened read-write, once for each tap: the host's kernel then moves the packets. Empty, or as
    /// many as there are taps.
    #[serde(default)]
    pub vhost: Vec<FdSlot>,
    /// The guest's MAC address; not a group's.
    pub mac: [u8; 6],
    /// Bytes of the largest packet without its Ethernet header, 68 to 65535.
    pub mtu: u16,
    /// How much the guest may receive. Not with `vhost`.
    #[serde(default)]
    pub receive_rate: Option<RateLimit>,
    /// How much the guest may send. Not with `vhost`.
    #[serde(default)]
    pub transmit_rate: Option<RateLimit>,
}

/// A virtio persistent memory device: a file that the guest maps, so that it needs no copy of it in its own cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// The file, opened read-only or read-write as `read_only` says. Its size is rounded up to 2 MiB for the guest.
    pub file: FdSlot,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What a device may do in a time; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Tokens are bytes.
    #[serde(default)]
    pub bytes: Option<TokenBucket>,
    /// Tokens are requests or packets.
    #[serde(default)]
    pub operations: Option<TokenBucket>,
}

/// A bucket that starts full and refills evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that it holds, at least 1: the largest burst.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills, 1 to a day: the rate is `size` in that time.
    pub refill_ms: u64,
}

fn one() -> u8 {
    1
}

fn sector() -> u32 {
    MIN_BLOCK_BYTES
}

impl VsockConfig {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let (least, most) = (MIN_GUEST_CID.into(), u64::from(u32::MAX) - 1);
        in_range("vsock.cid", self.cid.into(), least, most)
    }
}

impl ShareConfig {
    /// A share without a window and without a cache of writes in the guest.
    pub fn new(tag: &str, directory: FdSlot) -> Self {
        Self {
            tag: tag.to_owned(),
            directory,
            window_mib: 0,
            writeback: false,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let rule = "1 to 36 printable ASCII characters";
        printable("share.tag", &self.tag, MAX_TAG_BYTES, rule)?;
        if self.tag.is_empty() {
            return Err(ConfigError::Text {
                field: "share.tag",
                value: String::new(),
                rule,
            });
        }
        let mib = self.window_mib;
        in_range("share.window_mib", mib.into(), 0, MAX_WINDOW_MIB.into())?;
        if !mib.is_multiple_of(2) {
            return Err(broken("share.window_mib", mib.into(), "a multiple of 2"));
        }
        Ok(())
    }
}

impl DiskConfig {
    /// A disk with one queue, blocks of 512 bytes and no limits.
    pub fn new(file: FdSlot, read_only: bool, serial: &str) -> Self {
        Self {
            file,
            joined: Vec::new(),
            read_only,
            serial: serial.to_owned(),
            queues: one(),
            logical_block_bytes: sector(),
            physical_block_bytes: sector(),
            rate: None,
        }
    }

    /// Checks every field but the slots.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let rule = "at most 20 printable ASCII characters";
        printable("disk.serial", &self.serial, MAX_SERIAL_BYTES, rule)?;
        in_range("disk.queues", self.queues.into(), 1, MAX_QUEUES as u64)?;
        let (logical, physical) = (self.logical_block_bytes, self.physical_block_bytes);
        block_bytes("disk.logical_block_bytes", logical, MIN_BLOCK_BYTES)?;
        block_bytes("disk.physical_block_bytes", physical, logical)?;
        if !self.joined.is_empty() && !self.read_only {
            let count = self.joined.len() as u64;
            return Err(broken(
                "number of disk.joined",
                count,
                "0 where the guest writes",
            ));
        }
        validate_rate("disk.rate", self.rate)
    }

    /// The files that it names.
    pub fn slots(&self) -> Vec<(&'static str, FdSlot)> {
        let joined = self.joined.iter().map(|slot| ("disk.joined", *slot));
        std::iter::once(("disk.file", self.file))
            .chain(joined)
            .collect()
    }
}

impl NetworkConfig {
    /// Checks every field but the slots.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let (taps, vhost) = (self.taps.len() as u64, self.vhost.len() as u64);
        in_range("number of network.taps", taps, 1, MAX_QUEUES as u64)?;
        if vhost != 0 {
            in_range("number of network.vhost", vhost, taps, taps)?;
        }
        in_range("network.mtu", self.mtu.into(), MIN_MTU.into(), 65535)?;
        if self.mac[0] & GROUP_ADDRESS != 0 {
            let first = self.mac[0].into();
            return Err(broken(
                "network.mac[0]",
                first,
                "even: a group has no interface",
            ));
        }
        for (field, rate) in [
            ("network.receive_rate", self.receive_rate),
            ("network.transmit_rate", self.transmit_rate),
        ] {
            validate_rate(field, rate)?;
            if rate.is_some() && vhost != 0 {
                return Err(broken(
                    "number of network.vhost",
                    vhost,
                    "0 where a rate is set",
                ));
            }
        }
        Ok(())
    }

    /// The files that it names.
    pub fn slots(&self) -> Vec<(&'static str, FdSlot)> {
        let taps = self.taps.iter().map(|&slot| ("network.taps", slot));
        let vhost = self.vhost.iter().map(|&slot| ("network.vhost", slot));
        taps.chain(vhost).collect()
    }
}

impl PmemConfig {
    /// The files that it names.
    pub fn slots(&self) -> Vec<(&'static str, FdSlot)> {
        vec![("pmem.file", self.file)]
    }
}

fn broken(field: &'static str, value: u64, rule: &'static str) -> ConfigError {
    ConfigError::Number { field, value, rule }
}

fn block_bytes(field: &'static str, value: u32, least: u32) -> Result<(), ConfigError> {
    in_range(field, value.into(), least.into(), MAX_BLOCK_BYTES.into())?;
    if value.is_power_of_two() {
        return Ok(());
    }
    Err(broken(field, value.into(), "a power of two"))
}

fn validate_rate(field: &'static str, rate: Option<RateLimit>) -> Result<(), ConfigError> {
    let rate = rate.unwrap_or_default();
    for bucket in [rate.bytes, rate.operations].into_iter().flatten() {
        in_range(field, bucket.size, 1, u64::MAX)?;
        in_range(field, bucket.refill_ms, 1, MAX_REFILL_MS)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> NetworkConfig {
        NetworkConfig {
            taps: vec![FdSlot(0)],
            vhost: Vec::new(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            receive_rate: None,
            transmit_rate: None,
        }
    }

    #[test]
    fn what_a_disk_cannot_be_is_named() {
        type Change = fn(&mut DiskConfig);
        let cases: [(&str, Change); 6] = [
            ("number of disk.joined is 1", |disk| {
                disk.joined = vec![FdSlot(1)]
            }),
            ("disk.queues is 0", |disk| disk.queues = 0),
            ("disk.logical_block_bytes is 256", |disk| {
                disk.logical_block_bytes = 256;
            }),
            ("disk.physical_block_bytes is 1536", |disk| {
                disk.physical_block_bytes = 1536;
            }),
            ("disk.physical_block_bytes is 512", |disk| {
                disk.logical_block_bytes = 4096;
            }),
            ("disk.rate is 0", |disk| {
                disk.rate = Some(RateLimit {
                    bytes: Some(TokenBucket {
                        size: 1,
                        refill_ms: 0,
                    }),
                    operations: None,
                });
            }),
        ];
        for (message, change) in cases {
            let mut disk = DiskConfig::new(FdSlot(0), false, "root");
            assert_eq!(disk.validate(), Ok(()));
            change(&mut disk);
            let error = disk.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn what_a_network_cannot_be_is_named() {
        type Change = fn(&mut NetworkConfig);
        let cases: [(&str, Change); 5] = [
            ("number of network.taps is 0", |network| {
                network.taps.clear();
            }),
            ("number of network.vhost is 2", |network| {
                network.vhost = vec![FdSlot(1), FdSlot(2)];
            }),
            ("network.mtu is 67", |network| network.mtu = 67),
            ("network.mac[0] is 1", |network| network.mac[0] = 1),
            ("number of network.vhost is 1", |network| {
                network.vhost = vec![FdSlot(1)];
                network.transmit_rate = Some(RateLimit::default());
            }),
        ];
        for (message, change) in cases {
            let mut network = network();
            assert_eq!(network.validate(), Ok(()));
            change(&mut network);
            let error = network.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn a_window_is_made_of_huge_pages() {
        let mut share = ShareConfig::new("walnut", FdSlot(0));
        assert_eq!(share.validate(), Ok(()));
        share.window_mib = 3;
        let error = share.validate().unwrap_err().to_string();
        assert!(error.starts_with("share.window_mib is 3"), "{error}");
    }
}
