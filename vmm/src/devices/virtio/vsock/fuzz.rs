//! What fuzzers run of the socket device's parsers and of its flow control.

use super::{
    connection::{BUFFER_BYTES, Connection, Effect},
    handshake::Handshake,
    packet::{HEADER_BYTES, Header, Parsed},
};
use std::{io::Write, os::unix::net::UnixStream, time::Instant};

/// The guest's context id; packets of others are dropped.
const CID: u64 = 42;

/// Takes packets, and keeps the promises that the connection makes to its owner.
pub(crate) fn packets(data: &[u8]) {
    let mut connection = Connection::new(CID, 1024, 7, BUFFER_BYTES);
    let _ = connection.next_control();
    for bytes in data.chunks(HEADER_BYTES) {
        let mut whole = [0; HEADER_BYTES];
        whole[..bytes.len()].copy_from_slice(bytes);
        let header = Header::from_bytes(&whole);
        assert_eq!(header.to_bytes(), whole);
        let ours = Header {
            src_cid: CID,
            dst_cid: 2,
            op: header.op % 10,
            socket_type: 1,
            ..header
        };
        for header in [header, ours] {
            let Parsed::Packet(packet) = header.parse(CID) else {
                continue;
            };
            let effect = connection.receive(&packet);
            assert!(connection.buffered() <= BUFFER_BYTES);
            match effect {
                Effect::Finish | Effect::Finished | Effect::Abort | Effect::Violation => {
                    connection = Connection::new(CID, 1024, 7, BUFFER_BYTES);
                }
                Effect::Proceed | Effect::Establish | Effect::Deliver | Effect::RefuseWrites => {}
            }
            let sendable = connection.sendable();
            if sendable > 0 {
                connection.data(sendable);
                assert_eq!(connection.sendable(), 0);
            }
            connection.forward(header.flags);
            while connection.owes_control() {
                assert!(connection.next_control().is_some());
            }
        }
    }
}

/// Reads a line that comes in pieces, and stops where it ends.
pub(crate) fn handshake(data: &[u8]) {
    let Ok((mut program, socket)) = UnixStream::pair() else {
        return;
    };
    if socket.set_nonblocking(true).is_err() {
        return;
    }
    let mut handshake = Handshake::new(socket, Instant::now());
    for piece in data.chunks(5) {
        if program.write_all(piece).is_err() || !matches!(handshake.advance(), Ok(None)) {
            return;
        }
    }
}
