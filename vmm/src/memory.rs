#![allow(
    unsafe_code,
    reason = "maps files over guest RAM, and reads and writes files from it"
)]
//! Guest RAM, and how files get into it and out of it.
//!
//! RAM is private anonymous memory that costs nothing until it is touched. It asks for huge pages: measured
//! with our kernel, 28 faults up to the guest's init instead of 9,140, for 8 MiB more. What is mapped from a file is shared
//! with other VMs through the host's page cache until the guest writes to it; whoever owns such a file
//! must replace it by renaming, never by writing into it. Must not know what is in the files.

use crate::arch::x86_64::layout::PAGE_BYTES;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use std::{fs::File, io, os::fd::AsRawFd};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, VolatileSlice,
    mmap::FromRangesError,
};

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
    /// The file ends early.
    #[error("a file of {actual} bytes should have {wanted}")]
    Truncated {
        /// Bytes of the file.
        actual: u64,
        /// Bytes that were announced.
        wanted: u64,
    },
    /// The host refuses advice about it.
    #[error("cannot choose the page size of {bytes} bytes of guest RAM")]
    Advise {
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
    /// The file cannot be mapped.
    #[error("cannot map {bytes} bytes at offset {offset} of a file")]
    MapFile {
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

/// RAM below this holds a few boot structures, for which a huge page would be a waste.
const SMALL_PAGES_END_BYTES: usize = 2 << 20;

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
        let small = if start.0 == 0 {
            SMALL_PAGES_END_BYTES.min(bytes)
        } else {
            0
        };
        advise(&memory, start, small, Advice::LinuxNoHugepage)?;
        let rest = GuestAddress(start.0 + small as u64);
        advise(&memory, rest, bytes - small, Advice::LinuxHugepage)?;
    }
    Ok(memory)
}

fn advise(
    memory: &GuestMemoryMmap,
    at: GuestAddress,
    bytes: usize,
    advice: Advice,
) -> Result<(), MemoryError> {
    if bytes == 0 {
        return Ok(());
    }
    let slice = slice(memory, at, bytes as u64)?;
    // SAFETY: the slice proves that these pages are guest RAM; the advice changes how they are backed, not
    // what is in them.
    let result = unsafe { madvise(slice.ptr_guard_mut().as_ptr().cast(), bytes, advice) };
    match result {
        // A host built without huge pages has none to give, and none to withhold.
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(source) => Err(MemoryError::Advise {
            bytes: bytes as u64,
            source: source.into(),
        }),
    }
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

/// Makes part of `file` visible in guest RAM without copying it. `extent` is aligned to pages on both sides;
/// behind its end the rest of its last page is whatever the file holds there, or zero.
pub fn map(memory: &GuestMemoryMmap, file: &File, extent: Extent) -> Result<(), MemoryError> {
    let Extent { offset, at, bytes } = extent;
    let failed = |source| MemoryError::MapFile {
        offset,
        bytes,
        source,
    };
    let actual = file.metadata().map_err(failed)?.len();
    let wanted = offset.saturating_add(bytes);
    // Beyond its end a mapped file gives signals instead of bytes.
    if actual < wanted {
        return Err(MemoryError::Truncated { actual, wanted });
    }
    let whole_pages = bytes.next_multiple_of(PAGE_BYTES);
    let slice = slice(memory, at, whole_pages)?;
    // SAFETY: the slice proves that these pages belong to guest RAM, which stays mapped as long as `memory`
    // lives and is only reached through volatile accesses; replacing pages of it invalidates no reference.
    let mapping = unsafe {
        rustix::mm::mmap(
            slice.ptr_guard_mut().as_ptr().cast(),
            slice.len(),
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file,
            offset,
        )
    };
    mapping.map(|_| ()).map_err(|source| failed(source.into()))
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
            page in 0_u64..3,
            at in 0_u64..3,
            bytes in 1_u64..12_000,
            mapped: bool,
        ) {
            let memory = ram();
            let extent = extent(page * PAGE_BYTES, at * PAGE_BYTES, bytes);
            if mapped {
                map(&memory, &file(&contents()), extent).unwrap();
            } else {
                read(&memory, &file(&contents()), extent).unwrap();
            }
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
    fn a_guest_that_writes_to_a_mapped_file_changes_its_own_copy() {
        let (memory, file) = (ram(), file(&contents()));
        map(&memory, &file, extent(0, 4096, 8192)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(4096)).unwrap();
        let other = ram();
        map(&other, &file, extent(0, 0, 8192)).unwrap();
        let seen: u8 = other.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(seen, contents()[0]);
    }

    #[test]
    fn a_file_that_is_too_short_or_too_far_is_refused() {
        let memory = ram();
        let short = file(&[1; 5000]);
        let error = map(&memory, &short, extent(4096, 0, 4096)).unwrap_err();
        assert!(
            matches!(error, MemoryError::Truncated { actual: 5000, .. }),
            "{error}"
        );
        let error = read(&memory, &short, extent(4096, 0, 4096)).unwrap_err();
        assert!(matches!(error, MemoryError::Read { .. }), "{error}");
        let long = file(&[1; 8192]);
        for at in [0xf000, 0x2_0000, u64::MAX - 4095] {
            for load in [read, map] {
                let error = load(&memory, &long, extent(0, at, 8192)).unwrap_err();
                assert!(matches!(error, MemoryError::Outside { .. }), "{error}");
            }
        }
    }
}
