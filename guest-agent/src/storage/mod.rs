//! Root file systems that come on disks, and the disks that containers use as they are.
//!
//! Layers are mounted for as long as it takes to mount an overlay of them, which keeps them; what is left is
//! one mount over the container's place in the share. Must not know containers but by their ids.

mod disk;

use self::disk::Disk;
use crate::{
    container::mount_options::{self, UnsupportedOption},
    file_system,
    task::check_id,
};
use rustix::{
    fs::{CWD, Gid, Mode, OFlags, Uid},
    mount::{MountAttrFlags, MoveMountFlags, UnmountFlags, move_mount, unmount},
};
use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};
use walnut_agent_api::{
    SHARE_MOUNT_POINT,
    guest::{AddStorageRequest, DeviceNumber, Image, Place},
};

/// Where layers stand until their overlay has them.
const LAYERS: &str = "/run/walnut/layers";

/// Why a container has no storage.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// It has some already.
    #[error("container {0:?} has its storage already")]
    Exists(String),
    /// A request that contradicts itself.
    #[error("{0}")]
    Request(String),
    /// The VMM said that it attached it.
    #[error("disk {0} did not appear in the guest")]
    NoDisk(String),
    /// The system refused.
    #[error("cannot {attempted}")]
    System {
        /// What was attempted.
        attempted: String,
        /// What the system said.
        source: io::Error,
    },
}

impl StorageError {
    fn system<E: Into<io::Error>>(attempted: impl Into<String>) -> impl FnOnce(E) -> Self {
        let attempted = attempted.into();
        move |error| Self::System {
            attempted,
            source: error.into(),
        }
    }
}

/// What one container has.
#[derive(Debug, Default)]
struct Held {
    disks: Vec<Disk>,
    /// Where its root file system is mounted, if it came on disks.
    root: Option<PathBuf>,
}

/// What all containers have.
#[derive(Debug, Default)]
pub(crate) struct Storage(Mutex<HashMap<String, Held>>);

impl Storage {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the disks of a container and mounts its root file system; answers the disks' numbers.
    pub(crate) async fn add(
        &self,
        request: &AddStorageRequest,
    ) -> Result<Vec<DeviceNumber>, StorageError> {
        let id = &request.container_id;
        check_id("container", id).map_err(|error| StorageError::Request(error.to_string()))?;
        if self.lock().contains_key(id) {
            return Err(StorageError::Exists(id.clone()));
        }
        let mut held = Held::default();
        match held.fill(request).await {
            Ok(numbers) => {
                self.lock().insert(id.clone(), held);
                Ok(numbers)
            }
            Err(error) => {
                // The first error is the one to tell.
                if let Err(error) = held.empty() {
                    eprintln!("walnut-agent: {error}");
                }
                Err(error)
            }
        }
    }

    /// Undoes [`Storage::add`].
    pub(crate) fn remove(&self, id: &str) -> Result<(), StorageError> {
        let held = self.lock().remove(id);
        held.map_or(Ok(()), Held::empty)
    }
}

impl Held {
    async fn fill(
        &mut self,
        request: &AddStorageRequest,
    ) -> Result<Vec<DeviceNumber>, StorageError> {
        let mut numbers = Vec::new();
        for asked in &request.disks {
            let disk = Disk::find(&asked.name).await?;
            let (major, minor) = disk.number()?;
            numbers.push(DeviceNumber {
                major,
                minor,
                ..Default::default()
            });
            let divided = disk.divide(&asked.part_bytes);
            self.disks.push(disk);
            divided?;
        }
        if !request.images.is_empty() {
            let place = Path::new(SHARE_MOUNT_POINT)
                .join(&request.container_id)
                .join("rootfs");
            let root = self.root(request)?;
            move_to(&root, &place)?;
            self.root = Some(place);
        }
        Ok(numbers)
    }

    /// The root file system, mounted nowhere yet.
    fn root(&self, request: &AddStorageRequest) -> Result<OwnedFd, StorageError> {
        if let ([image], 0) = (request.images.as_slice(), request.scratch_bytes) {
            return self.image(image);
        }
        let layers = Layers::new(&request.container_id)?;
        let mut lower = Vec::new();
        for image in &request.images {
            lower.push(layers.put(&self.image(image)?, lower.len())?);
        }
        layers.overlay(&lower, request.scratch_bytes)
    }

    fn image(&self, image: &Image) -> Result<OwnedFd, StorageError> {
        let attempted = format!("mount a root file system of type {:?}", image.type_);
        let options = mount_options::parse(&image.type_, &image.options).map_err(
            |UnsupportedOption(option)| {
                StorageError::Request(format!("{attempted}: {option:?} is not supported"))
            },
        )?;
        let source = self.device(&image.place)?;
        let mut data = options.data;
        if image.read_only {
            data.push(("ro".to_owned(), None));
        }
        for device in &image.devices {
            let device = self.device(device)?.to_string_lossy().into_owned();
            data.push(("device".to_owned(), Some(device)));
        }
        let flags = u32::try_from(options.attributes.set).unwrap_or(0);
        file_system::create(
            &image.type_,
            &source,
            &data,
            MountAttrFlags::from_bits_retain(flags),
        )
        .map_err(StorageError::system(attempted))
    }

