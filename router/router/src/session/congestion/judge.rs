//! Which losses mean congestion. Pure: what is acknowledged and lost in, verdicts out.
//!
//! Two signs of congestion count. *Delay*: the packets that reveal a loss left right behind the lost ones, so what they waited is what the
//! queue was then; a loss before which packets waited is congestion, as it always was. *Rate*: queues shorter than a delay can tell drop
//! packets as well, so what is received pays for what is lost, and a loss that is not paid for is congestion too.

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
/// One packet in so many may get lost, 2 % as in BBRv2, and between two cuts what [`LOSSES_AFTER_CUT`] and the flight that was cut have paid
/// for. However many share a queue, they lose little more than that and what they would without a judge.
const PACKETS_PER_LOSS: u64 = 50;
/// Losses that can be paid for at once. A path that loses 1 % by chance needs more once in tens of thousands of them.
const LOSSES_MAX: u64 = 8;
/// What a flight of a hundred packets may lose pays for the first losses after a cut, or it would be followed by another one half of the
/// time. A smaller flight pays for less: where many share a short queue nobody has more than a few packets in it.
const LOSSES_AFTER_CUT: u64 = 2;

/// One connection's judge.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    mtu: u16,
    /// Packets sent before took another path, or their losses have been answered.
    since: Option<Instant>,
    /// Packets sent before took another path: they say nothing of this one's distance.
    path_since: Option<Instant>,
    floor: Floor,
    /// The fastest round trip of each of the latest batches.
    batches: [Option<Duration>; BATCHES],
    batch: usize,
    last_batch: Instant,
    /// Bytes received that have not paid for a loss yet.
    paid_bytes: u64,
}

impl Judge {
    /// Of a connection that may have `window` bytes in flight.
    pub(super) fn new(now: Instant, mtu: u16, window: u64) -> Self {
        let mut judge = Self {
            mtu,
            since: None,
            path_since: None,
            floor: Floor::new(now),
            batches: [None; BATCHES],
            batch: 0,
            last_batch: now,
            paid_bytes: 0,
        };
        judge.pay_anew(window);
        judge
    }

    /// The packets take another path from now on.
    pub(super) fn path_changed(&mut self, now: Instant, window: u64) {
        *self =
            Self { since: Some(now), path_since: Some(now), ..Self::new(now, self.mtu, window) };
    }

    pub(super) fn set_mtu(&mut self, mtu: u16) {
        self.mtu = mtu;
    }

