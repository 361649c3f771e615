//! A guest's console as a pipe: the arrival of a line is an event.

use anyhow::{Context, Result, bail};
use std::{
    io::{BufRead, BufReader, PipeReader},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::Instant,
};
use walnut_tests::deadline::{self, Deadline};

/// What a guest says, line by line, each with the moment at which it came.
pub(crate) struct Console {
    lines: Receiver<(Instant, String)>,
}

impl Console {
    /// Reads on a thread of its own, which ends with the last writer of the pipe.
    pub(crate) fn new(pipe: PipeReader) -> Self {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n') {
                let Ok(line) = line else { return };
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send((Instant::now(), text)).is_err() {
                    return;
                }
            }
        });
        Self { lines }
    }

    /// The next line and when it came.
    pub(crate) fn next_line(&self, deadline: Deadline) -> Result<(Instant, String)> {
        match self.lines.recv_timeout(deadline.left()) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("no line of the guest's by the deadline"),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest ended"),
        }
    }

    /// Waits for a line that holds `word`: when it came, and what follows the word.
    pub(crate) fn wait_for(&self, word: &str) -> Result<(Instant, String)> {
        let deadline = Deadline::after(deadline::BOOT);
        let mut seen = String::new();
        loop {
            let next = self.next_line(deadline);
            let (at, line) = next.with_context(|| format!("no {word:?}, but: {seen}"))?;
            match line.split_once(word) {
                Some((_, rest)) => return Ok((at, rest.to_owned())),
                None => seen.push_str(&format!("{line}\n")),
            }
        }
    }
}
