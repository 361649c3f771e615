//! How a VM ended, in words: from the VMM's exit status, its standard error, and the guest's console.
//!
//! What a guest says is bounded and printable.

use crate::error::printable;
use std::{fs::File, io, os::unix::process::ExitStatusExt as _, path::Path, process::ExitStatus};
use tokio::{io::AsyncReadExt as _, process::ChildStderr};
use walnut_vmm_api::VmmExit;

const MAX_STDERR_BYTES: usize = 8 * 1024;
const MAX_CONSOLE_BYTES: u64 = 4 * 1024;
/// Longest reason that is told.
pub(crate) const MAX_REASON_BYTES: usize = 3 * 1024;

/// What a VMM's exit status says.
pub(crate) fn describe_status(status: Option<ExitStatus>) -> String {
    let Some(status) = status else {
        return "its exit status is lost".to_owned();
    };
    match (status.code(), status.signal()) {
        (Some(code), _) => match VmmExit::from_code(code) {
            Some(exit) => exit.describe().to_owned(),
            None => format!("walnut-vmm failed with status {code}"),
        },
        (None, Some(libc::SIGSYS)) => {
            "walnut-vmm was killed for a system call that its jail forbids \
             (SIGSYS; the host's audit log, `dmesg | grep type=1326`, tells which)"
                .to_owned()
        }
        (None, Some(signal)) => format!("walnut-vmm was killed by signal {signal}"),
        (None, None) => "walnut-vmm ended".to_owned(),
    }
}

/// The last bytes of the console log: what the guest said, so bounded and printable.
pub(crate) fn console_tail(path: &Path) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_CONSOLE_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(MAX_CONSOLE_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    printable(String::from_utf8_lossy(&bytes).trim(), MAX_REASON_BYTES)
}

/// Reads to the end, so that the VMM never blocks, and keeps the last bytes.
pub(crate) async fn read_stderr(stderr: Option<ChildStderr>) -> String {
    let Some(mut stderr) = stderr else {
        return String::new();
    };
    let mut kept = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stderr.read(&mut buffer).await {
        kept.extend_from_slice(buffer.get(..length).unwrap_or_default());
        let excess = kept.len().saturating_sub(MAX_STDERR_BYTES);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn ends_are_told_in_words() {
        for (raw, expected) in [
            (66 << 8, "the guest kernel panicked"),
            (1 << 8, "walnut-vmm failed with status 1"),
            (9, "walnut-vmm was killed by signal 9"),
        ] {
            assert_eq!(describe_status(Some(ExitStatus::from_raw(raw))), expected);
        }
        let forbidden = describe_status(Some(ExitStatus::from_raw(libc::SIGSYS)));
        assert!(forbidden.contains("its jail forbids") && forbidden.contains("type=1326"));
    }

    #[test]
    fn the_consoles_tail_is_bounded_and_printable() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        assert_eq!(console_tail(&path), "");
        fs::write(&path, format!("{}\u{1b}[1mpanic\n", "x".repeat(100_000))).unwrap();
        let tail = console_tail(&path);
        assert!(tail.len() <= MAX_REASON_BYTES + 3);
        assert!(tail.chars().all(|character| !character.is_control()));
    }
}
