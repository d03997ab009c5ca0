//! What associations of a session want to send, one queue each, served in turn. Pure.
//!
//! Queues are bounded, each and all of them together, and keep what is newest: a datagram that has waited for long is worth less to its
//! receiver than the one behind it.

use bytes::Bytes;
use std::collections::{HashMap, VecDeque};

/// What one association may have waiting: about 45 full packets, or the longest burst of a client that sends small ones.
pub(super) const WAITING_BYTES_MAX: usize = 64 << 10;
/// What all of a session may have waiting; paid for while the session lasts.
pub(super) const WAITING_BYTES_TOTAL_MAX: usize = 512 << 10;
/// What a queued frame costs besides its bytes.
const FRAME_OVERHEAD: usize = 64;

#[derive(Debug, Default)]
pub(super) struct FairQueue {
    waiting: HashMap<u64, Waiting>,
    /// Associations with something to send, in the order of their turns.
    turns: VecDeque<u64>,
    cost: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Bytes>,
    cost: usize,
}

fn cost(frame: &Bytes) -> usize {
    frame.len() + FRAME_OVERHEAD
}

impl FairQueue {
    /// Appends a frame and returns how many had to go for it: the oldest of the same association, or, if it has none, of the one whose turn
    /// is next.
    pub(super) fn push(&mut self, flow: u64, frame: Bytes) -> u64 {
        let cost = cost(&frame);
        let mut dropped = 0;
        while self.waiting.get(&flow).is_some_and(|w| w.cost + cost > WAITING_BYTES_MAX) {
            dropped += u64::from(self.drop_oldest(flow));
        }
        while self.cost + cost > WAITING_BYTES_TOTAL_MAX {
            let own = self.waiting.contains_key(&flow).then_some(flow);
            let Some(victim) = own.or_else(|| self.turns.front().copied()) else { break };
            dropped += u64::from(self.drop_oldest(victim));
        }
        let waiting = self.waiting.entry(flow).or_default();
        if waiting.frames.is_empty() {
            self.turns.push_back(flow);
        }
        waiting.frames.push_back(frame);
        waiting.cost += cost;
        self.cost += cost;
        dropped
    }

    /// The next frame, of the association whose turn it is.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let flow = self.turns.pop_front()?;
        let waiting = self.waiting.get_mut(&flow)?;
        let frame = waiting.frames.pop_front()?;
        waiting.cost -= cost(&frame);
        self.cost -= cost(&frame);
        if waiting.frames.is_empty() {
            self.waiting.remove(&flow);
        } else {
            self.turns.push_back(flow);
        }
        Some(frame)
    }

    /// Forgets an association that has ended, and returns how many frames it still had.
    pub(super) fn remove(&mut self, flow: u64) -> u64 {
        let Some(waiting) = self.waiting.remove(&flow) else { return 0 };
        self.cost -= waiting.cost;
        self.turns.retain(|turn| *turn != flow);
        waiting.frames.len() as u64
    }

    fn drop_oldest(&mut self, flow: u64) -> bool {
        let Some(waiting) = self.waiting.get_mut(&flow) else { return false };
        let Some(frame) = waiting.frames.pop_front() else { return false };
        waiting.cost -= cost(&frame);
        self.cost -= cost(&frame);
        if waiting.frames.is_empty() {
            self.waiting.remove(&flow);
            self.turns.retain(|turn| *turn != flow);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(flow: u64, n: u32, len: usize) -> Bytes {
        let mut bytes = [flow.to_be_bytes().as_slice(), &n.to_be_bytes()].concat();
        bytes.resize(len.max(12), 0);
        bytes.into()
    }

    fn tag(frame: &Bytes) -> (u64, u32) {
        let (flow, n) = (frame.first_chunk().unwrap(), frame[8..].first_chunk().unwrap());
        (u64::from_be_bytes(*flow), u32::from_be_bytes(*n))
    }

    #[test]
    fn a_flood_of_one_does_not_keep_others_waiting() {
        let mut queue = FairQueue::default();
        for n in 0..1_000 {
            queue.push(1, frame(1, n, 1_200));
        }
        queue.push(2, frame(2, 0, 100));
        queue.pop().unwrap();
        assert_eq!(tag(&queue.pop().unwrap()), (2, 0));
    }

    #[test]
    fn the_newest_are_kept() {
        let mut queue = FairQueue::default();
        let dropped: u64 = (0..1_000).map(|n| queue.push(1, frame(1, n, 1_200))).sum();
        let left: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|f| tag(&f).1).collect();
        assert_eq!(left.len() as u64 + dropped, 1_000);
        assert_eq!((left[0], left[left.len() - 1]), (u32::try_from(dropped).unwrap(), 999));
    }

    proptest! {
        /// Whatever is pushed and popped, bounds hold, nothing is lost uncounted, and each association keeps its order.
        #[test]
        fn bounds_hold_and_everything_is_counted(
            ops in prop::collection::vec((0_u64..12, 0_u8..10, 0_usize..9_000), 1..600),
        ) {
            let mut queue = FairQueue::default();
            let (mut pushed, mut gone, mut last) = (0_u32, 0_u64, HashMap::<u64, u32>::new());
            for (flow, op, len) in ops {
                match op {
                    0 => gone += queue.remove(flow),
                    1 | 2 => if let Some(frame) = queue.pop() {
                        let (flow, n) = tag(&frame);
                        prop_assert!(last.insert(flow, n).is_none_or(|before| before < n));
                        gone += 1;
                    },
                    _ => {
                        pushed += 1;
                        gone += queue.push(flow, frame(flow, pushed, len));
                    }
                }
                let held: usize = queue.waiting.values().map(|w| w.frames.len()).sum();
                let cost: usize = queue.waiting.values().map(|w| w.cost).sum();
                prop_assert_eq!(held as u64 + gone, u64::from(pushed));
                prop_assert!(cost == queue.cost && cost <= WAITING_BYTES_TOTAL_MAX);
                prop_assert!(queue.waiting.values().all(|w| w.cost <= WAITING_BYTES_MAX));
                prop_assert_eq!(queue.turns.len(), queue.waiting.len());
            }
        }
    }
}
