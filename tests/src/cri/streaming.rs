//! The streams of exec, attach and port-forward: the kubelet's WebSocket protocol `v4.channel.k8s.io`, in which the
//! first byte of a message is its channel.

use crate::deadline::{self, Deadline};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::net::TcpStream;
use tungstenite::{Message, WebSocket, client::IntoClientRequest, http::HeaderValue};

const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// The standard streams of one process.
#[derive(Debug)]
pub struct Streaming {
    socket: WebSocket<TcpStream>,
    /// What it wrote to standard output up to now.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error up to now.
    pub stderr: Vec<u8>,
    status: Option<Value>,
}

impl Streaming {
    /// Connects to the address that the CRI gave.
    pub(super) fn open(url: &str) -> Result<Self> {
        Ok(Self {
            socket: connect(url)?,
            stdout: Vec::new(),
            stderr: Vec::new(),
            status: None,
        })
    }

    /// Writes to standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        send(&mut self.socket, STDIN, bytes)
    }

    /// Sets the size of the terminal.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        send(&mut self.socket, RESIZE, size.as_bytes())
    }

    /// Reads on until standard output has `words`.
    pub fn wait_for(&mut self, words: &str) -> Result<()> {
        while !String::from_utf8_lossy(&self.stdout).contains(words) {
            let open = self
                .read()
                .with_context(|| format!("waiting for {words:?}"));
            if !open? {
                bail!("the stream ended without {words:?}: {self:?}");
            }
        }
        Ok(())
    }

    /// Reads to the end; gives the exit status.
    pub fn finish(&mut self) -> Result<i32> {
        while self.read()? {}
        let status = self.status.as_ref().context("no status came")?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let code = &status["details"]["causes"][0]["message"];
        let code = code.as_str().and_then(|code| code.parse().ok());
        code.with_context(|| format!("no exit status in {status}"))
    }

    /// Leaves it alone, as a person who closes the window.
    pub fn leave(mut self) {
        let _ = self.socket.close(None);
        let _ = self.socket.flush();
    }

    /// Reads the next piece; false at the end.
    pub fn read(&mut self) -> Result<bool> {
        match receive(&mut self.socket)? {
            None => return Ok(false),
            Some((STDOUT, bytes)) => self.stdout.extend(bytes),
            Some((STDERR, bytes)) => self.stderr.extend(bytes),
            Some((STATUS, bytes)) => self.status = Some(serde_json::from_slice(&bytes)?),
            Some((channel, bytes)) => bail!("channel {channel} says {bytes:?}"),
        }
        Ok(true)
    }
}

/// Sends a request to one forwarded port; gives the answer, which ends when `enough` says so.
pub fn forward(url: &str, request: &[u8], enough: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
    let mut socket = connect(url)?;
    // Each channel, one for data and one for errors, begins with the port's number.
    let mut greeted = [false; 2];
    let mut answer = Vec::new();
    send(&mut socket, 0, request)?;
    while !enough(&answer) {
        match receive(&mut socket)? {
            None => break,
            Some((channel @ 0..=1, _)) if !greeted[usize::from(channel)] => {
                greeted[usize::from(channel)] = true;
            }
            Some((0, bytes)) => answer.extend(bytes),
            Some((_, bytes)) => bail!("refused: {}", String::from_utf8_lossy(&bytes)),
        }
    }
    Ok(answer)
}

fn connect(url: &str) -> Result<WebSocket<TcpStream>> {
    let Some(rest) = url.strip_prefix("http://") else {
        bail!("not an address of HTTP: {url}");
    };
    let (host, _) = rest.split_once('/').context("no path")?;
    let stream = TcpStream::connect(host).with_context(|| format!("cannot connect to {host}"))?;
    stream.set_read_timeout(Some(Deadline::after(deadline::REQUEST).left()))?;
    let mut request = format!("ws://{rest}").into_client_request()?;
    let protocol = HeaderValue::from_static(PROTOCOL);
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", protocol);
    let (socket, _) = tungstenite::client(request, stream)
        .map_err(|error| anyhow::anyhow!("{url} is no WebSocket: {error}"))?;
    Ok(socket)
}

fn send(socket: &mut WebSocket<TcpStream>, channel: u8, bytes: &[u8]) -> Result<()> {
    let message = [&[channel], bytes].concat();
    socket.send(Message::binary(message)).context("cannot send")
}

/// The next message and its channel; `None` at the end.
fn receive(socket: &mut WebSocket<TcpStream>) -> Result<Option<(u8, Vec<u8>)>> {
    loop {
        match socket.read() {
            Ok(Message::Binary(message)) => {
                if let [channel, bytes @ ..] = &message[..] {
                    return Ok(Some((*channel, bytes.to_vec())));
                }
            }
            Ok(Message::Close(_)) => return Ok(None),
            Ok(_) => {}
            Err(tungstenite::Error::ConnectionClosed) => return Ok(None),
            // The kubelet's server hangs up without WebSocket's goodbye.
            Err(tungstenite::Error::Protocol(_)) => return Ok(None),
            Err(error) => return Err(error).context("the stream broke"),
        }
    }
}
