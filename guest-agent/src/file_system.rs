//! New file systems as mounts that stand nowhere yet: fsopen(2), fsconfig(2), fsmount(2).
//!
//! Must not attach them.

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use std::{os::fd::OwnedFd, path::Path};

/// Makes one. An empty source is none; `data` are its own options, by key and value, `attributes` the mount's.
pub(crate) fn create(
    kind: &str,
    source: &Path,
    data: &[(String, Option<String>)],
    attributes: MountAttrFlags,
) -> rustix::io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    if !source.as_os_str().is_empty() {
        fsconfig_set_string(&context, "source", source)?;
    }
    for (key, value) in data {
        match value {
            Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str())?,
            None => fsconfig_set_flag(&context, key.as_str())?,
        }
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
