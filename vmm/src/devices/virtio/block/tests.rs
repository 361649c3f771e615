//! The block device behind a driver without a guest, with io_uring and without.

mod joined;

use super::super::mock_driver::{DEADLINE, Driver, FIRST_BUFFER};
use super::request::Request;
use super::*;
use proptest::prelude::*;
use std::{
    collections::HashMap,
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_WRITE_ZEROES,
    },
    virtio_ring::VRING_DESC_F_WRITE,
};
use virtio_queue::{
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use walnut_vmm_api::{FdSlot, RateLimit, TokenBucket};

const DISK_BYTES: usize = 64 * 1024;
/// Each request of a test has its header, its status and then its data in a piece of memory of this size.
const AREA_BYTES: u64 = 0x8000;
const DATA: u64 = 0x1000;

fn pattern() -> Vec<u8> {
    (0..DISK_BYTES)
        .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
        .collect()
}

fn file() -> File {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(&pattern()).unwrap();
    file.write_all(b"beyond the last sector").unwrap();
    file
}

fn config() -> DiskConfig {
    DiskConfig::new(FdSlot(0), false, "walnut")
}

fn read_only() -> DiskConfig {
    DiskConfig::new(FdSlot(0), true, "walnut")
}

/// How requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Ring,
    Direct,
}

struct Rig {
    block: Block,
    driver: Driver,
    file: File,
    next: u64,
    /// Where a request's status goes, by queue and head.
    statuses: HashMap<(usize, u16), u64>,
}

impl Rig {
    fn new(config: &DiskConfig, way: Way) -> Self {
        let file = file();
        let block = Block::new(file.try_clone().unwrap(), config).unwrap();
        Self::of(block, file, way)
    }

    fn of(mut block: Block, file: File, way: Way) -> Self {
        if way == Way::Direct {
            for lane in &block.lanes {
                lane.lock().unwrap().as_mut().unwrap().ring = None;
            }
        }
        let (driver, activation) = Self::activation(&block);
        block.activate(activation).unwrap();
        Self {
            block,
            driver,
            file,
            next: 0,
            statuses: HashMap::new(),
        }
    }

    fn activation(block: &Block) -> (Driver, Activation) {
        let sizes = vec![QUEUE_SIZE; block.lanes.len()];
        let (driver, mut activation) = Driver::new(&sizes, true);
        activation.features = block.features();
        (driver, activation)
    }

    fn reset(&mut self) {
        self.block.reset();
        let (driver, activation) = Self::activation(&self.block);
        self.driver = driver;
        self.statuses.clear();
        self.block.activate(activation).unwrap();
    }

    /// Offers a request with these lengths of data, and gives where the data is.
    fn offer(&mut self, queue: usize, kind: u32, sector: u64, data: &[u32]) -> (u16, u64) {
        let area = FIRST_BUFFER + AREA_BYTES * (self.next % 256);
        self.next += 1;
        let memory = &self.driver.memory;
        memory.write_obj(kind, GuestAddress(area)).unwrap();
        memory.write_obj(sector, GuestAddress(area + 8)).unwrap();
        memory.write_obj(0xee_u8, GuestAddress(area + 16)).unwrap();
        let mut at = area + DATA;
        let mut pieces = Vec::new();
        for &bytes in data {
            pieces.push((at, bytes));
            at += u64::from(bytes);
        }
        let to_guest = matches!(kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID);
        let (mut readable, mut writable) = (vec![(area, 16)], Vec::new());
        let into = if to_guest {
            &mut writable
        } else {
            &mut readable
        };
        into.extend(pieces);
        writable.push((area + 16, 1));
        let head = self.driver.queues[queue].offer(&readable, &writable);
        self.statuses.insert((queue, head), area + 16);
        (head, area + DATA)
    }

    /// Waits for any request: its head, status, and the bytes that were written.
    fn wait(&mut self, queue: usize) -> (u16, u32, u32) {
        let (head, written) = self.driver.wait_used(queue);
        let at = self.statuses.remove(&(queue, head)).unwrap();
        let status: u8 = self.driver.memory.read_obj(GuestAddress(at)).unwrap();
        (head, status.into(), written)
    }

    /// Runs one request that has the data, and gives its status and the data afterwards.
    fn run(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u32, Vec<u8>) {
        let at = FIRST_BUFFER + AREA_BYTES * (self.next % 256) + DATA;
        self.driver
            .memory
            .write_slice(data, GuestAddress(at))
            .unwrap();
        let bytes = u32::try_from(data.len()).unwrap();
        let (head, _) = self.offer(0, kind, sector, &[bytes]);
        let (used, status, _) = self.wait(0);
        assert_eq!(head, used);
        (status, self.seen(at, data.len()))
    }

