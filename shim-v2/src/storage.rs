//! The directory that a Pod's guest sees, and what is mounted in it.
//!
//! `<share>/<container>/rootfs` is a container's root file system, `<share>/<container>/mounts/<n>` its
//! volumes; a volume that is a file is mounted alone, never with the directory that it is in. Every mount
//! made here is undone here; the `delete` command finds them again in `/proc/self/mountinfo`.
//! Nothing is ever deleted recursively while something is mounted below.
//!
//! `<share>` is a read-only bind mount of `<tree>`, where the mount points are made: the guest could
//! otherwise put a symbolic link where the shim is about to mount the next container, or fill the host's
//! `/run`.

use crate::{
    mounts::{Bind, MountOptionsError, parse_options, unmount_below},
    spec::{BlockDevice, Volume},
};
use containerd_shim_protos::api::Mount;
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_remount,
};
use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Component, Path, PathBuf},
};

/// linux/magic.h.
const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// Why a container's files can't be exposed or withdrawn.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// An operation on a path.
    #[error("{what} {path:?} failed")]
    Path {
        /// What was attempted.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A mount of the root file system.
    #[error("mounting {kind} {source_path:?} as the root file system failed")]
    Rootfs {
        /// Its type.
        kind: String,
        /// Its source.
        source_path: String,
        /// Why.
        source: io::Error,
    },
    /// Options of the root file system's mount.
    #[error("the root file system, {kind} {source_path:?}, cannot be mounted")]
    Options {
        /// Its type.
        kind: String,
        /// Its source.
        source_path: String,
        /// Why.
        source: MountOptionsError,
    },
    /// A mount whose target leaves the root file system.
    #[error("mount target {0:?} of the root file system must be a relative path without \"..\"")]
    Target(String),
    /// A volume that doesn't exist.
    #[error("volume {0:?} does not exist on the host")]
    NoVolume(PathBuf),
    /// A volume that is memory of the host in huge pages.
    #[error("volume {0:?} is of huge pages of the host, which cannot be shared with a VM")]
    HugePages(PathBuf),
    /// A volume that a shared file system can't carry.
    #[error("volume {path:?} is a {kind}; only files and directories can be shared with a VM")]
    VolumeKind {
        /// The volume.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
}

/// The shared directory of a Pod.
#[derive(Debug)]
pub(crate) struct Share {
    root: PathBuf,
    tree: PathBuf,
}

/// What one container needs from the host.
#[derive(Debug, Clone)]
pub(crate) struct Needs {
    /// The container.
    pub(crate) container_id: String,
    /// The mounts that make up its root file system, in order; none means `root`.
    pub(crate) rootfs: Vec<Mount>,
    /// Whether its configuration makes its root read-only.
    pub(crate) read_only_root: bool,
    /// Where the configuration says that its root file system is, on the host.
    pub(crate) root: PathBuf,
    /// Its volumes.
    pub(crate) volumes: Vec<Volume>,
    /// Block devices that it uses as they are.
    pub(crate) devices: Vec<BlockDevice>,
}

/// Where a root file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Root {
    /// On the host, for the share to show.
    OnHost,
    /// By the guest, from disks, over an empty directory of the share.
    InGuest,
}

/// Whether every volume can be shared, before a VM is booted for it.
pub(crate) fn check_volumes(volumes: &[Volume]) -> Result<(), StorageError> {
    volumes
        .iter()
        .try_for_each(|volume| volume_kind(&volume.source).map(drop))
}

impl Share {
    /// Makes `root` a read-only view of `tree` that passes later mounts on to the VMM's namespace.
    pub(crate) fn create(root: PathBuf, tree: PathBuf) -> Result<Self, StorageError> {
        let share = Self { root, tree };
        let created = share.mount();
        if created.is_err() {
            // The first error is the one to tell; this fails for the same reason or succeeds.
            let _ = share.remove();
        }
        created.map(|()| share)
    }

    /// The share that a dead server left, for [`Share::remove`].
    pub(crate) fn left_behind(root: PathBuf, tree: PathBuf) -> Self {
        Self { root, tree }
    }

