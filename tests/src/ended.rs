//! The end of a VMM, as its parent sees it.

use crate::command::End;
use anyhow::{Result, ensure};
use walnut_vmm_api::{Message, VmmExit};

/// How a VMM ended, and what it and its guest said.
#[derive(Debug)]
pub struct Ended {
    /// How the process ended.
    pub end: End,
    /// What that means by the contract; `None` for a fault of the VMM itself.
    pub status: Option<VmmExit>,
    /// Every message that came on the control socket.
    pub messages: Vec<Message>,
    /// The guest's serial console.
    pub console: String,
    /// The VMM's standard error.
    pub stderr: String,
}

impl Ended {
    /// Fails unless the VMM ended so.
    pub fn ends_with(&self, expected: VmmExit) -> Result<&Self> {
        ensure!(
            self.status == Some(expected),
            "expected the end {expected:?}, but it was {self:?}"
        );
        Ok(self)
    }

    /// Fails unless the VMM said at most `lines` lines on standard error, each of them its own.
    pub fn says_at_most(&self, lines: usize) -> Result<&Self> {
        let said: Vec<_> = self.stderr.lines().collect();
        ensure!(
            said.len() <= lines && said.iter().all(|line| line.starts_with("walnut-vmm: ")),
            "expected {lines} lines of the VMM's on stderr: {:?}",
            self.stderr
        );
        Ok(self)
    }
}
