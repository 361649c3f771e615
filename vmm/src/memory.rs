#![allow(
    unsafe_code,
    reason = "advises on guest RAM, and reads files into it and writes them from it"
)]
//! Guest RAM, and how files get into it and out of it.
//!
//! RAM is private anonymous memory that costs nothing until it is touched. It asks for huge pages: measured
//! with our kernel, 28 faults instead of 9,140 until the guest's init runs, for 8 MiB more. Files are copied
//! into it. To map them instead saves nothing: the kernel patches nearly every page of its code when it
//! starts, and the pages of the initramfs are written again once it is unpacked. Must not know what is in
//! the files.

use rustix::mm::{Advice, madvise};
use std::{fs::File, io, os::fd::AsRawFd};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
    mmap::FromRangesError,
};

/// Bytes of a huge page of an x86-64 host.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Why guest RAM cannot be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space or memory for it.
    #[error("cannot map {bytes} bytes of guest RAM")]
    Allocate {
        /// How much was asked for.
        bytes: u64,
        /// Why not.
        source: FromRangesError,
    },
    /// More than this host can address.
    #[error("guest RAM of {0} bytes is more than this host can address")]
    TooLarge(u64),
    /// The part of a file lies outside guest RAM.
    #[error("{bytes} bytes at guest address {at:#x} are outside guest RAM")]
    Outside {
        /// Where it should go.
        at: u64,
        /// How long it is.
        bytes: u64,
        /// What vm-memory says.
        source: GuestMemoryError,
    },
    /// The host refuses advice about it.
    #[error("cannot ask for huge pages for {bytes} bytes of guest RAM")]
    Advise {
        /// How much.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// Pages cannot be given back.
    #[error("cannot give back {bytes} bytes of guest RAM at {at:#x}")]
    Discard {
        /// Where they start.
        at: u64,
        /// How much.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read {bytes} bytes at offset {offset} of a file")]
    Read {
        /// Where in the file.
        offset: u64,
        /// How much.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
}

/// A part of a file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts in the file.
    pub offset: u64,
    /// Where it goes.
    pub at: GuestAddress,
    /// How long it is.
    pub bytes: u64,
}

/// Allocates guest RAM for `ranges` of start and length.
pub fn allocate(ranges: &[(GuestAddress, u64)]) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes = ranges.iter().map(|range| range.1).sum();
    let sized = ranges
        .iter()
        .map(|&(start, len)| Ok((start, usize::try_from(len)?)))
        .collect::<Result<Vec<_>, std::num::TryFromIntError>>()
        .map_err(|_| MemoryError::TooLarge(bytes))?;
    let memory = GuestMemoryMmap::from_ranges(&sized);
    let memory = memory.map_err(|source| MemoryError::Allocate { bytes, source })?;
    for (start, bytes) in sized {
        ask_for_huge_pages(&memory, start, bytes)?;
    }
    Ok(memory)
}

fn ask_for_huge_pages(
    memory: &GuestMemoryMmap,
    at: GuestAddress,
    bytes: usize,
) -> Result<(), MemoryError> {
    let slice = slice(memory, at, bytes as u64)?;
    match advise(&slice, Advice::LinuxHugepage) {
        // A host whose kernel was built without huge pages has none to give.
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(source) => Err(MemoryError::Advise {
            bytes: bytes as u64,
            source: source.into(),
        }),
    }
}

/// Gives whole pages of guest RAM back to the host; they read as zeroes from then on.
pub fn discard(memory: &GuestMemoryMmap, at: GuestAddress, bytes: u64) -> Result<(), MemoryError> {
    let discarded = slice(memory, at, bytes)?;
    let result = advise(&discarded, Advice::LinuxDontNeed);
    result.map_err(|source| MemoryError::Discard {
        at: at.0,
        bytes,
        source: source.into(),
    })?;
    let Some((start, length)) = broken_huge_pages(memory, at, bytes) else {
        return Ok(());
    };
    // The host's khugepaged would make whole huge pages of them again, holes included. A host that cannot be
    // told otherwise, for want of huge pages or of mappings, only keeps more memory than it needs to.
    let _ = advise(&slice(memory, start, length)?, Advice::LinuxNoHugepage);
    Ok(())
}

