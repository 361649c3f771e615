//! The host cgroup of a Pod: the VMM runs in it from its first instruction, so that it counts against, and
//! cannot escape, the limits that the node set for the Pod, nor the size of its VM.
//!
//! Linux, Documentation/admin-guide/cgroup-v2.rst, and cgroup-v1/ for hosts that still have one hierarchy for
//! each controller. The directories that were made are written to the sandbox's state directory before they
//! are made, so that `delete` can remove them. Must not know how large a VM should be.

use crate::{cgroup_path::relative, log, size::HostLimits};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

const ROOT: &str = "/sys/fs/cgroup";
/// A killed VMM needs this long at the most to leave its cgroup.
const EMPTY_DEADLINE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};
const MIB: u64 = 1024 * 1024;
/// The controllers whose files are written.
const CONTROLLERS: [&str; 3] = ["+cpu", "+memory", "+cpuset"];

/// Why a cgroup can't be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// No cgroups on this host.
    #[error("{ROOT} has no cgroups; mount cgroup2 on it")]
    NoHierarchy,
    /// The path has a component that would leave the hierarchy.
    #[error("linux.cgroupsPath {0:?} is neither a plain path nor slice:prefix:name")]
    Path(PathBuf),
    /// The same, of a runtime option.
    #[error("the runtime option shim_cgroup {0:?} is no plain path")]
    ShimPath(PathBuf),
    /// A controller that a limit needs.
    #[error("the host's cgroup {path:?} has no {file}, which {limit} needs")]
    Controller {
        /// The cgroup.
        path: PathBuf,
        /// Its missing file.
        file: &'static str,
        /// What asks for it.
        limit: &'static str,
    },
    /// An operation on a cgroup.
    #[error("{what} cgroup {path:?} failed")]
    Operation {
        /// What was attempted.
        what: &'static str,
        /// The cgroup, or the file that names it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A cgroup of this sandbox.
#[derive(Debug)]
pub(crate) struct Cgroup {
    /// One directory, or one in each hierarchy of version 1.
    leaves: Vec<PathBuf>,
    record: PathBuf,
    applied: Mutex<HostLimits>,
}

impl Cgroup {
    /// Makes the cgroup that `cgroups_path` names, or one of our own when the container names none.
    pub(crate) fn create(
        cgroups_path: Option<&Path>,
        fallback: &Path,
        record: PathBuf,
    ) -> Result<Self, CgroupError> {
        let path = cgroups_path
            .filter(|path| !path.as_os_str().is_empty())
            .unwrap_or(fallback);
        let relative = relative(path).ok_or_else(|| CgroupError::Path(path.to_owned()))?;
        Self::create_below(&hierarchies(Path::new(ROOT))?, &relative, record)
    }

    fn create_below(
        roots: &[PathBuf],
        relative: &Path,
        record: PathBuf,
    ) -> Result<Self, CgroupError> {
        // For each hierarchy the record lists what didn't exist: the leaf first, then its parents.
        let mut made = String::new();
        for root in roots {
            let leaf = root.join(relative);
            for ancestor in leaf.ancestors().take_while(|path| path != root) {
                if ancestor == leaf || !ancestor.exists() {
                    made.push_str(&ancestor.to_string_lossy());
                    made.push('\n');
                }
            }
        }
        fs::write(&record, made).map_err(failed("recording", &record))?;
        for root in roots {
            let leaf = root.join(relative);
            if let Err(error) = make(root, &leaf) {
                let error = failed("creating", &leaf)(error);
                // The first error is the one to tell.
                let _ = remove(&record);
                return Err(error);
            }
        }
        Ok(Self {
            leaves: roots.iter().map(|root| root.join(relative)).collect(),
            record,
            applied: Mutex::default(),
        })
    }

    /// Its directory; in version 1 one of several.
    pub(crate) fn directory(&self) -> &Path {
        self.leaves
            .first()
            .map_or(Path::new(ROOT), PathBuf::as_path)
    }

    /// The files through which a process moves itself in.
    pub(crate) fn open_procs(&self) -> Result<Vec<File>, CgroupError> {
        let open = |leaf: &PathBuf| {
            let path = leaf.join("cgroup.procs");
            let file = File::options().write(true).open(&path);
            file.map_err(failed("opening", &path))
        };
        self.leaves.iter().map(open).collect()
    }

    /// The memory in MiB that the cgroups above leave to this one, if they limit it.
    pub(crate) fn room_mib(&self) -> Option<u64> {
        let limit_of = |directory: &Path| {
            ["memory.max", "memory.limit_in_bytes"]
                .iter()
                .find_map(|file| fs::read_to_string(directory.join(file)).ok())
                .and_then(|text| text.trim().parse::<u64>().ok())
        };
        let above = self.leaves.iter().flat_map(|leaf| leaf.ancestors().skip(1));
        above.filter_map(limit_of).min().map(|bytes| bytes / MIB)
    }

    /// Limits the cgroup. Memory that a VM once had may still be in use, so that its limit is never lowered.
    pub(crate) fn limit(&self, limits: &HostLimits) -> Result<(), CgroupError> {
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        if limits.memory_mib > applied.memory_mib {
            let bytes = limits.memory_mib.saturating_mul(MIB).to_string();
            match self.file(&["memory.max", "memory.limit_in_bytes"]) {
                Some(path) => write(&path, &bytes)?,
                None => {
                    log::line("the host has no memory controller: the VM's memory isn't bounded")
                }
            }
            applied.memory_mib = limits.memory_mib;
        }
        if limits.shares != applied.shares && limits.shares > 0 {
            let shares = limits.shares.clamp(2, 262_144);
            if let Some(path) = self.file(&["cpu.weight"]) {
                write(&path, &(1 + (shares - 2) * 9_999 / 262_142).to_string())?;
            } else if let Some(path) = self.file(&["cpu.shares"]) {
                write(&path, &shares.to_string())?;
            }
            applied.shares = limits.shares;
        }
        self.place(
            "cpuset.cpus",
            "linux.resources.cpu.cpus",
            &limits.cpus,
            &mut applied.cpus,
        )?;
        self.place(
            "cpuset.mems",
            "linux.resources.cpu.mems",
            &limits.mems,
            &mut applied.mems,
        )
    }

    /// Binds the cgroup to CPUs or memory nodes; an empty list is no binding.
    fn place(
        &self,
        file: &'static str,
        limit: &'static str,
        list: &str,
        applied: &mut String,
    ) -> Result<(), CgroupError> {
        if list == applied {
            return Ok(());
        }
        let path = self.file(&[file]).ok_or_else(|| CgroupError::Controller {
            path: self.leaves.first().cloned().unwrap_or_default(),
            file,
            limit,
        })?;
        // An empty line takes a binding away.
        write(&path, &format!("{list}\n"))?;
        list.clone_into(applied);
        Ok(())
    }

    fn file(&self, names: &[&str]) -> Option<PathBuf> {
        let files = self
            .leaves
            .iter()
            .flat_map(|leaf| names.iter().map(|name| leaf.join(name)));
        files.into_iter().find(|path| path.exists())
    }

    /// Whether the host's kernel killed the VMM because memory was short, in this cgroup or everywhere.
    pub(crate) fn was_out_of_memory(&self) -> bool {
        let events = self.file(&["memory.events", "memory.oom_control"]);
        let text = events.and_then(|path| fs::read_to_string(path).ok());
        let text = text.unwrap_or_default();
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills != "0")
    }

    /// Removes what [`Cgroup::create`] made, once its processes have gone. A second time does nothing.
    pub(crate) fn remove(&self) -> Result<(), CgroupError> {
        remove(&self.record)
    }
}

