//! Finds or makes a path inside a root file system, so that no symbolic link of an image leads out of it.
//!
//! The kernel does the confining (openat2(2), `RESOLVE_IN_ROOT`); the walk here only adds what it cannot:
//! making what is missing, where a link points to a place that does not exist yet. Must not mount.

use super::SetupError;
use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, mkdirat, openat2, readlinkat, statat},
    io::Errno,
};
use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Component, Path, PathBuf},
};

/// Links in one path at the most, as the kernel's own limit.
const MAX_LINKS: usize = 40;
/// Mode of what is made on the way.
const MADE_DIRECTORY_MODE: u32 = 0o755;
const MADE_FILE_MODE: u32 = 0o644;

/// What stands at the end of a path that has to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    Directory,
    File,
}

/// Opens `path` below `root` as a reference (`O_PATH`), following links inside the root.
pub(super) fn open_in_root(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    open(root.as_fd(), path, OFlags::PATH)
}

fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() {
        Path::new(".")
    } else {
        relative
    };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::io::retry_on_intr(|| {
        openat2(
            root,
            relative,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    })
}

/// A place inside the root: opened as a reference, and where it is once all links are followed.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
}

/// Opens `path` below `root` as a reference, making what is missing on the way and at its end.
pub(super) fn open_or_make(root: impl AsFd, path: &Path, make: Make) -> Result<Place, SetupError> {
    let root = root.as_fd();
    let attempted =
        || SetupError::named(format!("cannot make {} in the container", path.display()));
    let resolved = walk(root, path, make).map_err(attempted())?;
    let fd = open(root, &resolved, OFlags::PATH).map_err(attempted())?;
    Ok(Place { fd, path: resolved })
}

fn walk(root: BorrowedFd<'_>, path: &Path, make: Make) -> Result<PathBuf, Errno> {
    let mut at = PathBuf::from("/");
    let mut ahead = names(path);
    let mut links = 0;
    while let Some(name) = ahead.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let parent = open(root, &at, OFlags::PATH | OFlags::DIRECTORY)?;
        match readlinkat(&parent, &name, Vec::new()) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                let mut rest = names(&target);
                rest.append(&mut ahead);
                ahead = rest;
            }
            // It exists and is not a link.
            Err(Errno::INVAL) => at.push(&name),
            Err(Errno::NOENT) => {
                let make = if ahead.is_empty() {
                    make
                } else {
                    Make::Directory
                };
                make_at(&parent, &name, make)?;
                at.push(&name);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(at)
}

fn make_at(parent: &OwnedFd, name: &OsStr, make: Make) -> Result<(), Errno> {
    let made = match make {
        Make::Directory => mkdirat(parent, name, Mode::from_raw_mode(MADE_DIRECTORY_MODE)),
        Make::File => rustix::fs::openat(
            parent,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::from_raw_mode(MADE_FILE_MODE),
        )
        .map(drop),
    };
    match made {
        Err(Errno::EXIST) if statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() => Ok(()),
        other => other,
    }
}

/// Names of a path; `.` and the root fall away.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let outside = tempfile::tempdir().unwrap();
        let inside = outside.path().join("root");
        std::fs::create_dir(&inside).unwrap();
        let fd = std::fs::File::open(&inside).unwrap().into();
        (outside, fd)
    }

    #[test]
    fn a_dangling_link_is_made_where_it_points_inside_the_root() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        std::fs::create_dir(inside.join("etc")).unwrap();
        symlink(
            "../run/systemd/resolve.conf",
            inside.join("etc/resolv.conf"),
        )
        .unwrap();
        let place = open_or_make(&root, Path::new("/etc/resolv.conf"), Make::File).unwrap();
        assert_eq!(place.path, Path::new("/run/systemd/resolve.conf"));
        assert!(inside.join("run/systemd/resolve.conf").is_file());
    }

    #[test]
    fn links_and_parents_do_not_lead_out() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        symlink("/../../../..", inside.join("up")).unwrap();
        symlink(directory.path(), inside.join("absolute")).unwrap();
        for path in ["/up/made", "/absolute/made", "../../made"] {
            open_or_make(&root, Path::new(path), Make::Directory).unwrap();
        }
        assert!(inside.join("made").is_dir());
        let names: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["root"]);
    }

    #[test]
    fn a_loop_of_links_ends() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        symlink("b", inside.join("a")).unwrap();
        symlink("a", inside.join("b")).unwrap();
        assert_eq!(
            walk(root.as_fd(), Path::new("/a/x"), Make::File),
            Err(Errno::LOOP)
        );
    }

    proptest! {
        #[test]
        fn whatever_is_made_is_inside(path in "(/|\\.\\./|[a-c]/|\\./){0,8}[a-c]") {
            let (directory, root) = root();
            let place = open_or_make(&root, Path::new(&path), Make::Directory).unwrap();
            let inside = directory.path().join("root");
            prop_assert!(inside.join(place.path.strip_prefix("/").unwrap()).is_dir());
            prop_assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        }
    }
}
