#![allow(unsafe_code, reason = "tells a block device of the host to discard")]
//! The file or block device behind a disk: what it can do, what a request comes to on it, and how that is done
//! by plain system calls.
//!
//! Must not know queues.

use super::request::{MAX_DESCRIPTORS, Operation, Piece, Range, Request};
use crate::memory;
use rustix::{
    fs::{FallocateFlags, FileType, fallocate},
    io::Errno,
};
use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsRawFd,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap};
use walnut_vmm_api::DiskConfig;

/// Unit of capacity and of a request's position, whatever the block size (section 5.2.4).
pub(super) const SECTOR_BYTES: u64 = 512;
/// Pieces of data in a request at the most: what a header and a status leave of its descriptors.
pub(super) const MAX_SEGMENTS: u32 = 254;
/// Bytes of a piece at the most.
pub(super) const MAX_SEGMENT_BYTES: u32 = 64 * 1024;
/// Bytes of a request's data at the most: what bounds the time that one takes.
pub(super) const MAX_REQUEST_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;
/// Sectors of one range of a discard or write-zeroes at the most: 256 MiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 512 * 1024;
/// Bytes of what VIRTIO_BLK_T_GET_ID answers.
const ID_BYTES: usize = 20;
/// Smaller discards free nothing on the file systems of hosts.
const DISCARD_BYTES: u32 = 4096;
/// What the length of a file that another follows is a multiple of: no block of a file system crosses from one to the next.
const JOINT_BYTES: u64 = 4096;
/// `BLKDISCARD`: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;
const _: () = assert!(MAX_SEGMENTS as usize + 2 == MAX_DESCRIPTORS);

/// Why a disk cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Another file cannot follow this one.
    #[error(
        "disk {serial:?} has a file of {bytes} bytes before another, not a multiple of {JOINT_BYTES}"
    )]
    Joint {
        /// Serial of the disk.
        serial: String,
        /// Bytes of the file.
        bytes: u64,
    },
    /// Its size cannot be found out.
    #[error("cannot tell the size of the file behind disk {serial:?}")]
    Size {
        /// Serial of the disk.
        serial: String,
        /// Why not.
        source: io::Error,
    },
    /// No timer for its rate.
    #[error("cannot limit the rate of disk {serial:?}")]
    Rate {
        /// Serial of the disk.
        serial: String,
        /// Why not.
        source: io::Error,
    },
}

/// The file behind the device.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    /// Files after it, with the position where each begins.
    others: Vec<(u64, File)>,
    pub(super) capacity_bytes: u64,
    pub(super) read_only: bool,
    pub(super) logical_block_bytes: u32,
    pub(super) physical_block_bytes: u32,
    /// How sectors are discarded, if they can be.
    pub(super) discard: Option<Erasure>,
    /// Whether sectors can be zeroed without writing zeroes to them.
    pub(super) zeroes: bool,
    id: [u8; ID_BYTES],
}

/// How the content of sectors goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Erasure {
    /// Their space is given back, and they read as zeroes.
    Punch,
    /// They keep their space, and read as zeroes.
    Zero,
    /// The first where it is possible, else the second.
    PunchElseZero,
    /// The second where it is possible, else the first.
    ZeroElsePunch,
    /// A block device forgets them. Done by an ioctl.
    DiscardDevice,
}

impl Erasure {
    pub(super) fn mode(self) -> FallocateFlags {
        let how = match self {
            Self::Zero | Self::ZeroElsePunch => FallocateFlags::ZERO_RANGE,
            Self::Punch | Self::PunchElseZero | Self::DiscardDevice => FallocateFlags::PUNCH_HOLE,
        };
        how | FallocateFlags::KEEP_SIZE
    }

    /// What to try where this isn't supported.
    pub(super) fn otherwise(self) -> Option<Self> {
        match self {
            Self::PunchElseZero => Some(Self::Zero),
            Self::ZeroElsePunch => Some(Self::Punch),
            Self::Punch | Self::Zero | Self::DiscardDevice => None,
        }
    }
}

/// A part of the disk whose content goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Erase {
    pub(super) how: Erasure,
    pub(super) position: u64,
    pub(super) bytes: u64,
}

/// Work on the file. All positions lie within the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Job {
    /// To guest memory.
    Read(u64, Vec<Piece>),
    /// From guest memory.
    Write(u64, Vec<Piece>),
    /// Makes what was written durable.
    Flush,
    /// One after the other.
    Erase(VecDeque<Erase>),
}

impl Job {
    /// Bytes that it moves, or what it costs in comparison.
    pub(super) fn weight(&self) -> u64 {
        match self {
            Self::Read(_, pieces) | Self::Write(_, pieces) => {
                pieces.iter().map(|piece| u64::from(piece.bytes)).sum()
            }
            Self::Flush => 0,
            Self::Erase(_) => MAX_REQUEST_BYTES,
        }
    }

    /// Whether only [`Disk::perform`] can do it.
    pub(super) fn is_direct(&self) -> bool {
        let Self::Erase(erases) = self else {
            return false;
        };
        let mut erases = erases.iter();
        erases.any(|erase| erase.how == Erasure::DiscardDevice)
    }
}

