//! The loop of a device that serves one queue on its own thread.
//!
//! Must not know what is in a buffer.

use super::{ActivateError, Activation, ActiveQueue, Interrupt};
use crate::{
    event_loop::{Poll, Worker},
    seccomp::Kind,
};
use std::io;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

const STOP: u64 = 0;
const KICK: u64 = 1;
/// Buffers after which the thread looks for the event that ends it, so that a driver that never pauses
/// cannot keep it.
const ROUND_BUFFERS: usize = 64;

/// How a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// The queue is empty, and the driver kicks when it is not.
    Drained,
    /// There may be more.
    Full,
}

/// Why a queue is no longer served.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    /// The driver's rings make no sense.
    #[error("the driver corrupted its queue")]
    Corrupt(#[from] virtio_queue::Error),
    /// Waiting failed.
    #[error("cannot wait for the driver")]
    Wait(#[from] io::Error),
}

/// Serves one queue of a device, the one at `index`, on a thread of its own. `execute` handles a buffer and gives
/// the bytes it wrote to it.
pub(super) fn spawn(
    kind: Kind,
    name: &str,
    index: usize,
    activation: Activation,
    mut execute: impl for<'a> FnMut(&'a GuestMemoryMmap, DescriptorChain<&'a GuestMemoryMmap>) -> u32
    + Send
    + 'static,
) -> Result<Worker, ActivateError> {
    let active = activation.queues.into_iter().nth(index).flatten();
    let active = active.ok_or(ActivateError::MissingQueue { index })?;
    let (memory, interrupt) = (activation.memory, activation.interrupt);
    let threads = activation.threads;
    let worker = threads.spawn(kind, name, move |stop| {
        serve(active, &memory, &interrupt, &stop, |chain| {
            execute(&memory, chain)
        });
    });
    worker.map_err(ActivateError::Thread)
}

/// Serves `active` until `stop` is readable. `execute` handles a buffer and gives the bytes it wrote to it.
/// A corrupt queue breaks the device and ends the loop.
pub(super) fn serve(
    active: ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    stop: &EventFd,
    execute: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) {
    if run(active, memory, interrupt, stop, execute).is_err() {
        interrupt.signal_needs_reset();
    }
}

fn run(
    mut active: ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    stop: &EventFd,
    mut execute: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> Result<(), QueueError> {
    let mut poll = Poll::new()?;
    poll.add(stop, STOP, EventSet::IN)?;
    poll.add(&active.kick, KICK, EventSet::IN)?;
    loop {
        for (token, _) in poll.wait()? {
            if token == STOP {
                return Ok(());
            }
            serve_kicked(&mut active, memory, interrupt, &mut execute)?;
        }
    }
}

/// Executes what the driver offered when it kicked, or a round of that: then the kick stays readable.
pub(super) fn serve_kicked(
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    execute: &mut impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> Result<(), QueueError> {
    // The count of kicks says nothing; an error says that there was none.
    let _ = active.kick.read();
    if serve_round(&mut active.queue, memory, interrupt, execute)? == Round::Full {
        // Fails only when the counter is full, and then the event is readable.
        let _ = active.kick.write(1);
    }
    Ok(())
}

/// Executes what the driver offered, and lets it know of each buffer as soon as it is used.
fn serve_round(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    execute: &mut impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> Result<Round, QueueError> {
    queue.disable_notification(memory)?;
    for _ in 0..ROUND_BUFFERS {
        let Some(chain) = pop(queue, memory)? else {
            if queue.enable_notification(memory)? {
                queue.disable_notification(memory)?;
                continue;
            }
            return Ok(Round::Drained);
        };
        let head = chain.head_index();
        let written = execute(chain);
        queue.add_used(memory, head, written)?;
        if queue.needs_notification(memory)? {
            interrupt.signal_used();
        }
    }
    Ok(Round::Full)
}

/// The next buffer that the driver offered, if there is one.
pub(super) fn pop<'a>(
    queue: &mut Queue,
    memory: &'a GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'a GuestMemoryMmap>>, QueueError> {
    Ok(queue.iter(memory)?.next())
}

#[cfg(test)]
mod tests {
    use super::super::mock_driver::memory;
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u16 = 8;
    const TABLE: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const INDIRECT: u64 = 0x4000;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const IS_TABLE: u16 = 4;

    /// Address, length, flags and next of a descriptor, mostly such as make sense.
    type Raw = (u64, u32, u16, u16);

    fn raw() -> impl Strategy<Value = Raw> {
        let address = prop_oneof![
            4 => 0x10_0000_u64..0x11_0000,
            2 => Just(INDIRECT),
            1 => Just(INDIRECT + 8),
            1 => any::<u64>(),
        ];
        let length = prop_oneof![
            4 => 0_u32..5000,
            4 => (0_u32..12).prop_map(|entries| entries * 16),
            1 => any::<u32>(),
        ];
        let flags = prop_oneof![
            4 => Just(NEXT),
            2 => Just(NEXT | WRITE),
            1 => Just(WRITE),
            2 => Just(IS_TABLE),
            1 => any::<u16>(),
        ];
        let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
        (address, length, flags, next)
    }

    /// virtio 1.3, sections 2.7.5 to 2.7.7: what a device may see of a chain. It ends where it breaks a rule.
    fn model(memory: &GuestMemoryMmap, head: u16) -> Vec<(u64, u32, bool)> {
        let (mut table, mut entries, mut index) = (TABLE, u32::from(SIZE), u32::from(head));
        let (mut seen, mut steps, mut bytes, mut indirect) = (Vec::new(), 0, 0_u64, false);
        // A chain is no longer than its table has entries: else it is a loop.
        while index < entries && steps < entries {
            let place = table.checked_add(u64::from(index) * 16).map(GuestAddress);
            let Some(Ok(bits)) = place.map(|place| memory.read_obj::<u128>(place)) else {
                break;
            };
            let part = |from: u32, bits_wide: u32| bits >> from & ((1 << bits_wide) - 1);
            let address = u64::try_from(part(0, 64)).unwrap();
            let length = u32::try_from(part(64, 32)).unwrap();
            let (flags, next) = (part(96, 16), u32::try_from(part(112, 16)).unwrap());
            let has = |flag: u16| flags & u128::from(flag) != 0;
            if has(IS_TABLE) {
                if indirect || length % 16 != 0 || length / 16 > u32::from(u16::MAX) {
                    break;
                }
                (table, entries, index, steps, indirect) = (address, length / 16, 0, 0, true);
                continue;
            }
            bytes += u64::from(length);
            if bytes > u64::from(u32::MAX) {
                break;
            }
            seen.push((address, length, has(WRITE)));
            if !has(NEXT) {
                break;
            }
            (index, steps) = (next, steps + 1);
        }
        seen
    }

    fn write_table(memory: &GuestMemoryMmap, at: u64, table: &[Raw]) {
        for (index, &(address, length, flags, next)) in (0..).zip(table) {
            let descriptor = Descriptor::new(address, length, flags, next);
            let place = GuestAddress(at + index * 16);
            memory.write_obj(descriptor, place).unwrap();
        }
    }

    fn queue(memory: &GuestMemoryMmap, heads: &[u16]) -> Queue {
        let low = |address: u64| u32::try_from(address).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(low(TABLE)), Some(0));
        queue.set_avail_ring_address(Some(low(AVAIL)), Some(0));
        queue.set_used_ring_address(Some(low(USED)), Some(0));
        queue.set_ready(true);
        for (slot, &head) in (0_u64..).zip(heads) {
            let place = AVAIL + 4 + 2 * (slot % u64::from(SIZE));
            memory.write_obj(head, GuestAddress(place)).unwrap();
        }
        let offered = u16::try_from(heads.len()).unwrap();
        memory.write_obj(offered, GuestAddress(AVAIL + 2)).unwrap();
        queue
    }

    proptest! {
        #[test]
        fn a_chain_is_walked_as_the_specification_says(
            table in proptest::collection::vec(raw(), usize::from(SIZE)),
            inner in proptest::collection::vec(raw(), 12),
            heads in proptest::collection::vec(0..SIZE + 2, 1..=usize::from(SIZE)),
        ) {
            let memory = memory();
            write_table(&memory, TABLE, &table);
            write_table(&memory, INDIRECT, &inner);
            let mut queue = queue(&memory, &heads);
            for &head in &heads {
                let chain = pop(&mut queue, &memory).unwrap().unwrap();
                prop_assert_eq!(chain.head_index(), head);
                let writable: Vec<_> = chain.clone().writable().collect();
                let readable: Vec<_> = chain.clone().readable().collect();
                let walked: Vec<_> = chain
                    .map(|one| (one.addr().0, one.len(), one.is_write_only()))
                    .collect();
                prop_assert_eq!(writable.len() + readable.len(), walked.len());
                prop_assert_eq!(walked, model(&memory, head));
            }
            prop_assert!(pop(&mut queue, &memory).unwrap().is_none());
        }

        #[test]
        fn more_buffers_than_the_ring_has_room_for_are_a_broken_ring(offered: u16) {
            let memory = memory();
            let mut queue = queue(&memory, &[]);
            memory.write_obj(offered, GuestAddress(AVAIL + 2)).unwrap();
            prop_assert_eq!(pop(&mut queue, &memory).is_ok(), offered <= SIZE);
        }
    }
}
