//! What a client says while an egress is sought: the newest of it, paid for. Pure.

use crate::session::{Account, Reservation};
use bytes::{Bytes, BytesMut};
use skein_wire::association::{RECORD_PREFIX_LEN, record};
use std::{collections::VecDeque, sync::Arc};

/// The longest datagram fits, and all of it goes along with the open of a flow: its credit is no less.
const HELD_BYTES_MAX: usize = 64 << 10;
/// A client that sends more while it waits is not waiting for an answer.
const HELD_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Held {
    /// The oldest first.
    records: VecDeque<Bytes>,
    len_bytes: usize,
    /// So many of the first went along with the last open.
    sent: usize,
    paid: Reservation,
}

impl Held {
    /// Nothing yet; `account` pays for what comes.
    pub(super) fn new(account: &Arc<Account>) -> Self {
        Self { records: VecDeque::new(), len_bytes: 0, sent: 0, paid: account.nothing() }
    }

    /// Takes a datagram, and returns how many are lost: older ones that had to go and were not sent, or itself where there is no memory.
    pub(super) fn push(&mut self, payload: &[u8]) -> u64 {
        let Some(record) = record(payload) else { return 1 };
        let mut dropped = 0;
        while self.len_bytes + record.len() > HELD_BYTES_MAX || self.records.len() >= HELD_MAX {
            let Some(oldest) = self.records.pop_front() else { break };
            self.len_bytes -= oldest.len();
            self.paid.shrink(oldest.len() as u64);
            dropped += u64::from(self.sent == 0);
            self.sent = self.sent.saturating_sub(1);
        }
        if !self.paid.try_grow(record.len() as u64) {
            return dropped + 1;
        }
        self.len_bytes += record.len();
        self.records.push_back(record);
        dropped
    }

    /// All of it, to go along with an open.
    pub(super) fn records(&mut self) -> Bytes {
        self.sent = self.records.len();
        let mut out = BytesMut::with_capacity(self.len_bytes);
        self.records.iter().for_each(|record| out.extend_from_slice(record));
        out.freeze()
    }

    /// Whoever the last open was for has refused, and the next gets nothing along.
    pub(super) fn forget_sent(&mut self) {
        self.sent = 0;
    }

    /// Takes the datagrams that did not go along with the last open.
    pub(super) fn unsent(&mut self) -> impl Iterator<Item = Bytes> + '_ {
        let sent = std::mem::take(&mut self.sent);
        self.records.drain(..sent);
        self.records.drain(..).map(|record| record.slice(RECORD_PREFIX_LEN..))
    }

    /// Datagrams that wait.
    pub(super) fn len(&self) -> u64 {
        self.records.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{Budget, Class};

    fn held(budget_bytes: u64) -> (Held, Arc<Budget>) {
        let budget = Budget::new(budget_bytes);
        (Held::new(&Account::new(Arc::clone(&budget), Class::Datagrams)), budget)
    }

    #[test]
    fn what_went_along_is_not_sent_again() {
        let (mut held, budget) = held(1 << 20);
        for payload in [&b"a"[..], b"", b"bc"] {
            assert_eq!(held.push(payload), 0);
        }
        assert_eq!(&held.records()[..], b"\0\x01a\0\0\0\x02bc");
        held.push(b"later");
        assert_eq!(held.unsent().collect::<Vec<_>>(), [&b"later"[..]]);
        held.push(b"again");
        held.records();
        held.forget_sent();
        assert_eq!(held.unsent().collect::<Vec<_>>(), [&b"again"[..]]);
        drop(held);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn the_newest_are_kept_and_paid_for() {
        let (mut held, budget) = held(1 << 20);
        assert_eq!(held.push(&[1; 65_507]), 0);
        assert_eq!(budget.used_bytes(), 65_509);
        assert_eq!(held.push(&[2; 100]), 1);
        assert_eq!(budget.used_bytes(), 102);
        held.records();
        for n in 0..HELD_MAX {
            assert_eq!(held.push(&[3]), 0, "{n}: what was sent is not lost");
        }
        assert_eq!(held.push(&[4]), 1);
        assert_eq!(held.unsent().last().unwrap(), &[4][..]);
    }

    #[test]
    fn without_memory_nothing_is_held() {
        let (mut held, _budget) = held(20);
        assert_eq!(held.push(&[0; 100]), 1);
        assert_eq!((held.push(b"short"), held.len()), (0, 1));
    }
}
