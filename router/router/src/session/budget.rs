//! One ceiling for the memory that flows of this router may make us hold, and a share of it for each site.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Router-wide budget of flow buffers.
///
/// What counts is what peers have been *promised*: a peer may use all of its credit at any time.
#[derive(Debug)]
pub struct Budget {
    ceiling_bytes: AtomicU64,
    used_bytes: AtomicU64,
}

impl Budget {
    /// A budget of `ceiling_bytes`.
    #[must_use]
    pub fn new(ceiling_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            ceiling_bytes: AtomicU64::new(ceiling_bytes),
            used_bytes: AtomicU64::new(0),
        })
    }

    /// Changes the ceiling; what is promised already stays promised.
    pub fn set_ceiling(&self, ceiling_bytes: u64) {
        self.ceiling_bytes.store(ceiling_bytes, Ordering::Relaxed);
    }

    /// The configured ceiling.
    #[must_use]
    pub fn ceiling_bytes(&self) -> u64 {
        self.ceiling_bytes.load(Ordering::Relaxed)
    }

    /// What is promised now.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Reserves `bytes` until the reservation is dropped; `None` at the ceiling.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        Reservation { budget: Arc::clone(self), account: None, bytes: 0, half: false }.grown(bytes)
    }

    /// As [`Budget::reserve`], but only while no more than half is used; nor does the reservation grow beyond that.
    #[must_use]
    pub fn reserve_half(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        Reservation { budget: Arc::clone(self), account: None, bytes: 0, half: true }.grown(bytes)
    }

    fn try_take(&self, bytes: u64, half: bool) -> bool {
        let ceiling_bytes = self.ceiling_bytes() / if half { 2 } else { 1 };
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|&used| used <= ceiling_bytes)
            })
            .is_ok()
    }
}

/// One site may hold so many times what is left for everybody else: alone three quarters of the budget, beside others less. Whoever comes
/// late finds room, and nobody needs to know how many there are.
const SHARE: u64 = 3;

/// What one site has made us promise.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    used_bytes: AtomicU64,
}

impl Account {
    /// An account that holds nothing yet.
    #[must_use]
    pub fn new(budget: Arc<Budget>) -> Arc<Self> {
        Arc::new(Self { budget, used_bytes: AtomicU64::new(0) })
    }

    /// Reserves `bytes` until the reservation is dropped; `None` at the ceiling, or beyond the site's share.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        self.nothing().grown(bytes)
    }

    /// As [`Account::reserve`], but only while no more than half of the budget is used; nor does the reservation grow beyond that.
    #[must_use]
    pub fn reserve_half(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let mut reservation = self.nothing();
        reservation.half = true;
        reservation.grown(bytes)
    }

    /// A reservation that may grow. There is always room for it, also where the site holds more than its share has become.
    #[must_use]
    pub fn nothing(self: &Arc<Self>) -> Reservation {
        let budget = Arc::clone(&self.budget);
        Reservation { budget, account: Some(Arc::clone(self)), bytes: 0, half: false }
    }

    /// Counts `bytes` that the budget has just given; `false` when they are too much for one site.
    fn try_take(&self, bytes: u64) -> bool {
        let left = self.budget.ceiling_bytes().saturating_sub(self.budget.used_bytes());
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|&used| used <= left.saturating_mul(SHARE))
            })
            .is_ok()
    }
}

/// A part of the [`Budget`], given back on drop.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    account: Option<Arc<Account>>,
    bytes: u64,
    /// Grows only while no more than half of the budget is used.
    half: bool,
}

impl Reservation {
    fn grown(mut self, bytes: u64) -> Option<Self> {
        self.try_grow(bytes).then_some(self)
    }

    /// What is reserved.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reserves `bytes` more, or nothing and `false` at the ceiling.
    pub fn try_grow(&mut self, bytes: u64) -> bool {
        self.try_grow_in(bytes, self.half)
    }

    /// As [`Reservation::try_grow`], but only if no more than half of the budget is used then.
    pub(super) fn try_grow_within_half(&mut self, bytes: u64) -> bool {
        self.try_grow_in(bytes, true)
    }

    fn try_grow_in(&mut self, bytes: u64, half: bool) -> bool {
        if !self.budget.try_take(bytes, half) {
            return false;
        }
        if self.account.as_ref().is_some_and(|account| !account.try_take(bytes)) {
            self.budget.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        self.bytes += bytes;
        true
    }

    /// Gives back `bytes`, at most what is reserved.
    pub fn shrink(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(account) = &self.account {
            account.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_holds_and_drop_gives_back() {
        let budget = Budget::new(100);
        let mut first = budget.reserve(60).unwrap();
        assert!(budget.reserve(41).is_none());
        assert!(first.try_grow(40));
        assert!(!first.try_grow(1));
        first.shrink(30);
        assert_eq!((budget.used_bytes(), first.bytes()), (70, 70));
        drop(first);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn a_site_leaves_room_for_others() {
        let budget = Budget::new(1_024);
        let greedy = Account::new(Arc::clone(&budget));
        let taken: Vec<_> = std::iter::from_fn(|| greedy.reserve(16)).collect();
        assert_eq!(budget.used_bytes(), 768);
        let late = Account::new(Arc::clone(&budget));
        let others: Vec<_> = std::iter::from_fn(|| late.reserve(16)).collect();
        assert_eq!(others.len(), 12);
        assert!(greedy.reserve(1).is_none(), "its share has shrunk");
        drop(taken);
        assert!(greedy.reserve(512).is_some());
        drop(others);
        assert_eq!((budget.used_bytes(), greedy.used_bytes.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn who_comes_second_leaves_half() {
        let budget = Budget::new(100);
        let account = Account::new(Arc::clone(&budget));
        let mut second = account.reserve_half(40).unwrap();
        assert!(!second.try_grow(11) && second.try_grow(10));
        assert!(budget.reserve_half(1).is_none());
        assert!(budget.reserve(50).is_some());
    }

    #[test]
    fn a_lowered_ceiling_refuses_new_promises_only() {
        let budget = Budget::new(100);
        let held = budget.reserve(100).unwrap();
        budget.set_ceiling(10);
        assert!(budget.reserve(1).is_none());
        drop(held);
        assert!(budget.reserve(10).is_some());
    }
}
