//! When to probe a link and when to give it up. Pure: events and time in, decisions out.

use std::time::{Duration, Instant};

/// Between probes while traffic flows.
const ACTIVE_INTERVAL: Duration = Duration::from_millis(100);
/// Between probes otherwise.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// Between probes once one was missed. A link that only loses frames has this often a chance to say so before it is given up.
const HASTY_INTERVAL: Duration = Duration::from_millis(30);
/// How long the longest silence that was no death is remembered, at least.
const SILENCE_MEMORY: Duration = Duration::from_secs(60);
/// How long after the last data traffic counts as flowing.
const ACTIVE_FOR: Duration = Duration::from_secs(1);
/// A timer this late means that we did not run; the silence may be ours.
const STARVED: Duration = Duration::from_millis(100);

/// What is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Due {
    /// Send a probe with this token.
    Probe {
        /// To come back in the reply.
        token: u64,
        /// Nothing has arrived since well before an earlier probe; told once per interval.
        missed: bool,
    },
    /// Nothing has arrived for this long: the link is dead.
    Dead(Duration),
}

/// Liveness and round-trip time of one link.
#[derive(Debug)]
pub(crate) struct Liveness {
    start: Instant,
    /// No link is given up sooner, whatever its round-trip time.
    silence_min: Duration,
    last_received: Instant,
    last_data: Option<Instant>,
    last_probe: Option<Instant>,
    /// Silence counts from here at the earliest.
    grace: Instant,
    /// When our own stall was last taken into account.
    stalled: Option<Instant>,
    next_probe: Instant,
    /// When it was last told that a probe was missed, since anything arrived.
    missed: Option<Instant>,
    silences: Silences,
    srtt: Duration,
    rttvar: Duration,
}

/// The longest silences under traffic that were followed by a sign of life.
#[derive(Debug)]
struct Silences {
    since: Instant,
    longest: Duration,
    longest_before: Duration,
}

impl Silences {
    fn note(&mut self, silence: Duration, now: Instant) {
        if now.saturating_duration_since(self.since) >= SILENCE_MEMORY {
            self.since = now;
            self.longest_before = std::mem::take(&mut self.longest);
        }
        self.longest = self.longest.max(silence);
    }

    fn longest(&self) -> Duration {
        self.longest.max(self.longest_before)
    }
}

impl Liveness {
    /// A link whose handshake has just been completed, with the round-trip time measured by it. Silence for less than
    /// `silence_min` says nothing.
    pub(crate) fn new(now: Instant, rtt: Duration, silence_min: Duration) -> Self {
        Self {
            start: now,
            silence_min,
            last_received: now,
            last_data: None,
            last_probe: None,
            grace: now,
            stalled: None,
            next_probe: now,
            missed: None,
            silences: Silences {
                since: now,
                longest: Duration::ZERO,
                longest_before: Duration::ZERO,
            },
            srtt: rtt,
            rttvar: rtt / 2,
        }
    }

    /// An authenticated frame arrived.
    pub(crate) fn frame_received(&mut self, now: Instant) {
        if self.is_active(now) {
            let silence = now.saturating_duration_since(self.last_received.max(self.grace));
            self.silences.note(silence, now);
        }
        self.last_received = self.last_received.max(now);
        self.missed = None;
    }

    /// Data was sent or received; `true` when it is the first after a pause and the timer must be set anew.
    pub(crate) fn data_moved(&mut self, now: Instant) -> bool {
        let first = !self.is_active(now);
        self.last_data = Some(now);
        if first {
            // Idle probes are a second apart: their silence says nothing about the link under traffic. Once: somebody who says a word
            // every other second must not keep a dead link alive.
            if self.last_received >= self.grace {
                self.grace = now;
            }
            self.next_probe = now;
        }
        first
    }

    /// A probe was answered (RFC 6298 §2).
    pub(crate) fn reply_received(&mut self, now: Instant, token: u64) {
        let Some(sent) = self.start.checked_add(Duration::from_micros(token)) else { return };
        if sent > now {
            return;
        }
        let sample = now - sent;
        self.rttvar = (self.rttvar * 3 + self.srtt.abs_diff(sample)) / 4;
        self.srtt = (self.srtt * 7 + sample) / 8;
    }

