//! Fills a tmpfs with what is in the directory that it will cover: the mount option `tmpcopyup`.
//!
//! Walks by names below an open directory and follows no link, as the tree is an image's. Must not mount.

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chmodat, chownat,
        mkdirat, mknodat, openat2, readlinkat, statat, symlinkat,
    },
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// Copies all that is below `from` to the empty directory `to`, which gets its owner and mode too.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let top = rustix::fs::fstat(from)?;
    if FileType::from_raw_mode(top.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR.into());
    }
    own(to, Path::new("."), &top)?;
    let mut ahead = vec![PathBuf::from(".")];
    while let Some(directory) = ahead.pop() {
        for entry in Dir::new(open(from, &directory, OFlags::DIRECTORY)?)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let path = directory.join(name);
            let stat = statat(from, &path, AtFlags::SYMLINK_NOFOLLOW)?;
            copy_one(from, to, &path, &stat)?;
            own(to, &path, &stat)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                ahead.push(path);
            }
        }
    }
    Ok(())
}

fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let mode = if flags.contains(OFlags::CREATE) {
        Mode::RUSR | Mode::WUSR
    } else {
        Mode::empty()
    };
    Ok(openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve)?)
}

fn copy_one(from: &OwnedFd, to: &OwnedFd, path: &Path, stat: &Stat) -> io::Result<()> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(mkdirat(to, path, Mode::RWXU)?),
        FileType::Symlink => Ok(symlinkat(readlinkat(from, path, Vec::new())?, to, path)?),
        FileType::RegularFile => {
            let mut source = File::from(open(from, path, OFlags::NOFOLLOW)?);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let mut made = File::from(open(to, path, flags)?);
            io::copy(&mut source, &mut made).map(drop)
        }
        kind => Ok(mknodat(to, path, kind, Mode::empty(), stat.st_rdev)?),
    }
}

/// Gives what was copied its owner, and then its mode, which a change of owner may cut.
fn own(to: impl AsFd, path: &Path, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(&to, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        chmodat(
            &to,
            path,
            Mode::from_raw_mode(stat.st_mode & 0o7777),
            AtFlags::empty(),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    #[test]
    fn a_tree_is_copied_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("deep/er/file"), "content").unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o1770)).unwrap();
        fs::set_permissions(from.join("deep/er/file"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
        copy(&open(&from), &open(&to)).unwrap();
        assert_eq!(
            fs::read_to_string(to.join("deep/er/file")).unwrap(),
            "content"
        );
        assert_eq!(
            fs::read_link(to.join("link")).unwrap(),
            Path::new("/etc/passwd")
        );
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(to.join("deep/er/file")), 0o640);
        assert_eq!(mode(to), 0o1770);
    }
}
