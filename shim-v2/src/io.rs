//! Between containerd's FIFOs and the guest's stdio streams, without losing a byte.
//!
//! containerd's client owns the other end of each FIFO and may open it late, go and come back: both ends
//! of an output FIFO are open here, so that opening never waits and writing never fails for want of a reader,
//! and a write end of the input FIFO is, so that a client that detaches doesn't end the input. The input
//! ends only by CloseIO.
//!
//! The input's FIFO is opened when the process is started: a client may see the end of its own input as
//! soon as someone reads, and calls CloseIO only if Create or Exec has been answered by then.

use crate::agent::{Agent, AgentError, StreamNames};
use std::{
    fs::File,
    future::Future,
    io::{self, Write as _},
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixStream,
        unix::pipe::{self, OpenOptions},
    },
    sync::Notify,
    task::{AbortHandle, JoinSet},
};

const CHUNK_BYTES: usize = 32 * 1024;
/// Output that doesn't move for this long is held up: by a reader that has gone, or by a process that
/// outlives its parent and keeps the stream open. Its copying goes on, but nobody waits for it any more.
const STALL_DEADLINE: Duration = Duration::from_secs(10);

/// Why stdio can't be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IoError {
    /// A FIFO or a file.
    #[error("opening {which} {path:?} failed")]
    Open {
        /// Which stream.
        which: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A way of logging that isn't built.
    #[error("{which} {address:?}: only FIFOs and \"file://\" are supported")]
    Scheme {
        /// Which stream.
        which: &'static str,
        /// What was asked for.
        address: String,
    },
    /// The guest's end.
    #[error("opening {0} in the guest failed", which)]
    Stream {
        /// Which stream.
        which: &'static str,
        /// Why.
        source: AgentError,
    },
}

/// What containerd asked for; empty is `/dev/null`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    /// Address of the input.
    pub(crate) stdin: String,
    /// Address of the output.
    pub(crate) stdout: String,
    /// Address of the error output; unused with a terminal.
    pub(crate) stderr: String,
    /// One terminal for all three.
    pub(crate) terminal: bool,
}

/// A process's running copies. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Streams {
    stdin: Option<Stdin>,
    outputs: JoinSet<()>,
    moved_bytes: Arc<AtomicU64>,
}

/// Whether all output has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Every output stream ended.
    Complete,
    /// Output no longer moves.
    Stalled,
}

#[derive(Debug)]
struct Stdin {
    close: Arc<Notify>,
    phase: Input,
}

#[derive(Debug)]
enum Input {
    /// The process isn't started yet.
    Waiting { fifo: PathBuf, stream: UnixStream },
    /// Bytes flow.
    Copying(AbortHandle),
    /// Could not be opened; the process is not started.
    Failed,
}

impl Drop for Stdin {
    fn drop(&mut self) {
        if let Input::Copying(task) = &self.phase {
            task.abort();
        }
    }
}

enum Sink {
    Fifo(pipe::Sender),
    File(File),
}

enum Target<'a> {
    Null,
    Fifo(&'a Path),
    File(&'a Path),
}

impl Streams {
    /// No streams.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self {
            stdin: None,
            outputs: JoinSet::new(),
            moved_bytes: Arc::default(),
        }
    }

    /// Opens containerd's FIFOs and the guest's streams and starts copying.
    pub(crate) async fn open(agent: &Agent, stdio: &Stdio) -> Result<(Self, StreamNames), IoError> {
        let mut names = StreamNames::default();
        let mut streams = Self {
            stdin: None,
            outputs: JoinSet::new(),
            moved_bytes: Arc::default(),
        };
        // containerd's side first: it costs the guest nothing when it fails.
        let input = check_input(&stdio.stdin)?;
        let stdout = open_output("stdout", &stdio.stdout)?;
        let stderr = if stdio.terminal {
            None
        } else {
            open_output("stderr", &stdio.stderr)?
        };
        if let Some(fifo) = input {
            let stream = stream(agent, "stdin", &mut names.stdin).await?;
            streams.stdin = Some(Stdin {
                close: Arc::default(),
                phase: Input::Waiting { fifo, stream },
            });
        }
        if let Some(sink) = stdout {
            let stream = stream(agent, "stdout", &mut names.stdout).await?;
            streams.start_output(stream, sink);
        }
        if let Some(sink) = stderr {
            let stream = stream(agent, "stderr", &mut names.stderr).await?;
            streams.start_output(stream, sink);
        }
        Ok((streams, names))
    }

    /// Starts copying the input, for a process that is about to start.
    pub(crate) fn start_stdin(&mut self) -> Result<(), IoError> {
        let Some(stdin) = &mut self.stdin else {
            return Ok(());
        };
        let Input::Waiting { fifo, stream } = std::mem::replace(&mut stdin.phase, Input::Failed)
        else {
            return Ok(());
        };
        let (receiver, write_end) = open_input(&fifo)?;
        let closed = Arc::clone(&stdin.close);
        let task = tokio::spawn(async move {
            let copied = copy_input(receiver, write_end, stream, &closed).await;
            // The process may close its input whenever it likes; the client then sees a broken pipe.
            drop(copied);
        });
        stdin.phase = Input::Copying(task.abort_handle());
        Ok(())
    }

    fn start_output(&mut self, stream: UnixStream, sink: Sink) {
        let moved_bytes = Arc::clone(&self.moved_bytes);
        self.outputs.spawn(copy_output(stream, sink, moved_bytes));
    }

    /// Ends the input once what has been written to its FIFO is through.
    pub(crate) fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.close.notify_one();
        }
    }

    /// Ends the input at once: its process has gone.
    pub(crate) fn abandon_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until every output stream has ended, or until output no longer moves.
    pub(crate) async fn drain(&mut self) -> Drained {
        let moved_bytes = Arc::clone(&self.moved_bytes);
        let outputs = &mut self.outputs;
        let all = async { while outputs.join_next().await.is_some() {} };
        unless_stalled(all, STALL_DEADLINE, || moved_bytes.load(Ordering::Relaxed)).await
    }
}

