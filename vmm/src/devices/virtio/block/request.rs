//! What a driver asks of a block device (virtio 1.3, section 5.2.6), read from a buffer. Pure: no I/O.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Descriptors of one request at the most: as many as the queue has (section 2.7.5.3.1).
pub const MAX_DESCRIPTORS: usize = 256;
/// Ranges of one discard or write-zeroes at the most, as the configuration space says.
pub const MAX_RANGES: usize = 16;
const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts.
    pub address: GuestAddress,
    /// How long it is.
    pub bytes: u32,
}

/// `struct virtio_blk_discard_write_zeroes`: sectors that a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first one.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// Bit 0 lets a write-zeroes give their space back.
    pub flags: u32,
}

/// What the driver wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// From this sector on, to the data.
    Read(u64),
    /// From this sector on, from the data.
    Write(u64),
    /// Make what was written durable.
    Flush,
    /// The serial, to the data.
    GetId,
    /// Forget what these hold.
    Discard(Vec<Range>),
    /// Make these read as zeroes.
    WriteZeroes(Vec<Range>),
    /// A discard or write-zeroes with ranges that are none, or too many.
    Malformed,
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
    /// More than the queue has.
    #[error("a block request has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
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
        for (position, descriptor) in chain.enumerate() {
            if position == MAX_DESCRIPTORS {
                return Err(RequestError::TooLong);
            }
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
        let header: [u8; HEADER_BYTES] =
            take_front(memory, &mut readable).ok_or(RequestError::Header)?;
        let status = take_status(&mut writable)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let mut ranges = || take_ranges(memory, &mut readable);
        let (operation, data) = match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => (Operation::Read(sector), writable),
            VIRTIO_BLK_T_OUT => (Operation::Write(sector), readable),
            VIRTIO_BLK_T_FLUSH => (Operation::Flush, Vec::new()),
            VIRTIO_BLK_T_GET_ID => (Operation::GetId, writable),
            VIRTIO_BLK_T_DISCARD => {
                let operation = ranges().map(Operation::Discard);
                (operation.unwrap_or(Operation::Malformed), Vec::new())
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let operation = ranges().map(Operation::WriteZeroes);
                (operation.unwrap_or(Operation::Malformed), Vec::new())
            }
            other => (Operation::Unknown(other), Vec::new()),
        };
        Ok(Self {
            operation,
            data,
            status,
        })
    }

    /// Bytes of data.
    pub fn data_bytes(&self) -> u64 {
        self.data.iter().map(|piece| u64::from(piece.bytes)).sum()
    }
}

/// Cuts so many bytes off the front, and gives them; `None` where there are fewer.
fn take_front<const BYTES: usize>(
    memory: &GuestMemoryMmap,
    pieces: &mut Vec<Piece>,
) -> Option<[u8; BYTES]> {
    let mut front = [0; BYTES];
    let mut done = 0;
    while done < BYTES {
        let piece = pieces.first_mut()?;
        let missing = BYTES - done;
        let bytes = usize::try_from(piece.bytes).map_or(missing, |len| len.min(missing));
        memory
            .read_slice(&mut front[done..done + bytes], piece.address)
            .ok()?;
        done += bytes;
        let taken = u32::try_from(bytes).ok()?;
        if taken == piece.bytes {
            pieces.remove(0);
        } else {
            piece.bytes -= taken;
            piece.address = GuestAddress(piece.address.0.checked_add(taken.into())?);
        }
    }
    Some(front)
}

/// The ranges that the data consists of; `None` where it consists of something else.
fn take_ranges(memory: &GuestMemoryMmap, data: &mut Vec<Piece>) -> Option<Vec<Range>> {
    let mut ranges = Vec::new();
    while !data.is_empty() && ranges.len() < MAX_RANGES {
        let range: [u8; RANGE_BYTES] = take_front(memory, data)?;
        let [a, b, c, d, e, f, g, h, rest @ ..] = range;
        let [i, j, k, l, flags @ ..] = rest;
        ranges.push(Range {
            sector: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            sectors: u32::from_le_bytes([i, j, k, l]),
            flags: u32::from_le_bytes(flags),
        });
    }
    (data.is_empty() && !ranges.is_empty()).then_some(ranges)
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

    fn write_range(memory: &GuestMemoryMmap, at: u64, range: Range) {
        memory.write_obj(range.sector, GuestAddress(at)).unwrap();
        memory
            .write_obj(range.sectors, GuestAddress(at + 8))
            .unwrap();
        memory
            .write_obj(range.flags, GuestAddress(at + 12))
            .unwrap();
    }

    #[test]
    fn ranges_are_read_whole_and_counted() {
        let memory = memory();
        memory
            .write_obj(VIRTIO_BLK_T_DISCARD, GuestAddress(HEADER))
            .unwrap();
        let range = |sector| Range {
            sector,
            sectors: 8,
            flags: 1,
        };
        for sector in 0..20 {
            write_range(&memory, DATA + 16 * sector, range(sector));
        }
        let cases = [
            (32, Operation::Discard(vec![range(0), range(1)])),
            (16 * 16, Operation::Discard((0..16).map(range).collect())),
            (17 * 16, Operation::Malformed),
            (24, Operation::Malformed),
            (0, Operation::Malformed),
        ];
        for (bytes, expected) in cases {
            let driver = MockSplitQueue::new(&memory, 16);
            let descriptors = [
                descriptor(HEADER, 16, false),
                descriptor(DATA, bytes, false),
                descriptor(0xf000, 1, true),
            ];
            let chain = driver.build_desc_chain(&descriptors).unwrap();
            let request = Request::parse(&memory, chain).unwrap();
            assert_eq!(request.operation, expected, "{bytes} bytes of ranges");
        }
    }

    #[test]
    fn a_table_that_is_longer_than_the_queue_is_refused() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory
            .write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER))
            .unwrap();
        let table = 0x2_0000;
        for (count, accepted) in [(256_u16, true), (257, false)] {
            for index in 0..count {
                let last = index + 1 == count;
                let (address, len) = if index == 0 { (HEADER, 16) } else { (DATA, 8) };
                let next = if last { 0 } else { 1 };
                let write = if index == 0 { 0 } else { 2 };
                let raw = Descriptor::new(address, len, next | write, index + 1);
                memory
                    .write_obj(raw, GuestAddress(table + 16 * u64::from(index)))
                    .unwrap();
            }
            let driver = MockSplitQueue::new(&memory, 16);
            let indirect = Descriptor::new(table, 16 * u32::from(count), 4, 0);
            let chain = driver
                .build_desc_chain(&[RawDescriptor::from(indirect)])
                .unwrap();
            assert_eq!(Request::parse(&memory, chain).is_ok(), accepted);
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
