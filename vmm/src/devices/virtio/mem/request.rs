//! What the driver asks of the memory device (virtio 1.3, section 5.15.6), and what it is told. Pure.

/// Bytes of `struct virtio_mem_req` that say something: type, address and number of blocks.
pub(super) const REQUEST_BYTES: usize = 18;
/// Bytes of `struct virtio_mem_resp`.
pub(super) const RESPONSE_BYTES: usize = 10;

/// A run of blocks, as the driver names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Guest-physical address of the first.
    pub(super) address: u64,
    /// How many.
    pub(super) blocks: u16,
}

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// `VIRTIO_MEM_REQ_PLUG`
    Plug(Run),
    /// `VIRTIO_MEM_REQ_UNPLUG`
    Unplug(Run),
    /// `VIRTIO_MEM_REQ_UNPLUG_ALL`
    UnplugAll,
    /// `VIRTIO_MEM_REQ_STATE`
    State(Run),
}

impl Request {
    /// Reads a request; `None` for one that isn't known.
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let [
            t0,
            t1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            n0,
            n1,
        ] = *bytes;
        let run = Run {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            blocks: u16::from_le_bytes([n0, n1]),
        };
        match u16::from_le_bytes([t0, t1]) {
            0 => Some(Self::Plug(run)),
            1 => Some(Self::Unplug(run)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(run)),
            _ => None,
        }
    }
}

/// The state of a run of blocks (`VIRTIO_MEM_STATE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// What the driver is told (`VIRTIO_MEM_RESP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Not now: it would be more than the host wants.
    Nack,
    /// Not now: the host could not.
    Busy,
    /// Never.
    Error,
    /// The answer to a question about state.
    State(BlockState),
}

impl Response {
    /// As the driver reads it.
    pub(super) fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let mut bytes = [0; RESPONSE_BYTES];
        (bytes[0], bytes[8]) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state as u8),
        };
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_read_and_answers_written_as_the_specification_lays_them_out() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[8..16].copy_from_slice(&0x1_2340_0000_u64.to_le_bytes());
        bytes[16..].copy_from_slice(&3_u16.to_le_bytes());
        let run = Run {
            address: 0x1_2340_0000,
            blocks: 3,
        };
        let kinds = [
            Request::Plug(run),
            Request::Unplug(run),
            Request::UnplugAll,
            Request::State(run),
        ];
        for (kind, expected) in (0..).zip(kinds) {
            bytes[0] = kind;
            assert_eq!(Request::parse(&bytes), Some(expected));
        }
        bytes[1] = 1;
        assert_eq!(Request::parse(&bytes), None);
        let mixed = Response::State(BlockState::Mixed).bytes();
        assert_eq!(mixed, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(Response::Error.bytes()[..2], 3_u16.to_le_bytes());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_none(bytes: [u8; REQUEST_BYTES]) {
            let known = u16::from_le_bytes([bytes[0], bytes[1]]) < 4;
            prop_assert_eq!(Request::parse(&bytes).is_some(), known);
        }
    }
}
