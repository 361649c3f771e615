//! Packets in the buffers of a driver (virtio 1.3, sections 5.1.6 and 5.1.6.4): which pieces of guest memory they
//! lie in, and which buffers they fill. Pure: no I/O.

use crate::memory;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemoryMmap, VolatileSlice};

/// `struct virtio_net_hdr_v1`, which every packet starts with.
pub(super) const HEADER_BYTES: usize = 12;
/// Its last field, which the host's tap leaves alone.
const NUM_BUFFERS_OFFSET: usize = 10;
/// What an Ethernet frame adds to a packet.
const ETHERNET_BYTES: usize = 14;
const VLAN_BYTES: usize = 4;
/// What a packet needs beside the MTU.
pub(super) const OVERHEAD_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES + VLAN_BYTES;
/// The largest packet that IP can make.
pub(super) const MAX_BYTES: usize = OVERHEAD_BYTES + 65535;
/// A packet to the host is an Ethernet header at the least.
const MIN_SENT_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES;
/// Pieces of a buffer: a chain has no more descriptors than the queue (section 2.7.5.3.1).
const MAX_PIECES: usize = 256;

/// A piece of guest memory.
pub(super) type Piece<'m> = VolatileSlice<'m>;

/// Why a buffer holds no packet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum PacketError {
    /// It lies outside guest memory.
    #[error("a piece of {bytes} bytes at {at:#x} is not in guest memory")]
    Outside {
        /// Where it starts.
        at: u64,
        /// How long it is.
        bytes: u32,
    },
    /// More pieces than a buffer may have.
    #[error("a buffer of more than {MAX_PIECES} pieces")]
    Pieces,
    /// Too short for a header and what must follow it, or longer than any packet.
    #[error("a buffer of {0} bytes")]
    Size(usize),
}

/// A buffer that the driver offered for packets of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Buffer {
    /// Head of its chain.
    pub(super) head: u16,
    /// How many pieces it has.
    pub(super) pieces: usize,
    /// How long it is.
    pub(super) bytes: usize,
}

/// A buffer that goes back to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Used {
    /// Head of its chain.
    pub(super) head: u16,
    /// How much was written to it.
    pub(super) bytes: u32,
}

/// Adds what the descriptors refer to, and gives its length. After an error, `pieces` is as before.
fn collect<'m>(
    memory: &'m GuestMemoryMmap,
    descriptors: impl Iterator<Item = Descriptor>,
    pieces: &mut Vec<Piece<'m>>,
) -> Result<usize, PacketError> {
    let start = pieces.len();
    let mut total: usize = 0;
    for descriptor in descriptors.filter(|descriptor| descriptor.len() > 0) {
        let (at, bytes) = (descriptor.addr(), descriptor.len());
        let piece = memory::slice(memory, at, bytes.into());
        let error = match piece {
            Ok(piece) if pieces.len() - start < MAX_PIECES => {
                // A chain is at most 4 GiB.
                total = total.saturating_add(piece.len());
                pieces.push(piece);
                continue;
            }
            Ok(_) => PacketError::Pieces,
            Err(_) => PacketError::Outside { at: at.0, bytes },
        };
        pieces.truncate(start);
        return Err(error);
    }
    Ok(total)
}

/// Adds the pieces of a packet that the guest sends, given the readable part of its chain.
pub(super) fn collect_sent<'m>(
    memory: &'m GuestMemoryMmap,
    readable: impl Iterator<Item = Descriptor>,
    pieces: &mut Vec<Piece<'m>>,
) -> Result<usize, PacketError> {
    let start = pieces.len();
    let bytes = collect(memory, readable, pieces)?;
    if (MIN_SENT_BYTES..=MAX_BYTES).contains(&bytes) {
        return Ok(bytes);
    }
    pieces.truncate(start);
    Err(PacketError::Size(bytes))
}

/// Adds the pieces of a buffer for packets of the host, given the writable part of its chain.
pub(super) fn collect_buffer<'m>(
    memory: &'m GuestMemoryMmap,
    head: u16,
    writable: impl Iterator<Item = Descriptor>,
    pieces: &mut Vec<Piece<'m>>,
) -> Result<Buffer, PacketError> {
    let start = pieces.len();
    let bytes = collect(memory, writable, pieces)?;
    // A buffer holds the header at the least, also where several take one packet (section 5.1.6.3.1).
    if bytes < HEADER_BYTES {
        pieces.truncate(start);
        return Err(PacketError::Size(bytes));
    }
    Ok(Buffer {
        head,
        pieces: pieces.len() - start,
        bytes,
    })
}

