//! Block device (virtio 1.3, section 5.2): a file or block device of the host as a disk.
//!
//! `request` says what the driver wants; [`Disk`] does it, synchronously on the device's thread. Discard
//! and write-zeroes are not offered.

pub mod request;

use self::request::{Operation, Piece, Request};
use super::{ActivateError, Activation, DeviceType, VirtioDevice, queue};
use crate::{event_loop::Worker, memory, seccomp::Kind};
use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    sync::Arc,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryMmap, VolatileSlice};

const QUEUE_SIZES: [u16; 1] = [256];
/// A request is a header, a status and data between them.
const MAX_SEGMENTS: u32 = 254;
/// Unit of capacity and of a request's position, whatever the block size (section 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// Bytes of what VIRTIO_BLK_T_GET_ID answers.
const ID_BYTES: usize = 20;

/// Why a disk cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Its size cannot be found out.
    #[error("cannot tell the size of the file behind disk {serial:?}")]
    Size {
        /// Serial of the disk.
        serial: String,
        /// Why not.
        source: io::Error,
    },
}

/// The file behind the device.
#[derive(Debug)]
pub struct Disk {
    file: File,
    capacity_bytes: u64,
    read_only: bool,
    id: [u8; ID_BYTES],
}

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outcome {
    status: u32,
    written_to_guest: u32,
}

impl Outcome {
    fn failed(status: u32) -> Self {
        Self {
            status,
            written_to_guest: 0,
        }
    }
}

impl Disk {
    /// A disk in `file`; what is beyond the last whole sector is not seen.
    pub fn new(mut file: File, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        let size = file.seek(SeekFrom::End(0));
        let size = size.map_err(|source| BlockError::Size {
            serial: serial.to_owned(),
            source,
        })?;
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            file,
            capacity_bytes: size - size % SECTOR_BYTES,
            read_only,
            id,
        })
    }

    /// Handles one buffer and gives the bytes that were written to it.
    fn handle(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let Ok(request) = Request::parse(memory, chain) else {
            return 0;
        };
        let outcome = self.execute(memory, &request);
        let status = u8::try_from(outcome.status).unwrap_or(u8::MAX);
        match memory.write_obj(status, request.status) {
            Ok(()) => outcome.written_to_guest.saturating_add(1),
            Err(_) => 0,
        }
    }

    fn execute(&self, memory: &GuestMemoryMmap, request: &Request) -> Outcome {
        let result = match request.operation {
            Operation::Read(sector) => self.read(memory, sector, &request.data),
            Operation::Write(_) if self.read_only => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Operation::Write(sector) => self.write(memory, sector, &request.data),
            Operation::Flush => self.file.sync_data().map(|()| 0),
            Operation::GetId => self.get_id(memory, &request.data),
            Operation::Unknown(_) => return Outcome::failed(VIRTIO_BLK_S_UNSUPP),
        };
        result.map_or(Outcome::failed(VIRTIO_BLK_S_IOERR), |written_to_guest| {
            Outcome {
                status: VIRTIO_BLK_S_OK,
                written_to_guest,
            }
        })
    }

    /// Position in the file and length, when all of the data lies within the disk.
    fn locate(&self, sector: u64, data: &[Piece]) -> io::Result<(u64, u32)> {
        let total: u64 = data.iter().map(|piece| u64::from(piece.bytes)).sum();
        let start = sector.checked_mul(SECTOR_BYTES);
        let start = start.ok_or(io::ErrorKind::InvalidInput)?;
        let end = start
            .checked_add(total)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if end > self.capacity_bytes || !total.is_multiple_of(SECTOR_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let total = u32::try_from(total).map_err(io::Error::other)?;
        Ok((start, total))
    }

    fn read(&self, memory: &GuestMemoryMmap, sector: u64, data: &[Piece]) -> io::Result<u32> {
        let (mut position, total) = self.locate(sector, data)?;
        for piece in data {
            memory::read_at(&self.file, &slice(memory, piece)?, position)?;
            position += u64::from(piece.bytes);
        }
        Ok(total)
    }

    fn write(&self, memory: &GuestMemoryMmap, sector: u64, data: &[Piece]) -> io::Result<u32> {
        let (mut position, _) = self.locate(sector, data)?;
        for piece in data {
            memory::write_at(&self.file, &slice(memory, piece)?, position)?;
            position += u64::from(piece.bytes);
        }
        Ok(0)
    }

    fn get_id(&self, memory: &GuestMemoryMmap, data: &[Piece]) -> io::Result<u32> {
        let first = data.first().ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = usize::try_from(first.bytes).map_or(ID_BYTES, |len| len.min(ID_BYTES));
        memory
            .write_slice(&self.id[..bytes], first.address)
            .map_err(io::Error::other)?;
        u32::try_from(bytes).map_err(io::Error::other)
    }
}

