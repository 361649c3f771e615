//! Memory balloon (virtio 1.3, section 5.5), of which only free page reporting is there: the guest names
//! pages that it does not use, and the host takes their memory back until the guest touches them again.
//!
//! A Pod that is idle after a burst so costs what it holds, not what it once held. The balloon itself is never
//! inflated: its target size is zero.

use super::{ActivateError, Activation, DeviceType, VirtioDevice, queue};
use crate::{arch::x86_64::layout::PAGE_BYTES, event_loop::Worker, memory, seccomp::Kind};
use virtio_queue::{DescriptorChain, desc::split::Descriptor};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Inflate, deflate, and the reporting queue, which comes third when there are no statistics and no hints.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
const REPORTING_QUEUE: usize = 2;
/// VIRTIO_BALLOON_F_REPORTING (section 5.5.3).
const FEATURE_REPORTING: u64 = 1 << 5;

/// The balloon device.
#[derive(Debug, Default)]
pub struct Balloon {
    worker: Option<Worker>,
}

impl Balloon {
    /// A device that is not started.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        FEATURE_REPORTING
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_balloon_config`: no pages wanted, none had.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let reporting = activation.queues.into_iter().nth(REPORTING_QUEUE).flatten();
        // A driver without free page reporting does not enable the queue, and has nothing to say.
        let Some(active) = reporting else {
            return Ok(());
        };
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        let worker = activation
            .threads
            .spawn(Kind::Balloon, "balloon", move |stop| {
                queue::serve(active, &memory, &interrupt, &stop, |chain| {
                    take_back(&memory, chain)
                });
            });
        self.worker = Some(worker.map_err(ActivateError::Thread)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Gives the pages of one report back to the host. The guest gets them unchanged or zeroed, as it must expect:
/// pages that cannot be given back are simply kept.
fn take_back(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
    for descriptor in chain.writable() {
        if let Some((at, bytes)) = whole_pages(&descriptor) {
            let _ = memory::discard(memory, at, bytes);
        }
    }
    0
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
        assert_eq!(take_back(&memory, chain), 0);
        let mut seen = [1; 0x4000];
        memory.read_slice(&mut seen, GuestAddress(0x8000)).unwrap();
        assert_eq!(seen[..0x1000], [7; 0x1000]);
        assert_eq!(seen[0x1000..0x2000], [0; 0x1000]);
        assert_eq!(seen[0x2000..], [7; 0x2000]);
    }

    proptest! {
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
