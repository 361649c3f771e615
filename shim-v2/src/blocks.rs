//! Which of a container's mounts become disks of the guest, and the files behind them.
//!
//! An image file or device that the guest's kernel can mount becomes a disk, and so do the layers of an overlay that
//! are mounted images, many on one disk. What a container writes over layers goes to the host's snapshot, so such an
//! overlay is left to `storage` unless its root is read-only or the configuration wants it in the guest
//! (docs/decisions/0017). Reads the host's mount table and devices, mounts nothing, and takes nothing from the guest.

use crate::{
    mounts::{MountPoint, mount_point_at},
    spec::BlockDevice,
};
use containerd_shim_protos::api::Mount;
use rustix::fs::{FileType, major, makedev, minor};
use std::{
    fs::{self, File},
    io::{self, Seek as _, SeekFrom},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};
use walnut_agent_api::guest::{Disk, Image, Place};
use walnut_vmm_api::{DiskConfig, FdSlot, MAX_FDS, Request};

/// Image types that the guest's kernel mounts; others are mounted on the host and shared.
const IMAGE_TYPES: [&str; 3] = ["erofs", "ext4", "ext2"];
/// For mount points in a root that is read-only once its mounts are made.
const MOUNT_POINTS_BYTES: u64 = 1 << 20;
/// Options of an overlay that say nothing about what is in it.
const OVERLAY_HINTS: [&str; 5] = ["", "ro", "rw", "index=off", "volatile"];
/// What an image on a disk with others is a multiple of (vmm/api).
const PART_UNIT: u64 = 4096;
/// Linux' major number of loop devices.
const LOOP_MAJOR: u32 = 7;

/// Why a container's images or devices can't become disks.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlocksError {
    /// An image file or a device.
    #[error("{what} {path:?} failed")]
    Path {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A device number without a device.
    #[error("linux.devices: the host has no block device {major}:{minor} for {path:?}")]
    NoDevice {
        /// Path in the container.
        path: PathBuf,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// What is written over images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Writes {
    /// Nothing is, once mount points are made.
    pub(crate) read_only_root: bool,
    /// Bytes of the guest's memory that take it instead of the snapshot; 0 for the snapshot.
    pub(crate) guest_bytes: u64,
}

/// A root file system made of images, by their paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recipe {
    /// Topmost first.
    images: Vec<ImageSource>,
    overlay: bool,
    scratch_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ImageSource {
    kind: String,
    /// The image, then further devices of its file system.
    paths: Vec<PathBuf>,
    read_only: bool,
    options: Vec<String>,
}

/// Disks to attach, and what the guest makes of them.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// In the order in which the guest counts them: first those of images, then block devices.
    pub(crate) disks: Vec<DiskFiles>,
    /// The root file system, topmost image first; none when it is shared.
    pub(crate) images: Vec<Image>,
    /// Bytes for what is written over them.
    pub(crate) scratch_bytes: u64,
    /// Where the block devices begin among the disks.
    pub(crate) first_device: usize,
}

/// What is on one disk.
#[derive(Debug)]
pub(crate) struct DiskFiles {
    /// One after another.
    pub(crate) files: Vec<OwnedFd>,
    /// Whether the guest may only read.
    read_only: bool,
    /// Bytes of each, when there are several or there may be.
    part_bytes: Vec<u64>,
}

impl DiskFiles {
    /// What the VMM is asked for, with the files.
    pub(crate) fn request(&self) -> Request {
        let slots = (0..).map(FdSlot).take(self.files.len());
        Request::AttachDisk(DiskConfig {
            joined: slots.skip(1).collect(),
            ..DiskConfig::new(FdSlot(0), self.read_only, "")
        })
    }

    /// What the agent is told of a disk that the VMM named.
    pub(crate) fn told(&self, name: &str) -> Disk {
        Disk {
            name: name.to_owned(),
            part_bytes: self.part_bytes.clone(),
            ..Default::default()
        }
    }
}

/// How a root file system's mounts can be made of disks; `None` when they are for the host to make.
pub(crate) fn recipe(rootfs: &[Mount], writes: Writes, mountinfo: &[u8]) -> Option<Recipe> {
    let [mount] = rootfs else { return None };
    if !mount.target.is_empty() {
        return None;
    }
    if IMAGE_TYPES.contains(&mount.type_.as_str()) {
        return Some(Recipe {
            images: vec![image(mount)?],
            overlay: false,
            scratch_bytes: 0,
        });
    }
    (mount.type_ == "overlay").then(|| overlay(mount, writes, mountinfo))?
}

