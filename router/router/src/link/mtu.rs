//! The largest frame a link carries, found with padded probes. Pure: events and time in, sizes to try out.
//!
//! Hop connections carry too little to notice when their path shrinks, so frames find out for themselves: all sizes at
//! once, which takes one round trip, and then a look now and again.

use std::time::{Duration, Instant};

/// A frame for an end-to-end packet of 1,200 bytes: fits every path IPv6 may use.
pub(crate) const FRAME_LEN_MIN: u16 = 1_232;
/// Datagram sizes tried over IPv4: jumbo frames, Ethernet, PPPoE, tunnels and mobile networks. Sessions are twice as fast with
/// jumbo frames; see ADR 10 for why nothing larger is tried.
const SIZES_V4: &[u16] =
    &[8_972, 1_472, 1_464, 1_452, 1_432, 1_412, 1_392, 1_372, 1_342, 1_312, 1_272];
/// The same over IPv6, whose header is 20 bytes longer.
const SIZES_V6: &[u16] =
    &[8_952, 1_452, 1_444, 1_432, 1_412, 1_392, 1_372, 1_352, 1_322, 1_292, 1_262];
/// Where any size passes, Ethernet's: sessions that move to or from another carrier keep the size they have.
const FIXED_V4: u16 = 1_472;
const FIXED_V6: u16 = 1_452;
/// Nothing to do where the size is fixed.
const NEVER: Duration = Duration::from_secs(86_400);
/// Times all sizes are sent before the best answer counts; single ones get lost.
const ROUNDS: u8 = 3;
/// Between rounds at least.
const ROUND_MIN: Duration = Duration::from_millis(50);
/// Between checks that the size found still passes, while traffic flows.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// The same otherwise: an idle link should cost next to nothing.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Between checks when one is not answered, at least.
const RECHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Checks lost in a row until the path counts as shrunk.
const LOST_MAX: u8 = 3;
/// The same for the smallest size, while small probes are answered: below it there is nothing to fall back to, so it takes more to give a
/// path up than to use less of it.
const LOST_SMALLEST_MAX: u8 = 8;
/// Answers to small probes meanwhile, which tell a small path from a dead one.
const SMALL_ANSWERS_MIN: u8 = 4;
/// How often larger sizes are tried again.
const SEARCH_INTERVAL: Duration = Duration::from_secs(60);

/// Frame size of one link.
#[derive(Debug)]
pub(crate) struct FrameSize {
    sizes: &'static [u16],
    current: u16,
    rounds_left: u8,
    unanswered: u8,
    /// Answers to smaller probes since a check was not.
    small_answers: u8,
    next: Instant,
    /// When the next check is due if the last one is answered.
    if_answered: Instant,
    next_search: Instant,
}

impl FrameSize {
    /// Nothing is known yet but the minimum.
    pub(crate) fn new(now: Instant, is_ipv6: bool) -> Self {
        Self {
            sizes: if is_ipv6 { SIZES_V6 } else { SIZES_V4 },
            current: FRAME_LEN_MIN,
            rounds_left: ROUNDS,
            unanswered: 0,
            small_answers: 0,
            next: now,
            if_answered: now,
            next_search: now + SEARCH_INTERVAL,
        }
    }

    /// A carrier on which every size passes.
    pub(crate) fn fixed(now: Instant, is_ipv6: bool) -> Self {
        Self {
            sizes: &[],
            current: if is_ipv6 { FIXED_V6 } else { FIXED_V4 },
            rounds_left: 0,
            next: now + NEVER,
            ..Self::new(now, is_ipv6)
        }
    }

    /// Whether anything better than the minimum has been found, or nothing is searched.
    pub(crate) fn is_known(&self) -> bool {
        self.sizes.is_empty() || self.current > FRAME_LEN_MIN
    }

    /// Whether the path does not even carry the smallest of frames, though it does carry something.
    pub(crate) fn is_too_small(&self) -> bool {
        self.current == FRAME_LEN_MIN
            && self.unanswered >= LOST_SMALLEST_MAX
            && self.small_answers >= SMALL_ANSWERS_MIN
    }

    /// The largest frame known to pass.
    pub(crate) fn current(&self) -> u16 {
        self.current
    }

