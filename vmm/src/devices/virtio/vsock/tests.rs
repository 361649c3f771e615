//! The device against a driver that plays the guest.

use super::{
    Vsock,
    connection::BUFFER_BYTES,
    packet::{Credit, HEADER_BYTES, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM},
};
use crate::devices::virtio::{
    VirtioDevice,
    mock_driver::{DEADLINE, Driver, FIRST_BUFFER},
};
use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    thread,
    time::Instant,
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{READY_PORT, connect_line, parse_ok};

const CID: u64 = 42;
const RX: usize = 0;
const TX: usize = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const PORT: u32 = 1024;
/// Bytes of each receive buffer: small, so that payload is spread.
const RX_BYTES: u32 = 700;
const TX_BYTES: u32 = 64 * 1024;

struct Guest {
    driver: Driver,
    rx: HashMap<u16, u64>,
    device: Vsock,
    ready: EventFd,
    directory: TempDir,
    /// Where the guest's payload lies; reused once a packet is taken.
    tx_slots: Vec<u64>,
    tx: HashMap<u16, u64>,
}

impl Guest {
    fn start(event_idx: bool, rx_buffers: u16) -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let ready = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut device = Vsock::new(CID, listener.into(), ready.try_clone().unwrap()).unwrap();
        let (driver, activation) = Driver::new(&[128, 128, 16], event_idx);
        device.activate(activation).unwrap();
        let tx_slots = (0..32).map(|slot| FIRST_BUFFER + (1 << 20) + slot * 0x2_0000);
        let mut guest = Self {
            driver,
            rx: HashMap::new(),
            device,
            ready,
            directory,
            tx_slots: tx_slots.collect(),
            tx: HashMap::new(),
        };
        for slot in 0..u64::from(rx_buffers) {
            guest.offer_rx(FIRST_BUFFER + slot * 0x1000);
        }
        guest
    }

    fn socket_path(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn offer_rx(&mut self, address: u64) {
        let head = self.driver.queues[RX].offer(&[], &[(address, RX_BYTES)]);
        self.rx.insert(head, address);
    }

    /// The next packet that the host sent.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, length) = self.driver.wait_used(RX);
        self.read_packet(head, length)
    }

    fn read_packet(&mut self, head: u16, length: u32) -> (Header, Vec<u8>) {
        let address = self.rx.remove(&head).unwrap();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.driver
            .memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        self.offer_rx(address);
        let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        assert_eq!(
            usize::try_from(header.len).unwrap(),
            bytes.len() - HEADER_BYTES
        );
        (header, bytes.split_off(HEADER_BYTES))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        while let Some((head, _)) = self.driver.queues[TX].poll_used() {
            self.tx_slots.push(self.tx.remove(&head).unwrap());
        }
        if self.tx_slots.is_empty() {
            let (head, _) = self.driver.wait_used(TX);
            self.tx_slots.push(self.tx.remove(&head).unwrap());
        }
        let address = self.tx_slots.pop().unwrap();
        let memory = &self.driver.memory;
        memory
            .write_slice(&header.to_bytes(), GuestAddress(address))
            .unwrap();
        let data = address + 0x1000;
        memory.write_slice(payload, GuestAddress(data)).unwrap();
        let head_bytes = u32::try_from(HEADER_BYTES).unwrap();
        let mut readable = vec![(address, head_bytes)];
        // In two pieces, as Linux does with large packets.
        let half = payload.len() / 2;
        for (at, piece) in [(0, &payload[..half]), (half, &payload[half..])] {
            if !piece.is_empty() {
                let at = data + u64::try_from(at).unwrap();
                readable.push((at, u32::try_from(piece.len()).unwrap()));
            }
        }
        let head = self.driver.queues[TX].offer(&readable, &[]);
        self.tx.insert(head, address);
    }

    /// A host program that asks for [`PORT`]; the guest has accepted when this returns.
    fn connect(&mut self, buf_alloc: u32) -> (BufReader<UnixStream>, Peer) {
        let mut program = dial(&self.socket_path());
        let request = loop {
            let (header, _) = self.receive();
            if header.op != CREDIT_UPDATE {
                break header;
            }
        };
        assert_eq!((request.op, request.dst_port), (REQUEST, PORT));
        let peer = Peer::new(&request, buf_alloc);
        let response = peer.header(RESPONSE);
        self.send(response, &[]);
        let mut line = Vec::new();
        program.read_until(b'\n', &mut line).unwrap();
        assert_eq!(parse_ok(&line), Ok(request.src_port));
        (program, peer)
    }
}

