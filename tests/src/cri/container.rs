//! A container of a Pod.

use super::{LogLine, Pod, Streaming, bytes, log, merge, number, text};
use crate::deadline::{self, Deadline};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::path::PathBuf;

/// A container. It goes with its Pod.
#[derive(Debug)]
pub struct Container<'a> {
    pub(super) pod: &'a Pod<'a>,
    /// Its id.
    pub id: String,
    pub(super) log: PathBuf,
}

/// What `ExecSync` gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// The exit status.
    pub code: i64,
    /// Standard output as text, without its last newline.
    pub stdout: String,
    /// Standard error likewise.
    pub stderr: String,
}

impl Container<'_> {
    /// Calls a method whose request is this container's id, and perhaps more.
    pub fn ask(&self, method: &str, more: Value) -> Result<Value> {
        let mut request = json!({ "container_id": self.id });
        merge(&mut request, more);
        self.pod.cri.call(method, request)
    }

    /// `StartContainer`.
    pub fn start(&self) -> Result<()> {
        self.ask("StartContainer", json!({})).map(drop)
    }

    /// `StopContainer`, with this many seconds to end by itself.
    pub fn stop(&self, seconds: u32) -> Result<()> {
        self.ask("StopContainer", json!({ "timeout": seconds }))
            .map(drop)
    }

    /// `RemoveContainer`.
    pub fn remove(&self) -> Result<()> {
        self.ask("RemoveContainer", json!({})).map(drop)
    }

    /// `ExecSync` of a script, without a limit.
    pub fn exec(&self, script: &str) -> Result<ExecResult> {
        self.exec_within(script, 0)
    }

    /// `ExecSync` of a script that may take this many seconds.
    pub fn exec_within(&self, script: &str, seconds: u32) -> Result<ExecResult> {
        let more = json!({ "cmd": ["sh", "-c", script], "timeout": seconds });
        let answer = self.ask("ExecSync", more)?;
        let text = |name: &str| -> Result<String> {
            let bytes = bytes(&answer[name])?;
            Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
        };
        Ok(ExecResult {
            code: number(&answer["exit_code"])?,
            stdout: text("stdout")?,
            stderr: text("stderr")?,
        })
    }

    /// The standard output of a script that must succeed.
    pub fn output(&self, script: &str) -> Result<String> {
        let result = self.exec(script)?;
        ensure!(result.code == 0, "{script:?}: {result:?}");
        Ok(result.stdout)
    }

    /// `Exec` of a script, with its streams.
    pub fn stream(&self, script: &str, stdin: bool, tty: bool) -> Result<Streaming> {
        let answer = self.ask(
            "Exec",
            json!({
                "cmd": ["sh", "-c", script],
                "stdin": stdin, "stdout": true, "stderr": !tty, "tty": tty,
            }),
        )?;
        Streaming::open(&text(&answer["url"])?)
    }

    /// `Attach` to the container's own streams.
    pub fn attach(&self, tty: bool) -> Result<Streaming> {
        let more = json!({ "stdin": true, "stdout": true, "stderr": !tty, "tty": tty });
        let answer = self.ask("Attach", more)?;
        Streaming::open(&text(&answer["url"])?)
    }

    /// Its status.
    pub fn status(&self) -> Result<Value> {
        let mut answer = self.ask("ContainerStatus", json!({}))?;
        Ok(answer["status"].take())
    }

    /// Waits for its end; gives its exit status and the reason.
    pub fn ended(&self) -> Result<(i64, String)> {
        let what = format!("the end of {}", self.id);
        let status = deadline::until(&what, Deadline::after(deadline::REQUEST), || {
            let status = self.status()?;
            Ok((status["state"] == "CONTAINER_EXITED").then_some(status))
        })?;
        Ok((number(&status["exit_code"])?, text(&status["reason"])?))
    }

    /// Its log up to now.
    pub fn log(&self) -> Result<Vec<LogLine>> {
        log::read(&self.log)
    }
}
