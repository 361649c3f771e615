//! The device against a driver that plays the guest.

mod guest;
mod scale;

use self::guest::*;
use super::{
    connection::BUFFER_BYTES,
    packet::{Credit, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM},
};
use crate::devices::virtio::{
    VirtioDevice,
    mock_driver::{DEADLINE, Driver, FIRST_BUFFER},
};
use proptest::{prelude::*, test_runner::TestRunner};
use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{Read, Write},
    net::Shutdown,
    thread,
    time::Instant,
};
use walnut_vmm_api::READY_PORT;

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
    let mut backlog = VecDeque::new();
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

/// A header with fields that the device knows, so that more of it is reached than by any bytes.
fn header() -> impl Strategy<Value = Header> {
    let ports = prop_oneof![Just(READY_PORT), any::<u32>()];
    let length = prop_oneof![0u32..300, any::<u32>()];
    let credit = (any::<u32>(), any::<u32>());
    let op = prop_oneof![8 => 0u16..9, 1 => any::<u16>()];
    (op, ports, length, 0u32..5, credit).prop_map(
        move |(op, dst_port, len, flags, (buf_alloc, fwd_cnt))| Header {
            dst_port,
            len,
            flags,
            credit: Credit { buf_alloc, fwd_cnt },
            ..Peer::new(&Header::default(), 0).header(op)
        },
    )
}

#[test]
fn any_packet_is_survived() {
    let guest = RefCell::new(Guest::start(true, 16));
    let payload = proptest::collection::vec(any::<u8>(), 0..300);
    let packets = proptest::collection::vec((0u8..8, header(), payload), 1..20);
    TestRunner::new(ProptestConfig {
        cases: 300,
        // The device lives on from case to case.
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    })
    .run(&packets, |packets| {
        let mut guest = guest.borrow_mut();
        let (mut program, peer) = guest.connect(4096);
        program.get_mut().write_all(b"hello").unwrap();
        for (choice, header, payload) in packets {
            let dst_port = match choice {
                0 => header.dst_port,
                _ => peer.host_port,
            };
            guest.send(Header { dst_port, ..header }, &payload);
        }
        // Whatever became of it, the guest ends it and the program sees the end.
        guest.send(peer.header(RESET), &[]);
        let mut rest = Vec::new();
        let _ = program.read_to_end(&mut rest);
        prop_assert!(rest.len() <= 20 * 300);
        Ok(())
    })
    .unwrap();
}