/// The host's huge pages that a range of guest RAM lies in, as far as they are guest RAM; `None` where the
/// range consists of whole ones.
fn broken_huge_pages(
    memory: &GuestMemoryMmap,
    at: GuestAddress,
    bytes: u64,
) -> Option<(GuestAddress, u64)> {
    let region = memory.find_region(at)?;
    let base = region.as_ptr().addr() as u64;
    let from = base.checked_add(at.0.checked_sub(region.start_addr().0)?)?;
    let to = from.checked_add(bytes)?;
    if from.is_multiple_of(HUGE_PAGE_BYTES) && to.is_multiple_of(HUGE_PAGE_BYTES) {
        return None;
    }
    let first = base.max(from - from % HUGE_PAGE_BYTES);
    let last = to.checked_next_multiple_of(HUGE_PAGE_BYTES)?;
    let last = last.min(base.checked_add(region.len())?);
    let start = region.start_addr().0.checked_add(first - base)?;
    Some((GuestAddress(start), last.checked_sub(first)?))
}

/// Tells the host how to back a piece of guest RAM.
fn advise(slice: &VolatileSlice<'_>, advice: Advice) -> rustix::io::Result<()> {
    let start = slice.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the slice proves that these pages are guest RAM, which is private anonymous memory that is only
    // accessed as volatile bytes: that they are backed otherwise, or become zero, invalidates no reference.
    unsafe { madvise(start, slice.len(), advice) }
}

/// Copies part of `file` into guest RAM.
pub fn read(memory: &GuestMemoryMmap, file: &File, extent: Extent) -> Result<(), MemoryError> {
    let Extent { offset, at, bytes } = extent;
    if bytes == 0 {
        return Ok(());
    }
    read_at(file, &slice(memory, at, bytes)?, offset).map_err(|source| MemoryError::Read {
        offset,
        bytes,
        source,
    })
}

/// A piece of guest RAM, which must not cross from one range to another.
pub fn slice(
    memory: &GuestMemoryMmap,
    at: GuestAddress,
    bytes: u64,
) -> Result<VolatileSlice<'_>, MemoryError> {
    let length = usize::try_from(bytes).map_err(|_| MemoryError::TooLarge(bytes))?;
    memory
        .get_slice(at, length)
        .map_err(|source| MemoryError::Outside {
            at: at.0,
            bytes,
            source,
        })
}

