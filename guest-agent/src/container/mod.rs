//! A container of the guest: from its OCI configuration to a process that runs.
//!
//! `spec` and `refuse` read the configuration. `launch` runs in the agent: it starts `walnut-init`, this
//! same program under another name, and follows its reports over `wire`. Everything else runs in
//! `walnut-init`, which has one thread and may therefore fork: `init` is its order of steps, the other
//! modules are one step each. Must not know Task messages, nor cgroup files.

mod copy_up;
mod devices;
mod hooks;
mod identity;
mod init;
pub(crate) mod launch;
pub(crate) mod mount_options;
mod mounts;
mod program;
pub(crate) mod refuse;
mod resolve;
mod rootfs;
mod schedule;
pub(crate) mod seccomp;
mod sources;
pub(crate) mod spec;
mod terminal;
mod user_namespace;
mod validate;
pub(crate) mod wire;

pub(crate) use init::run as run_init;
pub(crate) use terminal::window as terminal_window;
pub(crate) use validate::{validate, validate_process};

use std::{fmt, io};

/// An error of the operating system, in the lower-case words that runc's users know.
#[derive(Debug)]
pub(crate) struct OsError(io::Error);

impl fmt::Display for OsError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(number) = self.0.raw_os_error() else {
            return self.0.fmt(formatter);
        };
        let words = nix::errno::Errno::from_raw(number).desc();
        let mut letters = words.chars();
        match letters.next() {
            Some(first) => write!(formatter, "{}{}", first.to_lowercase(), letters.as_str()),
            None => self.0.fmt(formatter),
        }
    }
}

impl std::error::Error for OsError {}

impl<E: Into<io::Error>> From<E> for OsError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// Why `walnut-init` could not set a process up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    /// The operating system refused a step.
    #[error("{attempted}")]
    System {
        /// The step, with its values.
        attempted: String,
        /// What the system said.
        source: OsError,
    },
    /// The configuration asks for what cannot be.
    #[error("{0}")]
    Request(String),
    /// The same, and the system said so.
    #[error("{attempted}")]
    Refused {
        /// What was asked for.
        attempted: String,
        /// What the system said.
        source: OsError,
    },
}

impl SetupError {
    /// For `map_err`: a step of ours that failed.
    fn step<E: Into<OsError>>(attempted: impl Into<String>) -> impl FnOnce(E) -> Self {
        let attempted = attempted.into();
        move |error| Self::System {
            attempted,
            source: error.into(),
        }
    }

    /// For `map_err`: something that the configuration names and that is not as it says.
    fn named<E: Into<OsError>>(attempted: impl Into<String>) -> impl FnOnce(E) -> Self {
        let attempted = attempted.into();
        move |error| Self::Refused {
            attempted,
            source: error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_speak_as_runc_does() {
        let cases = [
            (libc::ENOENT, "no such file or directory"),
            (libc::EACCES, "permission denied"),
            (libc::EISDIR, "is a directory"),
            (libc::ENOEXEC, "exec format error"),
        ];
        for (number, words) in cases {
            let error = OsError::from(io::Error::from_raw_os_error(number));
            assert_eq!(error.to_string(), words);
        }
    }
}