    fn seen(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        let memory = &self.driver.memory;
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn contents(&mut self) -> Vec<u8> {
        let mut contents = Vec::new();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.read_to_end(&mut contents).unwrap();
        contents
    }
}

fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes = ranges.iter().map(|(sector, sectors, flags)| {
        [
            &sector.to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    });
    bytes.collect::<Vec<_>>().concat()
}

const WAYS: [Way; 2] = [Way::Ring, Way::Direct];

#[test]
fn reads_are_scattered_and_writes_gathered() {
    for way in WAYS {
        let mut rig = Rig::new(&config(), way);
        let (head, at) = rig.offer(0, VIRTIO_BLK_T_IN, 2, &[100, 924]);
        assert_eq!(rig.wait(0), (head, VIRTIO_BLK_S_OK, 1025));
        assert_eq!(rig.seen(at, 1024), pattern()[1024..2048]);

        let at = FIRST_BUFFER + AREA_BYTES + DATA;
        let memory = &rig.driver.memory;
        memory.write_slice(&[7; 512], GuestAddress(at)).unwrap();
        let (head, _) = rig.offer(0, VIRTIO_BLK_T_OUT, 1, &[256, 1, 255]);
        assert_eq!(rig.wait(0), (head, VIRTIO_BLK_S_OK, 1));
        assert_eq!(rig.run(VIRTIO_BLK_T_FLUSH, 0, &[]).0, VIRTIO_BLK_S_OK);
        let contents = rig.contents();
        assert_eq!(contents[512..1024], [7; 512]);
        assert_eq!(contents[1024..DISK_BYTES], pattern()[1024..]);
    }
}

#[test]
fn the_serial_is_padded_with_zeroes_and_cut_to_the_data() {
    let mut rig = Rig::new(&read_only(), Way::Ring);
    let (_, at) = rig.offer(0, VIRTIO_BLK_T_GET_ID, 0, &[3, 17, 5]);
    assert_eq!(rig.wait(0).2, 21);
    let padded = b"walnut\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(rig.seen(at, 20), *padded);
    let (status, data) = rig.run(VIRTIO_BLK_T_GET_ID, 0, &[0; 4]);
    assert_eq!((status, &data[..]), (VIRTIO_BLK_S_OK, &b"waln"[..]));
}

#[test]
fn requests_that_cannot_be_done_get_an_error_status() {
    let (read, write, zero) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES);
    let discard = VIRTIO_BLK_T_DISCARD;
    let (io, unsupported) = (VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP);
    let sectors = u64::try_from(DISK_BYTES).unwrap() / SECTOR_BYTES;
    let cases = [
        ("past the end", read, sectors - 1, vec![0; 1024], io),
        ("far past the end", read, u64::MAX, vec![0; 512], io),
        ("half a sector", write, 0, vec![0; 100], io),
        ("unknown", 77, 0, vec![0; 512], unsupported),
        ("no ranges", discard, 0, vec![], io),
        ("half a range", discard, 0, vec![0; 24], io),
        ("a flag", discard, 0, ranges(&[(0, 8, 1)]), unsupported),
        ("flags", zero, 0, ranges(&[(0, 8, 3)]), unsupported),
        ("over the end", zero, 0, ranges(&[(sectors - 7, 8, 0)]), io),
        ("beyond", zero, 0, ranges(&[(u64::MAX, 8, 0)]), io),
        (
            "too long",
            zero,
            0,
            ranges(&[(0, MAX_RANGE_SECTORS + 1, 0)]),
            io,
        ),
        ("too many", zero, 0, ranges(&[(0, 1, 0); 17]), io),
    ];
    let mut rig = Rig::new(&config(), Way::Ring);
    for (name, kind, sector, data, status) in cases {
        assert_eq!(rig.run(kind, sector, &data).0, status, "{name}");
    }
    assert_eq!(rig.contents()[..DISK_BYTES], pattern());
    let mut rig = Rig::new(&read_only(), Way::Ring);
    assert_eq!(rig.run(write, 0, &[0; 512]).0, io);
    assert_eq!(rig.run(zero, 0, &ranges(&[(0, 8, 0)])).0, unsupported);
    assert_eq!(rig.run(discard, 0, &ranges(&[(0, 8, 0)])).0, unsupported);
    // A request whose data lies outside memory.
    let at = FIRST_BUFFER;
    let memory = &rig.driver.memory;
    memory.write_obj([0_u8; 16], GuestAddress(at)).unwrap();
    let head = rig.driver.queues[0].offer(&[(at, 16)], &[(u64::MAX - 10, 512), (at + 16, 1)]);
    rig.statuses.insert((0, head), at + 16);
    assert_eq!(rig.wait(0), (head, io, 1));
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes_and_give_space_back() {
    for way in WAYS {
        let mut rig = Rig::new(&config(), way);
        let before = rig.file.metadata().unwrap().blocks();
        let two = ranges(&[(8, 8, 0), (64, 16, 0)]);
        assert_eq!(rig.run(VIRTIO_BLK_T_DISCARD, 0, &two).0, VIRTIO_BLK_S_OK);
        let zero = ranges(&[(1, 2, 1), (0, 0, 0), (100, 1, 0)]);
        assert_eq!(
            rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zero).0,
            VIRTIO_BLK_S_OK
        );
        let mut expected = pattern();
        for (sector, sectors) in [(8, 8), (64, 16), (1, 2), (100, 1)] {
            expected[sector * 512..(sector + sectors) * 512].fill(0);
        }
        assert_eq!(rig.contents()[..DISK_BYTES], expected);
        let after = rig.file.metadata().unwrap().blocks();
        assert!(after + 24 <= before, "{before} blocks became {after}");
    }
}

