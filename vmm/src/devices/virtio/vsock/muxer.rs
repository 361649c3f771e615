//! Which socket belongs to which connection, and whose turn it is.
//!
//! Must not know queues or guest memory: the device's thread asks for the next packet when it has a
//! buffer for it, and hands over each packet that the guest sent. Turns are first come, first served, and
//! a turn is bounded, so no stream holds up another.

use super::{
    connection::{BUFFER_BYTES, Connection, Effect},
    handshake::Handshake,
    packet::{Header, Op, Packet, Parsed},
    peer::{Peer, Stage, Turn, watch},
    stream::Stream,
};
use std::{
    collections::{HashMap, VecDeque},
    io::{self, Read},
    os::unix::net::UnixListener,
    sync::Arc,
    time::{Duration, Instant},
};
use vmm_sys_util::{
    epoll::{Epoll, EventSet},
    eventfd::EventFd,
};
use walnut_vmm_api::{READY_PORT, ok_line};

/// Sockets of host programs at the most.
pub(super) const MAX_PEERS: usize = 4096;
/// Host programs that get a whole buffer; those above it get [`SMALL_BUFFER_BYTES`], so that a guest which sends
/// to programs that don't read holds 94 MiB of the host's memory at the most.
const FEW_PEERS: usize = 128;
const SMALL_BUFFER_BYTES: u32 = 16 * 1024;
/// Host programs at the most that have not finished their handshake.
const MAX_HANDSHAKES: usize = 64;
/// How long a host program may take for its handshake line.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long no connection is taken after one could not be (no file descriptor was left, for example).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Resets that wait for a buffer of the guest. When there are so many, its packets are left in the queue.
pub(super) const MAX_RESETS: usize = 128;
/// Where host ports begin: past those that programs know by number.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// The epoll token of the listener; peers have their host port, the device's thread what lies above.
pub(super) const LISTENER_TOKEN: u64 = 1 << 32;
/// Bytes that one turn moves at the most.
pub(super) const TURN_BYTES: usize = 64 * 1024;

/// Whether connections are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listening {
    Watched,
    /// There are enough.
    Full,
    /// Taking one failed.
    Paused(Instant),
}

/// Whether the guest's first attempt to reach the ready port has been seen.
#[derive(Debug)]
enum Readiness {
    Awaited(Arc<EventFd>),
    Announced,
}

/// What the guest gets next.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A packet without payload.
    Control(Header),
    /// Payload of the connection with this host port, so many bytes at the most.
    Data(u32, usize),
}

/// All connections of one guest.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    epoll: Arc<Epoll>,
    listener: Arc<UnixListener>,
    listening: Listening,
    readiness: Readiness,
    peers: HashMap<u32, Peer>,
    handshakes: usize,
    next_port: u32,
    line: VecDeque<u32>,
    resets: VecDeque<Header>,
    /// Peers whose interest may have changed.
    touched: Vec<u32>,
}

impl Muxer {
    /// Watches `listener`, which does not block; `ready` is written once the guest says that it is ready.
    pub(super) fn new(
        guest_cid: u64,
        epoll: Arc<Epoll>,
        listener: Arc<UnixListener>,
        ready: Arc<EventFd>,
    ) -> io::Result<Self> {
        watch(&epoll, &*listener, LISTENER_TOKEN, None, Some(EventSet::IN))?;
        Ok(Self {
            guest_cid,
            epoll,
            listener,
            listening: Listening::Watched,
            readiness: Readiness::Awaited(ready),
            peers: HashMap::new(),
            handshakes: 0,
            next_port: FIRST_HOST_PORT,
            line: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
        })
    }

