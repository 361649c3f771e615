//! Which pages the guest gives up, from the buffers of the inflate queue (virtio 1.3, section 5.5.6) and of the
//! reporting queue (section 5.5.6.5), and how their memory goes back to the host.
//!
//! Pages that cannot be given back are simply kept: the guest gets them unchanged or zeroed, as it must expect.

use crate::{arch::x86_64::layout::PAGE_BYTES, memory};
use std::io::Read;
use virtio_queue::{DescriptorChain, desc::split::Descriptor};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// Bytes of one list of pages that are looked at; Linux sends 1024, 256 pages of 4 bytes each.
const MAX_LIST_BYTES: u64 = 16 * 1024;

/// Gives the pages of an inflate buffer back to the host.
pub(super) fn inflate(memory: &GuestMemoryMmap, chain: Chain<'_>) {
    for range in ranges(memory, list(memory, chain)) {
        let _ = memory::discard(memory, range.start, range.bytes);
    }
}

/// Gives the pages of a report back to the host.
pub(super) fn take_back(memory: &GuestMemoryMmap, chain: Chain<'_>) {
    for descriptor in chain.writable() {
        if let Some((at, bytes)) = whole_pages(&descriptor) {
            let _ = memory::discard(memory, at, bytes);
        }
    }
}

/// The numbers of the pages in an inflate buffer.
fn list(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Vec<u32> {
    let mut bytes = Vec::new();
    if let Ok(reader) = chain.reader(memory) {
        let _ = reader.take(MAX_LIST_BYTES).read_to_end(&mut bytes);
    }
    let (numbers, _) = bytes.as_chunks();
    numbers.iter().copied().map(u32::from_le_bytes).collect()
}

/// Neighbouring pages of one region of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    region: GuestAddress,
    start: GuestAddress,
    bytes: u64,
}

/// The pages that are guest RAM, in as few ranges as they make.
fn ranges(memory: &GuestMemoryMmap, mut pages: Vec<u32>) -> Vec<Range> {
    pages.sort_unstable();
    pages.dedup();
    let mut ranges: Vec<Range> = Vec::new();
    for page in pages {
        let start = GuestAddress(u64::from(page) * PAGE_BYTES);
        let Some(region) = memory.find_region(start) else {
            continue;
        };
        let region = region.start_addr();
        match ranges.last_mut() {
            Some(last) if last.region == region && last.start.0 + last.bytes == start.0 => {
                last.bytes += PAGE_BYTES;
            }
            _ => ranges.push(Range {
                region,
                start,
                bytes: PAGE_BYTES,
            }),
        }
    }
    ranges
}

/// The pages that lie in a descriptor from their start to their end.
fn whole_pages(descriptor: &Descriptor) -> Option<(GuestAddress, u64)> {
    let start = descriptor.addr().0;
    let end = start.checked_add(descriptor.len().into())?;
    let first = start.checked_next_multiple_of(PAGE_BYTES)?;
    let bytes = (end - end % PAGE_BYTES).checked_sub(first)?;
    (bytes > 0).then_some((GuestAddress(first), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::{desc::RawDescriptor, mock::MockSplitQueue};
    use vm_memory::Bytes;

    fn report(address: u64, len: u32) -> Descriptor {
        let flags = u16::try_from(VRING_DESC_F_WRITE).unwrap();
        Descriptor::new(address, len, flags, 0)
    }

    #[test]
    fn reported_pages_lose_their_content_and_no_others() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory
            .write_slice(&[7; 0x4000], GuestAddress(0x8000))
            .unwrap();
        let reports = [
            report(0x9000, 0x1000),
            report(0xa800, 0x1000),
            report(0xff000, 0x2000),
            report(u64::MAX - 10, 100),
        ];
        let driver = MockSplitQueue::new(&memory, 16);
        let chain = driver
            .build_desc_chain(&reports.map(RawDescriptor::from))
            .unwrap();
        take_back(&memory, chain);
        let mut seen = [1; 0x4000];
        memory.read_slice(&mut seen, GuestAddress(0x8000)).unwrap();
        assert_eq!(seen[..0x1000], [7; 0x1000]);
        assert_eq!(seen[0x1000..0x2000], [0; 0x1000]);
        assert_eq!(seen[0x2000..], [7; 0x2000]);
    }

    /// Two regions that touch, and one that doesn't.
    fn three_regions() -> GuestMemoryMmap {
        let regions = [(0, 8), (8, 4), (16, 4)];
        let regions =
            regions.map(|(page, pages)| (GuestAddress(page * PAGE_BYTES), pages * PAGE_BYTES));
        crate::memory::allocate(&regions).unwrap()
    }

    #[test]
    fn neighbours_are_given_back_at_once_within_their_region() {
        let memory = three_regions();
        let pages = vec![9, 3, 2, 3, 7, 8, 12, 17, u32::MAX];
        let found = ranges(&memory, pages);
        let found: Vec<_> = found
            .iter()
            .map(|range| (range.start.0 / PAGE_BYTES, range.bytes / PAGE_BYTES))
            .collect();
        assert_eq!(found, [(2, 2), (7, 1), (8, 2), (17, 1)]);
    }

    #[test]
    fn a_list_is_bounded_and_half_a_number_is_none() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for (bytes, numbers) in [(11, 2), (3, 0), (0x2_0000, 4096)] {
            let driver = MockSplitQueue::new(&memory, 16);
            let descriptor = RawDescriptor::from(Descriptor::new(0x8000, bytes, 0, 0));
            let chain = driver.build_desc_chain(&[descriptor]).unwrap();
            assert_eq!(list(&memory, chain).len(), numbers);
        }
    }

    proptest! {
        #[test]
        fn exactly_the_pages_in_ram_are_given_back(
            pages in proptest::collection::vec(prop_oneof![0_u32..24, any::<u32>()], 0..40),
        ) {
            let memory = three_regions();
            let found = ranges(&memory, pages.clone());
            for range in &found {
                prop_assert!(memory::discard(&memory, range.start, range.bytes).is_ok());
            }
            let given: Vec<u64> = found
                .iter()
                .flat_map(|range| (0..range.bytes / PAGE_BYTES).map(|i| range.start.0 / PAGE_BYTES + i))
                .collect();
            let mut expected: Vec<u64> = pages.iter().copied().map(u64::from).collect();
            expected.retain(|page| (0..12).contains(page) || (16..20).contains(page));
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(given, expected);
        }

        #[test]
        fn whole_pages_lie_within_the_report(address: u64, len: u32) {
            let descriptor = report(address, len);
            if let Some((at, bytes)) = whole_pages(&descriptor) {
                prop_assert!(at.0 >= address && at.0 % PAGE_BYTES == 0 && bytes % PAGE_BYTES == 0);
                prop_assert!(at.0 - address + bytes <= u64::from(len));
            }
        }
    }
}
