//! The whole device with a mock driver on one side and a socket that plays the tap on the other.

use super::super::{
    DEVICE_NEEDS_RESET, Interrupt,
    mock_driver::{DEADLINE, Driver, FIRST_BUFFER},
};
use super::*;
use proptest::prelude::*;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::{sync::atomic::Ordering, time::Instant};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::{Bytes, GuestAddress};
use walnut_vmm_api::{FdSlot, RateLimit, TokenBucket};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const SIZES: [u16; 3] = [16, 16, 16];
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const HEADER: usize = packet::HEADER_BYTES;

fn config() -> NetworkConfig {
    NetworkConfig {
        taps: vec![FdSlot(0)],
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1500,
        receive_rate: None,
        transmit_rate: None,
    }
}

/// A device that runs, its driver, and the host's end of the wire.
struct Wire {
    network: Network,
    driver: Driver,
    interrupt: Interrupt,
    host: OwnedFd,
}

impl Wire {
    fn new(config: &NetworkConfig, features: u64) -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (host, tap) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut network =
            Network::with_taps(config, vec![Tap::of_socket(tap)], Vec::new()).unwrap();
        let (driver, interrupt) = activate(&mut network, features);
        Self {
            network,
            driver,
            interrupt,
            host,
        }
    }

    /// The host sends a packet, of which it leaves the header's last field alone.
    fn host_sends(&self, bytes: usize, seed: u8) -> Vec<u8> {
        let mut packet = vec![0; HEADER];
        packet.extend((0..bytes).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1] ^ seed));
        let sent = rustix::net::send(&self.host, &packet, SendFlags::empty()).unwrap();
        assert_eq!(sent, packet.len());
        packet
    }

    /// What the host receives next.
    fn host_receives(&self) -> Vec<u8> {
        let end = Instant::now() + DEADLINE;
        let mut packet = vec![0; packet::MAX_BYTES];
        loop {
            match rustix::net::recv(&self.host, &mut packet[..], RecvFlags::empty()) {
                Ok((bytes, _)) => {
                    packet.truncate(bytes);
                    return packet;
                }
                Err(_) => assert!(Instant::now() < end, "no packet came"),
            }
            std::thread::yield_now();
        }
    }

    fn guest_sends(&mut self, pieces: &[(u64, &[u8])]) -> u16 {
        let mut chain = Vec::new();
        for (at, bytes) in pieces {
            let memory = &self.driver.memory;
            memory.write_slice(bytes, GuestAddress(*at)).unwrap();
            chain.push((*at, u32::try_from(bytes.len()).unwrap()));
        }
        self.driver.queues[TRANSMIT].offer(&chain, &[])
    }

    fn read(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        let memory = &self.driver.memory;
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// A small packet arrives in either direction: the device lives.
    fn works(&mut self) {
        let frame = [0x5a; 60];
        let head = self.guest_sends(&[(FIRST_BUFFER, &[0; HEADER]), (FIRST_BUFFER + 64, &frame)]);
        while self.driver.wait_used(TRANSMIT).0 != head {}
        while self.host_receives()[HEADER..] != frame {}
    }

    fn needs_reset(&self) -> bool {
        self.interrupt.device_status.load(Ordering::SeqCst) & DEVICE_NEEDS_RESET != 0
    }

    fn link_status(&self) -> u32 {
        let mut status = [0; 2];
        self.network.read_config(6, &mut status);
        u16::from_le_bytes(status).into()
    }
}

fn activate(network: &mut Network, features: u64) -> (Driver, Interrupt) {
    let (driver, mut activation) = Driver::new(&SIZES, true);
    activation.features = features;
    let interrupt = activation.interrupt.clone();
    network.activate(activation).unwrap();
    (driver, interrupt)
}

/// Buffers of the receive queue, apart from each other.
fn buffer(number: u64) -> u64 {
    FIRST_BUFFER + 0x10_0000 + number * 0x2_0000
}

#[test]
fn a_packet_spans_as_many_buffers_as_it_needs() {
    let mut wire = Wire::new(&config(), MERGEABLE);
    let queue = &mut wire.driver.queues[RECEIVE];
    for number in 0..4 {
        // Cut within the header, as a driver may.
        queue.offer(&[], &[(buffer(number), 11), (buffer(number) + 11, 489)]);
    }
    for (bytes, seed, first) in [(1200, 3, 0), (100, 4, 3)] {
        let mut packet = wire.host_sends(bytes, seed);
        let count = packet.len().div_ceil(500);
        packet[10..12].copy_from_slice(&u16::try_from(count).unwrap().to_le_bytes());
        let mut seen = Vec::new();
        for number in first..first + count as u64 {
            let (_, length) = wire.driver.wait_used(RECEIVE);
            seen.extend(wire.read(buffer(number), usize::try_from(length).unwrap()));
        }
        assert_eq!(seen, packet);
        if bytes == 1200 {
            // What is left holds no full packet any more.
            for number in 4..8 {
                wire.driver.queues[RECEIVE].offer(&[], &[(buffer(number), 500)]);
            }
        }
    }
}

