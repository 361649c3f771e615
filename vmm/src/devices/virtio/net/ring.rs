//! A virtqueue as the network device needs it (virtio 1.3, section 2.7): buffers are taken before there is a packet
//! for them, and all buffers of one packet appear to the driver at once. Must not know what is in a buffer.

use super::packet::Used;
use crate::devices::virtio::ActiveQueue;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{DescriptorChain, Error, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of the flags and the index that both rings start with.
const RING_HEADER_BYTES: u64 = 4;
/// The driver's wish for no interrupts, where EVENT_IDX was not agreed on.
const NO_INTERRUPT: u16 = 1;

/// A buffer of the driver.
pub(super) type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// A virtqueue.
#[derive(Debug)]
pub(super) struct Ring {
    active: ActiveQueue,
    /// The used index up to which it was decided whether the driver is told.
    told: u16,
}

impl Ring {
    pub(super) fn new(active: ActiveQueue) -> Self {
        let told = active.queue.next_used();
        Self { active, told }
    }

    /// Readable when the driver kicked.
    pub(super) fn kick(&self) -> &EventFd {
        &self.active.kick
    }

    /// Buffers that the driver may have offered at once.
    pub(super) fn size(&self) -> usize {
        self.active.queue.size().into()
    }

    /// Takes a buffer. When there is none, the driver has been asked to kick when there is.
    pub(super) fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, Error> {
        if let Some(chain) = self.active.queue.iter(memory)?.next() {
            return Ok(Some(chain));
        }
        if !self.active.queue.enable_notification(memory)? {
            return Ok(None);
        }
        // It came between the two looks.
        self.active.queue.disable_notification(memory)?;
        Ok(self.active.queue.iter(memory)?.next())
    }

    /// Puts the buffer that was taken last back.
    pub(super) fn unpop(&mut self) {
        self.active.queue.go_to_previous_position();
    }

    /// Asks the driver not to kick.
    pub(super) fn hush(&mut self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        self.active.queue.disable_notification(memory)
    }

    /// Gives buffers back: the driver sees all of them or none.
    pub(super) fn publish(&mut self, memory: &GuestMemoryMmap, used: &[Used]) -> Result<(), Error> {
        let queue = &mut self.active.queue;
        let (base, size) = (queue.used_ring(), queue.size());
        let mut next = queue.next_used();
        for one in used {
            let slot = next.checked_rem(size).filter(|_| one.head < size);
            let slot = slot.ok_or(Error::InvalidDescriptorIndex)?;
            // `struct virtq_used_elem`: id and length.
            let element = u64::from(one.head) | u64::from(one.bytes) << 32;
            let address = offset(base, RING_HEADER_BYTES + 8 * u64::from(slot))?;
            let written = memory.write_obj(element.to_le(), address);
            written.map_err(Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        let stored = memory.store(next.to_le(), offset(base, 2)?, Ordering::Release);
        stored.map_err(Error::GuestMemory)?;
        queue.set_next_used(next);
        Ok(())
    }

    /// Whether the driver must be told of what was published since the last call (section 2.7.7.2).
    pub(super) fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Error> {
        let queue = &self.active.queue;
        let (new, old) = (queue.next_used(), self.told);
        if new == old {
            return Ok(false);
        }
        self.told = new;
        let load = |at| -> Result<u16, Error> {
            let value = memory.load(offset(queue.avail_ring(), at)?, Ordering::Relaxed);
            value.map(u16::from_le).map_err(Error::GuestMemory)
        };
        // What was published is seen by the driver before its wish is read.
        fence(Ordering::SeqCst);
        if !queue.event_idx_enabled() {
            return Ok(load(0)? & NO_INTERRUPT == 0);
        }
        let event = load(RING_HEADER_BYTES + 2 * u64::from(queue.size()))?;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }
}

fn offset(base: u64, bytes: u64) -> Result<GuestAddress, Error> {
    let address = GuestAddress(base).checked_add(bytes);
    address.ok_or(Error::AddressOverflow)
}

#[cfg(test)]
mod tests {
    use super::super::super::mock_driver::{Driver, FIRST_BUFFER};
    use super::*;

    fn ring(event_idx: bool) -> (Driver, Ring) {
        let (driver, mut activation) = Driver::new(&[16], event_idx);
        let active = activation.queues.remove(0).unwrap();
        (driver, Ring::new(active))
    }

    fn used(head: u16) -> Used {
        Used { head, bytes: 7 }
    }

    #[test]
    fn buffers_of_one_packet_appear_together() {
        let (mut driver, mut ring) = ring(true);
        let memory = driver.memory.clone();
        let heads: Vec<_> = (0..3)
            .map(|_| driver.queues[0].offer(&[], &[(FIRST_BUFFER, 64)]))
            .collect();
        for _ in 0..3 {
            assert!(ring.pop(&memory).unwrap().is_some());
        }
        assert!(ring.pop(&memory).unwrap().is_none());
        assert_eq!(driver.queues[0].poll_used(), None);
        let list: Vec<_> = heads.iter().map(|&head| used(head)).collect();
        ring.publish(&memory, &list).unwrap();
        assert!(ring.wants_interrupt(&memory).unwrap(), "asked at index 0");
        assert!(!ring.wants_interrupt(&memory).unwrap(), "told already");
        for head in heads {
            assert_eq!(driver.queues[0].poll_used(), Some((head, 7)));
        }
    }

    #[test]
    fn the_driver_is_told_when_it_asked_for_it() {
        let (mut driver, mut ring) = ring(true);
        let memory = driver.memory.clone();
        let head = driver.queues[0].offer(&[], &[(FIRST_BUFFER, 64)]);
        // Not asked for at index 0: the driver waits for the third.
        let used_event = GuestAddress(ring.active.queue.avail_ring() + 4 + 32);
        memory.write_obj(2_u16, used_event).unwrap();
        for (expected, _) in [(false, 1), (false, 2), (true, 3), (false, 4)] {
            ring.publish(&memory, &[used(head)]).unwrap();
            assert_eq!(ring.wants_interrupt(&memory).unwrap(), expected);
        }
        let (driver, mut ring) = self::ring(false);
        let flags = GuestAddress(ring.active.queue.avail_ring());
        for no_interrupt in [0_u16, 1] {
            driver.memory.write_obj(no_interrupt, flags).unwrap();
            ring.publish(&driver.memory, &[used(head)]).unwrap();
            let wanted = ring.wants_interrupt(&driver.memory).unwrap();
            assert_eq!(wanted, no_interrupt == 0);
        }
    }

    #[test]
    fn a_head_that_is_none_is_refused() {
        let (driver, mut ring) = ring(true);
        assert!(ring.publish(&driver.memory, &[used(16)]).is_err());
    }
}