/// When a write is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// Once the host has it.
    Cached,
    /// Once it is on the disk.
    Durable,
}

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Work, after which so many bytes have been written to the guest's data.
    Work(Job, u32),
    /// Nothing to do, but for this status, and bytes that were written to the guest's data.
    Done(u32, u32),
}

impl Disk {
    /// A disk of `file` and the others, one after another, of which nothing is written.
    pub(super) fn joined(
        file: File,
        others: Vec<File>,
        config: &DiskConfig,
    ) -> Result<Self, BlockError> {
        let mut disk = Self::new(file, config)?;
        for mut file in others {
            let bytes = disk.capacity_bytes;
            let serial = || config.serial.clone();
            if !bytes.is_multiple_of(JOINT_BYTES) {
                return Err(BlockError::Joint {
                    serial: serial(),
                    bytes,
                });
            }
            let more = file
                .seek(SeekFrom::End(0))
                .map_err(|source| BlockError::Size {
                    serial: serial(),
                    source,
                })?;
            disk.others.push((bytes, file));
            disk.capacity_bytes =
                bytes.saturating_add(more - more % u64::from(config.logical_block_bytes.max(512)));
        }
        Ok(disk)
    }

    /// The file that holds this position of the disk, and where in the disk it begins.
    fn part(&self, position: u64) -> (u64, &File) {
        let after = self.others.partition_point(|(start, _)| *start <= position);
        let part = after
            .checked_sub(1)
            .and_then(|index| self.others.get(index));
        part.map_or((0, &self.file), |(start, file)| (*start, file))
    }

