//! What a buffer of the statistics queue says (virtio 1.3, section 5.5.6.3). Pure.

use walnut_vmm_api::GuestMemory;

/// Bytes of `struct virtio_balloon_stat`: a tag of 16 bits and a value of 64.
const ENTRY_BYTES: usize = 10;
/// Bytes of a buffer that are looked at: twice as many entries as there are tags.
pub(super) const MAX_BYTES: u64 = 32 * ENTRY_BYTES as u64;

/// Reads the entries; what isn't known is ignored (section 5.5.6.3.2).
pub(super) fn parse(bytes: &[u8]) -> GuestMemory {
    let mut memory = GuestMemory::default();
    let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
    for &[low, high, ref value @ ..] in entries {
        let field = match u16::from_le_bytes([low, high]) {
            0 => &mut memory.swapped_in_bytes,
            1 => &mut memory.swapped_out_bytes,
            2 => &mut memory.major_faults,
            3 => &mut memory.minor_faults,
            4 => &mut memory.free_bytes,
            5 => &mut memory.total_bytes,
            6 => &mut memory.available_bytes,
            7 => &mut memory.cache_bytes,
            OOM_KILLS => &mut memory.oom_kills,
            _ => continue,
        };
        *field = u64::from_le_bytes(*value);
    }
    memory
}

/// `VIRTIO_BALLOON_S_OOM_KILL`, which Linux has had since 6.12 and the specification has not yet.
const OOM_KILLS: u16 = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn known_tags_are_told_and_others_ignored() {
        let entries = [entry(5, 100), entry(900, 7), entry(6, 50), entry(10, 1)];
        let mut bytes = entries.concat();
        bytes.extend([4, 0, 9]);
        let expected = GuestMemory {
            total_bytes: 100,
            available_bytes: 50,
            oom_kills: 1,
            ..GuestMemory::default()
        };
        assert_eq!(parse(&bytes), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_statistics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            parse(&bytes);
        }
    }
}