/// Waits for `work` as long as `progress` changes within each `patience`.
async fn unless_stalled(
    work: impl Future<Output = ()>,
    patience: Duration,
    progress: impl Fn() -> u64,
) -> Drained {
    tokio::pin!(work);
    let mut seen = progress();
    loop {
        if tokio::time::timeout(patience, &mut work).await.is_ok() {
            return Drained::Complete;
        }
        let now = progress();
        if now == seen {
            return Drained::Stalled;
        }
        seen = now;
    }
}

async fn stream(
    agent: &Agent,
    which: &'static str,
    name: &mut String,
) -> Result<UnixStream, IoError> {
    let (id, stream) = agent
        .open_stream()
        .await
        .map_err(|source| IoError::Stream { which, source })?;
    *name = id;
    Ok(stream)
}

fn target<'a>(which: &'static str, address: &'a str) -> Result<Target<'a>, IoError> {
    match address.split_once("://") {
        _ if address.is_empty() => Ok(Target::Null),
        None if address.starts_with('/') => Ok(Target::Fifo(Path::new(address))),
        Some(("fifo", path)) => Ok(Target::Fifo(Path::new(path))),
        Some(("file", path)) if path.starts_with('/') => Ok(Target::File(Path::new(path))),
        _ => Err(IoError::Scheme {
            which,
            address: address.to_owned(),
        }),
    }
}

/// The input's FIFO, not opened.
fn check_input(address: &str) -> Result<Option<PathBuf>, IoError> {
    let which = "stdin";
    let path = match target(which, address)? {
        Target::Null => return Ok(None),
        Target::Fifo(path) => path,
        Target::File(_) => {
            return Err(IoError::Scheme {
                which,
                address: address.to_owned(),
            });
        }
    };
    let is_fifo = std::fs::metadata(path).and_then(|metadata| match metadata.file_type() {
        kind if kind.is_fifo() => Ok(()),
        _ => Err(io::Error::other("it is not a FIFO")),
    });
    let path = path.to_owned();
    match is_fifo {
        Ok(()) => Ok(Some(path)),
        Err(source) => Err(IoError::Open {
            which,
            path,
            source,
        }),
    }
}

/// The read end and a write end of the input's FIFO.
fn open_input(path: &Path) -> Result<(pipe::Receiver, File), IoError> {
    let failed = |source| IoError::Open {
        which: "stdin",
        path: path.to_owned(),
        source,
    };
    let receiver = OpenOptions::new().open_receiver(path).map_err(failed)?;
    // Doesn't wait, as there is a reader now.
    let write_end = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    Ok((receiver, write_end))
}

fn open_output(which: &'static str, address: &str) -> Result<Option<Sink>, IoError> {
    match target(which, address)? {
        Target::Null => Ok(None),
        Target::Fifo(path) => OpenOptions::new()
            .read_write(true)
            .open_sender(path)
            .map(|sender| Some(Sink::Fifo(sender)))
            .map_err(|source| IoError::Open {
                which,
                path: path.to_owned(),
                source,
            }),
        Target::File(path) => File::options()
            .append(true)
            .create(true)
            .open(path)
            .map(|file| Some(Sink::File(file)))
            .map_err(|source| IoError::Open {
                which,
                path: path.to_owned(),
                source,
            }),
    }
}

