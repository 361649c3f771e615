//! mount(2): options as containerd and the OCI write them, and `/proc/self/mountinfo`.
//!
//! The parsers are pure. What is mounted where is decided by `storage`.

use rustix::mount::{MountFlags, UnmountFlags, unmount};
use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// mount(2) takes one page of options, its terminating zero included.
const MAX_DATA_BYTES: usize = 4095;

/// Mount options, sorted by who reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// For the kernel's mount layer.
    pub(crate) flags: MountFlags,
    /// For the file system, joined by commas.
    pub(crate) data: String,
    /// Bind mount, and whether with the mounts below it.
    pub(crate) bind: Bind,
}

/// Whether something is a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bind {
    /// It isn't.
    No,
    /// The mount alone.
    Single,
    /// With the mounts below it.
    Recursive,
}

/// Why options are refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum MountOptionsError {
    /// Something that this runtime can't do yet.
    #[error("mount option {0:?} is not supported")]
    Unsupported(String),
    /// Longer than the kernel takes.
    #[error(
        "mount options are {0} bytes long, but the kernel takes {MAX_DATA_BYTES}; use an image with fewer layers"
    )]
    TooLong(usize),
}

/// Sorts the options of a mount.
pub(crate) fn parse_options<S: AsRef<str>>(
    options: &[S],
) -> Result<MountOptions, MountOptionsError> {
    let mut parsed = MountOptions {
        flags: MountFlags::empty(),
        data: String::new(),
        bind: Bind::No,
    };
    for option in options.iter().map(AsRef::as_ref) {
        match option {
            "" | "defaults" | "rw" | "suid" | "dev" | "exec" | "async" | "atime" => {}
            "ro" => parsed.flags |= MountFlags::RDONLY,
            "nosuid" => parsed.flags |= MountFlags::NOSUID,
            "nodev" => parsed.flags |= MountFlags::NODEV,
            "noexec" => parsed.flags |= MountFlags::NOEXEC,
            "sync" => parsed.flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => parsed.flags |= MountFlags::DIRSYNC,
            "noatime" => parsed.flags |= MountFlags::NOATIME,
            "nodiratime" => parsed.flags |= MountFlags::NODIRATIME,
            "relatime" => parsed.flags |= MountFlags::RELATIME,
            "strictatime" => parsed.flags |= MountFlags::STRICTATIME,
            "bind" => parsed.bind = parsed.bind.max(Bind::Single),
            "rbind" => parsed.bind = Bind::Recursive,
            // Propagation between host and container ends at the VM.
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "unbindable"
            | "runbindable" => {}
            "loop" | "remount" => return Err(MountOptionsError::Unsupported(option.to_owned())),
            _ if is_special(option) => {
                return Err(MountOptionsError::Unsupported(option.to_owned()));
            }
            _ => {
                if !parsed.data.is_empty() {
                    parsed.data.push(',');
                }
                parsed.data.push_str(option);
            }
        }
    }
    if parsed.data.len() > MAX_DATA_BYTES {
        return Err(MountOptionsError::TooLong(parsed.data.len()));
    }
    Ok(parsed)
}

/// Options that containerd, not the kernel, acts on.
fn is_special(option: &str) -> bool {
    ["X-containerd.", "uidmap=", "gidmap="]
        .iter()
        .any(|prefix| option.starts_with(prefix))
}

impl Bind {
    fn max(self, other: Self) -> Self {
        if self == Self::Recursive { self } else { other }
    }
}

/// Mount points at or below `directory`, the deepest last.
pub(crate) fn below(mountinfo: &[u8], directory: &Path) -> Vec<PathBuf> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .filter(|path| path.starts_with(directory))
        .collect()
}

/// What is mounted on a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPoint {
    /// Type of the file system.
    pub(crate) kind: String,
    /// Where it comes from.
    pub(crate) source: PathBuf,
}

/// The file system whose root is mounted at exactly `directory`, last.
pub(crate) fn mount_point_at(mountinfo: &[u8], directory: &Path) -> Option<MountPoint> {
    let path = |field: &[u8]| PathBuf::from(OsString::from_vec(unescape(field)));
    let at = |line: &&[u8]| {
        line.split(|byte| *byte == b' ').nth(4).map(path).as_deref() == Some(directory)
    };
    let line = mountinfo.split(|byte| *byte == b'\n').rfind(at)?;
    let fields: Vec<_> = line.split(|byte| *byte == b' ').collect();
    // The root of the mount in its file system; after any number of optional fields, type and source.
    let whole = fields.get(3) == Some(&&b"/"[..]);
    let after = fields.iter().position(|field| *field == b"-")?;
    let kind = String::from_utf8(fields.get(after + 1)?.to_vec()).ok()?;
    let source = path(fields.get(after + 2)?);
    whole.then_some(MountPoint { kind, source })
}

