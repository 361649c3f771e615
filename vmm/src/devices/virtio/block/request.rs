//! What a driver asks of a block device (virtio 1.3, section 5.2.6), read from a buffer. Pure: no I/O.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const HEADER_BYTES: usize = 16;

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts.
    pub address: GuestAddress,
    /// How long it is.
    pub bytes: u32,
}

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// From this sector on, to the data.
    Read(u64),
    /// From this sector on, from the data.
    Write(u64),
    /// Make what was written durable.
    Flush,
    /// The serial, to the data.
    GetId,
    /// Something that was not offered.
    Unknown(u32),
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// With which memory.
    pub data: Vec<Piece>,
    /// Where the status byte goes.
    pub status: GuestAddress,
}

/// Why a buffer is not a request. There is no place for a status: the buffer is returned empty.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RequestError {
    /// Less than a header that the device can read.
    #[error("a block request has no whole header")]
    Header,
    /// No byte that the device can write.
    #[error("a block request has no status byte")]
    Status,
}

impl Request {
    /// Reads a request from a buffer, however the driver divided it (section 2.7.4).
    pub fn parse(
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<Self, RequestError> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for descriptor in chain {
            let piece = Piece {
                address: descriptor.addr(),
                bytes: descriptor.len(),
            };
            if piece.bytes == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                writable.push(piece);
            } else {
                readable.push(piece);
            }
        }
        let header = take_header(memory, &mut readable)?;
        let status = take_status(&mut writable)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (operation, data) = match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => (Operation::Read(sector), writable),
            VIRTIO_BLK_T_OUT => (Operation::Write(sector), readable),
            VIRTIO_BLK_T_FLUSH => (Operation::Flush, Vec::new()),
            VIRTIO_BLK_T_GET_ID => (Operation::GetId, writable),
            other => (Operation::Unknown(other), Vec::new()),
        };
        Ok(Self {
            operation,
            data,
            status,
        })
    }
}

/// Cuts the header off the front.
fn take_header(
    memory: &GuestMemoryMmap,
    readable: &mut Vec<Piece>,
) -> Result<[u8; HEADER_BYTES], RequestError> {
    let mut header = [0; HEADER_BYTES];
    let mut done = 0;
    while done < HEADER_BYTES {
        let piece = readable.first_mut().ok_or(RequestError::Header)?;
        let missing = HEADER_BYTES - done;
        let bytes = usize::try_from(piece.bytes).map_or(missing, |len| len.min(missing));
        memory
            .read_slice(&mut header[done..done + bytes], piece.address)
            .map_err(|_| RequestError::Header)?;
        done += bytes;
        let taken = u32::try_from(bytes).map_err(|_| RequestError::Header)?;
        if taken == piece.bytes {
            readable.remove(0);
        } else {
            piece.bytes -= taken;
            let rest = piece.address.0.checked_add(taken.into());
            piece.address = GuestAddress(rest.ok_or(RequestError::Header)?);
        }
    }
    Ok(header)
}

/// Cuts the status byte off the end.
fn take_status(writable: &mut Vec<Piece>) -> Result<GuestAddress, RequestError> {
    let last = writable.last_mut().ok_or(RequestError::Status)?;
    last.bytes -= 1;
    let status = last.address.0.checked_add(last.bytes.into());
    let status = GuestAddress(status.ok_or(RequestError::Status)?);
    if last.bytes == 0 {
        writable.pop();
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };

    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x9000;

    fn memory() -> GuestMemoryMmap {
        crate::memory::allocate(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn descriptor(address: u64, len: u32, writable: bool) -> RawDescriptor {
        let flags = if writable { VRING_DESC_F_WRITE } else { 0 };
        let flags = u16::try_from(flags).unwrap();
        RawDescriptor::from(Descriptor::new(address, len, flags, 0))
    }

    #[test]
    fn a_request_needs_a_whole_header_and_a_status() {
        let memory = memory();
        let cases = [
            (vec![descriptor(HEADER, 15, false)], RequestError::Header),
            (vec![descriptor(DATA, 16, true)], RequestError::Header),
            (vec![descriptor(HEADER, 16, false)], RequestError::Status),
            (
                vec![descriptor(0xfff8, 16, false), descriptor(DATA, 1, true)],
                RequestError::Header,
            ),
        ];
        for (descriptors, error) in cases {
            let driver = MockSplitQueue::new(&memory, 16);
            let chain = driver.build_desc_chain(&descriptors).unwrap();
            assert_eq!(Request::parse(&memory, chain), Err(error));
        }
    }

    proptest! {
        #[test]
        fn any_buffer_is_a_request_or_an_error(
            pieces in proptest::collection::vec((any::<u64>(), any::<u32>(), any::<bool>()), 0..12),
        ) {
            let memory = memory();
            let descriptors: Vec<_> = pieces
                .iter()
                .map(|&(at, len, writable)| descriptor(at, len, writable))
                .collect();
            let driver = MockSplitQueue::new(&memory, 16);
            if let Ok(chain) = driver.build_desc_chain(&descriptors) {
                let _ = Request::parse(&memory, chain);
            }
        }

        #[test]
        fn the_header_may_be_divided_anywhere(cut in 1_u32..16) {
            let memory = memory();
            memory.write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER)).unwrap();
            memory.write_obj(3_u64, GuestAddress(HEADER + 8)).unwrap();
            let driver = MockSplitQueue::new(&memory, 16);
            let chain = driver.build_desc_chain(&[
                descriptor(HEADER, cut, false),
                descriptor(HEADER + u64::from(cut), 16 - cut, false),
                descriptor(DATA, 513, true),
            ]).unwrap();
            let request = Request::parse(&memory, chain).unwrap();
            prop_assert_eq!(request, Request {
                operation: Operation::Read(3),
                data: vec![Piece { address: GuestAddress(DATA), bytes: 512 }],
                status: GuestAddress(DATA + 512),
            });
        }
    }
}