    /// Takes the connections that wait at the listener.
    pub(super) fn accept(&mut self) {
        while self.peers.len() < MAX_PEERS && self.handshakes < MAX_HANDSHAKES {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(_) => {
                    self.listening = Listening::Paused(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            // It cannot fail for a socket; a peer that could block is not kept.
            if socket.set_nonblocking(true).is_err() {
                continue;
            }
            let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
            let port = self.free_port();
            self.handshakes += 1;
            self.touched.push(port);
            self.peers.insert(
                port,
                Peer {
                    stage: Stage::Handshake(Handshake::new(socket, deadline)),
                    turn: Turn::None,
                    watched: None,
                },
            );
        }
        self.listening = Listening::Full;
    }

    /// A port that no peer has; there are always some, as peers are few.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.peers.contains_key(&port) {
                return port;
            }
        }
    }

    /// Epoll reports `events` for the peer with this host port.
    pub(super) fn socket_event(&mut self, port: u32, events: EventSet) {
        let Some(peer) = self.peers.get_mut(&port) else {
            return;
        };
        let is_over = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match &mut peer.stage {
            Stage::Handshake(handshake) => match handshake.advance() {
                Ok(None) => {}
                Ok(Some(guest_port)) => self.open(port, guest_port),
                Err(_) => self.remove(port),
            },
            Stage::Draining(outlet) => {
                if outlet.flush().is_err() || outlet.is_empty() || is_over {
                    self.remove(port);
                }
            }
            Stage::Stream(stream) => {
                if is_over && !stream.connection.is_established() {
                    return self.reset(port);
                }
                if events.contains(EventSet::OUT) {
                    stream.flush();
                }
                if events.contains(EventSet::IN) {
                    stream.note_readable();
                }
                if is_over {
                    stream.note_hang_up();
                }
                self.review(port);
            }
        }
    }

    /// The handshake is done: asks the guest for the connection.
    fn open(&mut self, port: u32, guest_port: u32) {
        let Some(peer) = self.peers.remove(&port) else {
            return;
        };
        let Stage::Handshake(handshake) = peer.stage else {
            return;
        };
        self.handshakes -= 1;
        let buffer_bytes = match self.peers.len() {
            0..FEW_PEERS => BUFFER_BYTES,
            _ => SMALL_BUFFER_BYTES,
        };
        let connection = Connection::new(self.guest_cid, guest_port, port, buffer_bytes);
        let stream = Stream::new(handshake.into_socket(), connection);
        self.peers.insert(
            port,
            Peer {
                stage: Stage::Stream(stream),
                ..peer
            },
        );
        self.review(port);
    }

    /// Takes a packet of the guest; `payload` gives what follows its header, and passes through `scratch`.
    pub(super) fn receive(&mut self, header: &Header, payload: &mut dyn Read, scratch: &mut [u8]) {
        match header.parse(self.guest_cid) {
            Parsed::Dropped => {}
            Parsed::Refused(reset) => self.resets.push_back(reset),
            Parsed::Packet(packet) => self.receive_packet(&packet, payload, scratch),
        }
    }

    fn receive_packet(&mut self, packet: &Packet, payload: &mut dyn Read, scratch: &mut [u8]) {
        let port = packet.host_port;
        let stream = match self.peers.get_mut(&port).map(|peer| &mut peer.stage) {
            Some(Stage::Stream(stream)) if stream.connection.is_with(packet.guest_port) => stream,
            _ => return self.refuse(packet),
        };
        match stream.connection.receive(packet) {
            Effect::Proceed => {}
            Effect::Establish => {
                if !stream.announce(&ok_line(port)) {
                    return self.reset(port);
                }
            }
            Effect::Deliver => {
                if copy(payload, packet.len, scratch, stream).is_err() {
                    return self.reset(port);
                }
            }
            Effect::RefuseWrites => stream.refuse_writes(),
            Effect::Finish => {
                let reset = stream.connection.reset();
                self.resets.push_back(reset);
                return self.drain(port);
            }
            Effect::Finished => return self.drain(port),
            Effect::Abort => return self.remove(port),
            Effect::Violation => return self.reset(port),
        }
        stream.settle();
        self.review(port);
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, packet: &Packet) {
        if packet.op == Op::Reset {
            return;
        }
        if packet.op == Op::Request
            && packet.host_port == READY_PORT
            && let Readiness::Awaited(ready) = &self.readiness
        {
            // Fails only when the counter is full, and then it is readable.
            let _ = ready.write(1);
            self.readiness = Readiness::Announced;
        }
        let (port, guest_port) = (packet.host_port, packet.guest_port);
        let reset = Header::to_guest(self.guest_cid, port, guest_port, Op::Reset);
        self.resets.push_back(reset);
    }

    /// Ends a connection at once, on both sides. A guest that has not heard of it need not hear of its end: one that
    /// takes no packets would make the host keep them.
    fn reset(&mut self, port: u32) {
        if let Some(Stage::Stream(stream)) = self.peers.get_mut(&port).map(|peer| &mut peer.stage)
            && stream.connection.is_known()
        {
            let reset = stream.connection.reset();
            self.resets.push_back(reset);
        }
        self.remove(port);
    }

    /// The guest has forgotten the connection; the host program gets what is left.
    fn drain(&mut self, port: u32) {
        let Some(peer) = self.peers.remove(&port) else {
            return;
        };
        let Stage::Stream(stream) = peer.stage else {
            return;
        };
        let Some(outlet) = stream.into_outlet().filter(|outlet| !outlet.is_empty()) else {
            return self.remove(port);
        };
        self.peers.insert(
            port,
            Peer {
                stage: Stage::Draining(outlet),
                ..peer
            },
        );
        self.touched.push(port);
    }

    /// Forgets a peer. Closing the only descriptor of its socket also ends epoll's interest.
    fn remove(&mut self, port: u32) {
        let Some(peer) = self.peers.remove(&port) else {
            return;
        };
        if let Stage::Handshake(_) = peer.stage {
            self.handshakes -= 1;
        }
        if peer.turn == Turn::InLine {
            self.line.retain(|other| *other != port);
        }
    }

    /// Puts a stream in line when it has something for the guest.
    fn review(&mut self, port: u32) {
        let Some(peer) = self.peers.get_mut(&port) else {
            return;
        };
        self.touched.push(port);
        if let Stage::Stream(stream) = &peer.stage {
            let has_something = stream.connection.owes_control() || stream.readable() > 0;
            if has_something && peer.turn == Turn::None {
                peer.turn = Turn::InLine;
                self.line.push_back(port);
            }
        }
    }

    /// Whether so many resets wait that no further packet may be taken.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether [`Self::next`] may have something.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// What the guest gets next. After [`Outgoing::Data`] comes [`Self::read`].
    pub(super) fn next(&mut self) -> Option<Outgoing> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Outgoing::Control(reset));
        }
        while let Some(port) = self.line.pop_front() {
            let Some(peer) = self.peers.get_mut(&port) else {
                continue;
            };
            peer.turn = Turn::None;
            let Stage::Stream(stream) = &mut peer.stage else {
                continue;
            };
            if let Some(header) = stream.connection.next_control() {
                self.review(port);
                return Some(Outgoing::Control(header));
            }
            let bytes = usize::try_from(stream.readable()).unwrap_or(TURN_BYTES);
            if bytes > 0 {
                return Some(Outgoing::Data(port, bytes.min(TURN_BYTES)));
            }
        }
        None
    }

    /// Reads from a host program for the guest; the bytes go out by [`Self::stamp`].
    pub(super) fn read(&mut self, port: u32, bytes: &mut [u8]) -> usize {
        let stage = self.peers.get_mut(&port).map(|peer| &mut peer.stage);
        match stage {
            Some(Stage::Stream(stream)) => stream.read(bytes),
            _ => 0,
        }
    }

    /// The header for `len` of the bytes that were read.
    pub(super) fn stamp(&mut self, port: u32, len: u32) -> Option<Header> {
        match self.peers.get_mut(&port).map(|peer| &mut peer.stage) {
            Some(Stage::Stream(stream)) => Some(stream.connection.data(len)),
            _ => None,
        }
    }

    /// Ends the turn that [`Outgoing::Data`] began.
    pub(super) fn end_turn(&mut self, port: u32) {
        self.review(port);
    }

    /// Turns away the host programs that were too slow, and takes connections again after a pause.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.handshakes > 0 {
            let late = |peer: &Peer| matches!(&peer.stage, Stage::Handshake(handshake) if handshake.deadline <= now);
            let ports = self.peers.iter().filter(|(_, peer)| late(peer));
            let ports: Vec<u32> = ports.map(|(port, _)| *port).collect();
            for port in ports {
                self.remove(port);
            }
        }
        if matches!(self.listening, Listening::Paused(until) if until <= now) {
            self.listening = Listening::Full;
        }
    }

    /// When [`Self::expire`] has to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let pause = match self.listening {
            Listening::Paused(until) => Some(until),
            Listening::Watched | Listening::Full => None,
        };
        if self.handshakes == 0 {
            return pause;
        }
        let handshakes = self.peers.values().filter_map(|peer| match &peer.stage {
            Stage::Handshake(handshake) => Some(handshake.deadline),
            Stage::Stream(_) | Stage::Draining(_) => None,
        });
        handshakes.chain(pause).min()
    }

    /// Tells epoll what changed since the last call.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        for port in std::mem::take(&mut self.touched) {
            let Some(peer) = self.peers.get_mut(&port) else {
                continue;
            };
            let wanted = peer.interest();
            if let Some(socket) = peer.socket().filter(|_| wanted != peer.watched) {
                watch(&self.epoll, socket, port.into(), peer.watched, wanted)?;
            }
            peer.watched = wanted;
        }
        let may_accept = self.peers.len() < MAX_PEERS && self.handshakes < MAX_HANDSHAKES;
        let wanted = match self.listening {
            Listening::Watched => return Ok(()),
            Listening::Full if may_accept => Some(EventSet::IN),
            Listening::Full | Listening::Paused(_) => Some(EventSet::empty()),
        };
        let listener = &*self.listener;
        let watched = Some(EventSet::IN);
        watch(&self.epoll, listener, LISTENER_TOKEN, watched, wanted)?;
        if wanted == watched {
            self.listening = Listening::Watched;
        }
        Ok(())
    }
}