/// proc_pid_mountinfo(5) writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        match (byte, octal(after)) {
            (b'\\', Some(escaped)) => {
                bytes.push(escaped);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(*byte);
                rest = after;
            }
        }
    }
    bytes
}

fn octal(bytes: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(bytes.get(..3)?).ok()?;
    u8::from_str_radix(digits, 8).ok()
}

/// Unmounts everything at or below `directory`, newest first. Nothing mounted is success.
pub(crate) fn unmount_below(directory: &Path) -> io::Result<()> {
    // A mount that hides another shows it once it is gone, and unmounting one may take others with it, so
    // look again until none is left. Each round removes at least one, or fails.
    loop {
        let mountinfo = std::fs::read("/proc/self/mountinfo")?;
        let points = below(&mountinfo, directory);
        if points.is_empty() {
            return Ok(());
        }
        for point in points.iter().rev() {
            match unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // It went together with one above it.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                other => other?,
            }
        }
        let after = below(&std::fs::read("/proc/self/mountinfo")?, directory).len();
        if after >= points.len() {
            return Err(io::Error::other(format!(
                "{after} mounts stay below {directory:?}"
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_overlay_keeps_its_directories_as_data() {
        let options = [
            "index=off",
            "workdir=/w",
            "upperdir=/u",
            "lowerdir=/b:/a",
            "ro",
        ];
        let parsed = parse_options(&options).unwrap();
        assert_eq!(
            parsed.data,
            "index=off,workdir=/w,upperdir=/u,lowerdir=/b:/a"
        );
        assert_eq!(parsed.flags, MountFlags::RDONLY);
        assert_eq!(parsed.bind, Bind::No);
    }

    #[test]
    fn a_bind_is_recursive_if_any_option_says_so() {
        assert_eq!(
            parse_options(&["rbind", "bind"]).unwrap().bind,
            Bind::Recursive
        );
        assert_eq!(
            parse_options(&["bind", "rprivate"]).unwrap().bind,
            Bind::Single
        );
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        for option in ["loop", "X-containerd.dmverity=1", "uidmap=0:1:1"] {
            assert_eq!(
                parse_options(&[option]),
                Err(MountOptionsError::Unsupported(option.into()))
            );
        }
        let long = format!("lowerdir={}", "x".repeat(MAX_DATA_BYTES));
        assert!(matches!(
            parse_options(&[long]),
            Err(MountOptionsError::TooLong(_))
        ));
    }

    #[test]
    fn mount_points_below_a_directory_are_found_and_unescaped() {
        let mountinfo = b"22 1 0:20 / / rw - ext4 /dev/vda rw\n\
            30 22 0:21 / /run/walnut/a rw shared:1 - tmpfs t rw\n\
            31 30 0:22 / /run/walnut/a/with\\040space rw - overlay o rw\n\
            32 22 0:23 / /run/walnut/ab rw - tmpfs t rw\n";
        assert_eq!(
            below(mountinfo, Path::new("/run/walnut/a")),
            [
                PathBuf::from("/run/walnut/a"),
                PathBuf::from("/run/walnut/a/with space")
            ]
        );
    }

    #[test]
    fn what_is_mounted_last_on_a_directory_is_found() {
        let mountinfo = b"30 22 0:21 / /a rw shared:1 master:2 - tmpfs t rw\n\
            31 22 7:0 / /a ro - erofs /dev/with\\040space ro\n\
            32 22 0:22 /part /b rw - ext4 /dev/vda rw\n";
        let found = mount_point_at(mountinfo, Path::new("/a")).unwrap();
        assert_eq!(found.kind, "erofs");
        assert_eq!(found.source, Path::new("/dev/with space"));
        assert_eq!(mount_point_at(mountinfo, Path::new("/b")), None);
        assert_eq!(mount_point_at(mountinfo, Path::new("/c")), None);
    }

    proptest! {
        #[test]
        fn any_mountinfo_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = below(&bytes, Path::new("/"));
            let _ = mount_point_at(&bytes, Path::new("/"));
        }

        #[test]
        fn any_options_are_sorted_or_refused(options in proptest::collection::vec("\\PC{0,16}", 0..8)) {
            let _ = parse_options(&options);
        }
    }
}
