//! The host cgroup of a Pod: the VMM runs in it from its first instruction, so that it counts against, and
//! cannot escape, the limits that the node set for the Pod.
//!
//! cgroup v2 only (Linux, Documentation/admin-guide/cgroup-v2.rst). The directories that were made are
//! written to the sandbox's state directory before they are made, so that `delete` can remove them.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    fs::{self, File},
    io,
    path::{Component, Path, PathBuf},
};

const ROOT: &str = "/sys/fs/cgroup";
/// A killed VMM needs this long at the most to leave its cgroup.
const EMPTY_DEADLINE_SECONDS: i64 = 10;

/// Why a cgroup can't be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// No cgroup v2 on this host.
    #[error(
        "{ROOT} is not a cgroup v2 hierarchy; boot the host with systemd.unified_cgroup_hierarchy=1"
    )]
    NotVersion2,
    /// The path has a component that would leave the hierarchy.
    #[error("linux.cgroupsPath {0:?} is neither a plain path nor slice:prefix:name")]
    Path(PathBuf),
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
    leaf: PathBuf,
    record: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup that `cgroups_path` names, or one of our own when the container names none.
    pub(crate) fn create(
        cgroups_path: Option<&Path>,
        fallback: &Path,
        record: PathBuf,
    ) -> Result<Self, CgroupError> {
        let root = Path::new(ROOT);
        if !root.join("cgroup.controllers").exists() {
            return Err(CgroupError::NotVersion2);
        }
        let path = cgroups_path
            .filter(|path| !path.as_os_str().is_empty())
            .unwrap_or(fallback);
        Self::create_below(root, &relative(path)?, record)
    }

    fn create_below(root: &Path, relative: &Path, record: PathBuf) -> Result<Self, CgroupError> {
        let leaf = root.join(relative);
        // The record lists what didn't exist: the leaf first, then its parents.
        let mut made = String::new();
        for ancestor in leaf.ancestors().take_while(|path| *path != root) {
            if ancestor == leaf || !ancestor.exists() {
                made.push_str(&ancestor.to_string_lossy());
                made.push('\n');
            }
        }
        fs::write(&record, made).map_err(failed("recording", &record))?;
        // A sandbox that ends at this moment may remove a parent that both made; making it again is enough,
        // as this one is then no longer empty.
        let made = (0..3)
            .map(|_| fs::create_dir_all(&leaf))
            .find(|result| !matches!(result, Err(error) if error.kind() == io::ErrorKind::NotFound))
            .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        if let Err(error) = made {
            let error = failed("creating", &leaf)(error);
            // The first error is the one to tell.
            let _ = remove(&record);
            return Err(error);
        }
        Ok(Self { leaf, record })
    }

    /// Its directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.leaf
    }

    /// The file through which a process moves itself in.
    pub(crate) fn open_procs(&self) -> Result<File, CgroupError> {
        let path = self.leaf.join("cgroup.procs");
        File::options()
            .write(true)
            .open(&path)
            .map_err(failed("opening", &path))
    }

    /// Removes what [`Cgroup::create`] made, once its processes have gone. A second time does nothing.
    pub(crate) fn remove(&self) -> Result<(), CgroupError> {
        remove(&self.record)
    }
}

/// Removes the cgroups that a record lists: the leaf must go, a parent stays while others use it.
pub(crate) fn remove(record: &Path) -> Result<(), CgroupError> {
    let made = match fs::read_to_string(record) {
        Ok(made) => made,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("reading", record)(error)),
    };
    for (depth, path) in made.lines().map(Path::new).enumerate() {
        if depth == 0 {
            wait_until_empty(path).map_err(failed("emptying", path))?;
        }
        match fs::remove_dir(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Another Pod's cgroup is below this parent.
            Err(_) if depth > 0 => break,
            Err(error) => return Err(failed("removing", path)(error)),
        }
    }
    fs::remove_file(record).map_err(failed("forgetting", record))
}

/// Kills what is left in a cgroup and waits until the kernel says that it is empty.
fn wait_until_empty(path: &Path) -> io::Result<()> {
    let events = path.join("cgroup.events");
    let file = match File::open(&events) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
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
    let deadline = Timespec {
        tv_sec: EMPTY_DEADLINE_SECONDS,
        tv_nsec: 0,
    };
    while populated()? {
        if poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&deadline))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// The path below the hierarchy's root. systemd's form is `slice:prefix:name`, where the slice `a-b.slice`
/// is in `a.slice` (systemd.slice(5)).
fn relative(path: &Path) -> Result<PathBuf, CgroupError> {
    let bad = || CgroupError::Path(path.to_owned());
    let text = path.to_str().ok_or_else(bad)?;
    let parts: Vec<&str> = text.split(':').collect();
    let relative = match parts.as_slice() {
        [slice, prefix, name] if !text.contains('/') => {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let unit = match (name.ends_with(".slice"), prefix.is_empty()) {
                (true, _) => (*name).to_owned(),
                (false, true) => format!("{name}.scope"),
                (false, false) => format!("{prefix}-{name}.scope"),
            };
            expand_slice(slice).ok_or_else(bad)?.join(unit)
        }
        _ => path
            .components()
            .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
            .collect(),
    };
    let plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if plain && !relative.as_os_str().is_empty() && !text.contains('\n') {
        return Ok(relative);
    }
    Err(bad())
}

fn expand_slice(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if stem == "-" {
        return Some(path);
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
        name.push('-');
    }
    Some(path)
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Operation { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path_of(text: &str) -> Option<String> {
        relative(Path::new(text))
            .ok()
            .map(|path| path.to_string_lossy().into_owned())
    }

    #[test]
    fn plain_paths_and_systemd_names_are_understood() {
        for (text, expected) in [
            ("/default/c1", "default/c1"),
            ("kubepods/pod1/c1", "kubepods/pod1/c1"),
            (
                "kubepods-besteffort-pod1.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-c1.scope",
            ),
            ("-.slice::c1", "c1.scope"),
            (":docker:c1", "system.slice/docker-c1.scope"),
            ("user.slice:a:b.slice", "user.slice/b.slice"),
        ] {
            assert_eq!(path_of(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn paths_that_leave_the_hierarchy_are_refused() {
        for text in ["/", "..", "/a/../../b", "a--b.slice:x:y", "noslice:x:y"] {
            assert_eq!(path_of(text), None, "{text}");
        }
    }

    #[test]
    fn what_was_made_is_removed_and_what_others_use_stays() {
        let root = tempfile::tempdir().unwrap();
        let record = root.path().join("record");
        let hierarchy = root.path().join("cgroup");
        fs::create_dir(&hierarchy).unwrap();
        let make = || Cgroup::create_below(&hierarchy, Path::new("a/b/c"), record.clone()).unwrap();
        let cgroup = make();
        cgroup.remove().unwrap();
        cgroup.remove().unwrap();
        assert!(!hierarchy.join("a").exists() && !record.exists());
        let cgroup = make();
        fs::create_dir(hierarchy.join("a/other")).unwrap();
        cgroup.remove().unwrap();
        assert!(hierarchy.join("a/other").exists() && !hierarchy.join("a/b").exists());
    }

    proptest! {
        #[test]
        fn any_path_stays_below_the_root(text in "[-a-z.:/]{0,40}") {
            if let Ok(path) = relative(Path::new(&text)) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
