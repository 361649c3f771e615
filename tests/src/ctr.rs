//! Drives containerd by `ctr`, with one runtime or another, and tells what came of it.
//!
//! Must not know how a runtime works: the same story is told to Walnut and to runc, the oracle.

use crate::{
    command::{self, Output, Running},
    deadline::{self, Deadline},
    processes::{self, Process},
};
use anyhow::{Context, Result, ensure};
use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// A root file system of busybox alone.
pub const BUSYBOX: &str = "walnut.local/busybox:latest";
/// A Debian with servers and Python.
pub const DEBIAN: &str = "walnut.local/debian:latest";

/// Makes names unique in this process.
static NAMES: AtomicU32 = AtomicU32::new(0);

/// Who runs a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The product.
    Walnut,
    /// The oracle.
    Runc,
}

impl Runtime {
    /// Its name, as containerd knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Walnut => "io.containerd.walnut.v2",
            Self::Runc => "io.containerd.runc.v2",
        }
    }

    fn short(self) -> &'static str {
        match self {
            Self::Walnut => "walnut",
            Self::Runc => "runc",
        }
    }

    /// `ctr run` of an image.
    pub fn run(self, image: &str) -> Run {
        Run {
            runtime: self,
            image: image.to_owned(),
            id: unique_name(self),
            flags: Vec::new(),
            command: Vec::new(),
            stdin: Vec::new(),
        }
    }
}

/// A name that no other container or Pod has.
pub fn unique_name(runtime: Runtime) -> String {
    let number = NAMES.fetch_add(1, Ordering::Relaxed);
    format!("test-{}-{}-{number}", runtime.short(), std::process::id())
}

/// Runs `ctr` to its end.
pub fn ctr(arguments: &[&str]) -> Result<Output> {
    command::run(
        Command::new("ctr").args(arguments),
        Vec::new(),
        Deadline::after(deadline::BOOT),
    )
}

/// A `ctr run` to be.
#[derive(Debug, Clone)]
pub struct Run {
    runtime: Runtime,
    image: String,
    id: String,
    flags: Vec<String>,
    command: Vec<String>,
    stdin: Vec<u8>,
}

impl Run {
    /// Adds a flag of `ctr run`.
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// What to run instead of the image's own command.
    #[must_use]
    pub fn command(mut self, command: &[&str]) -> Self {
        self.command = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// What to run, as a script of the image's shell.
    #[must_use]
    pub fn shell(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// What to write to its standard input.
    #[must_use]
    pub fn stdin(mut self, stdin: Vec<u8>) -> Self {
        self.stdin = stdin;
        self
    }

    /// The container's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn program(&self, first_flag: &str) -> Command {
        let mut program = Command::new("ctr");
        program
            .args(["run", first_flag, "--runtime", self.runtime.name()])
            .args(&self.flags)
            .args([&self.image, &self.id])
            .args(&self.command);
        program
    }

    /// `ctr run --rm` to its end.
    pub fn finish(self) -> Result<Output> {
        let _container = Container(self.id.clone());
        let mut program = self.program("--rm");
        command::run(
            &mut program,
            self.stdin,
            Deadline::after(deadline::BOOT + deadline::REQUEST),
        )
    }

    /// `ctr run --rm`, which goes on.
    pub fn start(self) -> Result<(Container, Running)> {
        let container = Container(self.id.clone());
        let mut program = self.program("--rm");
        Ok((container, command::start(&mut program, self.stdin)?))
    }

    /// `ctr run --detach`: returns once the container runs.
    pub fn detach(self) -> Result<Container> {
        let container = Container(self.id.clone());
        let mut program = self.program("--detach");
        command::run(&mut program, self.stdin, Deadline::after(deadline::BOOT))?
            .success()
            .with_context(|| format!("cannot start {}", container.0))?;
        Ok(container)
    }
}

/// A container that is removed, with all it has, when this value goes.
#[derive(Debug)]
pub struct Container(String);

impl Container {
    /// Its name.
    pub fn id(&self) -> &str {
        &self.0
    }

