//! The console's log: what the guest prints by any console goes to one file, and the last of it is kept for
//! error messages.
//!
//! The guest decides how much it prints, so the log is bounded; a log that cannot be written must not stop
//! the guest.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use walnut_vmm_api::CONSOLE_TAIL_BYTES;

/// Bytes of the log at the most: a guest must not fill the host's disk.
const MAX_LOG_BYTES: usize = 4 * 1024 * 1024;
/// What stands at the end of a log that is full.
const LOG_FULL: &[u8] = b"\n[walnut-vmm: the console log is full, the rest is dropped]\n";
/// A line is written to the log when it ends, or when it has this many bytes.
const MAX_LINE_BYTES: usize = 256;

/// Where the output of a VM's consoles goes.
#[derive(Debug, Clone)]
pub struct ConsoleLog(Arc<Mutex<Output>>);

#[derive(Debug)]
struct Output {
    log: File,
    line: Vec<u8>,
    tail: VecDeque<u8>,
    room_bytes: usize,
}

impl Output {
    fn put(&mut self, byte: u8) {
        if self.tail.len() == CONSOLE_TAIL_BYTES {
            self.tail.pop_front();
        }
        self.tail.push_back(byte);
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= MAX_LINE_BYTES {
            self.write_line();
        }
    }

    fn write_line(&mut self) {
        if self.room_bytes > 0 {
            self.room_bytes = self.room_bytes.saturating_sub(self.line.len());
            if self.room_bytes == 0 {
                self.line.extend(LOG_FULL);
            }
            // A full disk is not the guest's fault and not a reason to stop it.
            let _ = self.log.write_all(&self.line);
        }
        self.line.clear();
    }
}

impl ConsoleLog {
    /// A log that is written to this file.
    pub fn new(log: File) -> Self {
        Self(Arc::new(Mutex::new(Output {
            log,
            line: Vec::new(),
            tail: VecDeque::new(),
            room_bytes: MAX_LOG_BYTES,
        })))
    }

    /// Writes what is left of an unfinished line to the log, and gives the last output as text.
    pub fn finish(&self) -> String {
        let mut output = self.lock();
        output.write_line();
        String::from_utf8_lossy(output.tail.make_contiguous()).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.lock();
        bytes.iter().for_each(|&byte| output.put(byte));
        Ok(bytes.len())
    }

    /// COM1 calls it after each byte, so it does nothing: lines are written when they end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom};

    fn log() -> (ConsoleLog, File) {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        (ConsoleLog::new(file.try_clone().unwrap()), file)
    }

    fn logged(file: &mut File) -> Vec<u8> {
        let mut contents = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut contents).unwrap();
        contents
    }

    #[test]
    fn output_is_logged_by_lines_and_whole_in_the_end() {
        let (mut log, mut file) = log();
        log.write_all(b"Linux version\npanic").unwrap();
        assert_eq!(logged(&mut file), b"Linux version\n");
        assert_eq!(log.finish(), "Linux version\npanic");
        assert_eq!(logged(&mut file), b"Linux version\npanic");
    }

    #[test]
    fn the_tail_and_the_log_are_bounded() {
        let (mut log, mut file) = log();
        let mut line = vec![b'a'; 1023];
        line.push(b'\n');
        for _ in 0..MAX_LOG_BYTES / 1024 + 10 {
            log.write_all(&line).unwrap();
        }
        log.write_all(b"the end").unwrap();
        let tail = log.finish();
        assert_eq!(tail.len(), CONSOLE_TAIL_BYTES);
        assert!(tail.ends_with("the end"));
        let contents = logged(&mut file);
        assert!(contents.len() < MAX_LOG_BYTES + 1024);
        assert!(contents.ends_with(LOG_FULL));
    }
}
