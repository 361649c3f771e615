//! Persistent memory device (virtio 1.3, section 5.19): a file of the host that the guest maps, so that neither
//! keeps a copy of it beside the host's page cache. The guest's stores reach the file by themselves; this
//! device only answers its flushes.
//!
//! A file that is cut while it is mapped takes memory away that the guest believes to have, which ends the VM
//! (`cuts`). A store to a read-only file is an exit that changes nothing, and ends the VM where KVM
//! cannot emulate it. This process never touches the mapping. Must not map anything.

use super::{ActivateError, Activation, DeviceType, SharedRegion, VirtioDevice, queue};
use crate::{event_loop::Worker, seccomp::Kind};
use std::{
    fs::File,
    io::{self, Read, Write},
    sync::Arc,
};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

const QUEUE_SIZES: [u16; 1] = [64];
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (section 5.19.6).
const FLUSH: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_OK`.
const OK: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_EIO`; Linux takes any other number than [`OK`] for a failure.
const EIO: u32 = 1;

/// The persistent memory device.
#[derive(Debug)]
pub struct Pmem {
    file: Arc<File>,
    region: SharedRegion,
    worker: Option<Worker>,
}

impl Pmem {
    /// A device for `file`, which the guest sees at `region`.
    pub fn new(file: File, region: SharedRegion) -> Self {
        Self {
            file: Arc::new(file),
            region,
            worker: None,
        }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> DeviceType {
        DeviceType::PersistentMemory
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_pmem_config`: start and size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = [self.region.address.0, self.region.bytes];
        super::read_config_space(&fields.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let file = self.file.clone();
        let worker = queue::spawn(Kind::Pmem, "pmem", 0, activation, move |memory, chain| {
            answer(memory, chain, || file.sync_data())
        });
        self.worker = Some(worker?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Answers one request, and gives the bytes that were written; none where the buffer has no room for an answer.
fn answer(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    flush: impl FnOnce() -> io::Result<()>,
) -> u32 {
    let result = match kind(memory, chain.clone()) {
        Some(FLUSH) if flush().is_ok() => OK,
        _ => EIO,
    };
    let Ok(mut writer) = chain.writer(memory) else {
        return 0;
    };
    match writer.write_all(&result.to_le_bytes()) {
        Ok(()) => 4,
        Err(_) => 0,
    }
}

/// The request's type.
fn kind(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Option<u32> {
    let mut bytes = [0; 4];
    chain.reader(memory).ok()?.read_exact(&mut bytes).ok()?;
    Some(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::super::mock_driver::{Driver, FIRST_BUFFER};
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };
    use vm_memory::{Bytes, GuestAddress};

    fn pmem() -> Pmem {
        let fd = rustix::fs::memfd_create("pmem", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let region = SharedRegion {
            address: GuestAddress(1 << 32),
            bytes: 2 << 20,
        };
        Pmem::new(File::from(fd), region)
    }

    #[test]
    fn the_guest_finds_the_region_and_flushes() {
        let mut pmem = pmem();
        let mut config = [0xff; 20];
        pmem.read_config(0, &mut config);
        assert_eq!(config[..8], (1_u64 << 32).to_le_bytes());
        assert_eq!(config[8..16], (2_u64 << 20).to_le_bytes());
        assert_eq!(config[16..], [0; 4]);

        let (mut driver, activation) = Driver::new(&QUEUE_SIZES, false);
        pmem.activate(activation).unwrap();
        let [request, response] = [FIRST_BUFFER, FIRST_BUFFER + 0x1000];
        for (kind, expected) in [(FLUSH, OK), (7, EIO)] {
            let memory = &driver.memory;
            memory.write_obj(kind, GuestAddress(request)).unwrap();
            memory.write_obj(77_u32, GuestAddress(response)).unwrap();
            driver.queues[0].offer(&[(request, 4)], &[(response, 4)]);
            assert_eq!(driver.wait_used(0).1, 4);
            let seen: u32 = driver.memory.read_obj(GuestAddress(response)).unwrap();
            assert_eq!(seen, expected);
        }
        pmem.reset();
    }

    #[test]
    fn a_flush_that_fails_is_told() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let driver = MockSplitQueue::new(&memory, 16);
        let descriptors = [(0x8000, 4, 0), (0x9000, 4, 2)]
            .map(|(at, len, flags)| RawDescriptor::from(Descriptor::new(at, len, flags, 0)));
        let chain = driver.build_desc_chain(&descriptors).unwrap();
        let failed = || Err(io::ErrorKind::StorageFull.into());
        assert_eq!(answer(&memory, chain, failed), 4);
        let seen: u32 = memory.read_obj(GuestAddress(0x9000)).unwrap();
        assert_eq!(seen, EIO);
    }

    proptest! {
        #[test]
        fn any_buffer_is_answered_or_ignored(
            pieces in proptest::collection::vec((0_u64..0x11_0000, 0_u32..10, any::<bool>()), 1..8),
        ) {
            let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let driver = MockSplitQueue::new(&memory, 16);
            let descriptors: Vec<_> = pieces
                .iter()
                .map(|&(at, len, writable)| Descriptor::new(at, len, if writable { 2 } else { 0 }, 0))
                .map(RawDescriptor::from)
                .collect();
            let chain = driver.build_desc_chain(&descriptors).unwrap();
            let room: u32 = pieces.iter().filter(|piece| piece.2).map(|piece| piece.1).sum();
            prop_assert!(answer(&memory, chain, || Ok(())) <= room);
        }
    }
}
