//! QEMU's monitor protocol, as far as saving and restoring needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Saving a template writes a few hundred megabytes at most.
const LIMIT: Duration = Duration::from_secs(120);

/// One monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets the monitor.
    pub(crate) fn connect(stream: UnixStream) -> Result<Self> {
        stream
            .set_read_timeout(Some(LIMIT))
            .context("set the monitor's deadline")?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            bail!("the monitor greets with {greeting}");
        }
        qmp.command("qmp_capabilities", json!({}))?;
        let capabilities = json!([
            { "capability": "x-ignore-shared", "state": true },
            { "capability": "events", "state": true },
        ]);
        qmp.command(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
        )?;
        Ok(qmp)
    }

    /// Lets the processors run.
    pub(crate) fn resume(&mut self) -> Result<()> {
        self.command("cont", json!({}))
    }

    /// Stops the processors and saves all state but the RAM, which is in its file.
    pub(crate) fn save(&mut self, state: &Path) -> Result<()> {
        self.command("stop", json!({}))?;
        self.command("migrate", json!({ "uri": file_uri(state) }))?;
        self.await_migration()
    }

    /// Loads what [`Self::save`] saved; the processors stay stopped.
    pub(crate) fn load(&mut self, state: &Path) -> Result<()> {
        self.command("migrate-incoming", json!({ "uri": file_uri(state) }))?;
        self.await_migration()
    }

    /// Ends QEMU.
    pub(crate) fn quit(&mut self) -> Result<()> {
        self.command("quit", json!({}))
    }

    fn await_migration(&mut self) -> Result<()> {
        loop {
            let message = self.receive()?;
            if message["event"] == "MIGRATION" {
                match message["data"]["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed") => bail!("QEMU failed to move the lab's state: {message}"),
                    _ => {}
                }
            }
        }
    }

    fn command(&mut self, name: &str, arguments: Value) -> Result<()> {
        let mut line = json!({ "execute": name, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .context("write to QEMU's monitor")?;
        loop {
            let message = self.receive()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {name}: {error}");
            }
            if message.get("return").is_some() {
                return Ok(());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self
            .stream
            .read_line(&mut line)
            .context("read QEMU's monitor")?
            == 0
        {
            bail!("QEMU ended");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU's monitor says {line:?}"))
    }
}

fn file_uri(path: &Path) -> String {
    format!("file:{}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_command_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let script = b"{\"QMP\": {}}\n{\"return\": {}}\n{\"return\": {}}\n\
            {\"event\": \"STOP\"}\n{\"error\": {\"desc\": \"no\"}}\n";
        theirs.write_all(script).unwrap();
        let mut qmp = Qmp::connect(ours).unwrap();
        let error = qmp.resume().unwrap_err().to_string();
        assert!(error.contains("cont") && error.contains("no"), "{error}");
    }
}
