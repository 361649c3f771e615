//! Entropy device (virtio 1.3, section 5.4): fills the driver's buffers from the host's random generator.

use super::{ActivateError, Activation, DeviceType, VirtioDevice, queue};
use crate::event_loop::Worker;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::{DescriptorChain, desc::split::Descriptor};
use vm_memory::{Bytes, GuestMemoryMmap};

const QUEUE_SIZES: [u16; 1] = [64];
/// Bytes given for one buffer at the most, whatever its size: a driver may be content with less (section 5.4.6).
const MAX_BYTES: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl Rng {
    /// A device that is not started.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker = Some(queue::spawn("rng", 0, activation, fill)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Writes random bytes to the buffer and gives their number; stops at memory that isn't there.
fn fill(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
    let mut random = [0; MAX_BYTES];
    let mut written = 0;
    for descriptor in chain.writable() {
        let filled = fill_one(memory, &descriptor, &mut random[written..]);
        written += filled;
        if filled == 0 {
            break;
        }
    }
    u32::try_from(written).unwrap_or(0)
}

fn fill_one(memory: &GuestMemoryMmap, descriptor: &Descriptor, random: &mut [u8]) -> usize {
    let wanted =
        usize::try_from(descriptor.len()).map_or(random.len(), |len| len.min(random.len()));
    let Ok(got) = getrandom(&mut random[..wanted], GetRandomFlags::empty()) else {
        return 0;
    };
    match memory.write_slice(&random[..got], descriptor.addr()) {
        Ok(()) => got,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{ActiveQueue, Interrupt};
    use std::sync::Arc;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::{desc::RawDescriptor, mock::MockSplitQueue};
    use vm_memory::GuestAddress;
    use vmm_sys_util::{
        epoll::EventSet,
        eventfd::{EFD_NONBLOCK, EventFd},
    };

    fn memory() -> GuestMemoryMmap {
        crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn writable(address: u64, len: u32) -> RawDescriptor {
        let flags = u16::try_from(VRING_DESC_F_WRITE).unwrap();
        RawDescriptor::from(Descriptor::new(address, len, flags, 0))
    }

    #[test]
    fn a_kick_is_answered_with_random_bytes_and_an_interrupt() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        driver
            .build_multiple_desc_chains(&[writable(0x8000, 64), writable(0x9000, 1 << 20)])
            .unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let irqfd = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut rng = Rng::new();
        let active = ActiveQueue {
            queue: driver.create_queue().unwrap(),
            kick: kick.try_clone().unwrap(),
        };
        rng.activate(Activation {
            memory: memory.clone(),
            queues: vec![Some(active)],
            features: 0,
            interrupt: Interrupt::new(irqfd.clone()),
        })
        .unwrap();
        kick.write(1).unwrap();
        let mut poll = crate::event_loop::Poll::new().unwrap();
        poll.add(irqfd.as_ref(), 0, EventSet::IN).unwrap();
        poll.wait().unwrap();
        rng.reset();
        assert_eq!(driver.used().idx().load(), 2);
        let lengths = [0, 1].map(|i| driver.used().ring().ref_at(i).unwrap().load().len());
        assert_eq!(lengths, [64, 4096]);
        let mut bytes = [0; 64];
        memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        assert_ne!(bytes, [0; 64]);
    }

    #[test]
    fn buffers_outside_memory_get_nothing() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        let chain = driver
            .build_desc_chain(&[writable(0xf_ffff, 64), writable(0x8000, 64)])
            .unwrap();
        assert_eq!(fill(&memory, chain), 0);
    }
}