    /// A disk in `file`; what is beyond the last whole block is not seen.
    pub(super) fn new(mut file: File, config: &DiskConfig) -> Result<Self, BlockError> {
        let serial = &config.serial;
        let size = file.seek(SeekFrom::End(0));
        let size = size.map_err(|source| BlockError::Size {
            serial: serial.clone(),
            source,
        })?;
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let is_device = rustix::fs::fstat(&file)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice);
        let discard = match (config.read_only, is_device) {
            (true, _) => None,
            // Refused for its length of zero where the device can discard, and before that where it cannot.
            (false, true) => {
                let refusal = discard_device(&file, 0, 0).err();
                let unsupported = refusal.is_some_and(|error| is_unsupported(&error));
                (!unsupported).then_some(Erasure::DiscardDevice)
            }
            // Beyond the end there is nothing to lose.
            (false, false) => {
                let mode = Erasure::Punch.mode();
                let end = size.checked_next_multiple_of(DISCARD_BYTES.into());
                let punched = end.map(|end| fallocate(&file, mode, end, DISCARD_BYTES.into()));
                (punched == Some(Ok(()))).then_some(Erasure::Punch)
            }
        };
        Ok(Self {
            file,
            others: Vec::new(),
            capacity_bytes: size - size % u64::from(config.logical_block_bytes.max(512)),
            read_only: config.read_only,
            logical_block_bytes: config.logical_block_bytes,
            physical_block_bytes: config.physical_block_bytes,
            discard,
            // The kernel writes zeroes to a block device that cannot make them.
            zeroes: discard.is_some() || is_device && !config.read_only,
            id,
        })
    }

    /// The file, for who does its I/O; `None` where there are several.
    pub(super) fn file(&self) -> Option<&File> {
        self.others.is_empty().then_some(&self.file)
    }

    /// Bytes below which a discard gives nothing back.
    pub(super) fn discard_bytes(&self) -> u32 {
        self.physical_block_bytes.max(DISCARD_BYTES)
    }

    /// Checks a request, and says what is to be done for it.
    pub(super) fn plan(&self, memory: &GuestMemoryMmap, request: Request) -> Plan {
        let bytes = request.data_bytes();
        let failed = Plan::Done(VIRTIO_BLK_S_IOERR, 0);
        match request.operation {
            Operation::Read(sector) => match self.locate(sector, bytes) {
                Some((_, 0)) => Plan::Done(VIRTIO_BLK_S_OK, 0),
                Some((position, bytes)) => Plan::Work(Job::Read(position, request.data), bytes),
                None => failed,
            },
            Operation::Write(_) if self.read_only => failed,
            Operation::Write(sector) => match self.locate(sector, bytes) {
                Some((_, 0)) => Plan::Done(VIRTIO_BLK_S_OK, 0),
                Some((position, _)) => Plan::Work(Job::Write(position, request.data), 0),
                None => failed,
            },
            Operation::Flush => Plan::Work(Job::Flush, 0),
            Operation::GetId => self
                .write_id(memory, &request.data)
                .map_or(failed, |written| Plan::Done(VIRTIO_BLK_S_OK, written)),
            Operation::Discard(ranges) => match self.discard {
                // Section 5.2.6.2: no flag means anything to a discard.
                Some(how) => self.erase(&ranges, 0, |_| how),
                None => Plan::Done(VIRTIO_BLK_S_UNSUPP, 0),
            },
            Operation::WriteZeroes(ranges) if self.zeroes => self.erase(
                &ranges,
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
                |flags| match flags {
                    0 => Erasure::ZeroElsePunch,
                    _ => Erasure::PunchElseZero,
                },
            ),
            Operation::Malformed => failed,
            Operation::WriteZeroes(_) | Operation::Unknown(_) => Plan::Done(VIRTIO_BLK_S_UNSUPP, 0),
        }
    }

    /// Position in the file and length, when all of the data lies within the disk and isn't too much.
    fn locate(&self, sector: u64, bytes: u64) -> Option<(u64, u32)> {
        let position = sector.checked_mul(SECTOR_BYTES)?;
        let within = position.checked_add(bytes)? <= self.capacity_bytes;
        let whole = bytes.is_multiple_of(SECTOR_BYTES) && bytes <= MAX_REQUEST_BYTES;
        // Partitions end where files do, so that only a guest of its own making asks across.
        let of_one_file = bytes == 0 || self.part(position).0 == self.part(position + bytes - 1).0;
        (within && whole && of_one_file).then_some((position, u32::try_from(bytes).ok()?))
    }

    fn erase(&self, ranges: &[Range], known: u32, how: impl Fn(u32) -> Erasure) -> Plan {
        if ranges.iter().any(|range| range.flags & !known != 0) {
            return Plan::Done(VIRTIO_BLK_S_UNSUPP, 0);
        }
        let mut erases = VecDeque::new();
        for range in ranges {
            let bytes = u64::from(range.sectors) * SECTOR_BYTES;
            let position = range.sector.checked_mul(SECTOR_BYTES);
            let end = position.and_then(|position| position.checked_add(bytes));
            match (position, end) {
                (Some(position), Some(end))
                    if end <= self.capacity_bytes && range.sectors <= MAX_RANGE_SECTORS =>
                {
                    erases.push_back(Erase {
                        how: how(range.flags),
                        position,
                        bytes,
                    });
                }
                _ => return Plan::Done(VIRTIO_BLK_S_IOERR, 0),
            }
        }
        erases.retain(|erase| erase.bytes != 0);
        if erases.is_empty() {
            return Plan::Done(VIRTIO_BLK_S_OK, 0);
        }
        Plan::Work(Job::Erase(erases), 0)
    }

    /// Writes the serial to the data, as much of it as there is room for.
    fn write_id(&self, memory: &GuestMemoryMmap, data: &[Piece]) -> Option<u32> {
        let mut rest = &self.id[..];
        for piece in data {
            let bytes = usize::try_from(piece.bytes).map_or(rest.len(), |len| len.min(rest.len()));
            let (now, later) = rest.split_at(bytes);
            memory.write_slice(now, piece.address).ok()?;
            rest = later;
        }
        u32::try_from(ID_BYTES - rest.len()).ok()
    }

    /// Does the work now.
    pub(super) fn perform(
        &self,
        memory: &GuestMemoryMmap,
        job: &Job,
        durability: Durability,
    ) -> io::Result<()> {
        match job {
            Job::Read(position, pieces) => {
                let (start, file) = self.part(*position);
                for_each_slice(memory, pieces, *position - start, |slice, position| {
                    memory::read_at(file, slice, position)
                })
            }
            Job::Write(position, pieces) => {
                for_each_slice(memory, pieces, *position, |slice, position| {
                    memory::write_at(&self.file, slice, position)
                })?;
                match durability {
                    Durability::Cached => Ok(()),
                    Durability::Durable => self.file.sync_data(),
                }
            }
            Job::Flush => self.file.sync_data(),
            Job::Erase(erases) => erases.iter().try_for_each(|erase| self.erase_now(*erase)),
        }
    }

    fn erase_now(&self, mut erase: Erase) -> io::Result<()> {
        loop {
            let Erase {
                how,
                position,
                bytes,
            } = erase;
            let result = match how {
                Erasure::DiscardDevice => discard_device(&self.file, position, bytes),
                _ => fallocate(&self.file, how.mode(), position, bytes).map_err(io::Error::from),
            };
            match (result, how.otherwise()) {
                (Err(error), Some(otherwise)) if is_unsupported(&error) => erase.how = otherwise,
                (result, _) => return result,
            }
        }
    }
}

/// Whether an operation failed because the file has no such thing.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error())
}

/// Gives each piece as memory, with the position in the file that follows the piece before it.
fn for_each_slice(
    memory: &GuestMemoryMmap,
    pieces: &[Piece],
    mut position: u64,
    mut step: impl FnMut(&vm_memory::VolatileSlice<'_>, u64) -> io::Result<()>,
) -> io::Result<()> {
    for piece in pieces {
        let bytes = usize::try_from(piece.bytes).map_err(io::Error::other)?;
        for slice in memory.get_slices(piece.address, bytes) {
            let slice = slice.map_err(io::Error::other)?;
            step(&slice, position)?;
            position += slice.len() as u64;
        }
    }
    Ok(())
}

fn discard_device(file: &File, position: u64, bytes: u64) -> io::Result<()> {
    let range = [position, bytes];
    // SAFETY: BLKDISCARD reads two 64-bit numbers, which live until it returns, and writes no memory.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
