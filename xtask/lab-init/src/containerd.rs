//! Keeps containerd running: started once, started again whenever it ends.
//!
//! Readiness is containerd's own word, by the protocol of `sd_notify(3)`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where containerd's messages go.
pub(crate) const LOG: &str = "/var/log/containerd.log";

const NOTIFY_SOCKET: &str = "/run/lab-notify.sock";

/// A daemon that dies at once is not started more often than this.
const RESTART_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Serving,
}

/// Shared with whoever waits for containerd.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Containerd {
    /// Starts containerd and the threads that watch it.
    pub(crate) fn start() -> io::Result<Self> {
        let containerd = Self {
            state: Arc::new((Mutex::new(State::Starting), Condvar::new())),
        };
        let notifications = UnixDatagram::bind(NOTIFY_SOCKET)?;
        let listener = containerd.clone();
        std::thread::spawn(move || listener.listen(&notifications));
        let supervisor = containerd.clone();
        std::thread::spawn(move || supervisor.supervise());
        Ok(containerd)
    }

    /// Waits until containerd serves; false if it doesn't in time.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let (state, changed) = &*self.state;
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, _) = changed
            .wait_timeout_while(state, limit, |state| *state == State::Starting)
            .unwrap_or_else(PoisonError::into_inner);
        *state == State::Serving
    }

    fn set(&self, new: State) {
        let (state, changed) = &*self.state;
        *state.lock().unwrap_or_else(PoisonError::into_inner) = new;
        changed.notify_all();
    }

    fn listen(&self, notifications: &UnixDatagram) {
        let mut message = [0u8; 512];
        while let Ok(length) = notifications.recv(&mut message) {
            let message = String::from_utf8_lossy(&message[..length]);
            if message.lines().any(|line| line == "READY=1") {
                self.set(State::Serving);
            }
        }
    }

    fn supervise(&self) {
        loop {
            let started = Instant::now();
            let outcome = run_once();
            self.set(State::Starting);
            log(&match outcome {
                Ok(status) => format!("containerd ended ({status}), starting it again"),
                Err(error) => format!("containerd can't be started: {error}"),
            });
            std::thread::sleep(RESTART_INTERVAL.saturating_sub(started.elapsed()));
        }
    }
}

fn run_once() -> io::Result<std::process::ExitStatus> {
    let log = open_log()?;
    Command::new("containerd")
        .env("NOTIFY_SOCKET", NOTIFY_SOCKET)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir("/")
        .status()
}

fn open_log() -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(LOG)
}

fn log(message: &str) {
    if let Ok(mut log) = open_log() {
        let _ = writeln!(log, "lab-init: {message}");
    }
}