/// Fills `slice` from `file`, whose own position does not matter.
pub fn read_at(file: &File, slice: &VolatileSlice<'_>, offset: u64) -> io::Result<()> {
    transfer(slice.len(), offset, |done, position| {
        let rest = slice.offset(done).map_err(io::Error::other)?;
        let to = rest.ptr_guard_mut();
        // SAFETY: the slice is guest RAM of this length, valid while it is borrowed and only accessed as
        // volatile bytes; the kernel writes no further.
        let count =
            unsafe { libc::pread(file.as_raw_fd(), to.as_ptr().cast(), rest.len(), position) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    })
}

/// Writes `slice` to `file`, whose own position does not matter.
pub fn write_at(file: &File, slice: &VolatileSlice<'_>, offset: u64) -> io::Result<()> {
    transfer(slice.len(), offset, |done, position| {
        let rest = slice.offset(done).map_err(io::Error::other)?;
        let from = rest.ptr_guard();
        // SAFETY: the slice is guest RAM of this length, valid while it is borrowed and only accessed as
        // volatile bytes; the kernel reads no further.
        let count =
            unsafe { libc::pwrite(file.as_raw_fd(), from.as_ptr().cast(), rest.len(), position) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    })
}

/// Repeats `step`, which is told how much was done and the position in the file, until all is done.
fn transfer(
    bytes: usize,
    offset: u64,
    mut step: impl FnMut(usize, i64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        let position = offset
            .checked_add(done as u64)
            .and_then(|position| i64::try_from(position).ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        match step(done, position) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::PAGE_BYTES;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::Bytes;

    fn file(contents: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(contents).unwrap();
        file
    }

    fn ram() -> GuestMemoryMmap {
        allocate(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn extent(offset: u64, at: u64, bytes: u64) -> Extent {
        Extent {
            offset,
            at: GuestAddress(at),
            bytes,
        }
    }

    fn contents() -> Vec<u8> {
        (0..30_000_u32)
            .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
            .collect()
    }

    proptest! {
        #[test]
        fn what_is_loaded_is_what_the_file_holds(
            offset in 0_u64..9000,
            at in 0_u64..9000,
            bytes in 0_u64..12_000,
        ) {
            let memory = ram();
            let extent = extent(offset, at, bytes);
            read(&memory, &file(&contents()), extent).unwrap();
            let mut seen = vec![0; usize::try_from(bytes).unwrap()];
            memory.read_slice(&mut seen, extent.at).unwrap();
            let from = usize::try_from(extent.offset).unwrap();
            prop_assert_eq!(&seen[..], &contents()[from..from + seen.len()]);
        }

        #[test]
        fn a_round_trip_through_a_file_keeps_every_byte(
            offset in 0_u64..9000,
            bytes in 1_u64..9000,
        ) {
            let memory = ram();
            memory.write_slice(&contents(), GuestAddress(0)).unwrap();
            let disk = file(&[]);
            write_at(&disk, &slice(&memory, GuestAddress(100), bytes).unwrap(), offset).unwrap();
            read_at(&disk, &slice(&memory, GuestAddress(40_000), bytes).unwrap(), offset).unwrap();
            let mut seen = vec![0; usize::try_from(bytes).unwrap()];
            memory.read_slice(&mut seen, GuestAddress(40_000)).unwrap();
            prop_assert_eq!(&seen[..], &contents()[100..100 + seen.len()]);
        }
    }

    #[test]
    fn discarded_pages_are_zero_and_their_neighbours_are_kept() {
        let memory = ram();
        memory.write_slice(&[7; 12_288], GuestAddress(0)).unwrap();
        discard(&memory, GuestAddress(4096), 4096).unwrap();
        let mut seen = [1; 12_288];
        memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
        assert_eq!(seen[..4096], [7; 4096]);
        assert_eq!(seen[4096..8192], [0; 4096]);
        assert_eq!(seen[8192..], [7; 4096]);
        for (at, bytes) in [(0xf000, 8192), (u64::MAX - 4095, 4096), (1, 4096)] {
            assert!(
                discard(&memory, GuestAddress(at), bytes).is_err(),
                "{at:#x}"
            );
        }
    }

    proptest! {
        #[test]
        fn broken_huge_pages_hold_the_range_and_stay_in_ram(page in 0_u64..4096, pages in 1_u64..2048) {
            let ram_bytes = 16 << 20;
            let start = GuestAddress(1 << 30);
            let memory = allocate(&[(start, ram_bytes)]).unwrap();
            let at = GuestAddress(start.0 + page * PAGE_BYTES);
            let bytes = (pages * PAGE_BYTES).min(ram_bytes - page * PAGE_BYTES);
            match broken_huge_pages(&memory, at, bytes) {
                None => prop_assert!(bytes.is_multiple_of(HUGE_PAGE_BYTES)),
                Some((first, length)) => {
                    prop_assert!(first >= start && first <= at);
                    prop_assert!(first.0 + length >= at.0 + bytes);
                    prop_assert!(first.0 + length <= start.0 + ram_bytes);
                    prop_assert!(length < bytes + 2 * HUGE_PAGE_BYTES);
                }
            }
            discard(&memory, at, bytes).unwrap();
        }
    }

    #[test]
    fn a_file_that_is_too_short_or_too_far_is_refused() {
        let memory = ram();
        let error = read(&memory, &file(&[1; 5000]), extent(4096, 0, 4096)).unwrap_err();
        assert!(matches!(error, MemoryError::Read { .. }), "{error}");
        for at in [0xf000, 0x2_0000, u64::MAX - 4095] {
            let error = read(&memory, &file(&[1; 8192]), extent(0, at, 8192)).unwrap_err();
            assert!(matches!(error, MemoryError::Outside { .. }), "{error}");
        }
    }
}
