//! The line by which a host program names the port that it wants.
//!
//! See `walnut_vmm_api::parse_connect`. Must not read past the line: what follows it is the stream's.

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use std::{io, os::unix::net::UnixStream, time::Instant};
use walnut_vmm_api::{HandshakeError, MAX_HANDSHAKE_BYTES, parse_connect};

/// Why a host program is turned away.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeFailure {
    /// Its socket failed.
    #[error("cannot read the handshake line")]
    Read(#[source] io::Error),
    /// It closed the socket before it had said what it wants.
    #[error("the host program left after {bytes} bytes of its handshake line")]
    Left {
        /// How much it said.
        bytes: usize,
    },
    /// It does not come to an end.
    #[error("the handshake line is longer than {MAX_HANDSHAKE_BYTES} bytes")]
    Endless,
    /// It said something else.
    #[error("the handshake line is not understood")]
    Line(#[source] HandshakeError),
}

/// A host program that has connected and not finished its line.
#[derive(Debug)]
pub(super) struct Handshake {
    socket: UnixStream,
    line: Vec<u8>,
    /// When it is turned away.
    pub(super) deadline: Instant,
}

impl Handshake {
    /// Begins with a socket that does not block.
    pub(super) fn new(socket: UnixStream, deadline: Instant) -> Self {
        Self {
            socket,
            line: Vec::with_capacity(MAX_HANDSHAKE_BYTES),
            deadline,
        }
    }

    /// The socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Reads what has come; gives the guest's port once the line is whole.
    pub(super) fn advance(&mut self) -> Result<Option<u32>, HandshakeFailure> {
        let mut seen = [0; MAX_HANDSHAKE_BYTES];
        let room = MAX_HANDSHAKE_BYTES - self.line.len();
        let peeked = match recv(&self.socket, &mut seen[..room], RecvFlags::PEEK) {
            Ok((_, 0)) => {
                return Err(HandshakeFailure::Left {
                    bytes: self.line.len(),
                });
            }
            Ok((_, count)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(HandshakeFailure::Read(error.into())),
        };
        let end = seen[..peeked].iter().position(|byte| *byte == b'\n');
        let wanted = end.map_or(peeked, |newline| newline + 1);
        let (_, taken) = recv(&self.socket, &mut seen[..wanted], RecvFlags::empty())
            .map_err(|error| HandshakeFailure::Read(error.into()))?;
        self.line.extend_from_slice(&seen[..taken]);
        if !self.line.ends_with(b"\n") {
            if self.line.len() == MAX_HANDSHAKE_BYTES {
                return Err(HandshakeFailure::Endless);
            }
            return Ok(None);
        }
        parse_connect(&self.line)
            .map(Some)
            .map_err(HandshakeFailure::Line)
    }

    /// The socket, positioned after the line.
    pub(super) fn into_socket(self) -> UnixStream {
        self.socket
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn pair() -> (UnixStream, Handshake) {
        let (program, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        (program, Handshake::new(socket, Instant::now()))
    }

    #[test]
    fn a_line_in_pieces_leaves_what_follows_in_the_socket() {
        let (mut program, mut handshake) = pair();
        assert_eq!(handshake.advance().unwrap(), None);
        program.write_all(b"CONN").unwrap();
        assert_eq!(handshake.advance().unwrap(), None);
        program.write_all(b"ECT 1024\nhello").unwrap();
        assert_eq!(handshake.advance().unwrap(), Some(1024));
        drop(program);
        let mut rest = String::new();
        handshake.into_socket().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn endless_and_foreign_lines_are_refused() {
        let (mut program, mut handshake) = pair();
        program.write_all(&[b'1'; 2 * MAX_HANDSHAKE_BYTES]).unwrap();
        assert!(matches!(
            handshake.advance(),
            Err(HandshakeFailure::Endless)
        ));
        let (mut program, mut handshake) = pair();
        program.write_all(b"GET / HTTP/1.0\r\n").unwrap();
        assert!(matches!(
            handshake.advance(),
            Err(HandshakeFailure::Line(_))
        ));
    }

    #[test]
    fn a_program_that_leaves_is_noticed() {
        let (mut program, mut handshake) = pair();
        program.write_all(b"CONNECT").unwrap();
        assert_eq!(handshake.advance().unwrap(), None);
        drop(program);
        assert!(matches!(
            handshake.advance(),
            Err(HandshakeFailure::Left { bytes: 7 })
        ));
    }
}
