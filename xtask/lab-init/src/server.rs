//! The command server: one thread for each connection, one request for each connection.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::time::{ClockId, Timespec};
use walnut_lab_init::wire::{self, Call, Kind, Request};

use crate::containerd::Containerd;
use crate::exec;

/// How the token reaches this process.
pub(crate) const TOKEN_VARIABLE: &str = "LAB_TOKEN";

/// containerd starts in a few seconds; an emulated lab on a busy machine is far slower.
const CONTAINERD_LIMIT: Duration = Duration::from_secs(180);

/// The disk that the host writes archives to.
const OUTBOX: &str = "/dev/vdb";

/// Reads of the outbox bypass the page cache, so that what the host wrote last is what is read.
/// Their buffer and length must be multiples of a block.
const BLOCK_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("{TOKEN_VARIABLE} is not set")]
    NoToken,
    #[error("listen on port {}: {source}", wire::PORT)]
    Listen { source: io::Error },
    #[error("start the watch over containerd: {source}")]
    Containerd { source: io::Error },
    #[error("accept a connection: {source}")]
    Accept { source: io::Error },
}

/// Serves until the listener fails.
pub(crate) fn serve() -> Result<(), ServerError> {
    let token = std::env::var(TOKEN_VARIABLE).map_err(|_| ServerError::NoToken)?;
    let containerd = Containerd::start().map_err(|source| ServerError::Containerd { source })?;
    let listener = TcpListener::bind(("0.0.0.0", wire::PORT))
        .map_err(|source| ServerError::Listen { source })?;
    loop {
        let (stream, _) = listener
            .accept()
            .map_err(|source| ServerError::Accept { source })?;
        let (token, containerd) = (token.clone(), containerd.clone());
        std::thread::spawn(move || {
            if let Err(error) = converse(&stream, &token, &containerd) {
                let _ = wire::send(&stream, Kind::Refused, error.to_string().as_bytes());
            }
        });
    }
}

fn converse(mut stream: &TcpStream, token: &str, containerd: &Containerd) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(wire::BANNER)?;
    let Some((Kind::Call, call)) = wire::receive(stream)? else {
        return Err(io::Error::other("the first frame is not a call"));
    };
    let call: Call = serde_json::from_slice(&call)?;
    if call.token != token {
        return Err(io::Error::other(
            "wrong token: this lab belongs to another checkout",
        ));
    }
    match call.request {
        Request::SetClock { unix_nanos } => set_clock(unix_nanos)?,
        Request::AwaitContainerd => {
            if !containerd.wait(CONTAINERD_LIMIT) {
                let what = format!("containerd does not serve after {CONTAINERD_LIMIT:?}");
                return Err(io::Error::other(what));
            }
        }
        Request::Unpack { bytes } => unpack(bytes)?,
        Request::Exec(exec) => return exec::run(stream, &exec),
    }
    wire::send(stream, Kind::Exit, &0i32.to_le_bytes())
}

fn set_clock(unix_nanos: u64) -> io::Result<()> {
    let seconds = i64::try_from(unix_nanos / 1_000_000_000).map_err(io::Error::other)?;
    let nanos = i64::try_from(unix_nanos % 1_000_000_000).map_err(io::Error::other)?;
    let now = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, now)?)
}

fn unpack(bytes: u64) -> io::Result<()> {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).map_err(io::Error::other)?;
    let mut disk = OpenOptions::new()
        .read(true)
        .custom_flags(direct)
        .open(OUTBOX)?;
    let mut tar = Command::new("tar")
        .args([
            "--extract",
            "--no-same-owner",
            "--preserve-permissions",
            "--directory=/",
        ])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = tar
        .stdin
        .take()
        .ok_or_else(|| io::Error::other("tar has no input"))?;
    let copied = copy_aligned(&mut disk, &mut input, bytes);
    drop(input);
    let output = tar.wait_with_output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!(
            "tar: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    copied
}

fn copy_aligned(disk: &mut impl Read, to: &mut impl Write, bytes: u64) -> io::Result<()> {
    let mut storage = vec![0u8; CHUNK_BYTES + BLOCK_BYTES];
    let start = storage.as_ptr().align_offset(BLOCK_BYTES);
    let buffer = &mut storage[start..start + CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let got = disk.read(buffer)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(got);
        to.write_all(&buffer[..wanted])?;
        left -= wanted as u64;
    }
    Ok(())
}
