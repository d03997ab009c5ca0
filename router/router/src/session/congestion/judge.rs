//! Which losses mean congestion. Pure: what is acknowledged and lost in, verdicts out.
//!
//! Two signs of congestion count. *Delay*: the packets that reveal a loss left right behind the lost ones, so what they waited is what the
//! queue was then; a loss before which packets waited is congestion, as it always was. *Rate*: queues shorter than a delay can tell drop
//! packets as well, so losing more than a small share of a flight is congestion too, unless it turns out that sending less does not help:
//! every such cut is a trial, and if as much is lost after a third in a row, all three are taken back. What is lost then is the path's own,
//! and that much more is borne.

use std::time::{Duration, Instant};

/// Packets wait longer than this share of the shortest round trip seen: there is a queue ...
const WAIT_DIVISOR: u32 = 8;
/// ... but for noise of schedulers ...
const WAIT_MIN: Duration = Duration::from_millis(1);
/// ... and whatever the distance, below the 5 ms at which queue management (RFC 8289) begins to drop.
const WAIT_MAX: Duration = Duration::from_millis(4);
/// Batches of acknowledgements whose fastest tells of the queue: single ones are late for other reasons.
const BATCHES: usize = 8;
/// The shortest round trip is that of one or two spans of this length: longer than the queue of a flow that grows and backs off is full.
const FLOOR_SPAN: Duration = Duration::from_secs(15);
/// Share of a flight that may get lost on a path that loses none by itself, as in BBRv2.
const SHARE_MIN: f64 = 0.02;
/// Standard deviations by which more than that may get lost by chance.
const DEVIATIONS: f64 = 2.0;
/// A path that loses more, whatever is sent, is given less all the same: it might be others who suffer.
const OWN_SHARE_MAX: f64 = 0.1;
/// Packets that tell whether a cut has helped, and what a path loses.
const TRIAL_PACKETS: u64 = 100;
/// Sending less has not helped if this much of the share is lost as before. What a queue drops is gone altogether.
const IN_VAIN: f64 = 0.6;
/// Cuts in a row that must have been in vain: together they leave a third, which the others on a full line do not make up for at once.
const TRIALS: u8 = 3;
/// Weight of a flight in what a path loses by itself.
const OWN_SHARE_GAIN: f64 = 0.125;

/// What a loss means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// Send less.
    Congestion,
    /// Send less, and see whether that helps.
    Trial {
        /// Of those in a row.
        is_first: bool,
    },
    /// Go on.
    Bearable,
}

/// What a trial has shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Finding {
    /// Less is lost.
    Helped,
    /// As much is lost, and it takes another trial to be sure.
    Open,
    /// As much is lost, however little was sent: the cuts are to be taken back.
    InVain,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    acked: u64,
    lost: u64,
}

impl Tally {
    fn bytes(self) -> u64 {
        self.acked + self.lost
    }

    #[allow(clippy::cast_precision_loss, reason = "a share")]
    fn share(self) -> f64 {
        self.lost as f64 / self.bytes().max(1) as f64
    }
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Steady,
    /// What was sent before the cut is still being answered for.
    Draining {
        before: Tally,
    },
    /// What has been sent since is being answered for.
    Trial {
        after: Tally,
        began: Instant,
        is_round_over: bool,
    },
}

/// One connection's judge.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    mtu: u16,
    floor: Floor,
    /// The fastest round trip of each of the latest batches.
    batches: [Option<Duration>; BATCHES],
    batch: usize,
    /// Of packets sent since then acknowledgements begin a new round.
    round: Instant,
    tally: Tally,
    last_round: Tally,
    /// The share lost before the first of the latest cuts that did not help, and how many they are.
    in_vain: Option<(f64, u8)>,
    /// Losses of what was sent until then have been answered.
    cut: Option<Instant>,
    phase: Phase,
    /// The share of packets that the path seems to lose by itself.
    own_share: f64,
    /// The same of late, for when it loses less.
    recent_share: f64,
}

impl Judge {
    pub(super) fn new(now: Instant, mtu: u16) -> Self {
        Self {
            mtu,
            floor: Floor::new(now),
            batches: [None; BATCHES],
            batch: 0,
            round: now,
            tally: Tally::default(),
            last_round: Tally::default(),
            in_vain: None,
            cut: None,
            phase: Phase::Steady,
            own_share: 0.0,
            recent_share: 0.0,
        }
    }

    /// The packets take another path from now on.
    pub(super) fn path_changed(&mut self, now: Instant) {
        *self = Self { cut: self.cut, ..Self::new(now, self.mtu) };
    }

    pub(super) fn set_mtu(&mut self, mtu: u16) {
        self.mtu = mtu;
    }

