//! The window of a connection: the credit of its flows and a little more, so that what a peer makes QUIC hold is paid for like what it
//! makes us hold.
//!
//! Bytes that cannot be read yet, because one before them is missing or their flow is busy, stay in QUIC. A peer that keeps to its credit
//! never meets this window: it has room for all that was granted and not received. So flows that stall do not starve others, as they
//! would in a window of one size.

/// Beyond the credit, for what is none: heads of flows, what comes along with them before we know of the flow, the control stream. Only
/// the first flows of a session can fill it, since the others find the credit that those before them do not use.
pub(super) const SLACK_BYTES: u64 = 64 << 10;
/// Once changed, the window is this fraction larger than need be, so that it does not have to follow every grant.
const MARGIN_DIVISOR: u64 = 8;
/// It is never larger than need be by more than this fraction.
const EXCESS_DIVISOR: u64 = 2;

/// Follows the credit that is open in all flows of a session. Pure.
#[derive(Debug)]
pub(super) struct Inbound {
    credit_bytes: u64,
    window_bytes: u64,
}

impl Default for Inbound {
    fn default() -> Self {
        Self { credit_bytes: 0, window_bytes: SLACK_BYTES }
    }
}

impl Inbound {
    /// Takes note that one flow's open credit is `after` and no more `before`; returns the window to set, if it must change.
    pub(super) fn changed(&mut self, before: u64, after: u64) -> Option<u64> {
        self.credit_bytes = self.credit_bytes + after - before;
        let wanted = SLACK_BYTES + self.credit_bytes;
        let excess = self.window_bytes.checked_sub(wanted);
        if excess.is_some_and(|excess| excess <= wanted / EXCESS_DIVISOR) {
            return None;
        }
        self.window_bytes = wanted + wanted / MARGIN_DIVISOR;
        Some(self.window_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// There is room for all that was granted, and for little more.
        #[test]
        fn the_window_is_the_open_credit_and_a_bounded_excess(
            changes in proptest::collection::vec((0_usize..8, 0_u64..64 << 20), 1..200),
        ) {
            let (mut inbound, mut flows) = (Inbound::default(), [0; 8]);
            let mut window = SLACK_BYTES;
            for (flow, after) in changes {
                window = inbound.changed(flows[flow], after).unwrap_or(window);
                flows[flow] = after;
                let needed = SLACK_BYTES + flows.iter().sum::<u64>();
                prop_assert!((needed..=needed * 3 / 2).contains(&window));
            }
        }
    }

    #[test]
    fn a_flow_that_only_moves_does_not_change_it() {
        let mut inbound = Inbound::default();
        let full = 8 << 20;
        assert!(inbound.changed(0, full).is_some());
        for _ in 0..10 {
            assert_eq!(inbound.changed(full, full * 3 / 4), None);
            assert_eq!(inbound.changed(full * 3 / 4, full), None);
        }
    }
}
