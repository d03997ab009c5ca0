//! One direction of a WAN box. Pure: packets and time in, packets out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::packet;
use super::profile::{Counters, Loss, Profile};

/// Bytes on their way at most: half a second of a gigabit.
const HELD_BYTES_MAX: usize = 64 << 20;

/// What a random number is for: each has its own, so that a decision does not depend on which others were made.
#[derive(Clone, Copy)]
enum Draw {
    Lose,
    Turn,
    Jitter,
    Reorder,
    Duplicate,
    CopyJitter,
}

/// Packets of one direction and what happens to them. What happens to the n-th one is decided by the seed and the profile alone.
#[derive(Debug)]
pub(super) struct Path {
    seed: u64,
    profile: Profile,
    is_bad: bool,
    /// When the bottleneck has sent what it has accepted.
    line_free: Option<Instant>,
    last_due: Option<Instant>,
    held: BTreeMap<(Instant, u64), Vec<u8>>,
    held_bytes: usize,
    sequence: u64,
    pub(super) counters: Counters,
}

impl Path {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            profile: Profile::default(),
            is_bad: false,
            line_free: None,
            last_due: None,
            held: BTreeMap::new(),
            held_bytes: 0,
            sequence: 0,
            counters: Counters::default(),
        }
    }

    /// Holds for packets that come in from now on.
    pub(super) fn set(&mut self, profile: Profile) {
        self.profile = profile;
    }

    pub(super) fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Takes a frame; returns what its sender is told right away, if anything.
    pub(super) fn push(&mut self, now: Instant, frame: Vec<u8>) -> Option<Vec<u8>> {
        self.counters.received += 1;
        if self.profile.blackhole || self.profile.block_udp && packet::is_udp(&frame) {
            self.counters.blocked += 1;
            return None;
        }
        // Neighbours look each other up as if there were a cable.
        let Some(len) = packet::ip_len(&frame) else {
            self.hold(now, frame);
            return None;
        };
        if let Some(mtu) = self.profile.mtu.filter(|mtu| len > usize::from(mtu.bytes)) {
            self.counters.too_large += 1;
            return mtu.is_told.then(|| packet::too_large(&frame, mtu.bytes)).flatten();
        }
        let is_lost = self.is_lost();
        if is_lost {
            self.counters.lost += 1;
        } else if let Some(sent) = self.through_the_bottleneck(now, frame.len()) {
            self.travel(sent, frame);
        } else {
            self.counters.overflowed += 1;
        }
        None
    }

    /// Frames that have arrived by now.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Vec<u8>> {
        let entry = self.held.first_entry().filter(|entry| entry.key().0 <= now)?;
        let frame = entry.remove();
        self.held_bytes -= frame.len();
        self.counters.delivered += 1;
        self.counters.delivered_bytes += frame.len() as u64;
        Some(frame)
    }

    /// When the next frame arrives.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.held.first_key_value().map(|((due, _), _)| *due)
    }

    fn is_lost(&mut self) -> bool {
        match self.profile.loss {
            Loss::None => false,
            Loss::Random(share) => self.chance(Draw::Lose, share),
            Loss::Burst { enter, leave } => {
                let turns = self.chance(Draw::Turn, if self.is_bad { leave } else { enter });
                self.is_bad ^= turns;
                self.is_bad
            }
        }
    }

    /// When the last bit of a frame has left the bottleneck; `None` if its queue is full.
    fn through_the_bottleneck(&mut self, now: Instant, len: usize) -> Option<Instant> {
        let Some(rate) = self.profile.rate else { return Some(now) };
        let free = self.line_free.map_or(now, |free| free.max(now));
        let time = |bytes: u64| {
            Duration::from_secs_f64(bytes as f64 * 8.0 / rate.bits_per_second.max(1) as f64)
        };
        let waiting = free.saturating_duration_since(now);
        if !waiting.is_zero() && waiting + time(len as u64) > time(rate.queue_bytes) {
            return None;
        }
        let sent = free + time(len as u64);
        self.line_free = Some(sent);
        Some(sent)
    }

    fn travel(&mut self, sent: Instant, frame: Vec<u8>) {
        let mut due = sent + self.travel_time(Draw::Jitter);
        if self.chance(Draw::Reorder, self.profile.reorder) {
            self.counters.reordered += 1;
            due += self.profile.reorder_by;
        } else if !self.profile.jitter_reorders {
            due = self.last_due.map_or(due, |last| last.max(due));
            self.last_due = Some(due);
        }
        if self.chance(Draw::Duplicate, self.profile.duplicate) {
            self.counters.duplicated += 1;
            self.hold(due.max(sent + self.travel_time(Draw::CopyJitter)), frame.clone());
        }
        self.hold(due, frame);
    }

    fn travel_time(&self, draw: Draw) -> Duration {
        let Profile { delay, jitter, .. } = self.profile;
        (delay + jitter.mul_f64(2.0 * self.draw(draw))).saturating_sub(jitter)
    }

    fn hold(&mut self, due: Instant, frame: Vec<u8>) {
        if self.held_bytes + frame.len() > HELD_BYTES_MAX {
            self.counters.unheld += 1;
            return;
        }
        self.held_bytes += frame.len();
        self.sequence += 1;
        self.held.insert((due, self.sequence), frame);
    }

    fn chance(&self, draw: Draw, share: f64) -> bool {
        self.draw(draw) < share
    }

    /// At least 0 and less than 1: a number of the current packet (the finalizer of SplitMix64 over what it is for).
    fn draw(&self, draw: Draw) -> f64 {
        let mix = |value: u64| {
            let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            value ^ (value >> 31)
        };
        let golden = 0x9e37_79b9_7f4a_7c15_u64;
        let index = self.counters.received.wrapping_mul(8) + draw as u64;
        let value = mix(mix(self.seed).wrapping_add(index.wrapping_mul(golden)));
        (value >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::profile::{Mtu, Rate};
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// An IPv4 datagram in an Ethernet frame of `len` bytes that ends with its number.
    fn frame(len: usize, number: u32) -> Vec<u8> {
        let mut frame = vec![0; len.max(46)];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        let total = u16::try_from(frame.len() - 14).unwrap();
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        frame[20] = 0x40;
        frame[23] = 17;
        let end = frame.len();
        frame[end - 4..].copy_from_slice(&number.to_be_bytes());
        frame
    }

    fn number(frame: &[u8]) -> u32 {
        u32::from_be_bytes(*frame.last_chunk().unwrap())
    }

    /// Sends `count` frames `gap` apart; gives what arrived, when, and the path.
    fn run(
        seed: u64,
        profile: Profile,
        count: u32,
        gap: Duration,
    ) -> (Vec<(u32, Duration)>, Counters) {
        let start = crate::clock::now();
        let mut path = Path::new(seed);
        path.set(profile);
        let mut arrived = Vec::new();
        for n in 0..count {
            let now = start + gap * n;
            while let Some(due) = path.next_due().filter(|due| *due <= now) {
                let frame = path.pop(due).unwrap();
                arrived.push((number(&frame), due - start));
            }
            path.push(now, frame(1_000, n));
        }
        while let Some(due) = path.next_due() {
            arrived.push((number(&path.pop(due).unwrap()), due - start));
        }
        (arrived, path.counters)
    }

    #[test]
    fn nothing_set_passes_everything_at_once_and_in_order() {
        let (arrived, counters) = run(1, Profile::default(), 1_000, MS);
        assert!(arrived.iter().enumerate().all(|(i, (n, at))| *n as usize == i && *at == MS * *n));
        assert_eq!((counters.received, counters.delivered), (1_000, 1_000));
    }

    #[test]
    fn shares_and_bursts_come_out_as_set() {
        let share = |n: u64| n as f64 / 50_000.0;
        for set in [0.01, 0.07, 0.3] {
            let profile = Profile { loss: Loss::Random(set), ..Profile::default() };
            let (_, counters) = run(7, profile, 50_000, MS / 100);
            assert!((share(counters.lost) / set - 1.0).abs() < 0.1, "{set} {counters:?}");
            let profile = Profile { loss: Loss::burst(set, 5.0), ..Profile::default() };
            let (arrived, counters) = run(7, profile, 50_000, MS / 100);
            assert!((share(counters.lost) / set - 1.0).abs() < 0.3, "{set} {counters:?}");
            let gaps = arrived.windows(2).filter(|two| two[1].0 - two[0].0 > 1).count();
            let length = counters.lost as f64 / gaps as f64;
            assert!((4.0..6.5).contains(&length), "{length} a burst");
        }
        let profile =
            Profile { duplicate: 0.05, reorder: 0.02, reorder_by: MS, ..Profile::default() };
        let (arrived, counters) = run(7, profile, 50_000, MS / 10);
        assert!((share(counters.duplicated) / 0.05 - 1.0).abs() < 0.1, "{counters:?}");
        assert!((share(counters.reordered) / 0.02 - 1.0).abs() < 0.1, "{counters:?}");
        assert_eq!(arrived.len() as u64, 50_000 + counters.duplicated);
        let backwards = arrived.windows(2).filter(|two| two[1].0 < two[0].0).count() as u64;
        assert!(backwards >= counters.reordered * 9 / 10, "{backwards} {counters:?}");
    }

    #[test]
    fn the_bottleneck_sends_at_its_rate_and_queues_no_more_than_it_may() {
        let rate = Rate { bits_per_second: 8_000_000, queue_bytes: 20_000 };
        let profile = Profile { rate: Some(rate), delay: 30 * MS, ..Profile::default() };
        // 16 Mbit/s for a second: half passes, after 30 ms and at most 20 of waiting.
        let (arrived, counters) = run(3, profile, 2_000, MS / 2);
        let end = arrived.last().unwrap().1;
        let bits = arrived.len() as f64 * 8_000.0 / (end - 31 * MS).as_secs_f64();
        assert!((bits / 8e6 - 1.0).abs() < 0.02, "{bits} bit/s");
        assert_eq!(counters.overflowed + counters.delivered, 2_000);
        let longest = arrived.iter().map(|(n, at)| *at - MS / 2 * *n).max().unwrap();
        assert!(longest > 45 * MS && longest <= 51 * MS, "{longest:?}");
    }

    #[test]
    fn what_is_too_large_or_blocked_is_dropped() {
        let mtu = Mtu { bytes: 900, is_told: true };
        let mut path = Path::new(0);
        let now = crate::clock::now();
        path.set(Profile { mtu: Some(mtu), ..Profile::default() });
        let told = path.push(now, frame(915, 0)).expect("the sender is told");
        assert_eq!((told[23], told[34], told[35]), (1, 3, 4), "fragmentation needed");
        assert_eq!(told[40..42], 900_u16.to_be_bytes());
        assert!(path.push(now, frame(914, 1)).is_none());
        assert_eq!(number(&path.pop(now).unwrap()), 1);
        path.set(Profile { mtu: Some(Mtu { is_told: false, ..mtu }), ..Profile::default() });
        assert!(path.push(now, frame(915, 2)).is_none());
        path.set(Profile { block_udp: true, ..Profile::default() });
        path.push(now, frame(100, 3));
        let mut tcp = frame(100, 4);
        tcp[23] = 6;
        path.push(now, tcp);
        path.set(Profile { blackhole: true, ..Profile::default() });
        path.push(now, frame(100, 5));
        assert_eq!(number(&path.pop(now).unwrap()), 4);
        assert!(path.pop(now).is_none());
        assert_eq!((path.counters.too_large, path.counters.blocked), (2, 2));
    }

    proptest! {
        #[test]
        fn every_packet_is_accounted_for_and_a_seed_repeats_itself(
            seed: u64, loss in 0.0..0.5, reorder in 0.0..0.3, duplicate in 0.0..0.3,
            delay in 0_u32..50, jitter in 0_u32..60, jitter_reorders: bool, limited: bool,
        ) {
            let rate = Rate { bits_per_second: 4_000_000, queue_bytes: 10_000 };
            let profile = Profile {
                delay: MS * delay, jitter: MS * jitter, jitter_reorders,
                loss: Loss::Random(loss), reorder, reorder_by: 5 * MS, duplicate,
                rate: limited.then_some(rate), ..Profile::default()
            };
            let (arrived, counters) = run(seed, profile.clone(), 300, MS);
            let gone = counters.lost + counters.overflowed;
            prop_assert_eq!(counters.received + counters.duplicated, counters.delivered + gone);
            prop_assert_eq!(arrived.len() as u64, counters.delivered);
            prop_assert!(arrived.windows(2).all(|two| two[0].1 <= two[1].1));
            let least = MS * delay.saturating_sub(jitter);
            prop_assert!(arrived.iter().all(|(n, at)| *at >= MS * *n + least));
            if !jitter_reorders && reorder == 0.0 {
                prop_assert!(arrived.windows(2).all(|two| two[0].0 <= two[1].0));
            }
            prop_assert_eq!(run(seed, profile, 300, MS).0, arrived);
        }
    }
}
