//! Per-flow credit: how many bytes a peer may send that the local socket has not taken yet.
//!
//! quinn's own windows cannot do this: its stream window is one size for every stream of a connection, and its connection window lets
//! streams that are not read starve the rest. So the one is larger than any flow needs, every stream is read at once, and here every flow
//! has a window of its own, which grows with the rate at which its consumer drains it and is paid for from one budget. Pure: the time is
//! an argument.

use super::Reservation;
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// Implied for every flow in each direction, so that short flows cost no credit message.
pub const INITIAL_CREDIT_BYTES: u64 = 256 << 10;
/// One turn of a writer in the ring; with more than a quarter of the initial credit, shares follow windows instead of turns.
pub const TURN_BYTES: usize = 64 << 10;
/// Largest window of a flow: 5 Gbit/s over 100 ms.
pub const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// What a sender keeps when it gives back the credit it does not use: enough for a request without waiting for a grant.
pub(super) const IDLE_CREDIT_BYTES: u64 = 16 << 10;
/// A grant is due when this fraction of the window has been consumed since the last one.
const GRANT_DIVISOR: u64 = 4;
/// A window doubles when it passes within so many round trips: one to fill it, one for what is lost to be sent again, one for what of that
/// is lost, and everything behind waits so long. With two, a flow over a path that loses 7 % never gets more than the initial window.
const GROWTH_ROUNDS: u32 = 4;
/// Round-trip times below are scheduling noise and would make windows grow without need.
const GROWTH_RTT_MIN: Duration = Duration::from_millis(2);

const _: () = assert!(TURN_BYTES as u64 <= INITIAL_CREDIT_BYTES / 4);

/// The peer broke the rules of credit; the session must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreditViolation {
    /// More bytes arrived than were granted.
    #[error("the peer sent more than its credit")]
    Exceeded,
    /// More credit was returned than was outstanding.
    #[error("the peer returned credit that it does not have")]
    ReturnedTooMuch,
}

/// The receiving side of one flow: what was promised to the sender and how much of it is still open.
#[derive(Debug)]
pub struct ReceiveWindow {
    /// The window and its price are the same number.
    reservation: Reservation,
    /// What it goes back to after a pause.
    initial_bytes: u64,
    granted_bytes: u64,
    /// In order.
    received_bytes: u64,
    /// Up to the last byte that has arrived, in order or ahead of its turn.
    reached_bytes: u64,
    consumed_bytes: u64,
    /// What had been consumed at the last grant.
    consumed_at_grant_bytes: u64,
    sample_started: Instant,
    sample_bytes: u64,
    finished: bool,
}

impl ReceiveWindow {
    /// A window as large as its reservation, at most [`INITIAL_CREDIT_BYTES`].
    #[must_use]
    pub fn new(reservation: Reservation, now: Instant) -> Self {
        Self {
            granted_bytes: reservation.bytes(),
            initial_bytes: reservation.bytes(),
            reservation,
            received_bytes: 0,
            reached_bytes: 0,
            consumed_bytes: 0,
            consumed_at_grant_bytes: 0,
            sample_started: now,
            sample_bytes: 0,
            finished: false,
        }
    }

    /// Current size of the window.
    #[must_use]
    pub fn window_bytes(&self) -> u64 {
        self.reservation.bytes()
    }

    /// Counts bytes that arrived before their turn: `end_bytes` are all up to the last of them.
    ///
    /// # Errors
    /// When they are beyond what was granted.
    pub(super) fn reaches(&mut self, end_bytes: u64) -> Result<(), CreditViolation> {
        self.reached_bytes = self.reached_bytes.max(end_bytes);
        if end_bytes > self.granted_bytes { Err(CreditViolation::Exceeded) } else { Ok(()) }
    }

    /// Counts bytes whose turn it is.
    ///
    /// # Errors
    /// When they exceed what was granted.
    pub fn received(&mut self, bytes: u64) -> Result<(), CreditViolation> {
        self.received_bytes = self.received_bytes.saturating_add(bytes);
        self.reaches(self.received_bytes)
    }