    fn mount(&self) -> Result<(), StorageError> {
        create_directory(&self.root)?;
        create_directory(&self.tree)?;
        mount_bind(&self.tree, &self.root)
            .map_err(|error| failed("mounting shared directory", &self.root)(error.into()))?;
        // A fresh peer group: mounts below it reach the VMM's (slave) copy, and not the mount that the
        // tree is in.
        for flags in [
            MountPropagationFlags::PRIVATE,
            MountPropagationFlags::SHARED,
        ] {
            mount_change(&self.root, flags)
                .map_err(|error| failed("isolating", &self.root)(error.into()))?;
        }
        make_read_only(&self.root)
    }

    /// The directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where a container's volumes are, by their numbers.
    pub(crate) fn mounts(&self, container_id: &str) -> PathBuf {
        self.root.join(container_id).join("mounts")
    }

    /// Mounts what a container needs; leaves nothing behind on failure.
    pub(crate) fn expose(&self, needs: &Needs, root: Root) -> Result<(), StorageError> {
        let exposed = self.expose_all(needs, root);
        if exposed.is_err() {
            // The first error is the one to tell.
            let _ = self.withdraw(&needs.container_id);
        }
        exposed
    }

    fn expose_all(&self, needs: &Needs, root: Root) -> Result<(), StorageError> {
        let place = Path::new(&needs.container_id).join("rootfs");
        create_directory(&self.tree.join(&place))?;
        let rootfs = self.root.join(place);
        if root == Root::OnHost {
            if needs.rootfs.is_empty() {
                bind(&needs.root, &rootfs, Bind::Recursive)?;
            }
            for mount in &needs.rootfs {
                mount_rootfs(mount, &rootfs)?;
            }
        }
        for (number, volume) in needs.volumes.iter().enumerate() {
            let place = Path::new(&needs.container_id)
                .join("mounts")
                .join(number.to_string());
            make_mount_point(&volume.source, &self.tree.join(&place))?;
            expose_volume(volume, &self.root.join(place))?;
        }
        Ok(())
    }

    /// Undoes [`Share::expose`]. A second time does nothing.
    pub(crate) fn withdraw(&self, container_id: &str) -> Result<(), StorageError> {
        unmount_all(&self.root.join(container_id))?;
        remove_tree(&self.tree.join(container_id))
    }

    /// Undoes [`Share::create`] and every [`Share::expose`]. A second time does nothing.
    pub(crate) fn remove(&self) -> Result<(), StorageError> {
        unmount_all(&self.root)?;
        // Now empty: what it showed is in the tree.
        match fs::remove_dir(&self.root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("removing", &self.root)(error));
            }
            _ => {}
        }
        remove_tree(&self.tree)
    }
}

fn unmount_all(directory: &Path) -> Result<(), StorageError> {
    unmount_below(directory).map_err(failed("unmounting below", directory))
}

/// Removes mount points: empty directories and files that this module made, in a tree that has no mounts.
fn remove_tree(directory: &Path) -> Result<(), StorageError> {
    unmount_all(directory)?;
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("removing", directory)(error))
        }
        _ => Ok(()),
    }
}

fn mount_rootfs(rootfs_mount: &Mount, rootfs: &Path) -> Result<(), StorageError> {
    let kind = rootfs_mount.type_.clone();
    let source_path = rootfs_mount.source.clone();
    let target = inside(rootfs, &rootfs_mount.target)?;
    let options = parse_options(&rootfs_mount.options).map_err(|source| StorageError::Options {
        kind: kind.clone(),
        source_path: source_path.clone(),
        source,
    })?;
    if kind == "bind" || options.bind != Bind::No {
        let recursion = if options.bind == Bind::No {
            Bind::Single
        } else {
            options.bind
        };
        bind(Path::new(&source_path), &target, recursion)?;
        if options.flags.contains(MountFlags::RDONLY) {
            make_read_only(&target)?;
        }
        return Ok(());
    }
    let failed = |source| StorageError::Rootfs {
        kind: kind.clone(),
        source_path: source_path.clone(),
        source,
    };
    let data = CString::new(options.data)
        .map_err(|_| failed(io::Error::other("an option holds a zero byte")))?;
    mount(
        source_path.as_str(),
        &target,
        kind.as_str(),
        options.flags,
        data.as_c_str(),
    )
    .map_err(|error| failed(error.into()))
}

