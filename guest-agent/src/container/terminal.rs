//! Gives a process a terminal of its container's own devpts, so that `ttyname` and `/dev/pts` work inside.
//!
//! Runs after the root has been entered. Must not keep the master side: it travels to the agent.

use super::{
    SetupError,
    mounts::{attach, clone_of},
    resolve::{Make, open_in_root, open_or_make},
    spec::ConsoleSize,
};
use rustix::{
    fs::{Mode, OFlags, open},
    pty::OpenptFlags,
    termios::{Winsize, tcsetwinsize},
};
use std::{os::fd::OwnedFd, path::Path};

/// Makes a terminal the controlling one of this process, a session leader, and its standard streams.
/// Answers the master side. The first process of a container finds it as `/dev/console` too.
pub(super) fn open_terminal(
    size: Option<ConsoleSize>,
    console: bool,
) -> Result<OwnedFd, SetupError> {
    let attempted = || SetupError::named("cannot open a terminal of the container's /dev/pts");
    let root = open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(attempted())?;
    let place = open_in_root(&root, Path::new("/dev/pts/ptmx")).map_err(attempted())?;
    if rustix::fs::fstat(&place).map_err(attempted())?.st_rdev != rustix::fs::makedev(5, 2) {
        return Err(SetupError::Request(
            "the container's /dev/pts/ptmx is not a terminal multiplexer".into(),
        ));
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = open("/dev/pts/ptmx", flags, Mode::empty()).map_err(attempted())?;
    rustix::pty::unlockpt(&master).map_err(attempted())?;
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, peer).map_err(attempted())?;
    if let Some(size) = size {
        tcsetwinsize(&master, window(size.width, size.height)).map_err(attempted())?;
    }
    if console {
        let place = open_or_make(&root, Path::new("/dev/console"), Make::File)?;
        let mount = clone_of(&slave, false).map_err(attempted())?;
        attach(&mount, &place.fd).map_err(attempted())?;
    }
    rustix::process::ioctl_tiocsctty(&slave).map_err(attempted())?;
    rustix::stdio::dup2_stdin(&slave).map_err(attempted())?;
    rustix::stdio::dup2_stdout(&slave).map_err(attempted())?;
    rustix::stdio::dup2_stderr(&slave).map_err(attempted())?;
    Ok(master)
}

/// The size of a terminal, in characters.
pub(crate) fn window(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