fn image(mount: &Mount) -> Option<ImageSource> {
    let mut image = ImageSource {
        kind: mount.type_.clone(),
        paths: vec![PathBuf::from(&mount.source)],
        read_only: mount.type_ == "erofs",
        options: Vec::new(),
    };
    for option in &mount.options {
        match option.as_str() {
            "ro" => image.read_only = true,
            "rw" | "loop" | "" | "defaults" => {}
            // For containerd's mounts on the host, which says by name what it doesn't know.
            _ if option.starts_with("X-containerd.") || option.contains("idmap=") => return None,
            _ => match option.strip_prefix("device=") {
                Some(device) => image.paths.push(device.into()),
                None => image.options.push(option.clone()),
            },
        }
    }
    let absolute = image.paths.iter().all(|path| path.is_absolute());
    absolute.then_some(image)
}

fn overlay(mount: &Mount, writes: Writes, mountinfo: &[u8]) -> Option<Recipe> {
    let (mut lower, mut upper) = (None, None);
    for option in &mount.options {
        match option.split_once('=') {
            Some(("lowerdir", value)) if !value.contains('\\') => lower = Some(value),
            Some(("upperdir", value)) => upper = Some(Path::new(value)),
            Some(("workdir", _)) => {}
            _ if OVERLAY_HINTS.contains(&option.as_str()) => {}
            _ => return None,
        }
    }
    let scratch_bytes = match upper {
        None => 0,
        // What is in it already is for the guest to see.
        Some(upper) if fs::read_dir(upper).ok()?.next().is_some() => return None,
        Some(_) if writes.read_only_root => MOUNT_POINTS_BYTES,
        Some(_) if writes.guest_bytes > 0 => writes.guest_bytes,
        Some(_) => return None,
    };
    let layer = |path: &str| {
        let MountPoint { kind, source } = mount_point_at(mountinfo, Path::new(path))?;
        (kind == "erofs" && source.is_absolute()).then(|| ImageSource {
            kind,
            paths: vec![source],
            read_only: true,
            options: Vec::new(),
        })
    };
    Some(Recipe {
        images: lower?.split(':').map(layer).collect::<Option<_>>()?,
        overlay: true,
        scratch_bytes,
    })
}

impl Recipe {
    /// Whether the host has the layers mounted, so that it can mount the whole too.
    pub(crate) fn is_overlay(&self) -> bool {
        self.overlay
    }
}

impl Blocks {
    /// Opens what a recipe and the configuration's block devices name.
    pub(crate) fn open(
        recipe: Option<&Recipe>,
        devices: &[BlockDevice],
    ) -> Result<Self, BlocksError> {
        let mut blocks = Self::default();
        for source in recipe.iter().flat_map(|recipe| &recipe.images) {
            let mut places = Vec::new();
            for path in &source.paths {
                let file = open_image(path, source.read_only)?;
                places.push(blocks.place(file, path, source.read_only)?);
            }
            let mut places = places.into_iter();
            blocks.images.push(Image {
                place: places.next().into(),
                devices: places.collect(),
                type_: source.kind.clone(),
                read_only: source.read_only,
                options: source.options.clone(),
                ..Default::default()
            });
        }
        blocks.leave_whole();
        blocks.scratch_bytes = recipe.map_or(0, |recipe| recipe.scratch_bytes);
        blocks.first_device = blocks.disks.len();
        for device in devices {
            let file = open_device(device)?;
            blocks.disks.push(DiskFiles::alone(file, device.read_only));
        }
        Ok(blocks)
    }

    /// A disk with one image needs no parts.
    fn leave_whole(&mut self) {
        for (number, disk) in (0..).zip(&mut self.disks) {
            if disk.files.len() > 1 {
                continue;
            }
            disk.part_bytes.clear();
            for image in &mut self.images {
                let places = image.place.as_mut().into_iter().chain(&mut image.devices);
                places
                    .filter(|place| place.disk == number)
                    .for_each(|place| place.part = 0);
            }
        }
    }