fn slice<'a>(memory: &'a GuestMemoryMmap, piece: &Piece) -> io::Result<VolatileSlice<'a>> {
    memory::slice(memory, piece.address, piece.bytes.into()).map_err(io::Error::other)
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    worker: Option<Worker>,
}

impl Block {
    /// A device that is not started.
    pub fn new(disk: Disk) -> Self {
        Self {
            disk: Arc::new(disk),
            worker: None,
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let read_only = u64::from(self.disk.read_only) << VIRTIO_BLK_F_RO;
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | read_only
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_blk_config`: capacity, size_max (not offered), seg_max.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let capacity = (self.disk.capacity_bytes / SECTOR_BYTES).to_le_bytes();
        let fields = [&capacity[..], &[0; 4], &MAX_SEGMENTS.to_le_bytes()].concat();
        super::read_config_space(&fields, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let active = activation.queues.pop().flatten();
        let active = active.ok_or(ActivateError::MissingQueue { index: 0 })?;
        let disk = self.disk.clone();
        let worker = activation.threads.spawn(Kind::Block, "block", move |stop| {
            let memory = &activation.memory;
            queue::serve(active, memory, &activation.interrupt, &stop, |chain| {
                disk.handle(memory, chain)
            });
        });
        self.worker = Some(worker.map_err(ActivateError::Thread)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use virtio_bindings::{
        virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT},
        virtio_ring::VRING_DESC_F_WRITE,
    };
    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };
    use vm_memory::GuestAddress;

    const DISK_BYTES: usize = 8192;
    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x9000;
    const STATUS: u64 = 0xf000;

    fn memory() -> GuestMemoryMmap {
        crate::memory::allocate(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn pattern() -> Vec<u8> {
        (0..DISK_BYTES)
            .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
            .collect()
    }

    fn disk(read_only: bool) -> Disk {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&pattern()).unwrap();
        file.write_all(b"beyond the last sector").unwrap();
        Disk::new(file, read_only, "walnut").unwrap()
    }

    fn descriptor(address: u64, len: u32, writable: bool) -> RawDescriptor {
        let flags = if writable { VRING_DESC_F_WRITE } else { 0 };
        RawDescriptor::from(Descriptor::new(
            address,
            len,
            u16::try_from(flags).unwrap(),
            0,
        ))
    }

    /// Runs a request and gives its status and the bytes that were written.
    fn run(
        disk: &Disk,
        memory: &GuestMemoryMmap,
        kind: u32,
        sector: u64,
        data: &[(u64, u32)],
    ) -> (u32, u32) {
        memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(0xee_u8, GuestAddress(STATUS)).unwrap();
        let to_guest = kind != VIRTIO_BLK_T_OUT;
        let mut descriptors = vec![descriptor(HEADER, 16, false)];
        descriptors.extend(data.iter().map(|&(at, len)| descriptor(at, len, to_guest)));
        descriptors.push(descriptor(STATUS, 1, true));
        let driver = MockSplitQueue::new(memory, 16);
        let chain = driver.build_desc_chain(&descriptors).unwrap();
        let written = disk.handle(memory, chain);
        let status: u8 = memory.read_obj(GuestAddress(STATUS)).unwrap();
        (status.into(), written)
    }

    fn seen(memory: &GuestMemoryMmap, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    #[test]
    fn a_read_is_scattered_over_the_data() {
        let (disk, memory) = (disk(false), memory());
        let data = [(DATA, 100), (DATA + 0x1000, 924)];
        assert_eq!(run(&disk, &memory, VIRTIO_BLK_T_IN, 2, &data), (0, 1025));
        assert_eq!(seen(&memory, DATA, 100), pattern()[1024..1124]);
        assert_eq!(seen(&memory, DATA + 0x1000, 924), pattern()[1124..2048]);
    }

    #[test]
    fn a_write_is_gathered_and_a_flush_succeeds() {
        let (disk, memory) = (disk(false), memory());
        memory.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
        let data = [(DATA, 256), (DATA + 256, 256)];
        assert_eq!(run(&disk, &memory, VIRTIO_BLK_T_OUT, 1, &data), (0, 1));
        assert_eq!(run(&disk, &memory, VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
        let mut contents = Vec::new();
        (&disk.file).seek(SeekFrom::Start(0)).unwrap();
        (&disk.file).read_to_end(&mut contents).unwrap();
        assert_eq!(contents[512..1024], [7; 512]);
        assert_eq!(contents[1024..DISK_BYTES], pattern()[1024..]);
    }

    #[test]
    fn the_serial_is_padded_with_zeroes() {
        let (disk, memory) = (disk(true), memory());
        assert_eq!(
            run(&disk, &memory, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20)]),
            (0, 21)
        );
        assert_eq!(
            seen(&memory, DATA, 20),
            *b"walnut\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        );
    }

    #[test]
    fn requests_that_cannot_be_done_get_an_error_status() {
        let (disk, memory) = (disk(true), memory());
        let cases = [
            (
                "past the end",
                VIRTIO_BLK_T_IN,
                15,
                vec![(DATA, 1024)],
                VIRTIO_BLK_S_IOERR,
            ),
            (
                "far past the end",
                VIRTIO_BLK_T_IN,
                u64::MAX,
                vec![(DATA, 512)],
                VIRTIO_BLK_S_IOERR,
            ),
            (
                "half a sector",
                VIRTIO_BLK_T_IN,
                0,
                vec![(DATA, 100)],
                VIRTIO_BLK_S_IOERR,
            ),
            (
                "outside memory",
                VIRTIO_BLK_T_IN,
                0,
                vec![(u64::MAX - 10, 512)],
                VIRTIO_BLK_S_IOERR,
            ),
            (
                "read-only",
                VIRTIO_BLK_T_OUT,
                0,
                vec![(DATA, 512)],
                VIRTIO_BLK_S_IOERR,
            ),
            ("unknown", 77, 0, vec![(DATA, 512)], VIRTIO_BLK_S_UNSUPP),
        ];
        for (name, kind, sector, data, status) in cases {
            assert_eq!(
                run(&disk, &memory, kind, sector, &data),
                (status, 1),
                "{name}"
            );
        }
    }

    #[test]
    fn the_capacity_counts_whole_sectors() {
        let block = Block::new(disk(true));
        let mut config = [0xff; 24];
        config.fill(0);
        block.read_config(0, &mut config);
        assert_eq!(config[..8], 16_u64.to_le_bytes());
        assert_eq!(config[12..16], MAX_SEGMENTS.to_le_bytes());
        assert_eq!(block.features() >> VIRTIO_BLK_F_RO & 1, 1);
    }

    proptest! {
        #[test]
        fn any_buffer_is_a_request_or_an_error(
            pieces in proptest::collection::vec((0_u64..0x1_1000, 0_u32..0x2000, any::<bool>()), 1..12),
            header: [u8; 16],
            kind in 0_u32..12,
        ) {
            let (disk, memory) = (disk(false), memory());
            memory.write_obj(header, GuestAddress(HEADER)).unwrap();
            memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
            let mut descriptors = vec![descriptor(HEADER, 16, false)];
            descriptors.extend(pieces.iter().map(|&(at, len, writable)| descriptor(at, len, writable)));
            let driver = MockSplitQueue::new(&memory, 16);
            let chain = driver.build_desc_chain(&descriptors).unwrap();
            disk.handle(&memory, chain);
        }
    }
}