    /// Counts bytes that the local socket took, and returns the credit to grant now. `measure` reads time and round-trip time, when needed.
    ///
    /// The window doubles when a whole window was drained in less than four round trips, so it settles at four to eight times the
    /// bandwidth-delay product; slow and idle flows keep what they have.
    pub fn consumed(
        &mut self,
        bytes: u64,
        measure: impl FnOnce() -> (Instant, Duration),
    ) -> Option<u64> {
        self.consumed_bytes += bytes;
        self.sample_bytes += bytes;
        if self.finished {
            self.reservation.shrink(bytes);
            return None;
        }
        let outstanding = self.granted_bytes - self.consumed_bytes;
        let window = self.window_bytes();
        if window.saturating_sub(outstanding) < window / GRANT_DIVISOR {
            return None;
        }
        self.grant(measure)
    }

    /// Fills the window up.
    fn grant(&mut self, measure: impl FnOnce() -> (Instant, Duration)) -> Option<u64> {
        self.grow(measure);
        let outstanding = self.granted_bytes - self.consumed_bytes;
        let add = self.window_bytes().saturating_sub(outstanding);
        self.granted_bytes += add;
        self.consumed_at_grant_bytes = self.consumed_bytes;
        (add > 0).then_some(add)
    }

    fn grow(&mut self, measure: impl FnOnce() -> (Instant, Duration)) {
        let window = self.window_bytes();
        if window >= self.initial_bytes && self.sample_bytes < window {
            return;
        }
        let (now, rtt) = measure();
        if window < self.initial_bytes {
            // The flow was idle and is not any more. At the ceiling it goes on with what it kept.
            self.reservation.try_grow(self.initial_bytes - window);
        } else if now.saturating_duration_since(self.sample_started)
            < GROWTH_ROUNDS * rtt.max(GROWTH_RTT_MIN)
        {
            self.reservation.try_grow(window.min(WINDOW_BYTES_MAX - window));
        }
        self.sample_started = now;
        self.sample_bytes = 0;
    }

    /// Takes back credit that the sender will not use, and returns the credit to grant now. `measure` reads time and round-trip time, when
    /// needed.
    ///
    /// A return may be overtaken by bytes that were sent after it. If those were all that the sender had kept, and they are consumed, no more
    /// bytes will come to grant for. Where nothing was consumed since the last grant, the sender has kept nothing: it would return the next
    /// grant as well.
    ///
    /// # Errors
    /// When the sender does not have as much: what has arrived is used up, also what lies ahead of its turn.
    pub fn returned(
        &mut self,
        bytes: u64,
        measure: impl FnOnce() -> (Instant, Duration),
    ) -> Result<Option<u64>, CreditViolation> {
        if bytes > self.granted_bytes.saturating_sub(self.reached_bytes) {
            return Err(CreditViolation::ReturnedTooMuch);
        }
        self.granted_bytes -= bytes;
        // What is still reserved after the end is for what is held, and nothing for credit. A return may be overtaken by the end.
        if self.finished {
            return Ok(None);
        }
        self.reservation.shrink(bytes);
        let is_spent = self.granted_bytes == self.consumed_bytes
            && self.consumed_bytes > self.consumed_at_grant_bytes;
        Ok(if is_spent { self.grant(measure) } else { None })
    }

    /// The sender has finished: only what it sent and nobody consumed still needs memory.
    pub fn finished(&mut self) {
        self.finished = true;
        let held = self.received_bytes - self.consumed_bytes;
        self.reservation.shrink(self.window_bytes().saturating_sub(held));
    }
}

/// The sending side of one flow. One task sends; the session's control stream adds.
#[derive(Debug)]
pub struct SendCredit {
    limit_bytes: AtomicU64,
    raised: Notify,
}

impl SendCredit {
    /// Starts with the credit implied by the session's hello.
    #[must_use]
    pub fn new(initial_bytes: u64) -> Self {
        Self { limit_bytes: AtomicU64::new(initial_bytes), raised: Notify::new() }
    }

