//! What a path between two hosts does to what is sent over it, in one direction.

use rand::{Rng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};

/// No path is faster: hosts are stepped in turn, and nothing may arrive within the step in which it was sent.
pub const LATENCY_US_MIN: u64 = 2_000;
/// IPv4 and UDP headers.
const HEADER_BYTES: usize = 28;
/// Payload of a TCP segment: how many packets a chunk of a stream is.
const SEGMENT_BYTES: usize = 1_400;
/// What a packet that is overtaken waits longer.
const REORDER_US: u64 = 5_000;

/// Properties of one direction of a path. Probabilities are in thousandths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Path {
    /// Propagation delay.
    pub latency_us: u64,
    /// Added to it, evenly from nothing to this.
    pub jitter_us: u64,
    /// Packets lost on their own.
    pub loss_permille: u16,
    /// Begins of a burst in which everything is lost.
    pub burst_permille: u16,
    /// Ends of such a burst.
    pub burst_end_permille: u16,
    /// Packets that are overtaken.
    pub reorder_permille: u16,
    /// Packets that arrive twice.
    pub duplicate_permille: u16,
    /// What the narrowest place takes; 0 is without bound.
    pub rate_bytes_per_s: u64,
    /// How long the queue before the narrowest place may be.
    pub queue_us: u64,
    /// Largest packet, IP header included; larger ones vanish.
    pub mtu: u16,
    /// Nothing passes.
    pub is_cut: bool,
    /// No UDP passes.
    pub blocks_udp: bool,
}

impl Default for Path {
    fn default() -> Self {
        Self {
            latency_us: 10_000,
            jitter_us: 0,
            loss_permille: 0,
            burst_permille: 0,
            burst_end_permille: 300,
            reorder_permille: 0,
            duplicate_permille: 0,
            rate_bytes_per_s: 0,
            queue_us: 100_000,
            mtu: 1_500,
            is_cut: false,
            blocks_udp: false,
        }
    }
}

/// A path with what is on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct PathState {
    pub(crate) path: Path,
    busy_until_us: u64,
    last_due_us: u64,
    in_burst: bool,
}

impl PathState {
    pub(crate) fn new(path: Path) -> Self {
        Self { path, ..Self::default() }
    }

    /// When a datagram arrives: never, once or twice.
    pub(crate) fn datagram(&mut self, now_us: u64, len: usize, rng: &mut StdRng) -> Vec<u64> {
        let path = &self.path;
        if path.is_cut || path.blocks_udp || len + HEADER_BYTES > usize::from(path.mtu) {
            return Vec::new();
        }
        if self.loses(rng) {
            return Vec::new();
        }
        let Some(left_us) = self.queue(now_us, len) else { return Vec::new() };
        let due_us = self.due(left_us, rng);
        if roll(rng, self.path.duplicate_permille) {
            return vec![due_us, due_us + LATENCY_US_MIN];
        }
        vec![due_us]
    }

    /// When a part of a stream arrives; `None` when the sender must send it again.
    pub(crate) fn segment(&mut self, now_us: u64, len: usize, rng: &mut StdRng) -> Option<u64> {
        if self.path.is_cut {
            return None;
        }
        // A sender notices a single loss by what arrives behind it; only a whole flight that is lost waits for its timer.
        let packets = len / SEGMENT_BYTES + 1;
        let lost = (0..packets).filter(|_| self.loses(rng)).count();
        if lost > 0 && lost * 2 >= packets {
            return None;
        }
        let repair_us = if lost > 0 { 2 * self.path.latency_us } else { 0 };
        let left_us = self.queue(now_us, len).unwrap_or(self.busy_until_us);
        Some(self.due(left_us, rng) + repair_us)
    }

    fn loses(&mut self, rng: &mut StdRng) -> bool {
        if self.in_burst {
            self.in_burst = !roll(rng, self.path.burst_end_permille);
        } else {
            self.in_burst = roll(rng, self.path.burst_permille);
        }
        self.in_burst || roll(rng, self.path.loss_permille)
    }

    /// When it has left the narrowest place; `None` when its queue is full.
    fn queue(&mut self, now_us: u64, len: usize) -> Option<u64> {
        if self.path.rate_bytes_per_s == 0 {
            return Some(now_us);
        }
        let begins_us = now_us.max(self.busy_until_us);
        if begins_us - now_us > self.path.queue_us {
            return None;
        }
        let takes_us = (len + HEADER_BYTES) as u64 * 1_000_000 / self.path.rate_bytes_per_s;
        self.busy_until_us = begins_us + takes_us;
        Some(self.busy_until_us)
    }

    fn due(&mut self, left_us: u64, rng: &mut StdRng) -> u64 {
        let jitter_us = match self.path.jitter_us {
            0 => 0,
            jitter_us => rng.random_range(0..=jitter_us),
        };
        let due_us = left_us + self.path.latency_us.max(LATENCY_US_MIN) + jitter_us;
        if roll(rng, self.path.reorder_permille) {
            return due_us + REORDER_US;
        }
        self.last_due_us = self.last_due_us.max(due_us);
        self.last_due_us
    }
}

fn roll(rng: &mut StdRng, permille: u16) -> bool {
    permille > 0 && rng.random_range(0..1_000) < permille
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    fn arrivals(path: Path, packets: u64) -> Vec<u64> {
        let (mut state, mut rng) = (PathState::new(path), StdRng::seed_from_u64(1));
        (0..packets).flat_map(|n| state.datagram(n * 1_000, 1_000, &mut rng)).collect()
    }

    #[test]
    fn a_clean_path_only_delays() {
        assert_eq!(arrivals(Path::default(), 3), [10_000, 11_000, 12_000]);
    }

    #[test]
    fn jitter_alone_keeps_the_order() {
        let due = arrivals(Path { jitter_us: 20_000, ..Path::default() }, 100);
        assert!(due.is_sorted());
        assert!(due.iter().zip(0_u64..).any(|(due, n)| *due > n * 1_000 + 15_000));
    }

    #[test]
    fn loss_duplication_and_reordering_happen_as_often_as_asked() {
        let lossy = arrivals(Path { loss_permille: 100, ..Path::default() }, 10_000);
        assert!((8_800..9_200).contains(&lossy.len()), "{}", lossy.len());
        let twice = arrivals(Path { duplicate_permille: 100, ..Path::default() }, 10_000);
        assert!((10_800..11_200).contains(&twice.len()), "{}", twice.len());
        let reordered = arrivals(Path { reorder_permille: 100, ..Path::default() }, 1_000);
        assert!(!reordered.is_sorted() && reordered.len() == 1_000);
    }

    #[test]
    fn a_rate_makes_a_queue_that_ends() {
        let path = Path { rate_bytes_per_s: 100_000, queue_us: 50_000, ..Path::default() };
        let due = arrivals(path, 100);
        assert!(due.len() < 30, "{} packets of 100 in 100 ms at 10 a second", due.len());
        assert!(due.windows(2).all(|pair| pair[1] - pair[0] >= 10_000));
    }

    #[test]
    fn what_is_too_large_or_cut_or_blocked_vanishes() {
        assert!(arrivals(Path { mtu: 1_027, ..Path::default() }, 5).is_empty());
        assert_eq!(arrivals(Path { mtu: 1_028, ..Path::default() }, 5).len(), 5);
        assert!(arrivals(Path { is_cut: true, ..Path::default() }, 5).is_empty());
        assert!(arrivals(Path { blocks_udp: true, ..Path::default() }, 5).is_empty());
    }
}
