//! One ceiling for the memory that flows of this router may make us hold.

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
        let mut reservation = Reservation { budget: Arc::clone(self), bytes: 0 };
        reservation.try_grow(bytes).then_some(reservation)
    }

    fn try_take(&self, bytes: u64) -> bool {
        let ceiling_bytes = self.ceiling_bytes();
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|&used| used <= ceiling_bytes)
            })
            .is_ok()
    }
}

/// A part of the [`Budget`], given back on drop.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Reservation {
    /// What is reserved.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reserves `bytes` more, or nothing and `false` at the ceiling.
    pub fn try_grow(&mut self, bytes: u64) -> bool {
        let taken = self.budget.try_take(bytes);
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    /// Gives back `bytes`, at most what is reserved.
    pub fn shrink(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
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
    fn a_lowered_ceiling_refuses_new_promises_only() {
        let budget = Budget::new(100);
        let held = budget.reserve(100).unwrap();
        budget.set_ceiling(10);
        assert!(budget.reserve(1).is_none());
        drop(held);
        assert!(budget.reserve(10).is_some());
    }
}