    /// The neighbour has received a frame of this size.
    pub(crate) fn reply_received(&mut self, size: u16) {
        if size < self.current {
            self.small_answers = self.small_answers.saturating_add(1);
            return;
        }
        self.small_answers = 0;
        if self.unanswered > 0 {
            self.unanswered = 0;
            self.next = self.if_answered;
        }
        if size > self.current && self.sizes.contains(&size) {
            self.current = size;
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub(crate) fn poll_timeout(&self) -> Instant {
        self.next
    }

    /// Traffic flows again: what has happened to the path in the meantime is of interest soon.
    pub(crate) fn resume(&mut self, now: Instant) {
        if !self.sizes.is_empty() {
            self.next = self.next.min(now + RECHECK_INTERVAL);
        }
    }

    /// Sizes of the probes to send now; `active` says whether traffic flows.
    pub(crate) fn handle_timeout(&mut self, now: Instant, rtt: Duration, active: bool) -> Vec<u16> {
        if now < self.next {
            return Vec::new();
        }
        if self.sizes.is_empty() {
            self.next = now + NEVER;
            return Vec::new();
        }
        if self.rounds_left == 0 && self.unanswered >= LOST_MAX && self.current > FRAME_LEN_MIN {
            self.current = FRAME_LEN_MIN;
            self.rounds_left = ROUNDS;
            self.small_answers = 0;
        }
        if now >= self.next_search {
            self.next_search = now + SEARCH_INTERVAL;
            self.rounds_left = 1;
        }
        if self.rounds_left > 0 {
            self.rounds_left -= 1;
            if self.current > FRAME_LEN_MIN {
                self.unanswered = 0;
            }
            self.next = now + (2 * rtt).max(ROUND_MIN);
            return self.sizes.iter().copied().filter(|&size| size > self.current).collect();
        }
        self.next = now + (2 * rtt).max(RECHECK_INTERVAL);
        self.if_answered = now + if active { CHECK_INTERVAL } else { IDLE_CHECK_INTERVAL };
        if self.unanswered == 0 {
            // Those before say nothing of a path that has just died.
            self.small_answers = 0;
        }
        self.unanswered = self.unanswered.saturating_add(1);
        vec![self.current]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between the probes of an idle link.
    const IDLE_INTERVAL: Duration = Duration::from_secs(1);

    /// Runs for `duration` over a path that carries frames up to `limit`; returns the probes sent.
    fn run(size: &mut FrameSize, now: &mut Instant, duration: Duration, limit: u16) -> usize {
        let (end, mut probes) = (*now + duration, 0);
        while *now < end {
            for probe in size.handle_timeout(*now, Duration::from_millis(1), true) {
                probes += 1;
                if probe <= limit {
                    size.reply_received(probe);
                }
            }
            *now = size.poll_timeout();
        }
        probes
    }

    #[test]
    fn the_first_round_finds_the_size_and_shrinking_is_noticed() {
        for (limit, found) in [(1_472, 1_472), (1_450, 1_432), (1_200, 1_232)] {
            let mut now = crate::clock::now();
            let mut size = FrameSize::new(now, false);
            run(&mut size, &mut now, Duration::from_millis(1), limit);
            assert_eq!(size.current(), found);
            run(&mut size, &mut now, Duration::from_secs(10), 1_300);
            assert_eq!(size.current(), 1_272);
            run(&mut size, &mut now, Duration::from_secs(120), 9_000);
            assert_eq!(size.current(), 8_972, "a path that grows is used");
        }
    }

    #[test]
    fn shrinking_is_noticed_in_less_than_a_second() {
        let mut now = crate::clock::now();
        let mut size = FrameSize::new(now, false);
        run(&mut size, &mut now, Duration::from_secs(5), 9_000);
        let shrunk = now;
        while size.current() > 1_272 {
            run(&mut size, &mut now, Duration::from_millis(1), 1_280);
        }
        while size.current() < 1_272 {
            run(&mut size, &mut now, Duration::from_millis(1), 1_280);
        }
        assert!(now - shrunk < Duration::from_millis(900), "{:?}", now - shrunk);
    }

    #[test]
    fn a_path_too_small_for_anything_is_told_from_a_dead_one() {
        for (answers, too_small) in [(true, true), (false, false)] {
            let mut now = crate::clock::now();
            let mut size = FrameSize::new(now, false);
            for _ in 0..40 {
                run(&mut size, &mut now, Duration::from_millis(50), 1_000);
                if answers {
                    size.reply_received(48);
                }
            }
            assert_eq!(size.is_too_small(), too_small);
            size.reply_received(FRAME_LEN_MIN);
            assert!(!size.is_too_small());
        }
    }

    #[test]
    fn an_idle_link_over_the_smallest_path_outlives_an_outage() {
        let mut now = crate::clock::now();
        let mut size = FrameSize::new(now, false);
        for limit in [1_240, 0] {
            let end = now + if limit > 0 { 40 * IDLE_INTERVAL } else { 2 * IDLE_INTERVAL };
            while now < end {
                for probe in size.handle_timeout(now, Duration::from_millis(1), false) {
                    if probe <= limit {
                        size.reply_received(probe);
                    }
                }
                assert!(!size.is_too_small());
                // Liveness probes are answered as long as the path is there.
                if limit > 0 {
                    size.reply_received(48);
                }
                now = size.poll_timeout().min(now + IDLE_INTERVAL);
            }
            size.resume(now);
        }
        assert!(size.unanswered >= LOST_SMALLEST_MAX, "the outage was seen");
    }

    #[test]
    fn a_settled_link_sends_two_checks_a_second() {
        let mut now = crate::clock::now();
        let mut size = FrameSize::new(now, true);
        run(&mut size, &mut now, Duration::from_secs(1), 1_452);
        let probes = run(&mut size, &mut now, Duration::from_secs(30), 1_452);
        assert!((59..=61).contains(&probes), "{probes}");
    }

    #[test]
    fn a_fixed_size_is_known_and_never_probed() {
        let mut now = crate::clock::now();
        let mut size = FrameSize::fixed(now, false);
        assert!(size.is_known());
        size.resume(now);
        assert_eq!(run(&mut size, &mut now, 3 * NEVER, 0), 0);
        size.reply_received(8_972);
        assert_eq!(size.current(), FIXED_V4);
    }

    #[test]
    fn made_up_sizes_are_ignored() {
        let mut size = FrameSize::new(crate::clock::now(), false);
        size.reply_received(u16::MAX);
        assert_eq!(size.current(), FRAME_LEN_MIN);
    }
}