    /// The token of a probe sent now.
    pub(crate) fn token(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_micros()).unwrap_or(u64::MAX)
    }

    /// Smoothed round-trip time.
    pub(crate) fn rtt(&self) -> Duration {
        self.srtt
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub(crate) fn poll_timeout(&self, now: Instant) -> Instant {
        let next = self.repeat_at().map_or(self.next_probe, |repeat| repeat.min(self.next_probe));
        next.min(self.deadline(now))
    }

    /// When the last probe counts as missed and is repeated, unless something arrives: an idle link would otherwise be dead
    /// before anything was done about it.
    fn repeat_at(&self) -> Option<Instant> {
        let probe = self.last_probe.filter(|probe| self.last_received <= *probe)?;
        let patience = (self.srtt + 4 * self.rttvar).max(ACTIVE_INTERVAL);
        Some(probe + if self.missed.is_some() { HASTY_INTERVAL } else { patience })
    }

    /// What is due, if anything.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Option<Due> {
        let late = now.saturating_duration_since(self.poll_timeout(now));
        // Not again and again, or a machine that is always late would never notice.
        let recently = |then| now.saturating_duration_since(then) <= 2 * self.dead_after(now);
        if late >= STARVED && !self.stalled.is_some_and(recently) {
            self.grace = now;
            self.stalled = Some(now);
        }
        if now >= self.deadline(now) {
            return Some(Due::Dead(now.saturating_duration_since(self.last_received)));
        }
        let overdue = self.repeat_at().is_some_and(|repeat| now >= repeat);
        if now < self.next_probe && !overdue {
            return None;
        }
        let missed = overdue && self.missed.is_none_or(|told| now - told >= ACTIVE_INTERVAL);
        if missed {
            self.missed = Some(now);
        }
        self.last_probe = Some(now);
        self.next_probe = now + self.interval(now);
        Some(Due::Probe { token: self.token(now), missed })
    }

    /// Whether traffic flows.
    pub(crate) fn is_active(&self, now: Instant) -> bool {
        self.last_data.is_some_and(|last| now.saturating_duration_since(last) < ACTIVE_FOR)
    }

    fn interval(&self, now: Instant) -> Duration {
        if self.is_active(now) { ACTIVE_INTERVAL } else { IDLE_INTERVAL }
    }

    fn dead_after(&self, now: Instant) -> Duration {
        let patience = self.srtt + 4 * self.rttvar;
        let silence = patience + 2 * self.interval(now);
        // Long ways are silent for longer by half; on a quick link that was a busy machine, and says nothing of the next death.
        let remembered = (2 * self.silences.longest()).min(silence + patience / 2);
        silence.max(self.silence_min).max(remembered)
    }

    fn deadline(&self, now: Instant) -> Instant {
        self.last_received.max(self.grace) + self.dead_after(now)
    }
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD_AFTER_MIN: Duration = Duration::from_millis(300);
    const MS: Duration = Duration::from_millis(1);

    fn start() -> Instant {
        crate::clock::now()
    }

    /// Runs the timer from `from` with a neighbour silent throughout; returns the time of death and probes sent.
    fn until_dead(link: &mut Liveness, from: Instant, traffic: bool) -> (Duration, u32) {
        let (mut now, mut probes) = (from, 0);
        loop {
            now = now.max(link.poll_timeout(now));
            if traffic {
                link.data_moved(now);
            }
            match link.handle_timeout(now) {
                Some(Due::Dead(_)) => return (now - from, probes),
                Some(Due::Probe { .. }) => probes += 1,
                None => {}
            }
        }
    }

    #[test]
    fn a_silent_idle_link_dies_after_two_idle_intervals() {
        let t = start();
        let (after, probes) = until_dead(&mut Liveness::new(t, 2 * MS, DEAD_AFTER_MIN), t, false);
        assert_eq!(after, 2 * IDLE_INTERVAL + 6 * MS);
        assert!(probes > 10, "a missed probe is repeated soon, so that moved neighbours are found");
    }

    #[test]
    fn traffic_on_an_idle_link_probes_at_once_and_detects_in_the_minimum() {
        let t = start();
        let mut link = Liveness::new(t, 2 * MS, DEAD_AFTER_MIN);
        link.handle_timeout(t);
        link.frame_received(t + MS);
        let t = t + 900 * MS;
        assert!(link.data_moved(t));
        assert!(!link.data_moved(t + MS));
        assert_eq!(link.poll_timeout(t), t);
        let (after, probes) = until_dead(&mut link, t, true);
        assert_eq!(after, DEAD_AFTER_MIN, "the idle silence before does not count");
        assert_eq!(probes, 8, "one in time, and once it is missed as many as may be lost");
    }

    #[test]
    fn a_long_round_trip_gets_its_time() {
        let t = start();
        let mut link = Liveness::new(t, 400 * MS, DEAD_AFTER_MIN);
        link.data_moved(t);
        let (after, _) = until_dead(&mut link, t, true);
        assert_eq!(after, 400 * MS + 4 * 200 * MS + 2 * ACTIVE_INTERVAL);
    }

    #[test]
    fn the_first_missed_probe_is_told() {
        let t = start();
        let mut link = Liveness::new(t, MS, DEAD_AFTER_MIN);
        link.data_moved(t);
        assert!(matches!(link.handle_timeout(t), Some(Due::Probe { missed: false, .. })));
        let t = t + ACTIVE_INTERVAL;
        assert!(matches!(link.handle_timeout(t), Some(Due::Probe { missed: true, .. })));
        link.frame_received(t + MS);
        let t = t + ACTIVE_INTERVAL;
        assert!(matches!(link.handle_timeout(t), Some(Due::Probe { missed: false, .. })));
    }

    #[test]
    fn a_long_link_that_was_silent_before_gets_half_its_round_trip_more_for_a_while() {
        let t = start();
        let mut now = t + 290 * MS;
        for (rtt, expected) in [(MS, DEAD_AFTER_MIN), (400 * MS, 2_000 * MS)] {
            let dead_after = |heard: Duration| {
                let mut link = Liveness::new(t, rtt, DEAD_AFTER_MIN);
                for moved in (0..).map(|n| 500 * n * MS).take_while(|moved| *moved < heard) {
                    link.data_moved(t + moved);
                }
                link.frame_received(t + heard);
                until_dead(&mut link, t + heard, true).0
            };
            let (before, after) = (dead_after(MS), dead_after(1_200 * MS));
            assert!(before <= after && after == expected, "{before:?} {after:?}");
        }
        let mut link = Liveness::new(t, 100 * MS, DEAD_AFTER_MIN);
        link.data_moved(t);
        link.frame_received(now);
        while now < t + 3 * SILENCE_MEMORY {
            now += 100 * MS;
            link.data_moved(now);
            link.frame_received(now);
        }
        assert_eq!(until_dead(&mut link, now, true).0, 500 * MS, "forgotten");
    }

    #[test]
    fn a_word_now_and_then_does_not_keep_a_dead_link_alive() {
        let t = start();
        let mut link = Liveness::new(t, 100 * MS, Duration::from_secs(1));
        let (mut now, mut word) = (t, t);
        let dead = loop {
            now = now.max(link.poll_timeout(now)).min(word);
            if now == word {
                link.data_moved(now);
                word += 1_100 * MS;
            }
            match link.handle_timeout(now) {
                Some(Due::Dead(_)) => break now - t,
                _ if now - t > Duration::from_secs(20) => panic!("still alive"),
                _ => {}
            }
        };
        assert!(dead < Duration::from_secs(4), "{dead:?}");
    }

    #[test]
    fn our_own_stall_does_not_kill_the_link_but_lasting_silence_does() {
        let t = start();
        let mut link = Liveness::new(t, MS, DEAD_AFTER_MIN);
        link.data_moved(t);
        link.handle_timeout(t);
        let t = t + Duration::from_secs(10);
        link.data_moved(t - 500 * MS);
        assert!(matches!(link.handle_timeout(t), Some(Due::Probe { .. })));
        let (after, _) = until_dead(&mut link, t, true);
        assert_eq!(after, DEAD_AFTER_MIN);
    }

    #[test]
    fn round_trip_times_are_smoothed_and_impossible_replies_ignored() {
        let t = start();
        let mut link = Liveness::new(t, 100 * MS, DEAD_AFTER_MIN);
        for _ in 0..50 {
            link.reply_received(t + 20 * MS, 0);
        }
        assert!(link.rtt() < 21 * MS, "{:?}", link.rtt());
        link.reply_received(t, u64::MAX);
        link.reply_received(t, 1_000_000);
        assert!(link.rtt() < 21 * MS);
    }
}