    /// Adds credit granted by the peer.
    pub fn add(&self, bytes: u64) {
        // Saturating, because the number came from a peer.
        let raise = |limit: u64| Some(limit.saturating_add(bytes));
        let _always_some =
            self.limit_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, raise);
        self.raised.notify_one();
    }

    /// What may be sent by a flow that has sent `sent_bytes` so far.
    #[must_use]
    pub fn available(&self, sent_bytes: u64) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed).saturating_sub(sent_bytes)
    }

    /// Waits until something may be sent, and returns how much.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn wait(&self, sent_bytes: u64) -> u64 {
        loop {
            let available = self.available(sent_bytes);
            if available > 0 {
                return available;
            }
            self.raised.notified().await;
        }
    }

    /// Gives up credit of an idle flow but for `keep_bytes`, and returns how much, to be told to the peer.
    pub fn give_back(&self, sent_bytes: u64, keep_bytes: u64) -> Option<u64> {
        let surplus = self.available(sent_bytes).saturating_sub(keep_bytes);
        self.limit_bytes.fetch_sub(surplus, Ordering::Relaxed);
        (surplus > 0).then_some(surplus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{Account, Budget, Class};
    use proptest::prelude::*;
    use std::sync::Arc;

    const RTT: Duration = Duration::from_millis(50);

    fn window(budget: &Arc<Budget>, now: Instant) -> ReceiveWindow {
        let account = Account::new(Arc::clone(budget), Class::Streams);
        ReceiveWindow::new(account.reserve(INITIAL_CREDIT_BYTES).unwrap(), now)
    }

    /// Drains as fast as the credit allows, one window per `round`.
    fn drain(window: &mut ReceiveWindow, now: &mut Instant, round: Duration) {
        *now += round;
        let open = window.granted_bytes - window.received_bytes;
        window.received(open).unwrap();
        window.consumed(open, || (*now, RTT));
    }

    #[test]
    fn a_fast_consumer_grows_to_the_cap_and_a_slow_one_does_not() {
        let budget = Budget::new(u64::MAX);
        let mut now = crate::clock::now();
        let mut fast = window(&budget, now);
        for _ in 0..20 {
            drain(&mut fast, &mut now, RTT);
        }
        assert_eq!(fast.window_bytes(), WINDOW_BYTES_MAX);
        let mut slow = window(&budget, now);
        for _ in 0..20 {
            drain(&mut slow, &mut now, 5 * RTT);
        }
        assert_eq!(slow.window_bytes(), INITIAL_CREDIT_BYTES);
    }

    #[test]
    fn growth_stops_at_the_budget_but_grants_go_on() {
        let budget = Budget::new(3 * INITIAL_CREDIT_BYTES);
        let mut now = crate::clock::now();
        let mut flow = window(&budget, now);
        for _ in 0..10 {
            drain(&mut flow, &mut now, RTT);
            assert_eq!(flow.granted_bytes - flow.received_bytes, flow.window_bytes());
        }
        assert_eq!(flow.window_bytes(), 2 * INITIAL_CREDIT_BYTES);
        drop(flow);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn an_idle_flow_holds_little_and_recovers() {
        let budget = Budget::new(u64::MAX);
        let now = crate::clock::now();
        let mut receiver = window(&budget, now);
        let sender = SendCredit::new(INITIAL_CREDIT_BYTES);
        let returned = sender.give_back(0, IDLE_CREDIT_BYTES).unwrap();
        assert_eq!(sender.give_back(0, IDLE_CREDIT_BYTES), None);
        assert_eq!(receiver.returned(returned, || (now, RTT)), Ok(None));
        assert_eq!(budget.used_bytes(), IDLE_CREDIT_BYTES);
        let sent = sender.available(0);
        receiver.received(sent).unwrap();
        sender.add(receiver.consumed(sent, || (now, RTT)).unwrap());
        assert_eq!(sender.available(sent), INITIAL_CREDIT_BYTES);
    }

    #[test]
    fn a_return_that_is_overtaken_by_all_that_was_kept_is_answered_by_a_grant() {
        let budget = Budget::new(u64::MAX);
        let now = crate::clock::now();
        let mut receiver = window(&budget, now);
        let sender = SendCredit::new(INITIAL_CREDIT_BYTES);
        let returned = sender.give_back(0, IDLE_CREDIT_BYTES).unwrap();
        receiver.received(IDLE_CREDIT_BYTES).unwrap();
        assert_eq!(receiver.consumed(IDLE_CREDIT_BYTES, || (now, RTT)), None);
        let granted = receiver.returned(returned, || (now, RTT)).unwrap();
        sender.add(granted.unwrap());
        assert_eq!(sender.available(IDLE_CREDIT_BYTES), INITIAL_CREDIT_BYTES);
    }

    #[test]
    fn violations_are_noticed() {
        let budget = Budget::new(u64::MAX);
        let now = crate::clock::now();
        let mut flow = window(&budget, now);
        let measure = || (now, RTT);
        let too_much = Err(CreditViolation::ReturnedTooMuch);
        assert_eq!(flow.returned(INITIAL_CREDIT_BYTES + 1, measure), too_much);
        flow.received(INITIAL_CREDIT_BYTES).unwrap();
        assert_eq!(flow.returned(1, measure), too_much);
        assert_eq!(flow.received(1), Err(CreditViolation::Exceeded));
    }

    /// What lies ahead of a gap is held and not yet received.
    #[test]
    fn what_arrived_ahead_of_its_turn_cannot_be_returned() {
        let budget = Budget::new(u64::MAX);
        let now = crate::clock::now();
        let mut flow = window(&budget, now);
        flow.reaches(INITIAL_CREDIT_BYTES - 10).unwrap();
        let returned = flow.returned(INITIAL_CREDIT_BYTES - 1, || (now, RTT));
        assert_eq!(returned, Err(CreditViolation::ReturnedTooMuch));
        assert_eq!(flow.returned(10, || (now, RTT)), Ok(None));
        assert_eq!(budget.used_bytes(), INITIAL_CREDIT_BYTES - 10);
    }

    /// Otherwise the two would go on for ever.
    #[test]
    fn who_returns_all_again_and_again_is_answered_once() {
        let budget = Budget::new(u64::MAX);
        let now = crate::clock::now();
        let mut flow = window(&budget, now);
        assert_eq!(flow.returned(INITIAL_CREDIT_BYTES, || (now, RTT)), Ok(None));
        let mut flow = window(&budget, now);
        flow.received(1).unwrap();
        assert_eq!(flow.consumed(1, || (now, RTT)), None);
        let rest = INITIAL_CREDIT_BYTES - 1;
        assert_eq!(flow.returned(rest, || (now, RTT)), Ok(Some(INITIAL_CREDIT_BYTES)));
        assert_eq!(flow.returned(INITIAL_CREDIT_BYTES, || (now, RTT)), Ok(None));
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn what_is_held_after_the_end_stays_paid_for() {
        let budget = Budget::new(u64::MAX);
        let now = crate::clock::now();
        let mut flow = window(&budget, now);
        let sent = INITIAL_CREDIT_BYTES / 2;
        flow.received(sent).unwrap();
        flow.finished();
        assert_eq!(budget.used_bytes(), sent);
        assert_eq!(flow.returned(INITIAL_CREDIT_BYTES - sent, || (now, RTT)), Ok(None));
        assert_eq!(budget.used_bytes(), sent);
        assert_eq!(flow.consumed(sent, || (now, RTT)), None);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Send(u64),
        /// One of the pieces on the way.
        Arrive(usize),
        Consume(u64),
        GiveBack,
        ReturnArrives,
        Wait(u16),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (1..1_000_000_u64).prop_map(Op::Send),
            any::<usize>().prop_map(Op::Arrive),
            any::<usize>().prop_map(Op::Arrive),
            (1..1_000_000_u64).prop_map(Op::Consume),
            Just(Op::GiveBack),
            Just(Op::ReturnArrives),
            any::<u16>().prop_map(Op::Wait),
        ]
    }

    /// Both ends of a flow, and the network between them, which keeps no order.
    struct Ends {
        sender: SendCredit,
        receiver: ReceiveWindow,
        now: Instant,
        sent: u64,
        /// Start and end of what is on the way.
        under_way: Vec<(u64, u64)>,
        /// The same of what has arrived ahead of its turn.
        ahead: Vec<(u64, u64)>,
        /// Arrived in order and not consumed.
        held: u64,
        /// Returned, and not heard of.
        returning: u64,
    }

    impl Ends {
        fn new(budget: &Arc<Budget>) -> Self {
            let now = crate::clock::now();
            Self {
                sender: SendCredit::new(INITIAL_CREDIT_BYTES),
                receiver: window(budget, now),
                now,
                sent: 0,
                under_way: Vec::new(),
                ahead: Vec::new(),
                held: 0,
                returning: 0,
            }
        }

        fn step(&mut self, op: &Op) -> Result<(), CreditViolation> {
            let now = self.now;
            match *op {
                Op::Send(bytes) => {
                    let end = self.sent + bytes.min(self.sender.available(self.sent));
                    self.under_way.push((self.sent, end));
                    self.sent = end;
                }
                Op::Arrive(which) if !self.under_way.is_empty() => {
                    let piece = self.under_way.remove(which % self.under_way.len());
                    self.receiver.reaches(piece.1)?;
                    self.ahead.push(piece);
                    while let Some(next) = self
                        .ahead
                        .iter()
                        .position(|(start, _)| *start == self.receiver.received_bytes)
                    {
                        let (start, end) = self.ahead.remove(next);
                        self.receiver.received(end - start)?;
                        self.held += end - start;
                    }
                }
                Op::Arrive(_) => {}
                Op::Consume(bytes) => {
                    let bytes = bytes.min(self.held);
                    self.held -= bytes;
                    let granted = self.receiver.consumed(bytes, || (now, RTT));
                    granted.into_iter().for_each(|add| self.sender.add(add));
                }
                Op::GiveBack => {
                    let returned = self.sender.give_back(self.sent, IDLE_CREDIT_BYTES);
                    self.returning += returned.unwrap_or(0);
                }
                Op::ReturnArrives => {
                    let bytes = std::mem::take(&mut self.returning);
                    let granted = self.receiver.returned(bytes, || (now, RTT))?;
                    granted.into_iter().for_each(|add| self.sender.add(add));
                }
                Op::Wait(ms) => self.now += Duration::from_millis(ms.into()),
            }
            Ok(())
        }
    }

    proptest! {
        /// An honest sender never violates, both ends always agree, whatever has arrived or may is paid for, and a drained flow can always
        /// send again.
        #[test]
        fn the_two_ends_agree(ops in proptest::collection::vec(op(), 0..200), ceiling in 2_u64..9) {
            let budget = Budget::new(ceiling * INITIAL_CREDIT_BYTES);
            let mut ends = Ends::new(&budget);
            for op in ops {
                prop_assert_eq!(ends.step(&op), Ok(()));
                let Ends { sender, receiver, sent, returning, held, .. } = &ends;
                prop_assert_eq!(sender.available(*sent) + returning, receiver.granted_bytes - sent);
                let reached = receiver.reached_bytes - receiver.received_bytes;
                let open = receiver.granted_bytes - receiver.reached_bytes;
                prop_assert!(held + reached + open <= receiver.window_bytes());
                prop_assert!(ends.ahead.iter().all(|(_, end)| *end <= receiver.reached_bytes));
                prop_assert!(budget.used_bytes() <= budget.ceiling_bytes());
                let is_drained = *held == 0 && ends.ahead.is_empty() && ends.under_way.is_empty();
                prop_assert!(!is_drained || *returning > 0 || sender.available(*sent) > 0);
            }
            let open = ends.receiver.granted_bytes - ends.receiver.reached_bytes;
            let too_much = ends.receiver.returned(open + 1, || (ends.now, RTT));
            prop_assert_eq!(too_much, Err(CreditViolation::ReturnedTooMuch));
        }
    }
}