/// `target` below `rootfs`, by names alone: containerd sends an empty one but for nested mounts.
fn inside(rootfs: &Path, target: &str) -> Result<PathBuf, StorageError> {
    let relative = Path::new(target);
    if relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Ok(if target.is_empty() {
            rootfs.to_owned()
        } else {
            rootfs.join(relative)
        });
    }
    Err(StorageError::Target(target.to_owned()))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VolumeKind {
    Directory,
    File,
}

fn volume_kind(source: &Path) -> Result<VolumeKind, StorageError> {
    let metadata = match fs::metadata(source) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StorageError::NoVolume(source.to_owned()));
        }
        Err(error) => return Err(failed("looking at volume", source)(error)),
    };
    let kind = metadata.file_type();
    if rustix::fs::statfs(source).is_ok_and(|of| of.f_type == HUGETLBFS_MAGIC) {
        return Err(StorageError::HugePages(source.to_owned()));
    }
    let name = match () {
        () if kind.is_dir() => return Ok(VolumeKind::Directory),
        () if kind.is_file() => return Ok(VolumeKind::File),
        () if kind.is_socket() => "socket",
        () if kind.is_fifo() => "FIFO",
        () => "device node",
    };
    Err(StorageError::VolumeKind {
        path: source.to_owned(),
        kind: name,
    })
}

fn make_mount_point(source: &Path, target: &Path) -> Result<(), StorageError> {
    match volume_kind(source)? {
        VolumeKind::Directory => create_directory(target),
        VolumeKind::File => {
            if let Some(parent) = target.parent() {
                create_directory(parent)?;
            }
            fs::File::create(target)
                .map(drop)
                .map_err(failed("creating mount point", target))
        }
    }
}

fn expose_volume(volume: &Volume, target: &Path) -> Result<(), StorageError> {
    let recursion = if volume.recursive {
        Bind::Recursive
    } else {
        Bind::Single
    };
    bind(&volume.source, target, recursion)?;
    if volume.read_only {
        make_read_only(target)?;
    }
    Ok(())
}

fn bind(source: &Path, target: &Path, recursion: Bind) -> Result<(), StorageError> {
    match recursion {
        Bind::Recursive => mount_bind_recursive(source, target),
        Bind::No | Bind::Single => mount_bind(source, target),
    }
    .map_err(|error| failed("bind-mounting", source)(error.into()))?;
    // Mounts that the host makes below the source later appear here and go on to the VMM's namespace, and
    // nothing that happens here goes back to the source.
    for flags in [
        MountPropagationFlags::DOWNSTREAM,
        MountPropagationFlags::SHARED,
    ] {
        mount_change(target, flags | MountPropagationFlags::REC)
            .map_err(|error| failed("isolating", target)(error.into()))?;
    }
    Ok(())
}

/// mount(2): a bind mount becomes read-only by a second call, which would also drop the flags that it
/// inherited unless they are given again.
fn make_read_only(target: &Path) -> Result<(), StorageError> {
    use rustix::fs::StatVfsMountFlags as Has;
    let inherited = rustix::fs::statvfs(target)
        .map_err(|error| failed("looking at mount", target)(error.into()))?
        .f_flag;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    let kept = [
        (Has::NOSUID, MountFlags::NOSUID),
        (Has::NODEV, MountFlags::NODEV),
        (Has::NOEXEC, MountFlags::NOEXEC),
        (Has::NOATIME, MountFlags::NOATIME),
        (Has::NODIRATIME, MountFlags::NODIRATIME),
        (Has::RELATIME, MountFlags::RELATIME),
    ];
    for (has, flag) in kept {
        if inherited.contains(has) {
            flags |= flag;
        }
    }
    mount_remount(target, flags, c"")
        .map_err(|error| failed("making read-only", target)(error.into()))
}

