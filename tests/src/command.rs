//! Runs a program with a deadline and keeps all that it says.

use crate::deadline::Deadline;
use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use std::{
    io::{Read, Write},
    os::fd::OwnedFd,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    thread::JoinHandle,
};

/// How a program ended, and what it said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub end: End,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, signal) => Self::Killed(signal.unwrap_or_default()),
        }
    }
}

impl Output {
    /// Standard output as text, without its last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// The output of a program that must have ended well.
    pub fn success(self) -> Result<Self> {
        self.exits(0)
    }

    /// The output of a program that must have ended with `code`.
    pub fn exits(self, code: i32) -> Result<Self> {
        if self.end != End::Exited(code) {
            bail!(
                "expected exit status {code}, but the program {:?}; stdout {:?}, stderr {:?}",
                self.end,
                self.text().chars().take(2000).collect::<String>(),
                self.stderr
            );
        }
        Ok(self)
    }
}

/// A program that runs; it is killed when its owner goes.
#[derive(Debug)]
pub struct Running {
    child: Child,
    what: String,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

/// Starts a program, feeds it `stdin` (then its end), and collects both outputs.
pub fn start(command: &mut Command, stdin: Vec<u8>) -> Result<Running> {
    let what = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {what}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A program may end without reading all of it; what that means is for the test to say.
        std::thread::spawn(move || pipe.write_all(&stdin));
    }
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    Ok(Running {
        child,
        what,
        stdout,
        stderr,
    })
}

/// Runs a program to its end.
pub fn run(command: &mut Command, stdin: Vec<u8>, deadline: Deadline) -> Result<Output> {
    start(command, stdin)?.wait(deadline)
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end and for that of its outputs.
    pub fn wait(mut self, deadline: Deadline) -> Result<Output> {
        let what = self.what.clone();
        if wait_child(&mut self.child, deadline)?.is_none() {
            self.child.kill().context("cannot kill a late program")?;
        }
        let status = self.child.wait().context("cannot wait for a program")?;
        let stdout = join(self.stdout.take())?;
        let stderr = String::from_utf8_lossy(&join(self.stderr.take())?).into_owned();
        if deadline.left().is_zero() {
            let said = String::from_utf8_lossy(&stdout);
            bail!("{what} did not end by its deadline; stdout {said:?}, stderr {stderr:?}");
        }
        Ok(Output {
            end: status.into(),
            stdout,
            stderr,
        })
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(pid_of(&self.child)?, signal).context("cannot signal a program")
    }

    /// Kills it, as a person at the keyboard would.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("cannot kill a program")?;
        self.child.wait().context("cannot wait for a program")?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn join(reader: Option<JoinHandle<Vec<u8>>>) -> Result<Vec<u8>> {
    match reader.map(JoinHandle::join) {
        Some(Ok(bytes)) => Ok(bytes),
        Some(Err(_)) => bail!("the reader of a program's output panicked"),
        None => Ok(Vec::new()),
    }
}

fn pid_of(child: &Child) -> Result<Pid> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.context("a process id that is none")
}

/// Waits for a child's end; `None` when the deadline comes first.
pub fn wait_child(child: &mut Child, deadline: Deadline) -> Result<Option<ExitStatus>> {
    let pidfd: OwnedFd =
        pidfd_open(pid_of(child)?, PidfdFlags::empty()).context("cannot watch a child")?;
    let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
    poll(&mut watched, Some(&deadline.timespec())).context("cannot wait for a child")?;
    child.try_wait().context("cannot wait for a child")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        command
    }

    #[test]
    fn output_and_exit_status_arrive() {
        let deadline = Deadline::after(Duration::from_secs(60));
        let ended = run(
            &mut shell("cat; echo no >&2; exit 7"),
            b"yes".into(),
            deadline,
        )
        .unwrap();
        assert_eq!(ended.end, End::Exited(7));
        assert_eq!(
            (ended.text().as_str(), ended.stderr.as_str()),
            ("yes", "no\n")
        );
    }

    #[test]
    fn a_late_program_is_killed() {
        let error = run(
            &mut shell("exec sleep 600"),
            Vec::new(),
            Deadline::after(Duration::ZERO),
        )
        .unwrap_err();
        assert!(error.to_string().contains("deadline"), "{error}");
    }
}