fn dial(path: &PathBuf) -> BufReader<UnixStream> {
    let mut program = UnixStream::connect(path).unwrap();
    program.set_read_timeout(Some(DEADLINE)).unwrap();
    program.set_write_timeout(Some(DEADLINE)).unwrap();
    program.write_all(connect_line(PORT).as_bytes()).unwrap();
    BufReader::new(program)
}

/// The guest's end of a connection.
#[derive(Debug, Clone, Copy)]
struct Peer {
    host_port: u32,
    buf_alloc: u32,
    forwarded: u32,
    sent: u32,
    host: Credit,
}

impl Peer {
    fn new(request: &Header, buf_alloc: u32) -> Self {
        Self {
            host_port: request.src_port,
            buf_alloc,
            forwarded: 0,
            sent: 0,
            host: request.credit,
        }
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: self.host_port,
            socket_type: TYPE_STREAM,
            op,
            credit: Credit {
                buf_alloc: self.buf_alloc,
                fwd_cnt: self.forwarded,
            },
            ..Header::default()
        }
    }

    fn credit(&self) -> u32 {
        self.host.buf_alloc - self.sent.wrapping_sub(self.host.fwd_cnt)
    }

    fn data(&mut self, payload: &[u8]) -> Header {
        let len = u32::try_from(payload.len()).unwrap();
        self.sent = self.sent.wrapping_add(len);
        Header {
            len,
            ..self.header(DATA)
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(SHUTDOWN)
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0u32..)
        .flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes())
        .take(length)
        .collect()
}

/// Echoes everything; the guest's buffer holds `buf_alloc` bytes.
fn echo(event_idx: bool, rx_buffers: u16, buf_alloc: u32, length: usize) {
    let mut guest = Guest::start(event_idx, rx_buffers);
    let (program, mut peer) = guest.connect(buf_alloc);
    let data = pattern(length);
    let expected = data.clone();
    let mut writer = program.get_ref().try_clone().unwrap();
    let writing = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut program = program;
    let reading = thread::spawn(move || {
        let mut all = Vec::new();
        program.read_to_end(&mut all).unwrap();
        all
    });
    let mut backlog = std::collections::VecDeque::new();
    let mut has_ended = false;
    while !(has_ended && backlog.is_empty()) {
        let room = usize::try_from(peer.credit().min(TX_BYTES)).unwrap();
        let piece: Vec<u8> = backlog.drain(..room.min(backlog.len())).collect();
        if !piece.is_empty() {
            let header = peer.data(&piece);
            guest.send(header, &piece);
        }
        if has_ended && backlog.is_empty() {
            break;
        }
        let (header, payload) = guest.receive();
        peer.host = header.credit;
        match header.op {
            DATA => {
                assert!(payload.len() <= usize::try_from(buf_alloc).unwrap());
                peer.forwarded = peer.forwarded.wrapping_add(header.len);
                backlog.extend(payload);
                guest.send(peer.header(CREDIT_UPDATE), &[]);
            }
            SHUTDOWN => {
                assert_eq!(header.flags, SHUTDOWN_SEND);
                has_ended = true;
            }
            CREDIT_UPDATE => {}
            CREDIT_REQUEST => guest.send(peer.header(CREDIT_UPDATE), &[]),
            other => panic!("operation {other}"),
        }
    }
    guest.send(peer.shutdown(SHUTDOWN_BOTH), &[]);
    writing.join().unwrap();
    assert!(reading.join().unwrap() == expected);
    loop {
        let (header, _) = guest.receive();
        match header.op {
            RESET => break,
            CREDIT_UPDATE | SHUTDOWN => {}
            other => panic!("operation {other}"),
        }
    }
}

