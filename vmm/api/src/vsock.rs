//! How a host program reaches a port of the guest through the VMM's Unix socket.
//!
//! The program connects to the listener that [`crate::VsockConfig`] names and writes
//! [`connect_line`]. The VMM asks the guest for a connection to that port and answers [`ok_line`] once
//! the guest accepts; from then on bytes pass both ways and a half-close on one side is a half-close on
//! the other. When the guest refuses, the VMM closes the socket without an answer.
//!
//! Guests cannot open connections to the host: the VMM refuses each with `VIRTIO_VSOCK_OP_RST`
//! (virtio 1.3, section 5.10.6). One such refused attempt has a meaning: see [`READY_PORT`].

/// A guest that asks the host (context id 2) for this port says that its init is listening.
pub const READY_PORT: u32 = 1023;
/// Bytes of a handshake line at the most, its newline included.
pub const MAX_HANDSHAKE_BYTES: usize = 32;

/// Why a handshake line is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HandshakeError {
    /// Not the expected word and a port number.
    #[error("handshake line {line:?} is not {expected:?} with a port number")]
    Malformed {
        /// What was received, with bytes outside ASCII escaped.
        line: String,
        /// The word that should have opened it.
        expected: &'static str,
    },
}

/// What the host program writes first.
pub fn connect_line(guest_port: u32) -> String {
    format!("CONNECT {guest_port}\n")
}

/// What the VMM answers; `host_port` is the port by which the guest sees the host's end.
pub fn ok_line(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

/// Reads [`connect_line`], its newline included or not, and gives the guest's port.
pub fn parse_connect(line: &[u8]) -> Result<u32, HandshakeError> {
    parse(line, "CONNECT ")
}

/// Reads [`ok_line`], its newline included or not, and gives the host's port.
pub fn parse_ok(line: &[u8]) -> Result<u32, HandshakeError> {
    parse(line, "OK ")
}

fn parse(line: &[u8], expected: &'static str) -> Result<u32, HandshakeError> {
    let digits = line
        .strip_suffix(b"\n")
        .unwrap_or(line)
        .strip_prefix(expected.as_bytes())
        .filter(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit));
    digits
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| HandshakeError::Malformed {
            line: line
                .iter()
                .take(MAX_HANDSHAKE_BYTES)
                .copied()
                .map(escape)
                .collect(),
            expected,
        })
}

fn escape(byte: u8) -> String {
    std::ascii::escape_default(byte).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn malformed_lines_are_refused() {
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT +1",
            "CONNECT 4294967296",
            "connect 1",
            "CONNECT 1 ",
        ] {
            assert!(parse_connect(line.as_bytes()).is_err(), "{line:?}");
        }
        assert!(parse_connect(b"CONNECT \xff\n").is_err());
    }

    proptest! {
        #[test]
        fn a_port_survives_the_handshake(port: u32) {
            prop_assert_eq!(parse_connect(connect_line(port).as_bytes()), Ok(port));
            prop_assert_eq!(parse_ok(ok_line(port).as_bytes()), Ok(port));
            prop_assert!(connect_line(port).len() <= MAX_HANDSHAKE_BYTES);
        }
    }
}