#[test]
fn segments_of_64_kib_arrive_whole() {
    let features = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let mut wire = Wire::new(&config(), features);
    for number in 0..5 {
        let queue = &mut wire.driver.queues[RECEIVE];
        queue.offer(&[], &[(buffer(number), 0x4000)]);
    }
    let packet = wire.host_sends(65549, 9);
    let mut seen = Vec::new();
    for number in 0..5 {
        let (_, length) = wire.driver.wait_used(RECEIVE);
        seen.extend(wire.read(buffer(number), usize::try_from(length).unwrap()));
    }
    assert_eq!(seen[12..], packet[12..]);
    assert_eq!(seen[10..12], [5, 0]);
}

#[test]
fn a_driver_with_few_small_buffers_receives_too() {
    let mut wire = Wire::new(&config(), MERGEABLE);
    // All descriptors that there are: 640 bytes.
    for number in 0..16 {
        let queue = &mut wire.driver.queues[RECEIVE];
        queue.offer(&[], &[(buffer(0) + number * 40, 40)]);
    }
    let packet = wire.host_sends(60, 1);
    let lengths = [(); 2].map(|()| wire.driver.wait_used(RECEIVE).1);
    assert_eq!(lengths, [40, 32]);
    assert_eq!(wire.read(buffer(0) + 12, 60), packet[12..]);
}

#[test]
fn without_mergeable_buffers_a_packet_has_one() {
    let mut wire = Wire::new(&config(), 0);
    let packet = wire.host_sends(1000, 7);
    // It waits for a buffer; one that is none comes back empty.
    let short = wire.driver.queues[RECEIVE].offer(&[], &[(buffer(0), 11)]);
    assert_eq!(wire.driver.wait_used(RECEIVE), (short, 0));
    let queue = &mut wire.driver.queues[RECEIVE];
    let head = queue.offer(&[], &[(buffer(1), 12), (buffer(2), 1600)]);
    assert_eq!(wire.driver.wait_used(RECEIVE), (head, 1012));
    assert_eq!(wire.read(buffer(1) + 10, 2), [1, 0]);
    assert_eq!(wire.read(buffer(2), 1000), packet[12..]);
}

#[test]
fn what_the_guest_sends_is_gathered_and_what_is_no_packet_is_lost() {
    let mut wire = Wire::new(&config(), 0);
    let at = FIRST_BUFFER;
    let head = wire.guest_sends(&[(at, &[1; 5]), (at + 100, &[2; 7]), (at + 200, &[3; 90])]);
    assert_eq!(wire.driver.wait_used(TRANSMIT), (head, 0));
    let expected = [&[1; 5][..], &[2; 7], &[3; 90]].concat();
    assert_eq!(wire.host_receives(), expected);
    let hostile: [&[(u64, u32)]; 5] = [
        &[(at, 12)],
        &[(at, 12), (at + 12, 65554)],
        &[(at, 12), (u64::MAX - 100, 60)],
        &[(at, u32::MAX), (at, 1)],
        &[(0xdead_0000_0000, 200)],
    ];
    for chain in hostile {
        let head = wire.driver.queues[TRANSMIT].offer(chain, &[]);
        assert_eq!(wire.driver.wait_used(TRANSMIT), (head, 0));
    }
    let head = wire.driver.queues[TRANSMIT].offer(&[], &[(at, 100)]);
    assert_eq!(wire.driver.wait_used(TRANSMIT), (head, 0));
    wire.works();
}

#[test]
fn a_host_that_takes_nothing_delays_and_loses_nothing() {
    let mut wire = Wire::new(&config(), 0);
    // More than the socket holds.
    let frame = vec![0x77; 60_000];
    for number in 0..8_u64 {
        let at = FIRST_BUFFER + number * 0x1_0000;
        let memory = &wire.driver.memory;
        memory.write_slice(&frame, GuestAddress(at)).unwrap();
        wire.driver.queues[TRANSMIT].offer(&[(at, 60_000)], &[]);
    }
    for _ in 0..8 {
        assert_eq!(wire.host_receives(), frame);
    }
    for _ in 0..8 {
        wire.driver.wait_used(TRANSMIT);
    }
}

#[test]
fn a_device_that_was_reset_works_again() {
    let mut wire = Wire::new(&config(), MERGEABLE);
    wire.driver.queues[RECEIVE].offer(&[], &[(buffer(0), 2000)]);
    wire.works();
    wire.network.reset();
    // It comes while there is no driver.
    let packet = wire.host_sends(500, 5);
    (wire.driver, wire.interrupt) = activate(&mut wire.network, 0);
    let head = wire.driver.queues[RECEIVE].offer(&[], &[(buffer(1), 2000)]);
    assert_eq!(wire.driver.wait_used(RECEIVE), (head, 512));
    assert_eq!(wire.read(buffer(1) + 12, 500), packet[12..]);
    wire.works();
}

