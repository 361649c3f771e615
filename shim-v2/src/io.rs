//! Between containerd's FIFOs and the guest's stdio streams, without losing a byte.
//!
//! containerd's client owns the other end of each FIFO and may open it late, go and come back: both ends
//! of an output FIFO are open here, so that opening never waits and writing never fails for want of a reader,
//! and a write end of the input FIFO is, so that a client that detaches doesn't end the input. The input
//! ends only by CloseIO.
//!
//! The input's FIFO is opened when the process is started: a client may see the end of its own input as
//! soon as someone reads, and calls CloseIO only if Create or Exec has been answered by then.

use crate::{
    agent::{Agent, AgentError, StreamNames},
    log_binary::{self, LogBinary, LogBinaryError, decode},
};
use rustix::fs::{Mode, OFlags};
use std::{
    fs::{self, File},
    future::Future,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
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
/// Output that doesn't move for this long after its process's end is held up. Its copying goes on until the
/// process is deleted, but nobody waits for it any more. By a reader that is slow:
const SLOW_DEADLINE: Duration = Duration::from_secs(10);
/// By a process that outlives its parent and keeps the stream open: nothing is on its way.
const QUIET_DEADLINE: Duration = Duration::from_secs(3);
/// By a reader that has gone and may come back.
const GONE_DEADLINE: Duration = Duration::from_secs(1);

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
    /// A way of logging that doesn't exist.
    #[error(
        "{which} {address:?}: only FIFOs, \"file://\" and, for output, \"binary://\" are supported"
    )]
    Scheme {
        /// Which stream.
        which: &'static str,
        /// What was asked for.
        address: String,
    },
    /// A program that takes the output.
    #[error(transparent)]
    LogBinary(#[from] LogBinaryError),
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
    /// Who it belongs to, for a program that takes the output: a namespace of containerd and a process's id.
    pub(crate) owner: (Arc<str>, String),
}

/// A process's running copies. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Streams {
    stdin: Option<Stdin>,
    outputs: JoinSet<()>,
    flow: Arc<Flow>,
    fifos: Vec<OutputFifo>,
    /// Ends after its input, which the copies hold.
    _log_binary: Option<LogBinary>,
}

/// How the copies of a process's output get on.
#[derive(Debug, Default)]
struct Flow {
    moved_bytes: AtomicU64,
    /// Copies that wait for their reader.
    held_up: AtomicU64,
}

/// A FIFO of the output, whose read end is open here, so that writing doesn't fail without a reader.
#[derive(Debug)]
struct OutputFifo {
    /// Stands for the FIFO, even if its name is gone, and is neither a reader nor a writer.
    place: OwnedFd,
    read_end: Option<File>,
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
    File(PathBuf),
    Program,
}

impl Streams {
    /// No streams.
    pub(crate) fn none() -> Self {
        Self {
            stdin: None,
            outputs: JoinSet::new(),
            flow: Arc::default(),
            fifos: Vec::new(),
            _log_binary: None,
        }
    }