/// The roots: one of version 2, or one for each controller.
fn hierarchies(root: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let mut roots = Vec::new();
    for entry in fs::read_dir(root)
        .map_err(failed("listing", root))?
        .flatten()
    {
        // `cpu` and `cpuacct` are usually links to one directory.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && entry.path().join("cgroup.procs").exists() {
            roots.push(entry.path());
        }
    }
    match roots.is_empty() {
        true => Err(CgroupError::NoHierarchy),
        false => Ok(roots),
    }
}

/// Moves this process to a cgroup that exists.
pub(crate) fn enter(path: &Path) -> Result<(), CgroupError> {
    let below = relative(path).ok_or_else(|| CgroupError::ShimPath(path.to_owned()))?;
    for root in hierarchies(Path::new(ROOT))? {
        let procs = root.join(&below).join("cgroup.procs");
        // 0 is whoever writes it.
        fs::write(&procs, "0").map_err(failed("entering", &procs))?;
    }
    Ok(())
}

/// Makes a cgroup and those above it, each with what a process in the last one needs.
fn make(root: &Path, leaf: &Path) -> io::Result<()> {
    // A sandbox that ends at this moment may remove a parent that both made; making it again is enough, as
    // this one is then no longer empty.
    (0..3)
        .map(|_| fs::create_dir_all(leaf))
        .find(|result| !matches!(result, Err(error) if error.kind() == io::ErrorKind::NotFound))
        .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))?;
    let mut path: Vec<&Path> = leaf
        .ancestors()
        .take_while(|ancestor| *ancestor != root)
        .collect();
    path.push(root);
    for pair in path.windows(2).rev() {
        let [below, above] = pair else { continue };
        let control = above.join("cgroup.subtree_control");
        if control.exists() {
            for controller in CONTROLLERS {
                // A controller that the host lacks shows by its missing files, when they are needed.
                let _ = fs::write(&control, controller);
            }
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            // Version 1 takes no process where these are empty.
            let (from, to) = (above.join(file), below.join(file));
            if !control.exists() && fs::read_to_string(&to).is_ok_and(|list| list.trim().is_empty())
            {
                fs::write(to, fs::read(from)?)?;
            }
        }
    }
    Ok(())
}

