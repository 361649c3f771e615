//! Programs in the lab that read what is typed or piped in here.

use std::io::{self, IsTerminal, Read};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios};
use walnut_lab_init::wire::{self, Exec, Kind, Request, TerminalSize};

use crate::lab::client::{Client, Inherit, receive_all};

const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Runs a program; its input is this process' own, unless that is a terminal.
pub(crate) fn run_with_input(client: &Client, exec: Exec) -> Result<i32> {
    let stream = client.connect(CONNECT_LIMIT)?;
    client.call(&stream, Request::Exec(exec))?;
    let to_lab = writer(&stream)?;
    if io::stdin().is_terminal() {
        wire::send(&stream, Kind::StdinEnd, &[]).context("send the end of input to the lab")?;
    } else {
        forward_input(Arc::clone(&to_lab));
    }
    receive_all(&stream, &to_lab, &mut Inherit)
}

/// Runs a login shell on a terminal of its own.
pub(crate) fn interactive(client: &Client) -> Result<i32> {
    anyhow::ensure!(
        io::stdin().is_terminal(),
        "lab shell needs a terminal; use lab exec"
    );
    let size = rustix::termios::tcgetwinsize(io::stdin()).context("read the terminal's size")?;
    let size = TerminalSize {
        rows: size.ws_row,
        columns: size.ws_col,
    };
    let argv = ["/bin/bash", "--login"].map(str::to_owned).to_vec();
    let stream = client.connect(CONNECT_LIMIT)?;
    client.call(
        &stream,
        Request::Exec(Exec {
            argv,
            environment: Vec::new(),
            terminal: Some(size),
        }),
    )?;
    let to_lab = writer(&stream)?;
    let _raw = RawTerminal::enter()?;
    forward_input(Arc::clone(&to_lab));
    receive_all(&stream, &to_lab, &mut Inherit)
}

/// For several to write to the lab, a frame at a time.
fn writer(stream: &TcpStream) -> Result<Arc<Mutex<TcpStream>>> {
    let stream = stream.try_clone().context("share the lab's connection")?;
    Ok(Arc::new(Mutex::new(stream)))
}

/// Sends standard input from a thread, which ends with this process.
fn forward_input(to_lab: Arc<Mutex<TcpStream>>) {
    std::thread::spawn(move || {
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            let length = io::stdin().read(&mut buffer).unwrap_or(0);
            let mut to_lab = to_lab.lock().unwrap_or_else(PoisonError::into_inner);
            let sent = match length {
                0 => wire::send(&mut *to_lab, Kind::StdinEnd, &[]),
                _ => wire::send(&mut *to_lab, Kind::Stdin, &buffer[..length]),
            };
            if length == 0 || sent.is_err() {
                return;
            }
        }
    });
}

/// The terminal passes every key on, until this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = rustix::termios::tcgetattr(io::stdin()).context("read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .context("set the terminal's mode")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
