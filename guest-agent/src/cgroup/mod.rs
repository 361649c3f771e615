//! One cgroup (v2) for each container.
//!
//! Linux, `Documentation/admin-guide/cgroup-v2.rst`. Where a container's cgroup lies on the host does not
//! matter here: in the guest all are children of one directory. Must not know the OCI configuration's
//! document, only its resources.

pub(crate) mod devices;
pub(crate) mod resources;
pub(crate) mod stats;

use crate::syscall;
use resources::Setting;
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use std::{
    collections::HashMap,
    fs, io,
    os::{fd::OwnedFd, unix::fs::DirEntryExt as _},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{io::Interest, time::timeout};
use walnut_bpf::kernel::{self, ProgramKind};

/// Directory of all containers' cgroups, below the root of the hierarchy.
const CONTAINERS: &str = "walnut";
/// Memory that containers never get: a share of it all, within these bounds, is for the kernel and the agent.
const RESERVED_BYTES: std::ops::RangeInclusive<u64> = 16 << 20..=64 << 20;
const RESERVED_SHARE: u64 = 16;
/// For the processes of a container to be gone after SIGKILL.
const EMPTY_DEADLINE: Duration = Duration::from_secs(30);

/// Why a cgroup is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// A directory could not be made, opened or removed.
    #[error("cannot {attempted} cgroup {}", path.display())]
    Directory {
        /// What was done to it.
        attempted: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A value was refused.
    #[error("cannot set {file} to {value:?}")]
    Set {
        /// File in the cgroup.
        file: String,
        /// What was written.
        value: String,
        /// What the system said.
        source: io::Error,
    },
    /// A value could not be read.
    #[error("cannot read {file}")]
    Read {
        /// File in the cgroup.
        file: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The device rules could not be enforced.
    #[error("cannot enforce linux.resources.devices")]
    Devices(#[source] io::Error),
    /// `linux.resources.memory.checkBeforeUpdate` does not allow it.
    #[error("memory.limit {limit} is below the {used} bytes that the container uses")]
    InUse {
        /// What was asked for.
        limit: i64,
        /// What is used.
        used: i64,
    },
    /// Processes are left after the deadline.
    #[error("processes are left in cgroup {} after {} s", .0.display(), EMPTY_DEADLINE.as_secs())]
    NotEmpty(PathBuf),
}

/// The directory in which containers' cgroups are made.
#[derive(Debug, Clone)]
pub(crate) struct Hierarchy(PathBuf);

impl Hierarchy {
    /// Makes the containers' directory below the root of a cgroup v2 hierarchy, with every controller.
    pub(crate) fn prepare(root: &Path) -> Result<Self, CgroupError> {
        let containers = root.join(CONTAINERS);
        delegate(root)?;
        make(&containers)?;
        delegate(&containers)?;
        Ok(Self(containers))
    }

    /// Makes the cgroup of a container. `id` has been checked to be one path component.
    pub(crate) fn create(&self, id: &str) -> Result<Cgroup, CgroupError> {
        let path = self.0.join(id);
        make(&path)?;
        // Each time anew, as memory may have been added since.
        self.reserve()?;
        Ok(Cgroup { path })
    }

    /// Keeps all containers together below what the guest has, so that memory runs out for one of them, by
    /// whose process the kernel then makes room, before it runs out for the agent.
    fn reserve(&self) -> Result<(), CgroupError> {
        let file = "memory.max";
        // Without the controller there is nothing to hold anybody to.
        if !self.0.join(file).exists() {
            return Ok(());
        }
        let text = fs::read_to_string("/proc/meminfo").map_err(|source| CgroupError::Read {
            file: "/proc/meminfo",
            source,
        })?;
        match for_containers(&text) {
            Some(bytes) => write(&self.0, file, &bytes.to_string()),
            None => Ok(()),
        }
    }

    /// The containers' ids by what the kernel calls their cgroups: the inode numbers of the directories.
    pub(crate) fn containers(&self) -> Result<HashMap<u64, String>, CgroupError> {
        let entries = fs::read_dir(&self.0).map_err(|source| CgroupError::Directory {
            attempted: "list",
            path: self.0.clone(),
            source,
        })?;
        let directories = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| {
                (
                    entry.ino(),
                    entry.file_name().to_string_lossy().into_owned(),
                )
            });
        Ok(directories.collect())
    }

    /// A hierarchy that is there already.
    #[cfg(test)]
    pub(crate) fn at(containers: &Path) -> Self {
        Self(containers.to_owned())
    }

    /// Kills every process of every container, and waits until they are gone.
    pub(crate) async fn kill_all(&self) -> Result<(), CgroupError> {
        let all = Cgroup {
            path: self.0.clone(),
        };
        all.kill()?;
        all.event("populated", false).await
    }
}

/// What is left of the memory that `/proc/meminfo` tells of.
fn for_containers(meminfo: &str) -> Option<u64> {
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    let bytes = kib.checked_mul(1024)?;
    let (least, most) = RESERVED_BYTES.into_inner();
    bytes.checked_sub((bytes / RESERVED_SHARE).clamp(least, most))
}

/// The cgroup of one container.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Opens the directory, for processes to be born in.
    pub(crate) fn open(&self) -> Result<OwnedFd, CgroupError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, &self.path, flags, Mode::empty()).map_err(|error| CgroupError::Directory {
            attempted: "open",
            path: self.path.clone(),
            source: error.into(),
        })
    }

    /// Writes settings in their order.
    pub(crate) fn apply(&self, settings: &[Setting]) -> Result<(), CgroupError> {
        settings
            .iter()
            .try_for_each(|setting| write(&self.path, &setting.file, &setting.value))
    }

    /// Whether a limit of memory, in bytes, leaves the container what it uses now.
    pub(crate) fn check_memory(&self, limit: i64) -> Result<(), CgroupError> {
        let file = "memory.current";
        let used = fs::read_to_string(self.path.join(file))
            .and_then(|text| text.trim().parse().map_err(io::Error::other))
            .map_err(|source| CgroupError::Read { file, source })?;
        if limit > 0 && limit < used {
            return Err(CgroupError::InUse { limit, used });
        }
        Ok(())
    }

    /// Lets the container use the devices that `program` allows, and no others.
    pub(crate) fn restrict_devices(&self, program: &[u64]) -> Result<(), CgroupError> {
        let directory = self.open()?;
        kernel::load(ProgramKind::CgroupDevice, "walnut_devices", program)
            .and_then(|program| kernel::attach_to_cgroup(&directory, &program))
            .map_err(CgroupError::Devices)
    }

    /// Ids of the processes, as the agent sees them, those in the container's own child cgroups included.
    pub(crate) fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut found = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(text) => found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
                // A child that was removed meanwhile, or one of a threaded domain.
                Err(_) if directory != self.path => continue,
                Err(source) => {
                    let file = "cgroup.procs";
                    return Err(CgroupError::Read { file, source });
                }
            }
            directories.extend(children(&directory));
        }
        Ok(found)
    }

    /// Kills every process at once.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        write(&self.path, "cgroup.kill", "1")
    }

    /// Stops every process, or lets them continue, and waits until it is so.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        write(&self.path, "cgroup.freeze", if frozen { "1" } else { "0" })?;
        self.event("frozen", frozen).await
    }

    /// Kills what is left and removes the directory. Removing what is gone succeeds.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        self.event("populated", false).await?;
        remove_tree(&self.path).map_err(|source| CgroupError::Directory {
            attempted: "remove",
            path: self.path.clone(),
            source,
        })
    }

    /// Waits until the kernel has killed more processes than `seen` for want of memory; answers how many.
    pub(crate) async fn kills_after(&self, seen: u64) -> Result<u64, CgroupError> {
        self.follow("memory.events", |text| {
            let kills = text
                .lines()
                .find_map(|line| line.strip_prefix("oom_kill "))?;
            kills.parse().ok().filter(|kills| *kills > seen)
        })
        .await
    }

    /// Waits until `cgroup.events` says `value` of `key`.
    async fn event(&self, key: &str, value: bool) -> Result<(), CgroupError> {
        let wanted = format!("{key} {}", u8::from(value));
        let reached = self.follow("cgroup.events", |text| {
            text.lines().any(|line| line == wanted).then_some(())
        });
        timeout(EMPTY_DEADLINE, reached)
            .await
            .unwrap_or_else(|_| Err(CgroupError::NotEmpty(self.path.clone())))
    }

    /// Reads a file at each of its changes until `found` finds something in it.
    async fn follow<T>(
        &self,
        file: &'static str,
        found: impl Fn(&str) -> Option<T>,
    ) -> Result<T, CgroupError> {
        let failed = |source| CgroupError::Read { file, source };
        let path = self.path.join(file);
        // epoll(7): a change of a cgroup file is an exceptional condition.
        let changes = fs::File::open(&path)
            .and_then(|file| syscall::register(file.into(), Interest::PRIORITY))
            .map_err(failed)?;
        loop {
            let text = fs::read_to_string(&path).map_err(failed)?;
            if let Some(found) = found(&text) {
                return Ok(found);
            }
            // Consumes the event only if the next reading sees what it announced.
            changes
                .ready(Interest::PRIORITY)
                .await
                .map_err(failed)?
                .clear_ready();
        }
    }

    /// Names of its files.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Reads one file of it; one that this kernel does not have is `None`.
    pub(crate) fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }
}