#[test]
fn a_disk_says_what_it_is() {
    let mut config = config();
    (config.queues, config.logical_block_bytes) = (4, 1024);
    config.physical_block_bytes = 4096;
    let block = Block::new(file(), &config).unwrap();
    let field = |offset| {
        let mut data = [0xff; 4];
        block.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!((field(0), field(4)), (128, 0), "whole blocks alone");
    assert_eq!((field(8), field(12)), (64 * 1024, 254));
    assert_eq!((field(20), field(24)), (1024, 2 | 4 << 16));
    assert_eq!(field(32), 4 << 16, "queues");
    assert_eq!([36, 40, 44].map(field), [512 * 1024, 16, 8]);
    assert_eq!([48, 52, 56, 60].map(field), [512 * 1024, 16, 1, 0]);
    let has = |block: &Block, bit| block.features() >> bit & 1 == 1;
    assert!(has(&block, VIRTIO_BLK_F_MQ) && has(&block, VIRTIO_BLK_F_DISCARD));
    assert!(has(&block, VIRTIO_BLK_F_WRITE_ZEROES) && !has(&block, VIRTIO_BLK_F_RO));
    let block = Block::new(file(), &read_only()).unwrap();
    assert!(!has(&block, VIRTIO_BLK_F_MQ) && !has(&block, VIRTIO_BLK_F_DISCARD));
    assert!(!has(&block, VIRTIO_BLK_F_WRITE_ZEROES) && has(&block, VIRTIO_BLK_F_RO));
}

#[test]
fn a_limited_disk_lets_a_burst_pass_and_then_waits() {
    let mut config = config();
    (config.queues, config.rate) = (
        2,
        Some(RateLimit {
            bytes: None,
            operations: Some(TokenBucket {
                size: 10,
                refill_ms: 500,
            }),
        }),
    );
    for way in WAYS {
        let mut rig = Rig::new(&config, way);
        let start = Instant::now();
        for request in 0..30 {
            rig.offer(request % 2, VIRTIO_BLK_T_IN, 0, &[512]);
        }
        // A reset does not fill the bucket, and one that waits for its rate does not delay a reset.
        rig.reset();
        for request in 0..30 {
            rig.offer(request % 2, VIRTIO_BLK_T_IN, 0, &[512]);
        }
        for request in 0..30 {
            assert_eq!(rig.wait(request % 2).1, VIRTIO_BLK_S_OK);
        }
        // At most 10 at once, and one ahead for each queue: 18 at 20 in a second.
        assert!(start.elapsed() >= Duration::from_millis(900));
        assert!(start.elapsed() < DEADLINE);
    }
}

#[test]
fn after_a_reset_nothing_is_written_and_the_disk_works_again() {
    for way in WAYS {
        let mut rig = Rig::new(&config(), way);
        for _ in 0..5 {
            for sector in 0..60 {
                rig.offer(0, VIRTIO_BLK_T_IN, sector, &[4096]);
            }
            let memory = rig.driver.memory.clone();
            rig.reset();
            let areas = vec![0x77; usize::try_from(60 * AREA_BYTES).unwrap()];
            memory
                .write_slice(&areas, GuestAddress(FIRST_BUFFER))
                .unwrap();
            assert_eq!(rig.run(VIRTIO_BLK_T_IN, 3, &[0; 512]).0, VIRTIO_BLK_S_OK);
            let mut seen = vec![0; areas.len()];
            memory
                .read_slice(&mut seen, GuestAddress(FIRST_BUFFER))
                .unwrap();
            assert!(seen == areas, "memory of the time before was written");
        }
    }
}

#[test]
fn a_corrupt_queue_breaks_the_device_until_it_is_reset() {
    let mut rig = Rig::new(&config(), Way::Ring);
    rig.offer(0, VIRTIO_BLK_T_IN, 0, &[512]);
    rig.wait(0);
    rig.driver.queues[0].publish(20_000);
    rig.driver.wait_interrupt(Instant::now() + DEADLINE);
    rig.reset();
    assert_eq!(rig.run(VIRTIO_BLK_T_IN, 0, &[0; 512]).0, VIRTIO_BLK_S_OK);
}

fn descriptor(address: u64, len: u32, writable: bool) -> RawDescriptor {
    let flags = if writable { VRING_DESC_F_WRITE } else { 0 };
    let flags = u16::try_from(flags).unwrap();
    RawDescriptor::from(Descriptor::new(address, len, flags, 0))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_disk_holds_what_was_written_last(
        steps in proptest::collection::vec((0_u8..4, 0_u64..120, 1_u32..8, any::<u8>()), 1..80),
        direct: bool,
    ) {
        let mut config = config();
        config.queues = 3;
        let mut rig = Rig::new(&config, if direct { Way::Direct } else { Way::Ring });
        let mut model = pattern();
        for (step, (what, sector, sectors, byte)) in steps.into_iter().enumerate() {
            let from = usize::try_from(sector * SECTOR_BYTES).unwrap();
            let bytes = usize::try_from(u64::from(sectors) * SECTOR_BYTES).unwrap();
            let touched = from..from + bytes;
            let queue = step % 3;
            let kinds = [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES];
            let kind = kinds[usize::from(what)];
            let at = FIRST_BUFFER + AREA_BYTES * (rig.next % 256) + DATA;
            let data = match what {
                0 | 1 => vec![byte; bytes],
                _ => ranges(&[(sector, sectors, if what == 3 { u32::from(byte & 1) } else { 0 })]),
            };
            rig.driver.memory.write_slice(&data, GuestAddress(at)).unwrap();
            rig.offer(queue, kind, sector, &[u32::try_from(data.len()).unwrap()]);
            prop_assert_eq!(rig.wait(queue).1, VIRTIO_BLK_S_OK);
            match what {
                0 => prop_assert_eq!(&rig.seen(at, bytes)[..], &model[touched]),
                1 => model[touched].fill(byte),
                _ => model[touched].fill(0),
            }
        }
        prop_assert_eq!(&rig.contents()[..DISK_BYTES], &model[..]);
    }

    #[test]
    fn many_requests_at_once_are_all_returned(
        requests in proptest::collection::vec((0_u64..100, 1_u32..8), 1..60),
        direct: bool,
    ) {
        let mut rig = Rig::new(&config(), if direct { Way::Direct } else { Way::Ring });
        let mut pending = HashMap::new();
        for (sector, sectors) in requests {
            let bytes = sectors * 512;
            let (head, at) = rig.offer(0, VIRTIO_BLK_T_IN, sector, &[bytes / 2, bytes / 2]);
            pending.insert(head, (at, usize::try_from(sector * 512).unwrap(), bytes));
        }
        while !pending.is_empty() {
            let (head, status, written) = rig.wait(0);
            let (at, from, bytes) = pending.remove(&head).unwrap();
            prop_assert_eq!((status, written), (VIRTIO_BLK_S_OK, bytes + 1));
            let length = usize::try_from(bytes).unwrap();
            prop_assert_eq!(&rig.seen(at, length)[..], &pattern()[from..from + length]);
        }
    }

    #[test]
    fn any_buffer_is_planned_within_the_disk(
        pieces in proptest::collection::vec((0_u64..0x1_1000, 0_u32..0x2000, any::<bool>()), 1..12),
        header: [u8; 16],
        kind in 0_u32..16,
    ) {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 16)]).unwrap();
        memory.write_obj(header, GuestAddress(0x8000)).unwrap();
        memory.write_obj(kind, GuestAddress(0x8000)).unwrap();
        let mut descriptors = vec![descriptor(0x8000, 16, false)];
        descriptors.extend(pieces.iter().map(|&(at, len, writable)| descriptor(at, len, writable)));
        let driver = MockSplitQueue::new(&memory, 16);
        let chain = driver.build_desc_chain(&descriptors).unwrap();
        let disk = Disk::new(file(), &config()).unwrap();
        if let Ok(request) = Request::parse(&memory, chain) {
            let plan = disk.plan(&memory as &GuestMemoryMmap, request);
            if let disk::Plan::Work(job, _) = plan {
                let _ = disk.perform(&memory, &job, Durability::Durable);
            }
        }
        prop_assert!(disk.file().unwrap().metadata().unwrap().len() == u64::try_from(DISK_BYTES).unwrap() + 22);
    }
}
