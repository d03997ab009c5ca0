//! The window of a connection: how much a peer may make QUIC hold.
//!
//! What has arrived is taken from QUIC at once, and paid for by the credit of its flow. QUIC holds what cannot be read yet, because a byte
//! before it is missing or its flow is about to run: as much as a round trip brings, however many flows were granted however much. So the
//! window follows what the session moves, like that of a TCP connection, and is paid for by itself. QUIC cannot take back what it has
//! permitted: a smaller window comes about as the peer uses up the larger one, and is paid for until then.

use super::Reservation;
use std::time::{Duration, Instant};

/// At first, and what is paid for as long as the session lasts: heads of flows, the control stream, and what little sessions move.
pub(super) const SLACK_BYTES: u64 = 64 << 10;
/// Largest window: 5 Gbit/s over 100 ms, like that of a flow.
const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// Up to here a window grows by this factor, so that it is not behind the sender's first flights; beyond it doubles.
const QUICK_BYTES: u64 = 1 << 20;
const QUICK_FACTOR: u64 = 4;
/// It grows when a round brought this fraction of it, so it settles at two to four times the bandwidth-delay product...
const FULL_DIVISOR: u64 = 2;
/// ...and halves when so many windows have passed of which no round brought this fraction.
const SPARSE_DIVISOR: u64 = 8;
const SPARSE_WINDOWS: u64 = 2;
/// Round-trip times below are scheduling noise and would make windows grow without need.
const ROUND_MIN: Duration = Duration::from_millis(2);

/// Follows what a session takes from QUIC. Pure: time and round-trip time are arguments.
#[derive(Debug)]
pub(super) struct Inbound {
    /// For all that is permitted beyond [`SLACK_BYTES`]: window and debt.
    paid: Reservation,
    window_bytes: u64,
    /// Permitted beyond the window: QUIC keeps it from what is read next.
    debt_bytes: u64,
    round_ends: Instant,
    round_bytes: u64,
    /// Read since a round last brought enough to keep the window.
    sparse_bytes: u64,
}

impl Inbound {
    /// The window that a connection begins with; `nothing` is to pay for a larger one.
    pub(super) fn new(nothing: Reservation, now: Instant) -> Self {
        Self {
            paid: nothing,
            window_bytes: SLACK_BYTES,
            debt_bytes: 0,
            round_ends: now,
            round_bytes: 0,
            sparse_bytes: 0,
        }
    }

    /// Takes note that so many bytes were read; returns the window to set, if it must change.
    ///
    /// Bytes that QUIC throws away, as those of a flow that was stopped, are not noted and stay paid for.
    pub(super) fn took(
        &mut self,
        bytes: u64,
        now: Instant,
        rtt: impl FnOnce() -> Duration,
    ) -> Option<u64> {
        let settled_bytes = bytes.min(self.debt_bytes);
        self.debt_bytes -= settled_bytes;
        self.paid.shrink(settled_bytes);
        if now >= self.round_ends {
            self.round_ends = now + rtt().max(ROUND_MIN);
            self.round_bytes = 0;
        }
        self.round_bytes += bytes;
        self.sparse_bytes += bytes;
        if self.round_bytes >= self.window_bytes / SPARSE_DIVISOR {
            self.sparse_bytes = 0;
        }
        if self.round_bytes >= self.window_bytes / FULL_DIVISOR {
            self.round_bytes = 0;
            self.grow()
        } else if self.sparse_bytes >= SPARSE_WINDOWS * self.window_bytes {
            self.sparse_bytes = 0;
            self.shrink()
        } else {
            None
        }
    }

    fn grow(&mut self) -> Option<u64> {
        let window = self.window_bytes;
        let next = if window < QUICK_BYTES {
            (QUICK_FACTOR * window).min(QUICK_BYTES)
        } else {
            (2 * window).min(WINDOW_BYTES_MAX)
        };
        let more = next - window;
        // What outlasts its use must leave flows room.
        let is_paid = more > 0
            && if next <= QUICK_BYTES {
                self.paid.try_grow(more)
            } else {
                self.paid.try_grow_lasting(more)
            };
        is_paid.then(|| {
            self.window_bytes = next;
            next
        })
    }