#[test]
fn a_mebibyte_passes_both_ways_with_tiny_credit() {
    echo(true, 8, 1000, 1 << 20);
}

#[test]
fn a_mebibyte_passes_both_ways_without_event_index() {
    echo(false, 2, 5000, 1 << 20);
}

#[test]
fn much_passes_with_the_credit_that_linux_gives() {
    echo(true, 100, 256 * 1024, 8 << 20);
}

#[test]
fn a_slow_program_holds_up_nobody_and_loses_nothing() {
    let mut guest = Guest::start(true, 16);
    let (mut slow, mut peer) = guest.connect(4096);
    let data = pattern(1 << 20);
    let mut left = &data[..];
    // Until neither the socket nor the buffer takes any more. An update can be news from before the
    // request, so one without credit is not yet the end.
    let mut rounds_without_credit = 0;
    while rounds_without_credit < 4 {
        let room = usize::try_from(peer.credit().min(TX_BYTES)).unwrap();
        let (piece, rest) = left.split_at(room.min(left.len()));
        if !piece.is_empty() {
            let header = peer.data(piece);
            guest.send(header, piece);
            left = rest;
        }
        guest.send(peer.header(CREDIT_REQUEST), &[]);
        peer.host = guest.expect(CREDIT_UPDATE).credit;
        rounds_without_credit = match peer.credit() {
            0 => rounds_without_credit + 1,
            _ => 0,
        };
    }
    let written = data.len() - left.len();
    assert!(written >= usize::try_from(BUFFER_BYTES).unwrap() && !left.is_empty());

    let (mut other, mut other_peer) = guest.connect(4096);
    other.get_mut().write_all(b"ping").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(
        (header.src_port, &payload[..]),
        (other_peer.host_port, &b"ping"[..])
    );
    let header = other_peer.data(b"pong");
    guest.send(header, b"pong");
    let mut answer = [0; 4];
    other.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");

    // The guest is done and forgets the connection; the program still gets everything.
    guest.send(peer.shutdown(SHUTDOWN_BOTH), &[]);
    let reset = guest.expect(RESET);
    assert_eq!(reset.src_port, peer.host_port);
    let mut all = Vec::new();
    slow.read_to_end(&mut all).unwrap();
    assert!(all == data[..written]);
}

#[test]
fn half_closes_pass_in_both_directions() {
    let mut guest = Guest::start(true, 8);
    let (mut program, mut peer) = guest.connect(4096);
    program.get_ref().shutdown(Shutdown::Write).unwrap();
    let shutdown = guest.expect(SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    let header = peer.data(b"late");
    guest.send(header, b"late");
    guest.send(peer.shutdown(SHUTDOWN_SEND), &[]);
    let mut rest = String::new();
    program.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "late");
    // Nothing can pass any more: the device says so and waits for the guest's word.
    assert_eq!(guest.expect(SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.send(peer.header(RESET), &[]);

    let (mut program, mut peer) = guest.connect(4096);
    let header = peer.data(b"bye");
    guest.send(header, b"bye");
    guest.send(peer.shutdown(SHUTDOWN_SEND), &[]);
    let mut rest = String::new();
    program.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "bye");
    program.get_mut().write_all(b"still here").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!((header.op, &payload[..]), (DATA, &b"still here"[..]));
}

#[test]
fn a_program_that_leaves_is_reported_with_what_it_wrote() {
    let mut guest = Guest::start(true, 8);
    let (mut program, mut peer) = guest.connect(4);
    program.get_mut().write_all(b"12345678").unwrap();
    drop(program);
    let (header, payload) = guest.receive();
    assert_eq!((header.op, &payload[..]), (DATA, &b"1234"[..]));
    guest.expect(CREDIT_REQUEST);
    peer.forwarded += 4;
    guest.send(peer.header(CREDIT_UPDATE), &[]);
    let (_, payload) = guest.receive();
    assert_eq!(&payload[..], b"5678");
    guest.expect(CREDIT_REQUEST);
    peer.forwarded += 4;
    guest.send(peer.header(CREDIT_UPDATE), &[]);
    assert_eq!(guest.expect(SHUTDOWN).flags, SHUTDOWN_BOTH);
}

#[test]
fn a_refused_connection_closes_the_socket_without_an_answer() {
    let mut guest = Guest::start(true, 8);
    let mut program = dial(&guest.socket_path());
    let request = guest.expect(REQUEST);
    let peer = Peer::new(&request, 0);
    guest.send(peer.header(RESET), &[]);
    let mut answer = Vec::new();
    program.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty());
}

