//! Files that name a process, such that a process that got the same number later isn't taken for it.
//!
//! One line: the process id and its start time in clock ticks since boot (`/proc/<pid>/stat`, field 22,
//! proc_pid_stat(5)). A signal goes through a pidfd that was opened before the start time was compared.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a killed process may take to go: the kernel has its memory to free.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Why a process can't be recorded or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessFileError {
    /// `/proc` or the file can't be read or written.
    #[error("process file {path:?} cannot be used")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not the two numbers.
    #[error("process file {path:?} holds {text:?}, which is not a process id and a start time")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its content.
        text: String,
    },
    /// A signal or a wait failed.
    #[error("process {pid} cannot be ended")]
    Kill {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
}

/// A process, by number and start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    pid: i32,
    start_ticks: u64,
}

/// Records a living process.
pub(crate) fn write(path: &Path, pid: u32) -> Result<(), ProcessFileError> {
    let failed = |source| ProcessFileError::File {
        path: path.to_owned(),
        source,
    };
    let pid = i32::try_from(pid).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let start_ticks = start_ticks(pid).map_err(failed)?;
    std::fs::write(path, format!("{pid} {start_ticks}\n")).map_err(failed)
}

/// Kills the recorded process and waits for its end. No file, or no such process any more: nothing to do.
/// Answers the number that was recorded.
pub(crate) fn kill(path: &Path) -> Result<Option<u32>, ProcessFileError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(ProcessFileError::File {
                path: path.to_owned(),
                source,
            });
        }
    };
    let identity = parse(&text).ok_or_else(|| ProcessFileError::Malformed {
        path: path.to_owned(),
        text,
    })?;
    kill_identity(identity).map_err(|source| ProcessFileError::Kill {
        pid: identity.pid,
        source,
    })?;
    Ok(u32::try_from(identity.pid).ok())
}

fn parse(text: &str) -> Option<Identity> {
    let (pid, start) = text.trim_end().split_once(' ')?;
    let pid = pid.parse().ok().filter(|pid| *pid > 0)?;
    Some(Identity {
        pid,
        start_ticks: start.parse().ok()?,
    })
}

fn kill_identity(identity: Identity) -> io::Result<()> {
    let Some(pid) = Pid::from_raw(identity.pid) else {
        return Ok(());
    };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // From here on the pidfd holds one process. Is it the recorded one?
    match start_ticks(identity.pid) {
        Ok(ticks) if ticks == identity.start_ticks => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let deadline = Timespec {
        tv_sec: i64::try_from(KILL_DEADLINE.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut waiting = [PollFd::new(&pidfd, PollFlags::IN)];
    match poll(&mut waiting, Some(&deadline))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Field 22 of `/proc/<pid>/stat`. The second field is the program's name in parentheses and may hold
/// spaces and parentheses, so fields are counted from its last one.
fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_ticks(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn a_recorded_process_is_killed_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        write(&path, child.id()).unwrap();
        assert_eq!(kill(&path).unwrap(), Some(child.id()));
        assert!(!child.wait().unwrap().success());
        assert_eq!(
            kill(&path).unwrap(),
            Some(child.id()),
            "it is gone: nothing to do"
        );
    }

    #[test]
    fn another_process_with_the_same_number_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        std::fs::write(&path, format!("{pid} 1\n")).unwrap();
        kill(&path).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it lives");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_missing_file_is_nothing_to_do_and_a_wrong_one_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        assert_eq!(kill(&path).unwrap(), None);
        for text in ["", "1", "-1 5", "0 5", "x y"] {
            std::fs::write(&path, text).unwrap();
            assert!(
                matches!(kill(&path), Err(ProcessFileError::Malformed { .. })),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_program_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) (c)) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(parse_start_ticks(stat), Some(4242));
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not(text in "\\PC{0,64}") {
            let _ = parse(&text);
            let _ = parse_start_ticks(&text);
        }
    }
}
