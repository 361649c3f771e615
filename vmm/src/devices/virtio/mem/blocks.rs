//! Which blocks of the region are plugged, and every rule about changing that (virtio 1.3, section 5.15.6).
//!
//! Must not touch memory: it is told how to discard.

use super::request::{BlockState, Request, Response, Run};
use std::ops::Range;

/// Bytes of a block: a huge page, so that unplugging breaks none.
pub(super) const BLOCK_BYTES: u64 = 2 << 20;

/// The region's blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    start: u64,
    plugged: Vec<bool>,
    plugged_blocks: u64,
    requested_bytes: u64,
}

impl Blocks {
    /// A region of `bytes` from `start` on with nothing plugged.
    pub(super) fn new(start: u64, bytes: u64) -> Self {
        let blocks = usize::try_from(bytes / BLOCK_BYTES).unwrap_or(0);
        Self {
            start,
            plugged: vec![false; blocks],
            plugged_blocks: 0,
            requested_bytes: 0,
        }
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn region_bytes(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK_BYTES
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.plugged_blocks * BLOCK_BYTES
    }

    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested_bytes
    }

    /// Sets how much the host wants to be plugged.
    pub(super) fn request(&mut self, bytes: u64) {
        self.requested_bytes = bytes;
    }

    /// Answers a request. `discard` gives so many bytes from an address on back to the host, and says whether
    /// that went well.
    pub(super) fn execute(
        &mut self,
        request: Request,
        discard: impl FnOnce(u64, u64) -> bool,
    ) -> Response {
        let run = match request {
            Request::UnplugAll => {
                // All of it, for a guest may have touched what was never plugged.
                if !discard(self.start, self.region_bytes()) {
                    return Response::Busy;
                }
                self.plugged.fill(false);
                self.plugged_blocks = 0;
                return Response::Ack;
            }
            Request::Plug(run) | Request::Unplug(run) | Request::State(run) => run,
        };
        let Some(range) = self.range(run) else {
            return Response::Error;
        };
        let state = self.state(range.clone());
        let bytes = u64::from(run.blocks) * BLOCK_BYTES;
        match (request, state) {
            (Request::State(_), state) => Response::State(state),
            (Request::Plug(_), BlockState::Unplugged) => {
                if self.plugged_bytes() + bytes > self.requested_bytes {
                    return Response::Nack;
                }
                self.plugged[range].fill(true);
                self.plugged_blocks += u64::from(run.blocks);
                Response::Ack
            }
            (Request::Unplug(_), BlockState::Plugged) => {
                if !discard(run.address, bytes) {
                    return Response::Busy;
                }
                self.plugged[range].fill(false);
                self.plugged_blocks -= u64::from(run.blocks);
                Response::Ack
            }
            _ => Response::Error,
        }
    }

    /// The blocks of a run, which must be some, aligned, and all in the region.
    fn range(&self, run: Run) -> Option<Range<usize>> {
        let offset = run.address.checked_sub(self.start)?;
        if !offset.is_multiple_of(BLOCK_BYTES) || run.blocks == 0 {
            return None;
        }
        let first = usize::try_from(offset / BLOCK_BYTES).ok()?;
        let end = first.checked_add(run.blocks.into())?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    fn state(&self, range: Range<usize>) -> BlockState {
        let blocks = &self.plugged[range];
        match (blocks.contains(&true), blocks.contains(&false)) {
            (true, true) => BlockState::Mixed,
            (true, false) => BlockState::Plugged,
            _ => BlockState::Unplugged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: u64 = 1 << 32;
    const COUNT: u64 = 16;

    fn run(block: u64, blocks: u16) -> Run {
        Run {
            address: START + block * BLOCK_BYTES,
            blocks,
        }
    }

    fn blocks() -> Blocks {
        let mut blocks = Blocks::new(START, COUNT * BLOCK_BYTES);
        blocks.request(8 * BLOCK_BYTES);
        blocks
    }

    #[test]
    fn each_rule_of_the_specification_has_its_answer() {
        let mut blocks = blocks();
        let mut ask = |request| blocks.execute(request, |_, _| true);
        let cases = [
            (Request::Plug(run(0, 4)), Response::Ack),
            (Request::Plug(run(3, 2)), Response::Error),
            (Request::Plug(run(4, 5)), Response::Nack),
            (Request::Plug(run(12, 4)), Response::Ack),
            (Request::Plug(run(4, 1)), Response::Nack),
            (Request::Plug(run(15, 2)), Response::Error),
            (Request::Plug(run(4, 0)), Response::Error),
            (Request::Unplug(run(3, 2)), Response::Error),
            (
                Request::State(run(3, 2)),
                Response::State(BlockState::Mixed),
            ),
            (
                Request::State(run(4, 8)),
                Response::State(BlockState::Unplugged),
            ),
            (Request::Unplug(run(2, 2)), Response::Ack),
            (
                Request::State(run(0, 2)),
                Response::State(BlockState::Plugged),
            ),
            (Request::UnplugAll, Response::Ack),
            (
                Request::State(run(0, 16)),
                Response::State(BlockState::Unplugged),
            ),
            (Request::Unplug(run(0, 1)), Response::Error),
        ];
        for (request, expected) in cases {
            assert_eq!(ask(request), expected, "{request:?}");
        }
        let off = |address| Run { address, blocks: 1 };
        for address in [START + 4096, START - BLOCK_BYTES, 0, u64::MAX] {
            assert_eq!(ask(Request::Plug(off(address))), Response::Error);
        }
    }

    #[test]
    fn what_cannot_be_discarded_stays_plugged() {
        let mut blocks = blocks();
        assert_eq!(
            blocks.execute(Request::Plug(run(0, 2)), |_, _| false),
            Response::Ack
        );
        for request in [Request::Unplug(run(0, 1)), Request::UnplugAll] {
            assert_eq!(blocks.execute(request, |_, _| false), Response::Busy);
        }
        assert_eq!(blocks.plugged_bytes(), 2 * BLOCK_BYTES);
    }

    fn request() -> impl Strategy<Value = Request> {
        let run = (0..COUNT + 2, 0_u16..6).prop_map(|(block, blocks)| run(block, blocks));
        (0..8_u8, run).prop_map(|(kind, run)| match kind {
            0 => Request::UnplugAll,
            1..=3 => Request::Plug(run),
            4..=6 => Request::Unplug(run),
            _ => Request::State(run),
        })
    }

    proptest! {
        #[test]
        fn the_account_is_right_and_never_beyond_what_was_requested(
            steps in proptest::collection::vec((request(), proptest::option::of(0..=COUNT)), 0..60),
        ) {
            let mut blocks = blocks();
            for (request, requested) in steps {
                if let Some(requested) = requested {
                    blocks.request(requested * BLOCK_BYTES);
                }
                let before = blocks.plugged_bytes();
                let mut discarded = None;
                let response = blocks.execute(request, |at, bytes| {
                    discarded = Some((at, bytes));
                    true
                });
                let counted = blocks.plugged.iter().filter(|plugged| **plugged).count() as u64;
                prop_assert_eq!(counted * BLOCK_BYTES, blocks.plugged_bytes());
                if blocks.plugged_bytes() > before {
                    prop_assert!(blocks.plugged_bytes() <= blocks.requested_bytes());
                }
                if response != Response::Ack {
                    prop_assert_eq!(blocks.plugged_bytes(), before);
                }
                if let Some((at, bytes)) = discarded {
                    prop_assert!(at >= START && at + bytes <= START + COUNT * BLOCK_BYTES);
                }
            }
        }
    }
}