    /// A packet of this size, sent then, was received.
    pub(super) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        let rtt = now.saturating_duration_since(sent);
        let fastest = &mut self.batches[self.batch];
        *fastest = Some(fastest.map_or(rtt, |fastest| fastest.min(rtt)));
        let is_before = self.cut.is_some_and(|cut| sent <= cut);
        match &mut self.phase {
            Phase::Steady if is_before => {}
            Phase::Steady => {
                if sent >= self.round {
                    self.round_over(now);
                }
                self.tally.acked += bytes;
            }
            Phase::Draining { before } if is_before => before.acked += bytes,
            Phase::Draining { before } => {
                let after = Tally { acked: bytes, lost: 0 };
                let before = before.share();
                self.in_vain.get_or_insert((before, 0));
                self.phase = Phase::Trial { after, began: now, is_round_over: false };
            }
            Phase::Trial { after, began, is_round_over, .. } => {
                after.acked += bytes;
                *is_round_over |= sent >= *began;
            }
        }
    }

    /// All of an acknowledgement was told; what has come of a trial, if one is over.
    pub(super) fn batch_over(&mut self, now: Instant) -> Option<Finding> {
        if let Some(fastest) = self.batches[self.batch] {
            self.floor.observe(now, fastest);
            self.batch = (self.batch + 1) % BATCHES;
            self.batches[self.batch] = None;
        }
        let Phase::Trial { after, is_round_over: true, .. } = self.phase else { return None };
        if after.bytes() < self.trial_bytes() {
            return None;
        }
        let (before, trials) = self.in_vain.take()?;
        self.begin_steady(now);
        if after.share() > OWN_SHARE_MAX || after.share() < IN_VAIN * before {
            return Some(Finding::Helped);
        }
        if trials + 1 < TRIALS {
            self.in_vain = Some((before, trials + 1));
            return Some(Finding::Open);
        }
        (self.own_share, self.recent_share) = (after.share(), after.share());
        Some(Finding::InVain)
    }

    /// Packets of `bytes` altogether are lost, the last of which was sent then.
    pub(super) fn lost(&mut self, now: Instant, sent: Instant, bytes: u64) -> Verdict {
        let is_before = self.cut.is_some_and(|cut| sent <= cut);
        if is_before {
            if let Phase::Draining { before } = &mut self.phase {
                before.lost += bytes;
            }
            return Verdict::Bearable;
        }
        if self.is_queued() {
            self.answered(now);
            return Verdict::Congestion;
        }
        match &mut self.phase {
            Phase::Steady => {}
            Phase::Draining { .. } => return Verdict::Bearable,
            Phase::Trial { after, .. } => {
                after.lost += bytes;
                return Verdict::Bearable;
            }
        }
        self.tally.lost += bytes;
        if self.is_bearable() {
            return Verdict::Bearable;
        }
        self.phase = Phase::Draining { before: self.tally };
        self.cut = Some(now);
        Verdict::Trial { is_first: self.in_vain.is_none() }
    }

    /// Congestion has been answered for all that was sent until now.
    pub(super) fn answered(&mut self, now: Instant) {
        self.cut = Some(now);
        self.in_vain = None;
        self.begin_steady(now);
    }

    fn begin_steady(&mut self, now: Instant) {
        self.phase = Phase::Steady;
        self.round = now;
        self.tally = Tally::default();
    }

    fn round_over(&mut self, now: Instant) {
        self.round = now;
        if self.tally.bytes() >= self.trial_bytes() {
            let share = self.tally.share();
            self.recent_share += OWN_SHARE_GAIN * (share - self.recent_share);
            self.own_share = self.own_share.min(self.recent_share);
            // It has helped after all.
            self.in_vain = self.in_vain.filter(|(before, _)| share >= IN_VAIN * before);
        }
        self.last_round = std::mem::take(&mut self.tally);
    }

    /// Whether the latest packets waited somewhere.
    fn is_queued(&self) -> bool {
        let Some(floor) = self.floor.get() else { return false };
        let latest = self.batches.iter().copied().flatten().min();
        let wait = latest.unwrap_or(floor).saturating_sub(floor);
        wait > (floor / WAIT_DIVISOR).clamp(WAIT_MIN, WAIT_MAX)
    }

    /// Whether no more is lost of this flight than may be.
    #[allow(clippy::cast_precision_loss, reason = "counts of packets")]
    fn is_bearable(&self) -> bool {
        let packets = |bytes: u64| bytes as f64 / f64::from(self.mtu);
        let flight = packets(self.last_round.bytes().max(self.tally.bytes()));
        let expected = flight * (SHARE_MIN + self.own_share);
        packets(self.tally.lost) <= expected + DEVIATIONS * expected.sqrt()
    }

    fn trial_bytes(&self) -> u64 {
        TRIAL_PACKETS * u64::from(self.mtu)
    }
}

