//! A container's users: which ids they are outside of it.
//!
//! user_namespaces(7), and OCI runtime specification, `config-linux.md`, "User namespace mappings". The
//! owners of files are left as they are, as the specification asks. Must not decide who maps what.

use super::{SetupError, spec::IdMapping};
use crate::syscall::{self, Side, SingleThread};
use nix::{
    sched::CloneFlags,
    sys::wait::waitpid,
    unistd::{Pid, pipe},
};
use rustix::{
    fs::{Gid, Uid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
};

/// Writes the mappings of the user namespace that a process has just made.
pub(super) fn write_mappings(pid: i32, uids: &[IdMapping], gids: &[IdMapping]) -> io::Result<()> {
    for (file, mappings) in [("uid_map", uids), ("gid_map", gids)] {
        let lines = mappings.iter().map(
            |IdMapping {
                 container_id,
                 host_id,
                 size,
             }| format!("{container_id} {host_id} {size}\n"),
        );
        // In one write, as the kernel wants it.
        std::fs::write(format!("/proc/{pid}/{file}"), lines.collect::<String>())?;
    }
    Ok(())
}

/// A user namespace that only holds mappings, for a mount to show owners by.
pub(super) fn with_mappings(
    alone: &SingleThread,
    uids: &[IdMapping],
    gids: &[IdMapping],
) -> io::Result<OwnedFd> {
    let (waits, holds) = pipe()?;
    let flags = u64::from(CloneFlags::CLONE_NEWUSER.bits().unsigned_abs());
    let pid = match syscall::fork_child(alone, flags)? {
        Side::Child => {
            drop(holds);
            let _ = File::from(waits).read(&mut [0]);
            std::process::exit(0)
        }
        Side::Parent(pid) => pid,
    };
    let namespace = write_mappings(pid, uids, gids)
        .and_then(|()| File::open(format!("/proc/{pid}/ns/user")).map(OwnedFd::from));
    drop(holds);
    waitpid(Pid::from_raw(pid), None)?;
    namespace
}

/// Makes this process the root of the user namespace that it is in.
pub(super) fn become_root() -> Result<(), SetupError> {
    let attempted = || SetupError::step("cannot become the user namespace's root");
    set_thread_groups(&[]).map_err(attempted())?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).map_err(attempted())?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(attempted())
}