/// Removes the cgroups that a record lists: a leaf must go, a parent stays while others use it.
pub(crate) fn remove(record: &Path) -> Result<(), CgroupError> {
    let made = match fs::read_to_string(record) {
        Ok(made) => made,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("reading", record)(error)),
    };
    let mut below: Option<&Path> = None;
    for path in made.lines().map(Path::new) {
        let is_leaf = below.is_none_or(|below| below.parent() != Some(path));
        below = Some(path);
        if is_leaf {
            empty(path).map_err(failed("emptying", path))?;
        }
        match fs::remove_dir(path) {
            Err(error) if is_leaf && error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("removing", path)(error));
            }
            // Another Pod's cgroup may be below this parent.
            _ => {}
        }
    }
    fs::remove_file(record).map_err(failed("forgetting", record))
}

/// Kills what is left in a cgroup and waits until it is gone.
fn empty(path: &Path) -> io::Result<()> {
    let events = path.join("cgroup.events");
    let file = match File::open(&events) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return kill_members(path),
        Err(error) => return Err(error),
    };
    let populated = || -> io::Result<bool> {
        Ok(fs::read_to_string(&events)?
            .lines()
            .any(|line| line == "populated 1"))
    };
    if !populated()? {
        return Ok(());
    }
    fs::write(path.join("cgroup.kill"), "1")?;
    while populated()? {
        if poll(
            &mut [PollFd::new(&file, PollFlags::PRI)],
            Some(&EMPTY_DEADLINE),
        )? == 0
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Version 1 kills and tells nothing by itself.
fn kill_members(path: &Path) -> io::Result<()> {
    let members = || -> io::Result<Vec<i32>> {
        match fs::read_to_string(path.join("cgroup.procs")) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    };
    for number in members()? {
        let process =
            Pid::from_raw(number).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // The descriptor holds one process from here on: is it still the member?
        let Some(process) = process.filter(|_| members().is_ok_and(|now| now.contains(&number)))
        else {
            continue;
        };
        // One that has ended meanwhile is what is wanted.
        let _ = pidfd_send_signal(&process, Signal::KILL);
        if poll(
            &mut [PollFd::new(&process, PollFlags::IN)],
            Some(&EMPTY_DEADLINE),
        )? == 0
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(failed("limiting", path))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Operation { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_was_made_is_removed_and_what_others_use_stays() {
        let root = tempfile::tempdir().unwrap();
        let record = root.path().join("record");
        // As version 1 has them.
        let roots = ["cpu", "memory"].map(|name| root.path().join(name));
        for hierarchy in &roots {
            fs::create_dir(hierarchy).unwrap();
        }
        let make = || Cgroup::create_below(&roots, Path::new("a/b/c"), record.clone()).unwrap();
        let cgroup = make();
        assert!(
            roots
                .iter()
                .all(|hierarchy| hierarchy.join("a/b/c").exists())
        );
        cgroup.remove().unwrap();
        cgroup.remove().unwrap();
        assert!(roots.iter().all(|hierarchy| !hierarchy.join("a").exists()) && !record.exists());
        let cgroup = make();
        fs::create_dir(roots[0].join("a/other")).unwrap();
        cgroup.remove().unwrap();
        assert!(roots[0].join("a/other").exists() && !roots[0].join("a/b").exists());
        assert!(!roots[1].join("a").exists(), "each hierarchy by itself");
    }

    #[test]
    fn hierarchies_are_one_or_many_or_an_error() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(
            hierarchies(root.path()),
            Err(CgroupError::NoHierarchy)
        ));
        fs::create_dir(root.path().join("memory")).unwrap();
        fs::write(root.path().join("memory/cgroup.procs"), "").unwrap();
        fs::create_dir(root.path().join("other")).unwrap();
        assert_eq!(
            hierarchies(root.path()).unwrap(),
            [root.path().join("memory")]
        );
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(hierarchies(root.path()).unwrap(), [root.path()]);
    }

    /// A cgroup of plain files.
    fn plain(root: &Path, files: &[&str]) -> Cgroup {
        let roots = [root.join("h")];
        fs::create_dir(&roots[0]).unwrap();
        let cgroup = Cgroup::create_below(&roots, Path::new("a/b"), root.join("record")).unwrap();
        for file in files {
            fs::write(roots[0].join("a/b").join(file), "").unwrap();
        }
        cgroup
    }

    #[test]
    fn limits_are_written_once_and_memory_is_never_lowered() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = plain(root.path(), &["memory.max", "cpu.weight", "cpuset.cpus"]);
        let read = |file: &str| fs::read_to_string(root.path().join("h/a/b").join(file)).unwrap();
        let mut limits = HostLimits {
            memory_mib: 2,
            shares: 1024,
            cpus: "0-1".into(),
            ..HostLimits::default()
        };
        cgroup.limit(&limits).unwrap();
        assert_eq!(
            (read("memory.max").as_str(), read("cpu.weight").as_str()),
            ("2097152", "39")
        );
        assert_eq!(read("cpuset.cpus"), "0-1\n");
        (limits.memory_mib, limits.cpus) = (1, String::new());
        cgroup.limit(&limits).unwrap();
        assert_eq!(
            (read("memory.max").as_str(), read("cpuset.cpus").as_str()),
            ("2097152", "\n")
        );
        limits.mems = "0".into();
        let error = cgroup.limit(&limits).unwrap_err().to_string();
        assert!(
            error.contains("cpuset.mems") && error.contains("linux.resources.cpu.mems"),
            "{error}"
        );
    }

    #[test]
    fn what_the_parents_allow_and_the_kernel_killed_is_read() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = plain(root.path(), &["memory.events"]);
        assert_eq!(cgroup.room_mib(), None);
        fs::write(root.path().join("h/memory.max"), "max\n").unwrap();
        fs::write(root.path().join("h/a/memory.max"), "10485760\n").unwrap();
        assert_eq!(cgroup.room_mib(), Some(10));
        let events = root.path().join("h/a/b/memory.events");
        for (text, expected) in [
            ("oom 0\noom_kill 0\n", false),
            ("oom 1\noom_kill 1\n", true),
        ] {
            fs::write(&events, text).unwrap();
            assert_eq!(cgroup.was_out_of_memory(), expected, "{text}");
        }
    }

    #[test]
    fn members_are_killed_by_their_numbers() {
        let root = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(
            root.path().join("cgroup.procs"),
            format!("{}\n", child.id()),
        )
        .unwrap();
        empty(root.path()).unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