    /// Opens containerd's FIFOs and the guest's streams and starts copying.
    pub(crate) async fn open(agent: &Agent, stdio: &Stdio) -> Result<(Self, StreamNames), IoError> {
        let mut names = StreamNames::default();
        let mut streams = Self::none();
        // containerd's side first: it costs the guest nothing when it fails.
        let input = check_input(&stdio.stdin)?;
        let (stdout, stderr) = streams.open_outputs(stdio).await?;
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

    /// Where standard output and standard error go.
    async fn open_outputs(
        &mut self,
        stdio: &Stdio,
    ) -> Result<(Option<Sink>, Option<Sink>), IoError> {
        if let Target::Program = target("stdout", &stdio.stdout)? {
            let (namespace, id) = &stdio.owner;
            let (program, stdout, stderr) = log_binary::start(&stdio.stdout, namespace, id).await?;
            self._log_binary = Some(program);
            // One program takes both; containerd names it twice.
            let stderr = (!stdio.terminal).then_some(Sink::Fifo(stderr));
            return Ok((Some(Sink::Fifo(stdout)), stderr));
        }
        let stdout = self.open_output("stdout", &stdio.stdout)?;
        let stderr = match stdio.terminal {
            true => None,
            false => self.open_output("stderr", &stdio.stderr)?,
        };
        Ok((stdout, stderr))
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
        let flow = Arc::clone(&self.flow);
        self.outputs.spawn(copy_output(stream, sink, flow));
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
        let (outputs, fifos, flow) = (&mut self.outputs, &mut self.fifos, &self.flow);
        let all = async { while outputs.join_next().await.is_some() {} };
        let patience = || match flow.held_up.load(Ordering::Relaxed) {
            0 => QUIET_DEADLINE,
            _ if fifos.iter_mut().all(OutputFifo::has_reader) => SLOW_DEADLINE,
            _ => GONE_DEADLINE,
        };
        unless_stalled(all, patience, || flow.moved_bytes.load(Ordering::Relaxed)).await
    }

    fn open_output(&mut self, which: &'static str, address: &str) -> Result<Option<Sink>, IoError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| IoError::Open {
                which,
                path,
                source,
            }
        };
        match target(which, address)? {
            Target::Null => Ok(None),
            Target::Fifo(path) => {
                let fifo = OutputFifo::open(path).map_err(failed(path))?;
                let sender = OpenOptions::new().open_sender(path).map_err(failed(path))?;
                self.fifos.push(fifo);
                Ok(Some(Sink::Fifo(sender)))
            }
            Target::File(path) => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                let opened = fs::create_dir_all(parent)
                    .and_then(|()| File::options().append(true).create(true).open(&path));
                Ok(Some(Sink::File(opened.map_err(failed(&path))?)))
            }
            Target::Program => Err(IoError::Scheme {
                which,
                address: address.to_owned(),
            }),
        }
    }
}

impl OutputFifo {
    fn open(path: &Path) -> io::Result<Self> {
        let mut fifo = Self {
            place: rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?,
            read_end: None,
        };
        fifo.read_end = Some(fifo.reopen(File::options().read(true))?);
        Ok(fifo)
    }

    fn reopen(&self, options: &mut fs::OpenOptions) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.place.as_raw_fd());
        options.custom_flags(libc::O_NONBLOCK).open(path)
    }

    /// Whether someone else reads. The runtime has one thread, so that nothing is written meanwhile.
    fn has_reader(&mut self) -> bool {
        self.read_end = None;
        let probe = self.reopen(File::options().write(true));
        match self.reopen(File::options().read(true)) {
            Ok(read_end) => self.read_end = Some(read_end),
            Err(error) => crate::log::error("opening a FIFO again", &error),
        }
        // fifo(7): without a reader this fails with ENXIO.
        probe.is_ok()
    }
}

