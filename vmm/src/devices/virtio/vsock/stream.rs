//! A connection together with the host program's socket.
//!
//! Must not block: what the socket does not take waits in a buffer, which is bounded by the credit that
//! the guest was given. Must not know queues.

use super::connection::{Connection, HostEnd};
use rustix::net::{SendFlags, send};
use std::{
    collections::VecDeque,
    io::{self, Read},
    net::Shutdown,
    os::unix::net::UnixStream,
};
use vmm_sys_util::epoll::EventSet;

/// An empty buffer that has grown past this gives its memory back.
const KEPT_BYTES: usize = 16 * 1024;

/// The way to a host program: its socket and the bytes that it has not taken.
#[derive(Debug)]
pub(super) struct Outlet {
    socket: UnixStream,
    buffer: VecDeque<u8>,
}

impl Outlet {
    fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            buffer: VecDeque::new(),
        }
    }

    /// The socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether every byte has been taken.
    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Writes `bytes` behind what is buffered; gives how many bytes the socket took at once.
    fn push(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = if self.buffer.is_empty() {
            self.write(bytes)?
        } else {
            0
        };
        self.buffer.extend(bytes.get(taken..).unwrap_or(&[]));
        Ok(taken)
    }

    /// Writes as much of the buffer as the socket takes; gives how many bytes that were.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let mut total = 0;
        loop {
            let (front, _) = self.buffer.as_slices();
            if front.is_empty() {
                break;
            }
            let taken = self.write(front)?;
            if taken == 0 {
                break;
            }
            self.buffer.drain(..taken);
            total += taken;
        }
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BYTES {
            self.buffer = VecDeque::new();
        }
        Ok(total)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::io::retry_on_intr(|| send(&self.socket, bytes, flags)) {
            Ok(taken) => Ok(taken),
            Err(rustix::io::Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

/// What is known of data that waits in the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inbox {
    /// Ask epoll.
    Unknown,
    /// There was something, and nobody has found the end yet.
    Waiting,
}

/// What the guest's direction of the socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteSide {
    Open,
    /// The host program was told that nothing more will come.
    ShutDown,
}

/// Whether the host program has closed its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// As far as is known it is there.
    There,
    /// It closed the socket; what it wrote before may still wait.
    Gone,
}

/// A connection and its socket.
#[derive(Debug)]
pub(super) struct Stream {
    /// The state towards the guest.
    pub(super) connection: Connection,
    /// `None` once nothing more can pass.
    outlet: Option<Outlet>,
    inbox: Inbox,
    write_side: WriteSide,
    presence: Presence,
}

impl Stream {
    /// A stream that the guest is yet to be asked for.
    pub(super) fn new(socket: UnixStream, connection: Connection) -> Self {
        Self {
            connection,
            outlet: Some(Outlet::new(socket)),
            inbox: Inbox::Unknown,
            write_side: WriteSide::Open,
            presence: Presence::There,
        }
    }

    /// The socket, until nothing more can pass.
    pub(super) fn socket(&self) -> Option<&UnixStream> {
        self.outlet.as_ref().map(Outlet::socket)
    }

    /// What is left when the guest is done.
    pub(super) fn into_outlet(self) -> Option<Outlet> {
        self.outlet
    }

    /// What the socket has to be watched for: `None` for not at all, and an empty set for errors and
    /// hang-ups, which epoll always reports.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let outlet = self.outlet.as_ref()?;
        let mut interest = EventSet::empty();
        if self.inbox == Inbox::Unknown && self.connection.sendable() > 0 {
            interest |= EventSet::IN;
        }
        if !outlet.is_empty() {
            interest |= EventSet::OUT;
        }
        // A hang-up that is known would be reported for ever.
        if interest.is_empty() && self.presence == Presence::Gone {
            return None;
        }
        Some(interest)
    }

    /// Epoll says that there is something to read.
    pub(super) fn note_readable(&mut self) {
        self.inbox = Inbox::Waiting;
    }

    /// Epoll says that the host program closed its socket.
    pub(super) fn note_hang_up(&mut self) {
        self.presence = Presence::Gone;
        if self.connection.is_silent() {
            self.connection.end_by_host(HostEnd::Both);
        } else {
            self.inbox = Inbox::Waiting;
        }
        self.settle();
    }

    /// Bytes to read for the guest now.
    pub(super) fn readable(&self) -> u32 {
        match self.inbox {
            Inbox::Waiting => self.connection.sendable(),
            Inbox::Unknown => 0,
        }
    }

    /// Reads for the guest. Zero means that there is nothing now or ever.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> usize {
        let Some(outlet) = &self.outlet else {
            return 0;
        };
        let mut socket = outlet.socket();
        match socket.read(bytes) {
            Ok(0) => {
                self.inbox = Inbox::Unknown;
                self.connection.end_by_host(match self.presence {
                    Presence::There => HostEnd::Sending,
                    Presence::Gone => HostEnd::Both,
                });
                self.settle();
                0
            }
            Ok(count) => {
                if count < bytes.len() {
                    self.inbox = Inbox::Unknown;
                }
                count
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.inbox = Inbox::Unknown;
                0
            }
            Err(_) => {
                self.inbox = Inbox::Unknown;
                self.connection.end_by_host(HostEnd::Both);
                self.settle();
                0
            }
        }
    }

    /// Passes payload of the guest on to the host program.
    pub(super) fn deliver(&mut self, bytes: &[u8]) {
        if let Some(outlet) = &mut self.outlet {
            let result = outlet.push(bytes);
            self.account(result);
        }
    }

    /// Writes what is buffered.
    pub(super) fn flush(&mut self) {
        if let Some(outlet) = &mut self.outlet {
            let result = outlet.flush();
            self.account(result);
        }
    }

    /// Tells the host program something that is not the guest's; false when it could not be told.
    pub(super) fn announce(&mut self, line: &str) -> bool {
        self.outlet
            .as_ref()
            .is_some_and(|outlet| outlet.write(line.as_bytes()).is_ok_and(|n| n == line.len()))
    }

    /// Makes the host program's writes fail.
    pub(super) fn refuse_writes(&mut self) {
        if let Some(outlet) = &self.outlet {
            // Fails only when the host program has left, which epoll reports.
            let _ = outlet.socket().shutdown(Shutdown::Read);
        }
    }

    fn account(&mut self, written: io::Result<usize>) {
        match written.map(u32::try_from) {
            Ok(Ok(bytes)) => self.connection.forward(bytes),
            // A socket that fails takes nothing more; what it holds for the guest can still be read.
            Ok(Err(_)) | Err(_) => {
                self.connection.end_by_host(HostEnd::Receiving);
                if let Some(outlet) = &mut self.outlet {
                    outlet.buffer = VecDeque::new();
                }
            }
        }
        self.settle();
    }

    /// Passes the guest's half-close on once its data is through, and lets go of a socket that has no
    /// use any more.
    pub(super) fn settle(&mut self) {
        let Some(outlet) = &self.outlet else {
            return;
        };
        if self.connection.is_drained() && self.write_side == WriteSide::Open {
            self.write_side = WriteSide::ShutDown;
            // Fails only when the host program has left, which epoll reports.
            let _ = outlet.socket().shutdown(Shutdown::Write);
        }
        if self.connection.is_over_for_host() {
            self.connection.end_by_host(HostEnd::Both);
            self.outlet = None;
        }
    }
}