    /// A packet of this size, sent then, was received.
    pub(super) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        if self.path_since.is_some_and(|since| sent <= since) {
            return;
        }
        let rtt = now.saturating_duration_since(sent);
        let fastest = &mut self.batches[self.batch];
        *fastest = Some(fastest.map_or(rtt, |fastest| fastest.min(rtt)));
        let most = LOSSES_MAX * PACKETS_PER_LOSS * u64::from(self.mtu);
        self.paid_bytes = (self.paid_bytes + bytes).min(most);
    }

    /// All of an acknowledgement was told.
    pub(super) fn batch_over(&mut self, now: Instant) {
        let Some(fastest) = self.batches[self.batch] else { return };
        self.floor.observe(now, fastest);
        // What was so long ago says nothing of the queue as it is.
        if now.saturating_duration_since(self.last_batch) > 2 * fastest {
            self.batches = [None; BATCHES];
            self.batches[self.batch] = Some(fastest);
        }
        self.last_batch = now;
        self.batch = (self.batch + 1) % BATCHES;
        self.batches[self.batch] = None;
    }

    /// Whether it means congestion that packets of `bytes` altogether are lost, the last of which was sent then.
    pub(super) fn is_congestion(&mut self, sent: Instant, bytes: u64) -> bool {
        if self.since.is_some_and(|since| sent <= since) {
            return false;
        }
        let cost = PACKETS_PER_LOSS * bytes;
        if self.is_queued() || cost > self.paid_bytes {
            return true;
        }
        self.paid_bytes -= cost;
        false
    }

    /// Less is sent from now on, for the sake of a packet sent then; `window` bytes may be in flight. What was lost of the same flight is
    /// answered by that.
    pub(super) fn answered(&mut self, now: Instant, sent: Instant, window: u64) {
        if self.since.is_none_or(|since| sent > since) {
            self.since = Some(now);
            self.pay_anew(window);
        }
    }

    fn pay_anew(&mut self, window: u64) {
        let most = LOSSES_AFTER_CUT * PACKETS_PER_LOSS * u64::from(self.mtu);
        self.paid_bytes = window.min(most);
    }

    /// Whether the latest packets waited somewhere.
    fn is_queued(&self) -> bool {
        let Some(floor) = self.floor.get() else { return false };
        let latest = self.batches.iter().copied().flatten().min();
        let wait = latest.unwrap_or(floor).saturating_sub(floor);
        wait > (floor / WAIT_DIVISOR).clamp(WAIT_MIN, WAIT_MAX)
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
    const WINDOW: u64 = 500 * PACKET;

    /// A flight of packets a tenth of a millisecond apart, of which every `lost`-th one gets lost; how many cuts that made.
    fn flight(judge: &mut Judge, start: Instant, packets: u32, lost: u32, rtt: Duration) -> u32 {
        let mut cuts = 0;
        for n in 0..packets {
            let sent = start + MS * n / 10;
            if lost == 0 || n % lost != lost - 1 {
                judge.acked(sent + rtt, sent, PACKET);
                judge.batch_over(sent + rtt);
            } else if judge.is_congestion(sent, PACKET) {
                judge.answered(sent + rtt, sent, u64::from(packets) * PACKET);
                cuts += 1;
            }
        }
        cuts
    }

    fn judge(now: Instant) -> Judge {
        let mut judge = Judge::new(now, 1_400, WINDOW);
        flight(&mut judge, now, 500, 0, RTT);
        judge
    }

    #[test]
    fn few_losses_are_borne_unless_packets_waited() {
        let now = crate::clock::now();
        assert_eq!(flight(&mut judge(now), now + RTT, 500, 100, RTT), 0);
        // Once for what is in flight: all of it was sent before that was known.
        assert_eq!(flight(&mut judge(now), now + RTT, 500, 100, RTT + 5 * MS), 1);
    }

    #[test]
    fn whatever_exceeds_one_in_fifty_is_answered_once_a_round_trip() {
        let now = crate::clock::now();
        for (packets, lost, cuts) in [(500, 60, 0..=0), (500, 40, 5..=20), (500, 14, 25..=40)] {
            let mut judge = judge(now);
            let found: u32 =
                (1..=40).map(|n| flight(&mut judge, now + RTT * n, packets, lost, RTT)).sum();
            assert!(cuts.contains(&found), "one in {lost}: {found} cuts in 40 round trips");
        }
    }

    #[test]
    fn a_flight_of_few_packets_bears_no_larger_share() {
        let now = crate::clock::now();
        let mut judge = Judge::new(now, 1_400, 9 * PACKET);
        let cuts: u32 = (1..=200).map(|n| flight(&mut judge, now + RTT * n, 9, 9, RTT)).sum();
        // What is sent until a loss is known is answered together with it.
        assert!(cuts >= 90, "one loss in nine packets: {cuts} cuts in 200 round trips");
    }

    #[test]
    fn long_peace_pays_for_a_handful_of_losses_and_no_more() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        for n in 1..100 {
            flight(&mut judge, now + RTT * n, 500, 0, RTT);
        }
        let sent = now + RTT * 100;
        assert!(!judge.is_congestion(sent, 8 * PACKET));
        assert!(judge.is_congestion(sent, PACKET));
    }

    #[test]
    fn what_was_sent_along_another_path_is_no_matter_here() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        let changed = now + RTT;
        judge.path_changed(changed, WINDOW);
        assert!(!judge.is_congestion(changed, WINDOW), "it went with the old path");
        // A quick acknowledgement along the old path does not make the new one look full.
        judge.acked(changed + MS, changed, PACKET);
        judge.batch_over(changed + MS);
        assert_eq!(flight(&mut judge, changed + RTT, 500, 100, RTT * 3), 0);
        assert!(judge.is_congestion(changed + RTT * 4, WINDOW));
    }

    #[test]
    fn a_mark_of_an_answered_flight_hides_no_losses() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        let cut = now + RTT;
        judge.answered(cut, cut - MS, WINDOW);
        // Told of later, but sent before the cut.
        judge.answered(cut + RTT, cut - MS, WINDOW);
        assert!(judge.is_congestion(cut + RTT / 2, WINDOW));
    }

    #[test]
    fn a_way_that_has_become_longer_is_known_after_a_while() {
        let now = crate::clock::now();
        let mut judge = judge(now);
        for n in 1..400 {
            flight(&mut judge, now + RTT * 2 * n, 500, 0, RTT * 2);
        }
        assert_eq!(flight(&mut judge, now + RTT * 800, 500, 100, RTT * 2), 0);
    }
}