async fn copy_input(
    mut fifo: pipe::Receiver,
    write_end: File,
    mut stream: UnixStream,
    close: &Notify,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        tokio::select! {
            biased;
            () = close.notified() => break,
            read = fifo.read(&mut buffer) => {
                let length = read?;
                stream.write_all(buffer.get(..length).unwrap_or_default()).await?;
            }
        }
    }
    drop(write_end);
    // A client that calls CloseIO has written all its bytes, but may still have the FIFO open: what is there
    // now is all there is.
    loop {
        match rustix::io::read(&fifo, buffer.as_mut_slice()) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
            Ok(length) => {
                stream
                    .write_all(buffer.get(..length).unwrap_or_default())
                    .await?
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    stream.shutdown().await?;
    // Keep the connection until the guest has read everything and closes its side, or the process ends.
    let _ = stream.read(&mut buffer).await?;
    Ok(())
}

async fn copy_output(mut stream: UnixStream, mut sink: Sink, moved_bytes: Arc<AtomicU64>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut failed = false;
    // A stream that breaks has ended: the VM's death is told by its exit, not here.
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        let bytes = buffer.get(..length).unwrap_or_default();
        let written = match &mut sink {
            _ if failed => Ok(()),
            Sink::Fifo(fifo) => fifo.write_all(bytes).await,
            Sink::File(file) => file.write_all(bytes),
        };
        if let Err(error) = written {
            // The process must not stop because its log can't be written; say so once.
            crate::log::error("output is lost from here on", &error);
            failed = true;
        }
        moved_bytes.fetch_add(u64::try_from(length).unwrap_or(0), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, mkfifoat};

    fn fifo(directory: &Path) -> PathBuf {
        let path = directory.join("fifo");
        mkfifoat(CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        path
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length)
            .map(|index| u8::try_from(index % 251).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn output_reaches_a_reader_that_comes_late_and_ends_with_the_stream() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let (mut guest, host) = UnixStream::pair().unwrap();
        let sink = open_output("stdout", path.to_str().unwrap())
            .unwrap()
            .unwrap();
        let mut outputs = JoinSet::new();
        let moved_bytes = Arc::new(AtomicU64::new(0));
        outputs.spawn(copy_output(host, sink, Arc::clone(&moved_bytes)));
        let mut streams = Streams {
            stdin: None,
            outputs,
            moved_bytes,
        };
        let sent = pattern(8 << 20);
        let expected = sent.clone();
        let writer = tokio::spawn(async move { guest.write_all(&sent).await.unwrap() });
        let reader = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
        assert_eq!(streams.drain().await, Drained::Complete);
        writer.await.unwrap();
        assert!(reader.await.unwrap() == expected);
    }

    #[tokio::test]
    async fn input_survives_a_client_that_detaches_and_ends_by_close() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let (mut guest, host) = UnixStream::pair().unwrap();
        let fifo = check_input(path.to_str().unwrap()).unwrap().unwrap();
        let mut streams = Streams::none();
        streams.stdin = Some(Stdin {
            close: Arc::default(),
            phase: Input::Waiting { fifo, stream: host },
        });
        streams.start_stdin().unwrap();
        let sent = pattern(20 << 20);
        let expected = sent.clone();
        let reader = tokio::spawn(async move {
            let mut bytes = Vec::new();
            guest.read_to_end(&mut bytes).await.unwrap();
            bytes
        });
        // Each half by a client of its own, the last of which still holds the FIFO at the close.
        let last = tokio::task::spawn_blocking(move || {
            let (first, second) = sent.split_at(sent.len() / 2);
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .write_all(first)
                .unwrap();
            let mut last = File::options().write(true).open(&path).unwrap();
            last.write_all(second).unwrap();
            last
        })
        .await
        .unwrap();
        streams.close_stdin();
        assert!(reader.await.unwrap() == expected);
        drop(last);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_stays_open_stalls_and_one_that_moves_does_not() {
        let moved = AtomicU64::new(0);
        let work = async {
            for _ in 0..5 {
                tokio::time::sleep(STALL_DEADLINE - Duration::from_secs(1)).await;
                moved.fetch_add(1, Ordering::Relaxed);
            }
        };
        let drained = unless_stalled(work, STALL_DEADLINE, || moved.load(Ordering::Relaxed)).await;
        assert_eq!(drained, Drained::Complete);
        let drained = unless_stalled(std::future::pending(), STALL_DEADLINE, || 0).await;
        assert_eq!(drained, Drained::Stalled);
    }

    #[tokio::test]
    async fn a_file_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "before ").unwrap();
        let sink = open_output("stdout", &format!("file://{}", path.display()))
            .unwrap()
            .unwrap();
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(b"after").await.unwrap();
        drop(guest);
        copy_output(host, sink, Arc::default()).await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before after");
    }

    #[tokio::test]
    async fn a_close_that_comes_before_the_start_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = fifo(directory.path());
        let (mut guest, stream) = UnixStream::pair().unwrap();
        let mut streams = Streams::none();
        streams.stdin = Some(Stdin {
            close: Arc::default(),
            phase: Input::Waiting { fifo, stream },
        });
        streams.close_stdin();
        streams.start_stdin().unwrap();
        let mut bytes = Vec::new();
        guest.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes.is_empty());
    }

    #[test]
    fn an_input_that_is_not_a_fifo_is_named() {
        for address in ["/dev/null", "/does/not/exist", "file:///dev/null"] {
            let error = check_input(address).unwrap_err().to_string();
            assert!(error.contains(address), "{error}");
        }
    }

    #[test]
    fn other_schemes_are_named() {
        for address in ["binary:///bin/logger", "relative", "file://relative"] {
            let error = open_output("stdout", address)
                .map(drop)
                .unwrap_err()
                .to_string();
            assert!(error.contains(address), "{error}");
        }
    }
}