    fn shrink(&mut self) -> Option<u64> {
        let next = (self.window_bytes / 2).max(SLACK_BYTES);
        let less = self.window_bytes - next;
        // One debt after the other: what is permitted never exceeds what it was when the window was largest.
        (less > 0 && self.debt_bytes == 0).then(|| {
            self.debt_bytes = less;
            self.window_bytes = next;
            next
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        session::{Account, Budget, Class},
    };
    use proptest::prelude::*;
    use std::sync::Arc;

    const RTT: Duration = Duration::from_millis(50);

    fn inbound(budget: &Arc<Budget>, now: Instant) -> Inbound {
        Inbound::new(Account::new(Arc::clone(budget), Class::Streams).nothing(), now)
    }

    #[test]
    fn a_window_that_every_round_fills_grows_to_the_cap() {
        let budget = Budget::new(u64::MAX);
        let mut now = clock::now();
        let mut inbound = inbound(&budget, now);
        for _ in 0..20 {
            now += RTT;
            inbound.took(inbound.window_bytes, now, || RTT);
        }
        assert_eq!(inbound.window_bytes, WINDOW_BYTES_MAX);
        assert_eq!(budget.used_bytes(), WINDOW_BYTES_MAX - SLACK_BYTES);
    }

    #[test]
    fn a_window_settles_at_a_few_round_trips_worth() {
        let budget = Budget::new(u64::MAX);
        let mut now = clock::now();
        let mut inbound = inbound(&budget, now);
        let per_round = 2 << 20;
        for _ in 0..1_000 {
            now += RTT / 10;
            inbound.took(per_round / 10, now, || RTT);
        }
        assert!((2 * per_round..=4 * per_round).contains(&inbound.window_bytes));
    }

    #[test]
    fn a_window_that_little_passes_shrinks_and_is_paid_for_until_it_is_used_up() {
        let budget = Budget::new(u64::MAX);
        let mut now = clock::now();
        let mut inbound = inbound(&budget, now);
        while inbound.window_bytes < 4 << 20 {
            inbound.took(inbound.window_bytes, now, || RTT);
        }
        let largest = budget.used_bytes();
        let mut trickle = |inbound: &mut Inbound| {
            now += RTT;
            inbound.took(10_000, now, || RTT)
        };
        while trickle(&mut inbound).is_none() {}
        assert_eq!((inbound.window_bytes, budget.used_bytes()), (2 << 20, largest));
        while inbound.window_bytes > SLACK_BYTES || inbound.debt_bytes > 0 {
            trickle(&mut inbound);
        }
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn large_windows_leave_half_of_the_memory_to_flows() {
        let budget = Budget::new(16 << 20);
        let now = clock::now();
        let mut inbound = inbound(&budget, now);
        for _ in 0..20 {
            inbound.took(WINDOW_BYTES_MAX, now, || RTT);
        }
        assert_eq!(inbound.window_bytes, 8 << 20);
    }

    /// As much of `quinn_proto`'s flow control as counts here.
    struct Quic {
        permitted: u64,
        window: u64,
        debt: u64,
    }

    impl Quic {
        fn set_window(&mut self, window: u64) {
            self.permitted += window.saturating_sub(self.window);
            self.debt += self.window.saturating_sub(window);
            self.window = window;
        }

        fn take(&mut self, bytes: u64) {
            let settled = bytes.min(self.debt);
            self.debt -= settled;
            self.permitted -= settled;
        }
    }

    proptest! {
        /// What QUIC lets the peer send, as long as nobody reads it, is paid for, whether we see what it throws away or not.
        #[test]
        fn all_that_is_permitted_is_paid_for(
            steps in proptest::collection::vec((0_u64..8 << 20, 0_u64..100, any::<bool>()), 1..200),
        ) {
            let budget = Budget::new(64 << 20);
            let mut now = clock::now();
            let mut inbound = inbound(&budget, now);
            let mut quic = Quic { permitted: SLACK_BYTES, window: SLACK_BYTES, debt: 0 };
            for (bytes, ms, is_seen) in steps {
                now += Duration::from_millis(ms);
                quic.take(bytes);
                if is_seen && let Some(window) = inbound.took(bytes, now, || RTT) {
                    quic.set_window(window);
                }
                prop_assert!(quic.permitted <= budget.used_bytes() + SLACK_BYTES);
                prop_assert!(budget.used_bytes() <= budget.ceiling_bytes());
            }
        }
    }
}