    fn device(&self, place: &Place) -> Result<PathBuf, StorageError> {
        let disk = usize::try_from(place.disk).ok();
        disk.and_then(|disk| self.disks.get(disk))
            .map(|disk| disk.path(place.part))
            .ok_or_else(|| StorageError::Request(format!("disk {} was not named", place.disk)))
    }

    /// Undoes as much as can be, and tells the first failure.
    fn empty(self) -> Result<(), StorageError> {
        let mut result = Ok(());
        if let Some(root) = &self.root {
            result = release_root(root);
        }
        for disk in &self.disks {
            result = result.and(disk.release());
        }
        result
    }
}

/// Writes a file system's data and unmounts it.
fn release_root(root: &Path) -> Result<(), StorageError> {
    let attempted = || StorageError::system(format!("unmount {root:?}"));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = rustix::fs::open(root, flags, Mode::empty()).map_err(attempted())?;
    // A disk that is full or gone fails here; what could be written is.
    let synced = rustix::fs::syncfs(&directory);
    drop(directory);
    unmount(root, UnmountFlags::NOFOLLOW).map_err(attempted())?;
    synced.map_err(attempted())
}

/// A directory in the guest's own memory with the layers of one container, gone with this value.
struct Layers(PathBuf);

impl Layers {
    fn new(container_id: &str) -> Result<Self, StorageError> {
        let path = Path::new(LAYERS).join(container_id);
        fs::create_dir_all(&path).map_err(StorageError::system(format!("make {path:?}")))?;
        Ok(Self(path))
    }

    fn put(&self, mount: &OwnedFd, number: usize) -> Result<PathBuf, StorageError> {
        let place = self.0.join(number.to_string());
        fs::create_dir(&place).map_err(StorageError::system(format!("make {place:?}")))?;
        move_to(mount, &place)?;
        Ok(place)
    }

    fn overlay(&self, lower: &[PathBuf], scratch_bytes: u64) -> Result<OwnedFd, StorageError> {
        let text = |path: &Path| Some(path.to_string_lossy().into_owned());
        let mut data: Vec<_> = lower
            .iter()
            .map(|layer| ("lowerdir+".to_owned(), text(layer)))
            .collect();
        if scratch_bytes > 0 {
            let size = ("size".to_owned(), Some(scratch_bytes.to_string()));
            let scratch = file_system::create(
                "tmpfs",
                Path::new("tmpfs"),
                &[size],
                MountAttrFlags::empty(),
            )
            .map_err(StorageError::system("make room for what is written"))?;
            let place = self.put(&scratch, lower.len())?;
            for name in ["upperdir", "workdir"] {
                let directory = place.join(name);
                make_like(&directory, lower.first())
                    .map_err(StorageError::system(format!("make {directory:?}")))?;
                data.push((name.to_owned(), text(&directory)));
            }
        }
        file_system::create(
            "overlay",
            Path::new("overlay"),
            &data,
            MountAttrFlags::empty(),
        )
        .map_err(StorageError::system(format!(
            "mount {} layers",
            lower.len()
        )))
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        // The overlay holds them by itself; what is left here is empty directories of a tmpfs.
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = unmount(entry.path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// Makes a directory that looks like `model`: an overlay's root has the attributes of its upper one.
fn make_like(directory: &Path, model: Option<&PathBuf>) -> io::Result<()> {
    fs::create_dir(directory)?;
    let Some(model) = model else { return Ok(()) };
    let metadata = fs::metadata(model)?;
    let (uid, gid) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    rustix::fs::chown(directory, Some(uid), Some(gid))?;
    fs::set_permissions(
        directory,
        fs::Permissions::from_mode(metadata.mode() & 0o7777),
    )
}

fn move_to(mount: &OwnedFd, place: &Path) -> Result<(), StorageError> {
    move_mount(
        mount,
        "",
        CWD,
        place,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(StorageError::system(format!("mount on {place:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(request: &AddStorageRequest) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let added = runtime.unwrap().block_on(Storage::default().add(request));
        added.unwrap_err().to_string()
    }

    #[test]
    fn requests_that_contradict_themselves_are_refused() {
        let mut request = AddStorageRequest {
            container_id: "../c".into(),
            ..Default::default()
        };
        assert!(refusal(&request).contains("container id"));
        request.container_id = "c".into();
        request.images.push(Image {
            type_: "erofs".into(),
            ..Default::default()
        });
        assert_eq!(refusal(&request), "disk 0 was not named");
        request.images[0].options.push("remount".into());
        assert!(refusal(&request).contains("\"remount\" is not supported"));
        for name in ["", "H00", "../H", "H00000"] {
            request.disks = vec![walnut_agent_api::guest::Disk {
                name: name.into(),
                ..Default::default()
            }];
            assert!(refusal(&request).contains("is no disk's name"), "{name:?}");
        }
    }

    #[test]
    fn what_was_never_added_is_removed_with_success() {
        Storage::default().remove("nobody").unwrap();
    }
}
