//! The far side of the guest's socket device: Walnut's is a Unix socket, QEMU's the host's vsock.

use anyhow::{Context, Result, ensure};
use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};
use vsock::VsockStream;
use walnut_tests::deadline;
use walnut_vmm_api::connect_line;

/// Context id of QEMU's guest, which the whole machine sees.
pub(crate) const GUEST_CID: u32 = 77;
/// What the guest's programs on these ports do: read all and say so, echo, and send [`BYTES`].
const SINK: u32 = 5000;
const ECHO: u32 = 5001;
const SOURCE: u32 = 5002;
/// Bytes of a transfer.
const BYTES: usize = 32 << 20;
/// Round trips.
const TURNS: u32 = 500;

/// How the guest is reached.
#[derive(Debug)]
pub(crate) enum Way {
    Unix(PathBuf),
    Vsock,
}

enum Stream {
    Unix(UnixStream),
    Vsock(VsockStream),
}

impl Way {
    fn connect(&self, port: u32) -> Result<Stream> {
        let limit: Option<Duration> = Some(deadline::REQUEST);
        match self {
            Self::Unix(path) => {
                let mut stream = UnixStream::connect(path).context("cannot connect")?;
                stream.set_read_timeout(limit).context("no timeout")?;
                stream
                    .write_all(connect_line(port).as_bytes())
                    .context("cannot ask for a connection")?;
                // The answer names the host's port, so its length isn't known.
                let mut byte = [0];
                while byte != *b"\n" {
                    let read = stream.read_exact(&mut byte);
                    read.with_context(|| format!("the guest refused port {port}"))?;
                }
                Ok(Stream::Unix(stream))
            }
            Self::Vsock => {
                let stream = VsockStream::connect_with_cid_port(GUEST_CID, port)
                    .with_context(|| format!("the guest refused port {port}"))?;
                stream.set_read_timeout(limit).context("no timeout")?;
                Ok(Stream::Vsock(stream))
            }
        }
    }
}

impl Stream {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Vsock(stream) => stream.write_all(bytes),
        }
        .context("cannot write to the guest")
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Vsock(stream) => stream.read(bytes),
        }
        .context("cannot read from the guest")
    }

    fn finish(&self) -> Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Vsock(stream) => stream.shutdown(Shutdown::Write),
        }
        .context("cannot shut down")
    }

    /// Reads to the end, and gives how much there was.
    fn drain(&mut self) -> Result<usize> {
        let (mut total, mut buffer) = (0, vec![0; 256 << 10]);
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(total),
                count => total += count,
            }
        }
    }
}

/// Throughput both ways and the round trip, each on a connection of its own.
pub(crate) fn measure(way: &Way) -> Result<[(String, f64); 3]> {
    let chunk = vec![7; 256 << 10];
    let mut sink = way.connect(SINK)?;
    let started = Instant::now();
    for _ in 0..BYTES / chunk.len() {
        sink.write(&chunk)?;
    }
    sink.finish()?;
    ensure!(sink.drain()? > 0, "the guest did not say that it has all");
    let receive = kib_per_second(started);

    let mut echo = way.connect(ECHO)?;
    let started = Instant::now();
    for _ in 0..TURNS {
        echo.write(b"x")?;
        ensure!(echo.read(&mut [0])? == 1, "no echo");
    }
    let rtt = started.elapsed().as_secs_f64() * 1000.0 / f64::from(TURNS);

    let mut source = way.connect(SOURCE)?;
    let started = Instant::now();
    let came = source.drain()?;
    ensure!(came == BYTES, "{came} bytes of {BYTES} came");
    let send = kib_per_second(started);
    Ok([
        ("vsock.receive".to_owned(), receive),
        ("vsock.rtt".to_owned(), rtt),
        ("vsock.send".to_owned(), send),
    ])
}

fn kib_per_second(started: Instant) -> f64 {
    let kib = f64::from(u32::try_from(BYTES >> 10).unwrap_or(u32::MAX));
    kib / started.elapsed().as_secs_f64()
}
