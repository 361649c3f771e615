//! The guest's own file systems, from an initramfs that holds one program and one device node.

use super::GuestError;
use rustix::{
    mount::{MountFlags, mount, mount_bind, mount_move, mount_remount},
    process::{chdir, chroot},
};
use std::fs;
use walnut_agent_api::{PAUSE_ROOT, POD_SHM};

/// Where the root stands for a moment on its way to become a mount.
const STEP: &str = "/run";
/// cgroup of the agent itself: the root's may hold no process once it hands controllers on.
const OWN_CGROUP: &str = "/sys/fs/cgroup/init";
/// Root of the cgroup hierarchy.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

struct FileSystem {
    kind: &'static str,
    place: &'static str,
    flags: MountFlags,
    data: Option<&'static std::ffi::CStr>,
}

const NOTHING_SPECIAL: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NODEV);

const FILE_SYSTEMS: &[FileSystem] = &[
    FileSystem {
        kind: "proc",
        place: "/proc",
        flags: NOTHING_SPECIAL,
        data: None,
    },
    FileSystem {
        kind: "sysfs",
        place: "/sys",
        flags: NOTHING_SPECIAL,
        data: None,
    },
    FileSystem {
        kind: "devtmpfs",
        place: "/dev",
        flags: MountFlags::NOSUID,
        data: Some(c"mode=0755"),
    },
    FileSystem {
        kind: "devpts",
        place: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: Some(c"mode=0620,ptmxmode=0666,gid=5"),
    },
    FileSystem {
        kind: "tmpfs",
        place: POD_SHM,
        flags: NOTHING_SPECIAL,
        // As large as the CRI makes it.
        data: Some(c"mode=1777,size=64m"),
    },
    FileSystem {
        kind: "tmpfs",
        place: "/run",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        data: Some(c"mode=0755"),
    },
    FileSystem {
        kind: "cgroup2",
        place: CGROUP_ROOT,
        flags: NOTHING_SPECIAL,
        data: Some(c"nsdelegate"),
    },
];

/// Makes a root that pivot_root(2) can leave, and mounts everything in it.
pub(crate) fn mount_all() -> Result<(), GuestError> {
    make_root_a_mount().map_err(GuestError::system("make the initramfs a mount"))?;
    for FileSystem {
        kind,
        place,
        flags,
        data,
    } in FILE_SYSTEMS
    {
        fs::create_dir_all(place).map_err(GuestError::system(format!("make {place}")))?;
        mount(*kind, *place, *kind, *flags, *data)
            .map_err(GuestError::system(format!("mount {kind} on {place}")))?;
    }
    fs::create_dir_all(PAUSE_ROOT).map_err(GuestError::system(format!("make {PAUSE_ROOT}")))?;
    // Containers' processes are this program for a moment: whoever reaches it by /proc/PID/exe cannot write it.
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "")
        .map_err(GuestError::system("make the root read-only"))?;
    fs::create_dir(OWN_CGROUP).map_err(GuestError::system(format!("make {OWN_CGROUP}")))?;
    let file = format!("{OWN_CGROUP}/cgroup.procs");
    fs::write(&file, "0").map_err(GuestError::system(format!("write {file}")))
}

/// pivot_root(2) refuses the first root there is, an initramfs; on a copy of that mount it works.
fn make_root_a_mount() -> std::io::Result<()> {
    fs::create_dir_all(STEP)?;
    mount_bind("/", STEP)?;
    chdir(STEP)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}
