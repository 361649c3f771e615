//! `binary://`: a program of the host that takes a process's output, as containerd's document describes it
//! (core/runtime/v2/README.md, "Logging").
//!
//! It reads standard output from descriptor 3 and standard error from 4, and closes 5 once it is ready. It
//! is told to end by the end of both. Must not know where its input comes from.
#![allow(
    unsafe_code,
    reason = "the program's descriptors 3 to 5 are set between fork and exec"
)]

use rustix::{
    io::fcntl_dupfd_cloexec,
    process::{Pid, Signal, kill_process},
};
use std::{
    io::{self, pipe},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::PathBuf,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe::{Receiver, Sender},
    process::{Child, Command},
    time::timeout,
};

/// Numbers from here on are none of those that the program expects.
const ABOVE_FDS: i32 = 10;
const FIRST_FD: i32 = 3;
/// For the program to say that it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// For the program to end by itself after the end of its input, and after SIGTERM; runc's shim gives as long.
const END_DEADLINE: Duration = Duration::from_secs(12);

/// Why there is no such program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogBinaryError {
    /// Not `binary:///path?key=value`.
    #[error("{0:?} does not name a program by an absolute path")]
    Address(String),
    /// It can't be started.
    #[error("starting the log program {path:?} failed")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended at once.
    #[error("the log program {path:?} ended before it was ready: {status}")]
    Ended {
        /// The program.
        path: PathBuf,
        /// How.
        status: std::process::ExitStatus,
    },
    /// It doesn't close descriptor 5.
    #[error("the log program {0:?} does not say that it is ready")]
    Deadline(PathBuf),
}

/// A running program. Dropping it lets it end.
#[derive(Debug)]
pub(crate) struct LogBinary(Option<Child>);

impl Drop for LogBinary {
    fn drop(&mut self) {
        if let (Some(child), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(see_off(child));
        }
    }
}

/// Starts the program for a process called `id`; answers where its output goes.
pub(crate) async fn start(
    address: &str,
    namespace: &str,
    id: &str,
) -> Result<(LogBinary, Sender, Sender), LogBinaryError> {
    let (path, arguments) =
        parse(address).ok_or_else(|| LogBinaryError::Address(address.to_owned()))?;
    let failed = |source| LogBinaryError::Start {
        path: path.clone(),
        source,
    };
    let prepare = || -> io::Result<_> {
        let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
        let (ready, told) = pipe()?;
        let files = [high(&out)?, high(&err)?, high(&told)?];
        let ours = (
            Sender::from_owned_fd(stdout.into())?,
            Sender::from_owned_fd(stderr.into())?,
            Receiver::from_owned_fd(ready.into())?,
        );
        Ok((files, ours))
    };
    let (files, (stdout, stderr, mut ready)) = prepare().map_err(failed)?;
    let mut command = Command::new(&path);
    command
        .args(arguments)
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace);
    let mut child = spawn(&mut command, files).map_err(failed)?;
    // Its copies of the descriptors are what counts from here on.
    drop(command);
    let mut byte = [0];
    match timeout(READY_DEADLINE, ready.read(&mut byte)).await {
        Ok(Ok(_)) => {}
        Ok(Err(source)) => return Err(failed(source)),
        Err(_) => {
            // It is reaped by the runtime.
            let _ = child.start_kill();
            return Err(LogBinaryError::Deadline(path));
        }
    }
    match child.try_wait() {
        Ok(Some(status)) if !status.success() => Err(LogBinaryError::Ended { path, status }),
        _ => Ok((LogBinary(Some(child)), stdout, stderr)),
    }
}

fn high(fd: &impl AsFd) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(fd, ABOVE_FDS)?)
}

fn spawn(command: &mut Command, files: [OwnedFd; 3]) -> io::Result<Child> {
    let place = move || {
        for (number, file) in (FIRST_FD..).zip(&files) {
            // SAFETY: dup2 only changes the descriptor table of this forked child, whose descriptors 3 to 5
            // belong to the shim's runtime, which the child doesn't use.
            if unsafe { libc::dup2(file.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `place` makes system calls on descriptors that it owns and does not allocate.
    unsafe { command.pre_exec(place) };
    command.spawn()
}

/// Waits for the end of a program whose input has ended.
async fn see_off(mut child: Child) {
    if timeout(END_DEADLINE, child.wait()).await.is_ok() {
        return;
    }
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    if let Some(pid) = pid.and_then(Pid::from_raw) {
        // Not reaped yet, so that the number is its own.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(END_DEADLINE, child.wait()).await.is_err() {
        crate::log::line("a log program does not end and is killed");
        let _ = child.kill().await;
    }
}

/// The program, and its arguments: each key of the query, followed by its value unless that is empty.
fn parse(address: &str) -> Option<(PathBuf, Vec<String>)> {
    let rest = address.strip_prefix("binary://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(decode(path, false)?);
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key, true)?);
        if !value.is_empty() {
            arguments.push(decode(value, true)?);
        }
    }
    path.is_absolute().then_some((path, arguments))
}

/// Undoes the escapes of an URL (RFC 3986, section 2.1); in a query a plus is a space.
pub(crate) fn decode(text: &str, plus: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if plus => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};
    use tokio::io::AsyncWriteExt as _;

    fn script(directory: &Path, text: &str) -> String {
        let path = directory.join("log program");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        format!("binary://{}", path.to_str().unwrap().replace(' ', "%20"))
    }

    #[test]
    fn keys_and_values_become_arguments() {
        let (path, arguments) = parse("binary:///bin/a%20b?--id&driver=x+y&empty=&p=%2Fq").unwrap();
        assert_eq!(path, Path::new("/bin/a b"));
        assert_eq!(arguments, ["--id", "driver", "x y", "empty", "p", "/q"]);
        for wrong in [
            "binary://relative",
            "binary:///a%2",
            "binary:///a?%ff",
            "binary:///a%00",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_program_gets_output_names_and_arguments() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let address = script(
            directory.path(),
            "cd $2; echo $CONTAINER_NAMESPACE $CONTAINER_ID $1 > said; exec 5>&-; cat <&3 > out; cat <&4 > err; mv err end",
        );
        let address = format!("{address}?--to={}", directory.path().display());
        let (program, mut stdout, mut stderr) = start(&address, "ns", "c1").await.unwrap();
        assert_eq!(fs::read_to_string(at("said")).unwrap(), "ns c1 --to\n");
        stdout.write_all(b"one").await.unwrap();
        stderr.write_all(b"two").await.unwrap();
        drop((stdout, stderr));
        let mut program = program;
        assert!(program.0.take().unwrap().wait().await.unwrap().success());
        assert_eq!(fs::read_to_string(at("out")).unwrap(), "one");
        assert_eq!(fs::read_to_string(at("end")).unwrap(), "two");
    }

    #[tokio::test]
    async fn a_program_that_cannot_run_is_named() {
        let error = start("binary:///no/such/program", "ns", "c")
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/program"), "{error}");
    }

    proptest! {
        #[test]
        fn any_address_is_a_program_or_refused(address in "(binary://)?[/a%0-9?&=+]{0,24}") {
            if let Some((path, _)) = parse(&address) {
                prop_assert!(path.is_absolute());
            }
        }
    }
}