    /// `ctr task exec` of a program, to its end.
    pub fn exec(&self, program: &[&str]) -> Result<Output> {
        self.exec_with(&[], program, Vec::new())
    }

    /// `ctr task exec` of a shell script, to its end.
    pub fn shell(&self, script: &str) -> Result<Output> {
        self.exec(&["sh", "-c", script])
    }

    /// `ctr task exec` with flags and input, to its end.
    pub fn exec_with(&self, flags: &[&str], program: &[&str], stdin: Vec<u8>) -> Result<Output> {
        let number = NAMES.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new("ctr");
        command
            .args(["task", "exec", "--exec-id", &format!("exec-{number}")])
            .args(flags)
            .arg(&self.0)
            .args(program);
        command::run(&mut command, stdin, Deadline::after(deadline::BOOT))
    }

    /// `ctr task kill`.
    pub fn kill(&self, signal: &str) -> Result<()> {
        ctr(&["task", "kill", "--signal", signal, &self.0])?.success()?;
        Ok(())
    }

    /// `ctr task rm` of a task that has stopped; gives its exit status, which ctr warns of unless it is 0.
    pub fn task_status(&self) -> Result<i32> {
        let removed = ctr(&["task", "rm", &self.0])?.success()?;
        let Some((_, status)) = removed.stderr.split_once("exit with non-zero exit code ") else {
            ensure!(removed.stderr.is_empty(), "{removed:?}");
            return Ok(0);
        };
        let digits = status.split(|c: char| !c.is_ascii_digit()).next();
        let digits = digits.unwrap_or_default();
        digits
            .parse()
            .with_context(|| format!("no status in {removed:?}"))
    }

    /// `ctr container rm`.
    pub fn remove(&self) -> Result<()> {
        ctr(&["container", "rm", &self.0])?.success()?;
        Ok(())
    }

    /// Waits until `ctr task ls` says so of this container.
    pub fn wait_for(&self, state: &str) -> Result<()> {
        let what = format!("{} to be {state}", self.0);
        deadline::until(&what, Deadline::after(deadline::BOOT), || {
            let list = ctr(&["task", "ls"])?.success()?.text();
            let found = list.lines().any(|line| {
                let mut words = line.split_whitespace();
                words.next() == Some(&self.0) && words.any(|word| word == state)
            });
            Ok(found.then_some(()))
        })
    }

    /// Its shim.
    pub fn shim(&self) -> Result<Process> {
        let of_this = |process: &Process| {
            let mut words = process.command.split(' ');
            words.any(|word| word == "-id") && words.next() == Some(&self.0)
        };
        deadline::until("a shim", Deadline::after(deadline::REQUEST), || {
            // Not `start` or `delete`, which come and go.
            let shims = processes::list()?.into_iter().filter(|process| {
                process.command.contains("containerd-shim-")
                    && of_this(process)
                    && !process.command.ends_with(" start")
                    && !process.command.ends_with(" delete")
            });
            Ok(shims.min())
        })
    }

    /// Its VMM.
    pub fn vmm(&self) -> Result<Process> {
        let shim = self.shim()?;
        deadline::until("a VMM", Deadline::after(deadline::REQUEST), || {
            let mut vmms = processes::named("walnut-vmm")?;
            vmms.retain(|vmm| vmm.parent == shim.pid);
            ensure!(vmms.len() <= 1, "a Pod has one VMM, not {vmms:?}");
            Ok(vmms.pop())
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Most have gone already; what stays is for the leak check to find.
        let known = ctr(&["container", "ls", "--quiet"])
            .map(|list| list.text().lines().any(|line| line == self.0))
            .unwrap_or(true);
        if known {
            let _ = ctr(&["task", "rm", "--force", &self.0]);
            let _ = ctr(&["container", "rm", &self.0]);
        }
    }
}
