//! Thousands of connections, and floods.

use super::{super::muxer::MAX_PEERS, guest::*, pattern};
use crate::devices::virtio::vsock::packet::{Credit, Header, SHUTDOWN_BOTH};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    collections::HashMap,
    io::{BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

/// Each connection of these tests has two descriptors in this process.
fn allow_many_files() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).unwrap();
}

/// The guest answers each message of a connection with the same, until `count` were answered.
fn echo_messages(guest: &mut Guest, peers: &mut HashMap<u32, Peer>, count: usize) {
    let mut answered = 0;
    while answered < count {
        let (header, payload) = guest.receive();
        let peer = peers.get_mut(&header.src_port).unwrap();
        peer.host = header.credit;
        if header.op == DATA {
            peer.forwarded += header.len;
            let answer = peer.data(&payload);
            guest.send(answer, &payload);
            answered += 1;
        }
    }
}

#[test]
fn as_many_connections_as_there_may_be_move_data_at_once_and_one_more_waits() {
    allow_many_files();
    let mut guest = Guest::start(true, 100);
    let mut programs = Vec::new();
    let mut peers = HashMap::new();
    for _ in 0..MAX_PEERS {
        let (program, peer) = guest.connect(4096);
        peers.insert(peer.host_port, peer);
        programs.push(program);
    }
    // One takes nothing that the guest sends, until the guest has no credit for it.
    let (slow, others) = programs.split_first_mut().unwrap();
    let slow_port = *peers.keys().min().unwrap();
    let mut written = 0;
    while peers[&slow_port].credit() > 0 {
        let peer = peers.get_mut(&slow_port).unwrap();
        let piece = pattern(usize::try_from(peer.credit().min(TX_BYTES)).unwrap());
        let header = peer.data(&piece);
        guest.send(header, &piece);
        written += piece.len();
    }
    for (index, program) in others.iter_mut().enumerate() {
        program.get_mut().write_all(&index.to_le_bytes()).unwrap();
    }
    echo_messages(&mut guest, &mut peers, others.len());
    for (index, program) in others.iter_mut().enumerate() {
        let mut answer = [0; 8];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(answer, index.to_le_bytes());
    }
    let mut seen = vec![0; written];
    slow.read_exact(&mut seen).unwrap();

    // One more is taken when one has left, and not before.
    let mut waiting = dial(&guest.socket_path());
    waiting.get_ref().set_nonblocking(true).unwrap();
    assert!(waiting.read(&mut [0]).is_err(), "it got an answer");
    waiting.get_ref().set_nonblocking(false).unwrap();
    let left = programs.pop().unwrap();
    drop(left);
    let mut accepted = false;
    while !accepted {
        let (header, _) = guest.receive();
        match (header.op, peers.get(&header.src_port)) {
            (SHUTDOWN, Some(peer)) => {
                assert_eq!(header.flags, SHUTDOWN_BOTH);
                guest.send(peer.header(RESET), &[]);
            }
            (REQUEST, None) => {
                guest.send(Peer::new(&header, 4096).header(RESPONSE), &[]);
                accepted = true;
            }
            _ => {}
        }
    }
    let mut answer = [0; 3];
    waiting.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK ");
}

#[test]
fn later_connections_of_many_get_smaller_buffers() {
    allow_many_files();
    let mut guest = Guest::start(true, 16);
    let mut programs: Vec<BufReader<UnixStream>> = Vec::new();
    let mut buffers = Vec::new();
    for _ in 0..200 {
        let (program, peer) = guest.connect(4096);
        programs.push(program);
        buffers.push(peer.host.buf_alloc);
    }
    assert_eq!((buffers[0], buffers[199]), (256 * 1024, 16 * 1024));
    let whole = buffers.iter().filter(|bytes| **bytes == buffers[0]);
    assert_eq!(whole.count(), 128);
}

#[test]
fn a_flood_of_packets_waits_until_the_guest_takes_the_answers() {
    let mut guest = Guest::start(true, 4);
    let (mut program, mut peer) = guest.connect(4096);
    // Take the four buffers away, and ask for what is refused.
    let buffers: Vec<u64> = (0..4).map(|_| swallow_one(&mut guest, &peer)).collect();
    let mut sent = 0;
    while guest.driver.queues[TX].free() > 0 {
        let head = guest.raw(&Header {
            dst_port: 1,
            ..peer.header(REQUEST)
        });
        guest.tx.insert(head, 0);
        sent += 1;
        assert!(sent < 10_000, "the device takes packets without an end");
        while let Some((head, _)) = guest.driver.queues[TX].poll_used() {
            guest.tx.remove(&head);
        }
    }
    // The answers come once there is room, and the connection is as it was.
    for address in buffers {
        guest.offer_rx(address);
    }
    for _ in 0..sent {
        let reset = guest.expect(RESET);
        assert_eq!(reset.src_port, 1);
    }
    while guest.driver.queues[TX].free() < 128 {
        guest.driver.wait_used(TX);
    }
    guest.tx.clear();
    let header = peer.data(b"still here");
    guest.send(header, b"still here");
    let mut seen = [0; 10];
    program.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"still here");
    program.get_ref().shutdown(Shutdown::Write).unwrap();
    guest.expect(SHUTDOWN);
}

/// Makes the device use a receive buffer, which is not offered again. Gives its address.
fn swallow_one(guest: &mut Guest, peer: &Peer) -> u64 {
    guest.send(peer.header(CREDIT_REQUEST), &[]);
    let (head, _) = guest.driver.wait_used(RX);
    guest.rx.remove(&head).unwrap()
}

#[test]
fn a_guest_that_lies_about_its_credit_gets_no_more_than_it_says() {
    let mut guest = Guest::start(true, 100);
    let (mut program, peer) = guest.connect(0);
    program.get_mut().write_all(&pattern(100_000)).unwrap();
    // More taken than was sent, all of it, none: whatever it says, the difference to what was sent counts.
    let mut got = 0;
    for (buf_alloc, fwd_cnt) in [(10, u32::MAX), (0, 5), (u32::MAX, u32::MAX), (1000, 0)] {
        let credit = Credit { buf_alloc, fwd_cnt };
        let lie = Header {
            credit,
            ..peer.header(CREDIT_UPDATE)
        };
        guest.send(lie, &[]);
        guest.send(
            Header {
                credit,
                ..peer.header(CREDIT_REQUEST)
            },
            &[],
        );
        loop {
            let (header, payload) = guest.receive();
            match header.op {
                DATA => got += u32::try_from(payload.len()).unwrap(),
                CREDIT_UPDATE => break,
                CREDIT_REQUEST => {}
                other => panic!("operation {other}"),
            }
        }
        assert!(got <= 10 || buf_alloc > 10, "{got} bytes");
    }
}