/// The shortest round trip of late.
#[derive(Clone, Debug)]
struct Floor {
    span: Instant,
    current: Option<Duration>,
    previous: Option<Duration>,
}

impl Floor {
    fn new(now: Instant) -> Self {
        Self { span: now, current: None, previous: None }
    }

    fn observe(&mut self, now: Instant, rtt: Duration) {
        if now.saturating_duration_since(self.span) >= FLOOR_SPAN {
            self.span = now;
            self.previous = self.current.take();
        }
        self.current = Some(self.current.map_or(rtt, |current| current.min(rtt)));
    }

    fn get(&self) -> Option<Duration> {
        self.current.into_iter().chain(self.previous).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const RTT: Duration = Duration::from_millis(50);
    const PACKET: u64 = 1_400;

    /// A flight of packets a tenth of a millisecond apart, of which every `lost`-th one gets lost; what the judge said.
    fn flight(judge: &mut Judge, start: Instant, packets: u32, lost: u32, rtt: Duration) -> Said {
        let mut said = Said::default();
        for n in 0..packets {
            let sent = start + MS * n / 10;
            if lost > 0 && n % lost == lost - 1 {
                match judge.lost(sent + rtt, sent, PACKET) {
                    Verdict::Congestion => said.congestion += 1,
                    Verdict::Trial { .. } => said.trials += 1,
                    Verdict::Bearable => said.bearable += 1,
                }
            } else {
                judge.acked(sent + rtt, sent, PACKET);
                said.in_vain += u32::from(judge.batch_over(sent + rtt) == Some(Finding::InVain));
            }
        }
        said
    }

    #[derive(Default, PartialEq, Eq, Debug)]
    struct Said {
        congestion: u32,
        trials: u32,
        bearable: u32,
        in_vain: u32,
    }

    fn judge(now: Instant) -> Judge {
        let mut judge = Judge::new(now, 1_400);
        flight(&mut judge, now, 500, 0, RTT);
        judge
    }

    #[test]
    fn few_losses_are_borne_unless_packets_waited() {
        let now = crate::clock::now();
        let bearable = Said { bearable: 5, ..Said::default() };
        assert_eq!(flight(&mut judge(now), now + RTT, 500, 100, RTT), bearable);
        // Once for what is in flight: all of it was sent before that was known.
        let congestion = Said { congestion: 1, bearable: 4, ..Said::default() };
        assert_eq!(flight(&mut judge(now), now + RTT, 500, 100, RTT + 5 * MS), congestion);
    }

    #[test]
    fn what_is_lost_whatever_is_sent_is_borne_after_three_trials() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        let said: Vec<_> =
            (1..16).map(|n| flight(&mut judge, now + RTT * n, 500, 14, RTT)).collect();
        assert_eq!(said.iter().map(|said| said.trials).sum::<u32>(), 3, "{said:?}");
        assert_eq!(said.iter().map(|said| said.in_vain).sum::<u32>(), 1, "{said:?}");
        assert_eq!(said.last(), Some(&Said { bearable: 35, ..Said::default() }));
        // More is not.
        let more = flight(&mut judge, now + RTT * 16, 500, 5, RTT);
        assert_eq!(more.trials, 1, "{more:?}");
        judge.path_changed(now + RTT * 17);
        let said = flight(&mut judge, now + RTT * 18, 500, 14, RTT);
        assert_eq!(said.trials, 1, "another path is another matter: {said:?}");
    }

    #[test]
    fn a_cut_that_helps_stays() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        let said: Vec<_> = (1..6)
            .map(|n| flight(&mut judge, now + RTT * n, 500, if n == 1 { 14 } else { 0 }, RTT))
            .collect();
        assert_eq!(said[0].trials, 1);
        assert!(said.iter().all(|said| said.in_vain == 0), "{said:?}");
    }

    #[test]
    fn a_path_that_loses_very_much_is_given_less() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        let said: Vec<_> =
            (1..10).map(|n| flight(&mut judge, now + RTT * n, 500, 5, RTT)).collect();
        assert!(said.iter().map(|said| said.trials).sum::<u32>() >= 3, "{said:?}");
        assert!(said.iter().all(|said| said.in_vain == 0), "{said:?}");
    }

    #[test]
    fn a_way_that_has_become_longer_is_known_after_a_while() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        for n in 1..400 {
            flight(&mut judge, now + RTT * 2 * n, 500, 0, RTT * 2);
        }
        let said = flight(&mut judge, now + RTT * 800, 500, 100, RTT * 2);
        assert_eq!(said, Said { bearable: 5, ..Said::default() });
    }
}
