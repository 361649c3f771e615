//! A host program that has connected, in whatever stage it is, and what epoll is told of it.

use super::{
    handshake::Handshake,
    stream::{Outlet, Stream},
};
use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// What a peer is to the guest.
#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing yet.
    Handshake(Handshake),
    /// A connection.
    Stream(Stream),
    /// Nothing any more, but the host program has not taken everything.
    Draining(Outlet),
}

/// Whether a peer stands in the line of those that have something for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// It has nothing.
    None,
    /// It waits.
    InLine,
}

/// A host program.
#[derive(Debug)]
pub(super) struct Peer {
    /// What it is to the guest.
    pub(super) stage: Stage,
    /// Its place in line.
    pub(super) turn: Turn,
    /// What epoll watches.
    pub(super) watched: Option<EventSet>,
}

impl Peer {
    /// Its socket, while it has a use.
    pub(super) fn socket(&self) -> Option<&UnixStream> {
        match &self.stage {
            Stage::Handshake(handshake) => Some(handshake.socket()),
            Stage::Stream(stream) => stream.socket(),
            Stage::Draining(outlet) => Some(outlet.socket()),
        }
    }

    /// What the socket has to be watched for, see [`Stream::interest`].
    pub(super) fn interest(&self) -> Option<EventSet> {
        match &self.stage {
            Stage::Handshake(_) => Some(EventSet::IN),
            Stage::Stream(stream) => stream.interest(),
            Stage::Draining(_) => Some(EventSet::OUT),
        }
    }
}

/// Changes epoll's interest from `watched` to `wanted`.
pub(super) fn watch(
    epoll: &Epoll,
    file: &impl AsRawFd,
    token: u64,
    watched: Option<EventSet>,
    wanted: Option<EventSet>,
) -> io::Result<()> {
    let operation = match (watched, wanted) {
        (None, None) => return Ok(()),
        (None, Some(_)) => ControlOperation::Add,
        (Some(_), Some(_)) => ControlOperation::Modify,
        (Some(_), None) => ControlOperation::Delete,
    };
    let event = EpollEvent::new(wanted.unwrap_or(EventSet::empty()), token);
    epoll.ctl(operation, file.as_raw_fd(), event)
}
