//! What a driver asks on the control queue (virtio 1.3, section 5.1.6.5), read from a buffer. Pure: no I/O.

use std::io::{Read, Write};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{DescriptorChain, Writer};
use vm_memory::GuestMemoryMmap;

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Use so many pairs of queues.
    SetPairs(u16),
    /// Hand over packets with these offloads, given as feature bits.
    SetOffloads(u64),
    /// Something that was not offered, or cut short.
    Unknown,
}

/// Reads a command; gives the place of the answer too, `None` where the driver left none.
pub(super) fn parse<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
) -> Option<(Command, Writer<'m>)> {
    let answer = chain.clone().writer(memory).ok()?;
    let command = chain.reader(memory).ok().and_then(|mut reader| {
        let [class, command] = read(&mut reader)?;
        match (class.into(), command.into()) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                Some(Command::SetPairs(u16::from_le_bytes(read(&mut reader)?)))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                let offloads = u64::from_le_bytes(read(&mut reader)?);
                Some(Command::SetOffloads(offloads))
            }
            _ => None,
        }
    });
    Some((command.unwrap_or(Command::Unknown), answer))
}

/// Answers a command, and gives the bytes that were written.
pub(super) fn answer(mut place: Writer<'_>, done: bool) -> u32 {
    let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let status = u8::try_from(status).unwrap_or(u8::MAX);
    place.write_all(&[status]).map_or(0, |()| 1)
}

fn read<const BYTES: usize>(reader: &mut impl Read) -> Option<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    reader.read_exact(&mut bytes).ok().map(|()| bytes)
}

#[cfg(test)]
mod tests {
    use super::super::super::mock_driver::{Driver, FIRST_BUFFER};
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::QueueOwnedT;
    use vm_memory::{Bytes, GuestAddress};

    const ANSWER: u64 = FIRST_BUFFER + 0x1000;

    /// Parses `bytes`, cut as `cut` says, and answers.
    fn told(bytes: &[u8], cut: usize) -> (Command, u8) {
        let (mut driver, mut activation) = Driver::new(&[16], true);
        let memory = driver.memory.clone();
        memory
            .write_slice(bytes, GuestAddress(FIRST_BUFFER))
            .unwrap();
        let (first, second) = bytes.split_at(cut.min(bytes.len()));
        let lengths = [first, second].map(|part| u32::try_from(part.len()).unwrap());
        let readable = [
            (FIRST_BUFFER, lengths[0]),
            (FIRST_BUFFER + u64::from(lengths[0]), lengths[1]),
        ];
        driver.queues[0].offer(&readable, &[(ANSWER, 1)]);
        let mut active = activation.queues.remove(0).unwrap();
        let chain = active.queue.iter(&memory).unwrap().next().unwrap();
        let (command, place) = parse(&memory, chain).unwrap();
        assert_eq!(answer(place, command != Command::Unknown), 1);
        (command, memory.read_obj(GuestAddress(ANSWER)).unwrap())
    }

    #[test]
    fn commands_are_understood_however_they_are_cut() {
        for cut in 0..5 {
            assert_eq!(told(&[4, 0, 2, 1], cut), (Command::SetPairs(0x102), 0));
            let offloads = [5, 0, 1, 0, 0, 0, 0, 0, 0, 0x80];
            let expected = Command::SetOffloads(1 << 63 | 1);
            assert_eq!(told(&offloads, cut), (expected, 0));
        }
    }

    #[test]
    fn what_was_not_offered_or_is_cut_short_is_an_error() {
        let cases: [&[u8]; 6] = [&[], &[4], &[4, 0, 2], &[4, 1, 2, 0], &[0, 0, 1], &[5, 0, 0]];
        for bytes in cases {
            assert_eq!(told(bytes, 1), (Command::Unknown, 1), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..20), cut in 0_usize..20) {
            told(&bytes, cut);
        }
    }
}