    /// Finds a place for an image: behind others that are only read, or on a disk of its own.
    fn place(
        &mut self,
        mut file: File,
        path: &Path,
        read_only: bool,
    ) -> Result<Place, BlocksError> {
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(failed("measuring image", path))?;
        let packs = read_only && bytes > 0 && bytes.is_multiple_of(PART_UNIT);
        let last = self.disks.last_mut();
        let part = match last.filter(|disk| packs && disk.has_room()) {
            Some(disk) => disk.add(file, bytes),
            None => {
                self.disks.push(DiskFiles::alone(file, read_only));
                let disk = self.disks.last_mut().filter(|_| packs);
                disk.map_or(0, |disk| {
                    disk.part_bytes.push(bytes);
                    1
                })
            }
        };
        Ok(Place {
            disk: u32::try_from(self.disks.len().saturating_sub(1)).unwrap_or(u32::MAX),
            part,
            ..Default::default()
        })
    }
}

impl DiskFiles {
    fn alone(file: File, read_only: bool) -> Self {
        Self {
            files: vec![file.into()],
            read_only,
            part_bytes: Vec::new(),
        }
    }

    fn has_room(&self) -> bool {
        !self.part_bytes.is_empty() && self.files.len() < MAX_FDS
    }

    /// Adds a file and gives the number of its part.
    fn add(&mut self, file: File, bytes: u64) -> u32 {
        self.files.push(file.into());
        self.part_bytes.push(bytes);
        u32::try_from(self.part_bytes.len()).unwrap_or(u32::MAX)
    }
}

/// Opens an image; of a loop device that shows a whole file, the file, so that the host caches it once.
fn open_image(path: &Path, read_only: bool) -> Result<File, BlocksError> {
    let metadata = fs::metadata(path).map_err(failed("looking at image", path))?;
    let number = metadata.rdev();
    if read_only && is_block(&metadata) && major(number) == LOOP_MAJOR {
        let about = |name: &str| {
            let file = format!(
                "/sys/dev/block/{}:{}/loop/{name}",
                LOOP_MAJOR,
                minor(number)
            );
            fs::read_to_string(file)
        };
        let whole = ["offset", "sizelimit"].map(|name| about(name).ok());
        if whole
            .iter()
            .all(|text| text.as_deref().map(str::trim) == Some("0"))
        {
            let backing = about("backing_file").map_err(failed("looking at image", path))?;
            // Its file may have been deleted; the device has it still.
            if let Ok(file) = File::open(backing.trim_end_matches('\n')) {
                return Ok(file);
            }
        }
    }
    if !metadata.is_file() && !is_block(&metadata) {
        let neither = io::Error::other("it is neither a file nor a block device");
        return Err(failed("opening image", path)(neither));
    }
    open(path, read_only).map_err(failed("opening image", path))
}

/// Opens a block device by its number: the path in a container's configuration is the container's.
fn open_device(device: &BlockDevice) -> Result<File, BlocksError> {
    let &BlockDevice { major, minor, .. } = device;
    let absent = || BlocksError::NoDevice {
        path: device.path.clone(),
        major,
        minor,
    };
    let events = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let events = events.map_err(|_| absent())?;
    let name = events
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    let path = Path::new("/dev").join(name.ok_or_else(absent)?);
    let file = open(&path, device.read_only).map_err(failed("opening block device", &path))?;
    let metadata = file
        .metadata()
        .map_err(failed("looking at block device", &path))?;
    if is_block(&metadata) && metadata.rdev() == makedev(major, minor) {
        return Ok(file);
    }
    Err(absent())
}

fn open(path: &Path, read_only: bool) -> io::Result<File> {
    File::options().read(true).write(!read_only).open(path)
}