/// Waits for `work` as long as `progress` changes within each `patience`.
async fn unless_stalled(
    work: impl Future<Output = ()>,
    mut patience: impl FnMut() -> Duration,
    progress: impl Fn() -> u64,
) -> Drained {
    tokio::pin!(work);
    let mut seen = progress();
    // What is there already is taken without a look at who reads.
    let mut wait = Duration::ZERO;
    loop {
        if tokio::time::timeout(wait, &mut work).await.is_ok() {
            return Drained::Complete;
        }
        let now = progress();
        if now == seen && !wait.is_zero() {
            return Drained::Stalled;
        }
        (seen, wait) = (now, patience());
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
    let scheme = || {
        Err(IoError::Scheme {
            which,
            address: address.to_owned(),
        })
    };
    match address.split_once("://") {
        _ if address.is_empty() => Ok(Target::Null),
        None if address.starts_with('/') => Ok(Target::Fifo(Path::new(address))),
        Some(("fifo", path)) => Ok(Target::Fifo(Path::new(path))),
        Some(("file", path)) if path.starts_with('/') => match decode(path, false) {
            Some(path) => Ok(Target::File(path.into())),
            None => scheme(),
        },
        Some(("binary", _)) => Ok(Target::Program),
        _ => scheme(),
    }
}

/// The input's FIFO, not opened.
fn check_input(address: &str) -> Result<Option<PathBuf>, IoError> {
    let which = "stdin";
    let path = match target(which, address)? {
        Target::Null => return Ok(None),
        Target::Fifo(path) => path,
        Target::File(_) | Target::Program => {
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

async fn copy_output(mut stream: UnixStream, mut sink: Sink, flow: Arc<Flow>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut failed = false;
    // A stream that breaks has ended: the VM's death is told by its exit, not here.
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        let bytes = buffer.get(..length).unwrap_or_default();
        flow.held_up.fetch_add(1, Ordering::Relaxed);
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
        flow.held_up.fetch_sub(1, Ordering::Relaxed);
        let length = u64::try_from(length).unwrap_or(0);
        flow.moved_bytes.fetch_add(length, Ordering::Relaxed);
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
        let mut streams = Streams::none();
        let sink = streams.open_output("stdout", path.to_str().unwrap());
        streams.start_output(host, sink.unwrap().unwrap());
        let sent = pattern(8 << 20);
        let expected = sent.clone();
        let writer = tokio::spawn(async move { guest.write_all(&sent).await.unwrap() });
        let reader = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
        assert_eq!(streams.drain().await, Drained::Complete);
        writer.await.unwrap();
        assert!(reader.await.unwrap() == expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_has_gone_is_not_waited_for_as_long_as_a_slow_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let mut waited = Vec::new();
        for there in [true, false] {
            let reader = there.then(|| OpenOptions::new().open_receiver(&path).unwrap());
            let (mut guest, host) = UnixStream::pair().unwrap();
            let mut streams = Streams::none();
            let sink = streams.open_output("stdout", path.to_str().unwrap());
            streams.start_output(host, sink.unwrap().unwrap());
            // More than the FIFO takes.
            guest.write_all(&pattern(100_000)).await.unwrap();
            while streams.flow.held_up.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
            let start = tokio::time::Instant::now();
            assert_eq!(streams.drain().await, Drained::Stalled);
            waited.push(start.elapsed());
            // Nothing is lost to one that comes back.
            drop(guest);
            let mut reader =
                reader.unwrap_or_else(|| OpenOptions::new().open_receiver(&path).unwrap());
            let mut bytes = Vec::new();
            tokio::join!(reader.read_to_end(&mut bytes), streams.drain())
                .0
                .unwrap();
            assert!(bytes == pattern(100_000), "{} bytes", bytes.len());
        }
        assert!(
            waited[0] >= SLOW_DEADLINE && waited[1] < SLOW_DEADLINE,
            "{waited:?}"
        );
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
                tokio::time::sleep(SLOW_DEADLINE - Duration::from_secs(1)).await;
                moved.fetch_add(1, Ordering::Relaxed);
            }
        };
        let drained =
            unless_stalled(work, || SLOW_DEADLINE, || moved.load(Ordering::Relaxed)).await;
        assert_eq!(drained, Drained::Complete);
        let drained = unless_stalled(std::future::pending(), || SLOW_DEADLINE, || 0).await;
        assert_eq!(drained, Drained::Stalled);
    }

    #[tokio::test]
    async fn a_file_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/the log");
        let address = format!("file://{}/new/the%20log", directory.path().display());
        let open = || {
            Streams::none()
                .open_output("stdout", &address)
                .unwrap()
                .unwrap()
        };
        drop(open());
        std::fs::write(&path, "before ").unwrap();
        let sink = open();
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
        for address in ["http://logger", "relative", "file://relative"] {
            let error = Streams::none()
                .open_output("stdout", address)
                .map(drop)
                .unwrap_err()
                .to_string();
            assert!(error.contains(address), "{error}");
        }
    }
}
