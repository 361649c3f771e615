//! The host's side of the command server.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use walnut_lab_init::wire::{self, Call, Exec, Kind, Request};

/// QEMU accepts a connection before the lab does: a server that is there greets sooner than this.
const GREETING_LIMIT: Duration = Duration::from_secs(2);

/// Between two attempts to reach a lab that boots.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Between two packets that only wake the lab.
const BEAT: Duration = Duration::from_secs(1);

/// How to reach one lab.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// The port on this host.
    pub(crate) port: u16,
    /// What its command server wants to hear.
    pub(crate) token: String,
}

/// Receives what a program prints.
pub(crate) trait Sink {
    /// Bytes of its standard output.
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Bytes of its standard error.
    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Passes everything on to this process' own output.
#[derive(Debug)]
pub(crate) struct Inherit;

impl Sink for Inherit {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush())
    }

    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::stderr().lock().write_all(bytes)
    }
}

/// Keeps both streams.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    /// Standard output.
    pub(crate) stdout: Vec<u8>,
    /// Standard error.
    pub(crate) stderr: Vec<u8>,
}

impl Sink for Capture {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stdout.extend_from_slice(bytes);
        Ok(())
    }

    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stderr.extend_from_slice(bytes);
        Ok(())
    }
}

impl Client {
    /// Connects within `limit`.
    pub(crate) fn connect(&self, limit: Duration) -> Result<TcpStream> {
        let deadline = Instant::now() + limit;
        loop {
            match self.try_connect() {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).context("the lab's command server doesn't answer");
                }
                Err(_) => thread::sleep(RETRY_INTERVAL),
            }
        }
    }

    fn try_connect(&self) -> io::Result<TcpStream> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let mut stream = TcpStream::connect_timeout(&address, GREETING_LIMIT)?;
        stream.set_read_timeout(Some(GREETING_LIMIT))?;
        let mut banner = [0u8; wire::BANNER.len()];
        stream.read_exact(&mut banner)?;
        if &banner != wire::BANNER {
            return Err(io::Error::other("something else answers on the lab's port"));
        }
        stream.set_read_timeout(None)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Makes a request that prints nothing; it must succeed within `limit`.
    pub(crate) fn request(&self, request: Request, limit: Duration) -> Result<()> {
        let stream = self.connect(limit)?;
        stream
            .set_read_timeout(Some(limit))
            .context("set the lab's deadline")?;
        self.call(&stream, request)?;
        match receive_all(&stream, &Mutex::new(&stream), &mut Capture::default())? {
            0 => Ok(()),
            status => bail!("the lab answers with status {status}"),
        }
    }

    /// Sets the lab's clock to this machine's.
    pub(crate) fn set_clock(&self, limit: Duration) -> Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("read the clock")?;
        let unix_nanos = u64::try_from(now.as_nanos()).context("read the clock")?;
        self.request(Request::SetClock { unix_nanos }, limit)
    }

    /// Starts a request on a connection.
    pub(crate) fn call(&self, stream: &TcpStream, request: Request) -> Result<()> {
        let call = Call {
            token: self.token.clone(),
            request,
        };
        let text = serde_json::to_vec(&call).context("encode the request")?;
        wire::send(stream, Kind::Call, &text).context("send the request to the lab")
    }

    /// Runs a program without input, within `limit`; returns its exit status.
    pub(crate) fn run(&self, exec: Exec, sink: &mut dyn Sink, limit: Duration) -> Result<i32> {
        let what = exec.argv.join(" ");
        let stream = self.connect(Duration::from_secs(30))?;
        self.call(&stream, Request::Exec(exec))?;
        wire::send(&stream, Kind::StdinEnd, &[]).context("send the end of input to the lab")?;
        stream
            .set_read_timeout(Some(limit))
            .context("set the lab's deadline")?;
        receive_all(&stream, &Mutex::new(&stream), sink)
            .with_context(|| format!("in the lab: {what}"))
    }

    /// Runs a shell script and returns its status and output.
    pub(crate) fn script(&self, script: &str, limit: Duration) -> Result<(i32, Capture)> {
        let mut capture = Capture::default();
        let status = self.run(shell(script), &mut capture, limit)?;
        Ok((status, capture))
    }

    /// Runs a shell script that must succeed; returns its standard output.
    pub(crate) fn must(&self, script: &str, limit: Duration) -> Result<String> {
        let (status, output) = self.script(script, limit)?;
        if status != 0 {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("in the lab: {script}: status {status}: {}", text.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A shell script as a program.
pub(crate) fn shell(script: &str) -> Exec {
    let argv = ["/bin/bash", "-c", script].map(str::to_owned).to_vec();
    Exec {
        argv,
        environment: Vec::new(),
        terminal: None,
    }
}

/// Hands out a program's output until it ends; returns its exit status. Who else writes to the lab does so by `to_lab`.
pub(crate) fn receive_all(
    stream: &TcpStream,
    to_lab: &Mutex<impl Write + Send>,
    sink: &mut dyn Sink,
) -> Result<i32> {
    thread::scope(|scope| {
        let (running, ended) = mpsc::channel();
        scope.spawn(move || beat(to_lab, &ended));
        let status = receive(stream, sink);
        drop(running);
        status
    })
}

/// Sends packets that say nothing until the answer is there: an emulated processor that has lost an interrupt takes
/// it with the next one (docs/testing.md, "Where the emulator fails").
fn beat(to_lab: &Mutex<impl Write>, ended: &Receiver<()>) {
    while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
        let mut to_lab = to_lab.lock().unwrap_or_else(PoisonError::into_inner);
        if wire::send(&mut *to_lab, Kind::Stdin, &[]).is_err() {
            return;
        }
    }
}

fn receive(stream: &TcpStream, sink: &mut dyn Sink) -> Result<i32> {
    loop {
        match wire::receive(stream).context("the lab doesn't answer in time, or ended")? {
            Some((Kind::Stdout, bytes)) => sink.stdout(&bytes).context("write output")?,
            Some((Kind::Stderr, bytes)) => sink.stderr(&bytes).context("write output")?,
            Some((Kind::Exit, bytes)) => {
                let bytes: [u8; 4] = bytes.as_slice().try_into().context("read exit status")?;
                return Ok(i32::from_le_bytes(bytes));
            }
            Some((Kind::Refused, bytes)) => {
                bail!("the lab refuses: {}", String::from_utf8_lossy(&bytes));
            }
            Some((kind, _)) => bail!("the lab sent a frame of kind {kind:?}"),
            None => bail!("the lab closed the connection"),
        }
    }
}
