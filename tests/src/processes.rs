//! The machine's processes, as `/proc` shows them.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;

/// A process of interest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Its command line, with spaces between the arguments.
    pub command: String,
}

impl Process {
    /// Whether its program is `name`.
    pub fn runs(&self, name: &str) -> bool {
        let program = self.command.split(' ').next().unwrap_or_default();
        program.rsplit('/').next() == Some(name)
    }

    /// Sends it a signal; a process that has gone is no error.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid).context("process 0 has no signals")?;
        match kill_process(pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => bail!("cannot signal process {}: {error}", self.pid),
        }
    }
}

/// All processes that have a command line, so neither kernel threads nor zombies.
pub fn list() -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let name = entry.context("cannot list /proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process that ends while it is looked at is one that isn't there.
        if let Some(process) = read(pid) {
            processes.push(process);
        }
    }
    Ok(processes)
}

/// The processes whose program is `name`.
pub fn named(name: &str) -> Result<Vec<Process>> {
    let mut processes = list()?;
    processes.retain(|process| process.runs(name));
    Ok(processes)
}

fn read(pid: i32) -> Option<Process> {
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    let command = command.trim_end_matches('\0').replace('\0', " ");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold any character: the fields after it are state and parent.
    let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
    (!command.is_empty()).then_some(Process {
        pid,
        parent: parent.parse().ok()?,
        command,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_listed_with_its_parent() {
        let own = i32::try_from(std::process::id()).unwrap();
        let listed = list().unwrap();
        let process = listed.iter().find(|process| process.pid == own).unwrap();
        assert_eq!(
            u32::try_from(process.parent).unwrap(),
            std::os::unix::process::parent_id()
        );
    }
}
