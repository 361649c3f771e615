//! Tells the person who waits what goes on: one line when a long step starts, one every few
//! seconds while it runs, one when it ends.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a running step is reported.
const TICK: Duration = Duration::from_secs(15);

/// The clock that all progress lines show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    started: Instant,
}

impl Progress {
    /// Starts the clock.
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
        }
    }

    /// Prints one line.
    pub(crate) fn say(self, step: &str, text: &str) {
        eprintln!(
            "[{:>6.1} s] {step}: {text}",
            self.started.elapsed().as_secs_f64()
        );
    }

    /// Runs one long step.
    pub(crate) fn step<T>(
        self,
        step: &str,
        what: &str,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.say(step, what);
        let started = Instant::now();
        let value = run()?;
        self.say(
            step,
            &format!("done in {:.1} s", started.elapsed().as_secs_f64()),
        );
        Ok(value)
    }

    /// Runs a program with its output in a log; its last line is shown while it runs, and its last
    /// lines if it fails.
    pub(crate) fn run(self, step: &str, command: &mut Command, log: &Path) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        if let Some(folder) = log.parent() {
            fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        }
        let output = File::create(log).with_context(|| format!("create {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("share the log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("run {program}"))?;
        let (ended, end) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            let status = child.wait();
            let _ = ended.send(());
            status
        });
        while matches!(end.recv_timeout(TICK), Err(RecvTimeoutError::Timeout)) {
            let line = tail(log, 1);
            self.say(
                step,
                &format!("… {}", line.trim().chars().take(90).collect::<String>()),
            );
        }
        let status = waiter
            .join()
            .map_err(|_| anyhow::anyhow!("wait for {program}: panicked"))?;
        let status = status.with_context(|| format!("wait for {program}"))?;
        if !status.success() {
            bail!(
                "{program} failed ({status}); its last lines:\n{}\nall of them: {}",
                tail(log, 20),
                log.display()
            );
        }
        Ok(())
    }
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path, count: usize) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo the reason >&2; exit 1"]);
        let log = folder.path().join("logs/step.log");
        let error = Progress::new()
            .run("step", &mut command, &log)
            .unwrap_err()
            .to_string();
        assert!(error.contains("the reason"), "{error}");
    }
}
