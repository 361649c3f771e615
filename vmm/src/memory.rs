#![allow(unsafe_code, reason = "maps files over guest RAM")]
//! Guest RAM, and how files get into it.
//!
//! RAM is private anonymous memory that costs nothing until it is touched. The kernel and the initramfs are
//! mapped over it privately, so that VMs share the pages that none of them writes through the host's page
//! cache. Whoever owns those files must replace them by renaming, never by writing into them: this is
//! so for packages. Must not know what is in the files.

use crate::arch::x86_64::layout::PAGE_BYTES;
use rustix::mm::{MapFlags, ProtFlags};
use std::{fs::File, io, os::unix::fs::FileExt};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, mmap::FromRangesError,
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

/// Allocates guest RAM for `ranges` of start and length.
pub fn allocate(ranges: &[(GuestAddress, u64)]) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes = ranges.iter().map(|range| range.1).sum();
    let sized = ranges
        .iter()
        .map(|&(start, len)| Ok((start, usize::try_from(len)?)))
        .collect::<Result<Vec<_>, std::num::TryFromIntError>>()
        .map_err(|_| MemoryError::TooLarge(bytes))?;
    GuestMemoryMmap::from_ranges(&sized).map_err(|source| MemoryError::Allocate { bytes, source })
}

/// Makes part of `file` visible in guest RAM: whole pages are mapped where both sides are aligned, the rest
/// is read.
pub fn load(memory: &GuestMemoryMmap, file: &File, extent: Extent) -> Result<(), MemoryError> {
    let metadata = file.metadata().map_err(|source| MemoryError::Read {
        offset: 0,
        bytes: 0,
        source,
    })?;
    let wanted = extent.offset.saturating_add(extent.bytes);
    if metadata.len() < wanted {
        return Err(MemoryError::Truncated {
            actual: metadata.len(),
            wanted,
        });
    }
    let aligned =
        extent.offset.is_multiple_of(PAGE_BYTES) && extent.at.0.is_multiple_of(PAGE_BYTES);
    let mapped = if aligned && metadata.is_file() {
        extent.bytes - extent.bytes % PAGE_BYTES
    } else {
        0
    };
    map(
        memory,
        file,
        Extent {
            bytes: mapped,
            ..extent
        },
    )?;
    read(
        memory,
        file,
        Extent {
            offset: extent.offset + mapped,
            at: GuestAddress(extent.at.0.saturating_add(mapped)),
            bytes: extent.bytes - mapped,
        },
    )
}

fn map(memory: &GuestMemoryMmap, file: &File, extent: Extent) -> Result<(), MemoryError> {
    let Extent { offset, at, bytes } = extent;
    if bytes == 0 {
        return Ok(());
    }
    let length = usize::try_from(bytes).map_err(|_| MemoryError::TooLarge(bytes))?;
    let slice = memory
        .get_slice(at, length)
        .map_err(|source| MemoryError::Outside {
            at: at.0,
            bytes,
            source,
        })?;
    let host = slice.ptr_guard_mut();
    // SAFETY: the slice proves that these pages belong to guest RAM, which stays mapped as long as `memory`
    // lives and is only reached through volatile accesses; replacing pages of it invalidates no reference.
    let mapping = unsafe {
        rustix::mm::mmap(
            host.as_ptr().cast(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file,
            offset,
        )
    };
    mapping.map_err(|source| MemoryError::MapFile {
        offset,
        bytes,
        source: source.into(),
    })?;
    Ok(())
}

fn read(memory: &GuestMemoryMmap, file: &File, extent: Extent) -> Result<(), MemoryError> {
    const CHUNK_BYTES: u64 = 64 * 1024;
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < extent.bytes {
        let bytes = CHUNK_BYTES.min(extent.bytes - done);
        buffer.resize(usize::try_from(bytes).unwrap_or(0), 0);
        let offset = extent.offset + done;
        file.read_exact_at(&mut buffer, offset)
            .map_err(|source| MemoryError::Read {
                offset,
                bytes,
                source,
            })?;
        let at = extent.at.0.saturating_add(done);
        memory
            .write_slice(&buffer, GuestAddress(at))
            .map_err(|source| MemoryError::Outside { at, bytes, source })?;
        done += bytes;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{io::Write, os::fd::OwnedFd};

    fn file(contents: &[u8]) -> File {
        let fd: OwnedFd =
            rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(contents).unwrap();
        file
    }

    proptest! {
        #[test]
        fn what_is_loaded_is_what_the_file_holds(
            offset in 0_u64..3,
            at in 0_u64..3,
            bytes in 0_u64..12_000,
            unaligned in 0_u64..2,
        ) {
            let contents: Vec<u8> = (0..30_000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
            let memory = allocate(&[(GuestAddress(0), 1 << 16)]).unwrap();
            let extent = Extent {
                offset: offset * PAGE_BYTES + unaligned,
                at: GuestAddress(at * PAGE_BYTES),
                bytes,
            };
            load(&memory, &file(&contents), extent).unwrap();
            let mut seen = vec![0; usize::try_from(bytes).unwrap()];
            memory.read_slice(&mut seen, extent.at).unwrap();
            let from = usize::try_from(extent.offset).unwrap();
            prop_assert_eq!(&seen[..], &contents[from..from + seen.len()]);
            let after: u8 = memory.read_obj(GuestAddress(extent.at.0 + bytes)).unwrap();
            prop_assert_eq!(after, 0);
        }
    }

    #[test]
    fn a_file_that_is_too_short_or_too_far_is_refused() {
        let memory = allocate(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let short = load(
            &memory,
            &file(&[1; 5000]),
            Extent {
                offset: 4096,
                at: GuestAddress(0),
                bytes: 4096,
            },
        );
        assert!(
            matches!(short, Err(MemoryError::Truncated { actual: 5000, .. })),
            "{short:?}"
        );
        for at in [0xf000, 0x2_0000, u64::MAX - 4095] {
            let outside = load(
                &memory,
                &file(&[1; 8192]),
                Extent {
                    offset: 0,
                    at: GuestAddress(at),
                    bytes: 8192,
                },
            );
            assert!(
                matches!(outside, Err(MemoryError::Outside { .. })),
                "{outside:?}"
            );
        }
    }
}