fn create_directory(path: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(path).map_err(failed("creating directory", path))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError::Path { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mounting needs root; without it these tests say so and prove nothing.
    fn may_mount(directory: &Path) -> bool {
        let point = directory.join("probe");
        fs::create_dir(&point).unwrap();
        let may = mount_bind(&point, &point).is_ok();
        if may {
            unmount_all(&point).unwrap();
        } else {
            eprintln!("skipped: mounting is not permitted here");
        }
        may
    }

    fn needs(bundle: &Path, volumes: Vec<Volume>) -> Needs {
        Needs {
            container_id: "c1".into(),
            rootfs: Vec::new(),
            read_only_root: false,
            root: bundle.join("rootfs"),
            volumes,
            devices: Vec::new(),
        }
    }

    fn create(directory: &Path) -> Share {
        Share::create(directory.join("share"), directory.join("tree")).unwrap()
    }

    #[test]
    fn the_guest_cannot_write_between_the_containers() {
        let directory = tempfile::tempdir().unwrap();
        if !may_mount(directory.path()) {
            return;
        }
        let share = create(directory.path());
        let error = fs::create_dir(share.root().join("c2")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        share.remove().unwrap();
    }

    #[test]
    fn a_target_stays_inside_the_root() {
        assert_eq!(inside(Path::new("/r"), "").unwrap(), Path::new("/r"));
        assert_eq!(inside(Path::new("/r"), "a/b").unwrap(), Path::new("/r/a/b"));
        for target in ["..", "a/../../b", "/abs"] {
            assert!(matches!(
                inside(Path::new("/r"), target),
                Err(StorageError::Target(_))
            ));
        }
    }

    #[test]
    fn what_is_exposed_is_withdrawn_and_the_hosts_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        if !may_mount(directory.path()) {
            return;
        }
        let bundle = directory.path().join("bundle");
        fs::create_dir_all(bundle.join("rootfs/bin")).unwrap();
        let file = directory.path().join("hosts");
        fs::write(&file, "localhost").unwrap();
        let data = directory.path().join("data");
        fs::create_dir(&data).unwrap();
        let volumes = vec![
            Volume {
                source: file.clone(),
                recursive: true,
                read_only: true,
            },
            Volume {
                source: data.clone(),
                recursive: false,
                read_only: false,
            },
        ];
        let share = create(directory.path());
        share
            .expose(&needs(&bundle, volumes), Root::OnHost)
            .unwrap();
        let base = share.root().join("c1");
        assert!(base.join("rootfs/bin").is_dir());
        assert_eq!(
            fs::read_to_string(base.join("mounts/0")).unwrap(),
            "localhost"
        );
        let error = fs::write(base.join("mounts/0"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        fs::write(base.join("mounts/1/new"), "from the guest").unwrap();
        share.withdraw("c1").unwrap();
        share.withdraw("c1").unwrap();
        assert!(!base.exists());
        assert_eq!(
            fs::read_to_string(data.join("new")).unwrap(),
            "from the guest"
        );
        assert!(bundle.join("rootfs/bin").is_dir());
        share.remove().unwrap();
        share.remove().unwrap();
        assert!(!directory.path().join("tree").exists());
    }

    #[test]
    fn volumes_that_cannot_be_shared_are_named_and_leave_nothing() {
        let directory = tempfile::tempdir().unwrap();
        if !may_mount(directory.path()) {
            return;
        }
        let bundle = directory.path().join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let share = create(directory.path());
        for (source, expected) in [
            ("/dev/null", "volume \"/dev/null\" is a device node"),
            (
                "/does/not/exist",
                "volume \"/does/not/exist\" does not exist",
            ),
        ] {
            let volume = Volume {
                source: source.into(),
                recursive: true,
                read_only: false,
            };
            let error = share
                .expose(&needs(&bundle, vec![volume]), Root::OnHost)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(expected), "{error}");
            assert!(!share.root().join("c1").exists());
        }
        share.remove().unwrap();
    }
}