/// Hands every controller on to the children.
fn delegate(directory: &Path) -> Result<(), CgroupError> {
    let file = "cgroup.controllers";
    let controllers = fs::read_to_string(directory.join(file))
        .map_err(|source| CgroupError::Read { file, source })?;
    for controller in controllers.split_ascii_whitespace() {
        write(
            directory,
            "cgroup.subtree_control",
            &format!("+{controller}"),
        )?;
    }
    Ok(())
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::Directory {
                attempted: "make",
                path: path.to_owned(),
                source,
            })
        }
        _ => Ok(()),
    }
}

fn write(directory: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
    // Not `fs::write`: it would make a file, and truncate one, which no cgroup file understands.
    fs::OpenOptions::new()
        .write(true)
        .open(directory.join(file))
        .and_then(|mut opened| io::Write::write_all(&mut opened, value.as_bytes()))
        .map_err(|source| CgroupError::Set {
            file: file.to_owned(),
            value: value.to_owned(),
            source,
        })
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Children first, without recursion: a container may have made them deep.
fn remove_tree(path: &Path) -> io::Result<()> {
    let mut all = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = all.get(next) {
        let below = children(directory);
        all.extend(below);
        next += 1;
    }
    for directory in all.iter().rev() {
        match fs::remove_dir(directory) {
            Err(error) if error.raw_os_error() != Some(Errno::NOENT.raw_os_error()) => {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_below_what_is_used_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("memory.current"), "4096\n").unwrap();
        let cgroup = Cgroup {
            path: directory.path().to_owned(),
        };
        let error = cgroup.check_memory(4095).unwrap_err().to_string();
        assert!(error.contains("below the 4096 bytes"), "{error}");
        for limit in [4096, -1, 0] {
            cgroup.check_memory(limit).unwrap();
        }
    }

    #[test]
    fn some_memory_is_never_the_containers() {
        let left = |kib: u64| for_containers(&format!("MemTotal:  {kib} kB\nMemFree: 1 kB\n"));
        assert_eq!(left(128 << 10), Some(112 << 20));
        assert_eq!(left(512 << 10), Some(480 << 20));
        assert_eq!(left(8 << 20), Some((8 << 30) - (64 << 20)));
        assert_eq!(left(1), None);
        assert_eq!(for_containers("MemFree: 1 kB\n"), None);
    }
}