#[test]
fn the_guest_cannot_connect_but_can_say_that_it_is_ready() {
    let mut guest = Guest::start(true, 8);
    for port in [22, READY_PORT, READY_PORT] {
        assert!(guest.ready.read().is_err());
        let request = Header {
            dst_port: port,
            ..Peer::new(&Header::default(), 0).header(REQUEST)
        };
        guest.send(request, &[]);
        let reset = guest.expect(RESET);
        assert_eq!((reset.src_port, reset.dst_port), (port, PORT));
        if port == READY_PORT {
            break;
        }
    }
    assert_eq!(guest.ready.read().unwrap(), 1);
}

#[test]
fn violations_end_the_connection_and_nothing_else() {
    let mut guest = Guest::start(true, 8);
    let violations: [fn(&Peer) -> Header; 4] = [
        // More than the buffer holds.
        |peer| Header {
            len: u32::MAX,
            ..peer.header(DATA)
        },
        // Payload that is not there.
        |peer| Header {
            len: 100,
            ..peer.header(DATA)
        },
        |peer| peer.header(REQUEST),
        |peer| peer.header(RESPONSE),
    ];
    for violation in violations {
        let (mut program, peer) = guest.connect(4096);
        guest.send(violation(&peer), &[]);
        assert_eq!(guest.expect(RESET).src_port, peer.host_port);
        let mut rest = Vec::new();
        program.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }
    let (_program, peer) = guest.connect(4096);
    for (socket_type, op) in [(2, DATA), (TYPE_STREAM, 99)] {
        let header = Header {
            socket_type,
            ..peer.header(op)
        };
        guest.send(header, &[]);
        guest.expect(RESET);
    }
    guest.send(
        Header {
            src_cid: 7,
            ..peer.header(RESET)
        },
        &[],
    );
    guest.send(peer.header(CREDIT_REQUEST), &[]);
    guest.expect(CREDIT_UPDATE);
}

#[test]
fn a_corrupt_queue_asks_for_a_reset_of_the_device() {
    let mut guest = Guest::start(true, 0);
    guest.driver.queues[TX].publish(1000);
    guest.driver.wait_interrupt(Instant::now() + DEADLINE);
    guest.device.reset();
}

#[test]
fn the_device_starts_again_after_a_reset() {
    let mut guest = Guest::start(true, 8);
    let (mut program, _) = guest.connect(4096);
    guest.device.reset();
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    let (driver, activation) = Driver::new(&[128, 128, 16], true);
    guest.driver = driver;
    guest.rx.clear();
    guest.tx.clear();
    guest.device.activate(activation).unwrap();
    guest.offer_rx(FIRST_BUFFER);
    guest.connect(4096);
}

#[test]
fn the_configuration_is_the_context_id() {
    let guest = Guest::start(true, 0);
    let mut bytes = [1; 12];
    guest.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [42, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    guest.device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 12]);
    assert!(guest.driver.queues[RX].free() == 128);
}
