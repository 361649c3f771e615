//! Packets of the socket device: the header and the checks that need no connection.
//!
//! virtio 1.3, section 5.10.6. Pure: must not touch guest memory, queues or sockets. The crate
//! `virtio-vsock` takes a payload in one descriptor only, while Linux sends large ones in several, so
//! the header is read here and the payload stays with the descriptor chain's reader.

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;
/// Context id of the host.
pub(super) const HOST_CID: u64 = 2;
/// The socket type of streams.
pub(super) const TYPE_STREAM: u16 = 1;
/// The sender of the packet will receive no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of the packet will send no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one at once.
    Reset,
    /// Ends one direction or both.
    Shutdown,
    /// Carries data.
    Data,
    /// Says how much the sender can take.
    CreditUpdate,
    /// Asks for a credit update.
    CreditRequest,
}

impl Op {
    fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    fn from_code(code: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|op| op.code() == code)
    }
}

/// What a sender says about its receive buffer in every packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Credit {
    /// Size of the buffer.
    pub(super) buf_alloc: u32,
    /// Bytes taken out of it since the connection began, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

/// `struct virtio_vsock_hdr`, as it was received: no field has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) socket_type: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) credit: Credit,
}

/// A packet of the guest that names a stream of the host; its operation is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes of payload, zero for everything but [`Op::Data`].
    pub(super) len: u32,
    pub(super) credit: Credit,
}

/// What becomes of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parsed {
    /// It may concern a connection.
    Packet(Packet),
    /// It is answered with this reset.
    Refused(Header),
    /// It is not answered: a reset for what does not exist, or a forged address.
    Dropped,
}

impl Header {
    /// Reads the bytes that a driver wrote.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let (src_cid, rest) = take(bytes);
        let (dst_cid, rest) = take(rest);
        let (src_port, rest) = take(rest);
        let (dst_port, rest) = take(rest);
        let (len, rest) = take(rest);
        let (socket_type, rest) = take(rest);
        let (op, rest) = take(rest);
        let (flags, rest) = take(rest);
        let (buf_alloc, rest) = take(rest);
        let (fwd_cnt, _) = take(rest);
        Self {
            src_cid: u64::from_le_bytes(src_cid),
            dst_cid: u64::from_le_bytes(dst_cid),
            src_port: u32::from_le_bytes(src_port),
            dst_port: u32::from_le_bytes(dst_port),
            len: u32::from_le_bytes(len),
            socket_type: u16::from_le_bytes(socket_type),
            op: u16::from_le_bytes(op),
            flags: u32::from_le_bytes(flags),
            credit: Credit {
                buf_alloc: u32::from_le_bytes(buf_alloc),
                fwd_cnt: u32::from_le_bytes(fwd_cnt),
            },
        }
    }

    /// Writes the bytes that a driver reads.
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.socket_type.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.credit.buf_alloc.to_le_bytes());
        put(&self.credit.fwd_cnt.to_le_bytes());
        bytes
    }

    /// A stream packet from the host to the guest without payload, flags and credit.
    pub(super) fn to_guest(guest_cid: u64, host_port: u32, guest_port: u32, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            socket_type: TYPE_STREAM,
            op: op.code(),
            ..Self::default()
        }
    }

    /// Checks everything that can be checked without knowing the connections.
    pub(super) fn parse(&self, guest_cid: u64) -> Parsed {
        // A guest that forges an address gets no answer: there is nobody to whom it could go.
        if self.src_cid != guest_cid || self.dst_cid != HOST_CID {
            return Parsed::Dropped;
        }
        let op = Op::from_code(self.op);
        match op {
            // A reset is never answered by a reset, or two faulty peers would go on for ever.
            Some(Op::Reset) if self.socket_type != TYPE_STREAM => Parsed::Dropped,
            Some(op) if self.socket_type == TYPE_STREAM => Parsed::Packet(Packet {
                guest_port: self.src_port,
                host_port: self.dst_port,
                op,
                flags: self.flags,
                len: if op == Op::Data { self.len } else { 0 },
                credit: self.credit,
            }),
            Some(_) | None => Parsed::Refused(Self {
                socket_type: self.socket_type,
                ..Self::to_guest(guest_cid, self.dst_port, self.src_port, Op::Reset)
            }),
        }
    }
}

/// Splits the first `N` bytes off; every caller has them, as the fields add up to [`HEADER_BYTES`].
fn take<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    bytes
        .split_first_chunk()
        .map_or(([0; N], bytes), |(field, rest)| (*field, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUEST: u64 = 3;

    fn request() -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: 6,
            socket_type: TYPE_STREAM,
            op: 1,
            ..Header::default()
        }
    }

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = 3;
        bytes[8] = 2;
        bytes[16] = 5;
        bytes[20] = 6;
        bytes[24] = 7;
        bytes[28] = 1;
        bytes[30] = 5;
        bytes[32] = 2;
        bytes[36] = 8;
        bytes[40] = 9;
        let header = Header::from_bytes(&bytes);
        let expected = Header {
            len: 7,
            op: 5,
            flags: 2,
            credit: Credit {
                buf_alloc: 8,
                fwd_cnt: 9,
            },
            ..request()
        };
        assert_eq!(header, expected);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn forged_addresses_are_not_answered() {
        for (src_cid, dst_cid) in [(4, HOST_CID), (GUEST, 1), (HOST_CID, GUEST)] {
            let header = Header {
                src_cid,
                dst_cid,
                ..request()
            };
            assert_eq!(header.parse(GUEST), Parsed::Dropped);
        }
    }

    #[test]
    fn unknown_types_and_operations_are_reset() {
        for (socket_type, op) in [(2, 1), (0, 5), (TYPE_STREAM, 0), (TYPE_STREAM, 8)] {
            let header = Header {
                socket_type,
                op,
                ..request()
            };
            let Parsed::Refused(reset) = header.parse(GUEST) else {
                panic!("{header:?} was not refused");
            };
            assert_eq!((reset.op, reset.src_port, reset.dst_port), (3, 6, 5));
            assert_eq!((reset.src_cid, reset.dst_cid), (HOST_CID, GUEST));
        }
    }

    proptest! {
        #[test]
        fn any_header_survives_both_ways(bytes: [[u8; 22]; 2]) {
            let mut whole = [0; HEADER_BYTES];
            whole[..22].copy_from_slice(&bytes[0]);
            whole[22..].copy_from_slice(&bytes[1]);
            let header = Header::from_bytes(&whole);
            prop_assert_eq!(header.to_bytes(), whole);
            let _ = header.parse(GUEST);
        }

        #[test]
        fn a_reset_is_never_answered(socket_type: u16, src_cid in 2u64..5, dst_cid in 2u64..5) {
            let header = Header { src_cid, dst_cid, socket_type, op: 3, ..request() };
            prop_assert!(!matches!(header.parse(GUEST), Parsed::Refused(_)));
        }
    }
}