/// Adds to `used` the buffers that a packet of `bytes` fills, in order.
pub(super) fn fill<'b>(
    buffers: impl IntoIterator<Item = &'b Buffer>,
    mut bytes: usize,
    used: &mut Vec<Used>,
) {
    for buffer in buffers {
        let part = bytes.min(buffer.bytes);
        used.push(Used {
            head: buffer.head,
            bytes: u32::try_from(part).unwrap_or(u32::MAX),
        });
        bytes -= part;
        if bytes == 0 {
            return;
        }
    }
}

/// Says in the header of a packet how many buffers it fills.
pub(super) fn write_num_buffers(pieces: &[Piece<'_>], count: u16) {
    let bytes = count.to_le_bytes();
    let mut left = &bytes[..];
    let mut skip = NUM_BUFFERS_OFFSET;
    for piece in pieces {
        let room = piece.len().saturating_sub(skip).min(left.len());
        if room > 0 {
            // It fits, as was just seen.
            let _ = piece.write_slice(&left[..room], skip);
            left = &left[room..];
        }
        if left.is_empty() {
            return;
        }
        skip = skip.saturating_sub(piece.len());
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::mock_driver::memory;
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    fn descriptors(list: &[(u64, u32)]) -> impl Iterator<Item = Descriptor> {
        list.iter()
            .map(|&(at, bytes)| Descriptor::new(at, bytes, 0, 0))
    }

    #[test]
    fn what_cannot_be_a_packet_is_named_and_leaves_nothing() {
        let memory = memory();
        let mut pieces = Vec::new();
        let cases: [(&[(u64, u32)], PacketError); 5] = [
            (&[], PacketError::Size(0)),
            (&[(0x1000, 12), (0x2000, 13)], PacketError::Size(25)),
            (&[(0x1000, 65566)], PacketError::Size(65566)),
            (
                &[(0x1000, 12), (u64::MAX - 5, 100)],
                PacketError::Outside {
                    at: u64::MAX - 5,
                    bytes: 100,
                },
            ),
            (&[(0x1000, 1); 257], PacketError::Pieces),
        ];
        for (list, error) in cases {
            let result = collect_sent(&memory, descriptors(list), &mut pieces);
            assert_eq!(result, Err(error));
            assert!(pieces.is_empty());
        }
        let good = [(0x1000, 12), (0x9000, 0), (0x2000, 14)];
        assert_eq!(
            collect_sent(&memory, descriptors(&good), &mut pieces),
            Ok(26)
        );
        assert_eq!(pieces.len(), 2);
        let short = collect_buffer(&memory, 3, descriptors(&[(0, 11)]), &mut pieces);
        assert_eq!(short, Err(PacketError::Size(11)));
        assert_eq!(pieces.len(), 2);
    }

    proptest! {
        #[test]
        fn a_packet_fills_buffers_in_order_and_whole(
            sizes in proptest::collection::vec(12_usize..3000, 1..60), share in 0_usize..=100,
        ) {
            let buffers: Vec<_> = (0..).zip(&sizes)
                .map(|(head, &bytes)| Buffer { head, pieces: 1, bytes }).collect();
            let total: usize = sizes.iter().sum();
            let bytes = (total * share / 100).max(1);
            let mut used = Vec::new();
            fill(&buffers, bytes, &mut used);
            let sum: u32 = used.iter().map(|used| used.bytes).sum();
            prop_assert_eq!(usize::try_from(sum).unwrap(), bytes);
            for (at, one) in used.iter().enumerate() {
                prop_assert_eq!(usize::from(one.head), at);
                let full = usize::try_from(one.bytes).unwrap() == sizes[at];
                prop_assert!(full || at + 1 == used.len());
                prop_assert!(one.bytes > 0);
            }
        }

        #[test]
        fn the_number_of_buffers_stands_in_the_header_however_it_is_cut(
            cuts in proptest::collection::vec(1_u32..14, 1..13), count: u16,
        ) {
            let memory = memory();
            let (mut at, mut list) = (0x1000, Vec::new());
            for cut in cuts.into_iter().chain([12]) {
                list.push((at, cut));
                at += u64::from(cut);
            }
            let mut pieces = Vec::new();
            collect(&memory, descriptors(&list), &mut pieces).unwrap();
            write_num_buffers(&pieces, count);
            let seen: u16 = memory.read_obj(GuestAddress(0x1000 + 10)).unwrap();
            prop_assert_eq!(seen, count);
        }
    }
}