/// Passes `len` bytes of payload on, in pieces.
fn copy(
    payload: &mut dyn Read,
    len: u32,
    scratch: &mut [u8],
    stream: &mut Stream,
) -> io::Result<()> {
    // The connection has checked that the payload is no larger than its buffer.
    let mut left = usize::try_from(len.min(BUFFER_BYTES)).unwrap_or(0);
    while left > 0 {
        let piece = left.min(scratch.len());
        payload.read_exact(&mut scratch[..piece])?;
        stream.deliver(&scratch[..piece]);
        left -= piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;
    use walnut_vmm_api::connect_line;

    #[test]
    fn programs_that_come_and_go_leave_nothing_with_a_guest_that_takes_nothing() {
        use std::io::Write;
        let directory = tempfile::TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let epoll = Arc::new(Epoll::new().unwrap());
        let ready = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut muxer = Muxer::new(3, epoll, Arc::new(listener), ready).unwrap();
        for _ in 0..300 {
            let mut program = UnixStream::connect(directory.path().join("s")).unwrap();
            program.write_all(connect_line(1024).as_bytes()).unwrap();
            muxer.accept();
            let port = *muxer.peers.keys().next().unwrap();
            muxer.socket_event(port, EventSet::IN);
            assert!(muxer.has_outgoing());
            muxer.socket_event(port, EventSet::HANG_UP);
            muxer.sync().unwrap();
        }
        assert_eq!((muxer.peers.len(), muxer.handshakes), (0, 0));
        assert_eq!((muxer.line.len(), muxer.resets.len()), (0, 0));
    }
}
