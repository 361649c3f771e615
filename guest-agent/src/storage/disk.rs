//! Disks that the host attached: from the name that the VMM gave to the guest's block devices, and back.
//!
//! The VMM's names are those of places in an ACPI module device. A place that was used before has its
//! platform device still, without a driver. Must not look at what is on a disk.

use super::StorageError;
use crate::{
    hotplug::{self, PLATFORM, bind, is_driven, platform_device},
    kernel_events::KernelEvents,
    syscall,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::timeout;

/// From the VMM's interrupt to a block device, on the slowest machine.
const DEADLINE: Duration = Duration::from_secs(30);
/// Letters and digits of a name.
const NAME_BYTES: usize = 4;
/// What the parts of a disk are multiples of.
const PART_UNIT: u64 = 4096;
/// Minor numbers of one disk are a byte, and the first is its own.
const MAX_PARTS: usize = 255;

/// A disk that its driver serves.
#[derive(Debug)]
pub(super) struct Disk {
    /// Its platform device.
    platform: String,
    /// Its block device, `vda`.
    node: String,
}

impl Disk {
    /// Waits for the disk of this name.
    pub(super) async fn find(name: &str) -> Result<Self, StorageError> {
        if name.len() != NAME_BYTES || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(StorageError::Request(format!("{name:?} is no disk's name")));
        }
        let system = || StorageError::system(format!("look for disk {name}"));
        // Before the first look, so that what comes after it is told.
        let events = KernelEvents::listen().map_err(system())?;
        let found = timeout(DEADLINE, async {
            loop {
                if let Some(disk) = look(name)? {
                    return Ok(disk);
                }
                events.next().await?;
            }
        });
        match found.await {
            Ok(found) => found.map_err(system()),
            Err(_) => Err(StorageError::NoDisk(name.to_owned())),
        }
    }

    /// Makes the parts devices of their own.
    pub(super) fn divide(&self, parts: &[u64]) -> Result<(), StorageError> {
        let whole = |bytes: &u64| *bytes > 0 && bytes.is_multiple_of(PART_UNIT);
        if parts.len() > MAX_PARTS || !parts.iter().all(whole) {
            return Err(StorageError::Request(format!(
                "parts of a disk are at most {MAX_PARTS}, in multiples of {PART_UNIT} bytes: {parts:?}"
            )));
        }
        let device = self.path(0);
        let attempted = || StorageError::system(format!("divide {device:?}"));
        let file = fs::File::open(&device).map_err(attempted())?;
        let mut start = 0_u64;
        for (number, bytes) in (1..).zip(parts) {
            syscall::add_partition(&file, number, start, *bytes).map_err(attempted())?;
            start = start.saturating_add(*bytes);
        }
        Ok(())
    }

    /// The device node of a part, from 1, or of the whole disk.
    pub(super) fn path(&self, part: u32) -> PathBuf {
        let disk = Path::new("/dev").join(&self.node);
        match part {
            0 => disk,
            part => PathBuf::from(format!("{}{part}", disk.display())),
        }
    }

    /// Its numbers, major and minor.
    pub(super) fn number(&self) -> Result<(u32, u32), StorageError> {
        let file = format!("/sys/class/block/{}/dev", self.node);
        let attempted = || StorageError::system(format!("read {file}"));
        let text = fs::read_to_string(&file).map_err(attempted())?;
        let numbers = text.trim().split_once(':');
        numbers
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
            .ok_or_else(|| attempted()(io::Error::other("no device number")))
    }

    /// Takes the driver away, which writes what is not yet written. Without a driver nothing happens.
    pub(super) fn release(&self) -> Result<(), StorageError> {
        hotplug::unbind(&self.platform)
            .map_err(StorageError::system(format!("release {}", self.node)))
    }
}

/// Looks once, and gives a device that waits for its driver what it waits for.
fn look(name: &str) -> io::Result<Option<Disk>> {
    let Some(platform) = platform_device(name)? else {
        return Ok(None);
    };
    let device = Path::new(PLATFORM).join(&platform);
    if device.exists() && !is_driven(&platform) {
        bind(&platform);
    }
    let disk = block_device(&device)?.map(|node| Disk { platform, node });
    // Its directory comes before it can be opened; the kernel's event comes after.
    Ok(disk.filter(|disk| fs::File::open(disk.path(0)).is_ok()))
}

/// What is in `<device>/virtio<number>/block`.
fn block_device(device: &Path) -> io::Result<Option<String>> {
    let names = |directory: &Path| match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>(),
    };
    for child in names(device)? {
        if child.starts_with("virtio") {
            let blocks = names(&device.join(child).join("block"))?;
            return Ok(blocks.into_iter().next());
        }
    }
    Ok(None)
}
