//! Lines for containerd's log.
//!
//! The server's standard error is the bundle's `log` FIFO, which containerd copies into its own log. A
//! line is lost rather than waited for: the FIFO doesn't block, and nothing here fails.

use std::io::Write as _;

/// Longest line: what a guest or a file said must not flood the log.
const MAX_LINE_BYTES: usize = 2048;

/// Writes one line.
pub(crate) fn line(message: &str) {
    let mut line = crate::error::printable(message, MAX_LINE_BYTES);
    line.insert_str(0, "walnut-shim: ");
    line.push('\n');
    // A full or closed FIFO is not a reason to stop serving containers.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Writes one line with the whole chain of an error.
pub(crate) fn error(what: &str, error: &(dyn std::error::Error + 'static)) {
    line(&format!("{what}: {}", crate::error::one_line(error)));
}