fn is_block(metadata: &fs::Metadata) -> bool {
    FileType::from_raw_mode(metadata.mode()) == FileType::BlockDevice
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BlocksError {
    let path = path.to_owned();
    move |source| BlocksError::Path { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOT: Writes = Writes {
        read_only_root: false,
        guest_bytes: 0,
    };
    const READ_ONLY: Writes = Writes {
        read_only_root: true,
        guest_bytes: 0,
    };
    const LAYERS: &[u8] = b"30 22 7:0 / /s/1/fs ro - erofs /dev/loop0 ro\n\
        31 22 7:1 / /s/2/fs ro shared:1 - erofs /s/2/layer.erofs ro\n\
        32 22 0:9 / /s/3/fs rw - tmpfs t rw\n";

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn images_are_disks_and_what_the_guest_cannot_mount_is_not() {
        let block = mount("ext4", "/snap/1", &["rw", "loop", "noatime"]);
        let image = &recipe(&[block], SNAPSHOT, b"").unwrap().images[0];
        assert!(!image.read_only);
        assert_eq!(image.options, ["noatime"]);
        let merged = mount("erofs", "/meta", &["loop", "device=/a", "device=/b"]);
        let image = &recipe(&[merged], SNAPSHOT, b"").unwrap().images[0];
        assert!(image.read_only);
        assert_eq!(image.paths, ["/meta", "/a", "/b"].map(PathBuf::from));
        for other in [
            mount("xfs", "/dev/mapper/a", &["nouuid"]),
            mount("bind", "/dir", &["rbind"]),
            mount("erofs", "relative", &[]),
            mount("erofs", "/a", &["X-containerd.dmverity=1"]),
        ] {
            assert_eq!(recipe(&[other], SNAPSHOT, b""), None);
        }
        assert_eq!(recipe(&[], SNAPSHOT, b""), None);
    }

    #[test]
    fn layers_are_disks_where_nothing_is_to_be_kept_of_what_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let upper = format!("upperdir={}", directory.path().display());
        let lower = "lowerdir=/s/2/fs:/s/1/fs";
        let overlay = |lower| {
            [mount(
                "overlay",
                "overlay",
                &["index=off", &upper, "workdir=/w", lower],
            )]
        };
        assert_eq!(recipe(&overlay(lower), SNAPSHOT, LAYERS), None);
        let of_guest = recipe(&overlay(lower), READ_ONLY, LAYERS).unwrap();
        assert_eq!(of_guest.scratch_bytes, MOUNT_POINTS_BYTES);
        let sources: Vec<_> = of_guest
            .images
            .iter()
            .map(|image| &image.paths[0])
            .collect();
        assert_eq!(
            sources,
            [Path::new("/s/2/layer.erofs"), Path::new("/dev/loop0")]
        );
        let in_memory = Writes {
            guest_bytes: 5,
            ..SNAPSHOT
        };
        assert_eq!(
            recipe(&overlay(lower), in_memory, LAYERS)
                .unwrap()
                .scratch_bytes,
            5
        );
        let view = [mount("overlay", "overlay", &[lower])];
        assert_eq!(recipe(&view, SNAPSHOT, LAYERS).unwrap().scratch_bytes, 0);
        // A layer that is no image, one that isn't mounted, an option that says more.
        for lower in [
            "lowerdir=/s/3/fs:/s/1/fs",
            "lowerdir=/s/4/fs",
            "metacopy=on",
        ] {
            assert_eq!(recipe(&overlay(lower), READ_ONLY, LAYERS), None, "{lower}");
        }
        fs::write(directory.path().join("kept"), "").unwrap();
        assert_eq!(recipe(&overlay(lower), READ_ONLY, LAYERS), None);
    }

    #[test]
    fn a_hundred_layers_take_two_disks_and_a_writable_one_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let source = |number: usize, bytes: usize, read_only| {
            let path = directory.path().join(number.to_string());
            fs::write(&path, vec![0; bytes]).unwrap();
            ImageSource {
                kind: "erofs".into(),
                paths: vec![path],
                read_only,
                options: Vec::new(),
            }
        };
        let mut images: Vec<_> = (0..100).map(|number| source(number, 8192, true)).collect();
        images.push(source(100, 4095, true));
        images.push(source(101, 4096, false));
        let recipe = Recipe {
            images,
            overlay: true,
            scratch_bytes: 0,
        };
        let blocks = Blocks::open(Some(&recipe), &[]).unwrap();
        let files: Vec<_> = blocks.disks.iter().map(|disk| disk.files.len()).collect();
        assert_eq!(files, [MAX_FDS, 100 - MAX_FDS, 1, 1]);
        assert_eq!(blocks.disks[0].told("H000").part_bytes, [8192; MAX_FDS]);
        let place = |image: usize| {
            (
                blocks.images[image].place.disk,
                blocks.images[image].place.part,
            )
        };
        assert_eq!((place(0), place(63), place(64)), ((0, 1), (0, 64), (1, 1)));
        assert_eq!((place(100), place(101)), ((2, 0), (3, 0)));
        assert_eq!(blocks.first_device, 4);
    }

    #[test]
    fn devices_that_the_host_has_not_are_named() {
        let device = BlockDevice {
            path: "/dev/data".into(),
            major: 4095,
            minor: 1,
            read_only: true,
        };
        let error = Blocks::open(None, &[device]).unwrap_err().to_string();
        assert!(
            error.contains("4095:1") && error.contains("/dev/data"),
            "{error}"
        );
    }
}