#[test]
fn a_tap_that_goes_away_takes_the_link_down_and_nothing_else() {
    let mut wire = Wire::new(&config(), MERGEABLE);
    wire.driver.queues[RECEIVE].offer(&[], &[(buffer(0), 2000)]);
    assert_eq!(wire.link_status(), VIRTIO_NET_S_LINK_UP);
    let (host, _) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    wire.host = host;
    wire.driver.queues[RECEIVE].offer(&[], &[(buffer(1), 2000)]);
    let end = Instant::now() + DEADLINE;
    while wire.link_status() == VIRTIO_NET_S_LINK_UP {
        wire.driver.wait_interrupt(end);
    }
    let head = wire.guest_sends(&[(FIRST_BUFFER, &[0; 80])]);
    assert_eq!(wire.driver.wait_used(TRANSMIT), (head, 0));
    assert!(!wire.needs_reset());
}

#[test]
fn rates_hold_in_both_directions() {
    let bucket = TokenBucket {
        size: 1,
        refill_ms: 30,
    };
    let rate = Some(RateLimit {
        bytes: None,
        operations: Some(bucket),
    });
    let mut wire = Wire::new(
        &NetworkConfig {
            receive_rate: rate,
            transmit_rate: rate,
            ..config()
        },
        0,
    );
    for number in 0..4 {
        let queue = &mut wire.driver.queues[RECEIVE];
        queue.offer(&[], &[(buffer(number), 2000)]);
    }
    let start = Instant::now();
    for _ in 0..4 {
        wire.works();
    }
    assert!(start.elapsed().as_millis() >= 90, "{:?}", start.elapsed());
    let start = Instant::now();
    for seed in 0..4 {
        wire.host_sends(100, seed);
    }
    for _ in 0..4 {
        wire.driver.wait_used(RECEIVE);
    }
    assert!(start.elapsed().as_millis() >= 90, "{:?}", start.elapsed());
}

#[test]
fn commands_that_were_not_agreed_on_are_refused() {
    let mut wire = Wire::new(&config(), 0);
    let (question, answer) = (FIRST_BUFFER, FIRST_BUFFER + 0x100);
    let cases: [&[u8]; 4] = [
        &[4, 0, 1, 0],
        &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 1],
        &[9],
    ];
    for bytes in cases {
        let memory = &wire.driver.memory;
        memory.write_slice(bytes, GuestAddress(question)).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        let queue = &mut wire.driver.queues[CONTROL];
        let head = queue.offer(&[(question, length)], &[(answer, 1)]);
        assert_eq!(wire.driver.wait_used(CONTROL), (head, 1));
        assert_eq!(wire.read(answer, 1), [1], "{bytes:?}");
    }
}

#[test]
fn a_corrupt_ring_breaks_the_device_and_ends_its_thread() {
    for queue in [RECEIVE, TRANSMIT] {
        let mut wire = Wire::new(&config(), MERGEABLE);
        wire.driver.queues[queue].publish(999);
        wire.host_sends(60, 0);
        let end = Instant::now() + DEADLINE;
        while !wire.needs_reset() {
            wire.driver.wait_interrupt(end);
        }
        wire.network.reset();
    }
}

#[test]
fn configuration_and_missing_queues_are_as_the_standard_says() {
    let wire = Wire::new(&config(), 0);
    let mut space = [0xff; 14];
    wire.network.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xdc, 5, 0, 0]);
    let mut network = wire.network;
    network.reset();
    let (_driver, mut activation) = Driver::new(&SIZES, true);
    activation.queues[1] = None;
    let error = network.activate(activation).unwrap_err();
    assert!(matches!(error, ActivateError::MissingQueue { index: 0 }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_chains_are_survived(
        chains in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec((0_u64..0x110_0000, 0_u32..0x2_0000, any::<bool>()), 1..5)),
            0..8,
        ),
        packets in proptest::collection::vec(0_usize..2000, 0..8),
        mergeable: bool,
    ) {
        let features = if mergeable { MERGEABLE } else { 0 };
        let mut wire = Wire::new(&config(), features);
        for (receive, pieces) in chains {
            // The rings are the driver's: the test lets nobody write to them.
            let pieces = pieces.into_iter()
                .map(|(at, bytes, writable)| (at.max(FIRST_BUFFER), bytes, writable));
            let (writable, readable): (Vec<_>, Vec<_>) = pieces.partition(|piece| piece.2);
            let [readable, writable] = [readable, writable]
                .map(|list| list.into_iter().map(|(at, bytes, _)| (at, bytes)).collect::<Vec<_>>());
            let queue = &mut wire.driver.queues[if receive { RECEIVE } else { TRANSMIT }];
            if queue.free() >= readable.len() + writable.len() {
                queue.offer(&readable, &writable);
            }
        }
        for bytes in packets {
            wire.host_sends(bytes, 1);
        }
        while wire.driver.queues[TRANSMIT].free() < 16 {
            wire.driver.wait_used(TRANSMIT);
        }
        wire.works();
        prop_assert!(!wire.needs_reset());
    }
}
