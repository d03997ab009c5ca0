//! One ceiling for the memory that flows of this router may make us hold, and a share of it for each site.

use super::Class;
use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// All that associations hold may be one part in so many: anybody can begin any number of them, without a handshake.
const DATAGRAMS_DIVISOR: u64 = 2;
/// What outlasts its use grows only while no more than one part in so many of what there is for its class is used.
const LASTING_DIVISOR: u64 = 2;
/// One site may hold so many times what is left for everybody else: alone three quarters, beside others less. Whoever comes late finds room,
/// and nobody needs to know how many there are. Its streams and its associations each have their own such share, so that a site that is
/// busy with the ones is not refused the others.
const SHARE: u64 = 3;

/// Router-wide budget of flow buffers.
///
/// What counts is what peers have been *promised*: a peer may use all of its credit at any time.
#[derive(Debug)]
pub struct Budget {
    ceiling_bytes: AtomicU64,
    used: Mutex<Used>,
}

/// What is promised, by what it is for.
#[derive(Clone, Copy, Default, Debug)]
struct Used {
    streams_bytes: u64,
    datagrams_bytes: u64,
}

impl Used {
    fn all_bytes(self) -> u64 {
        self.streams_bytes + self.datagrams_bytes
    }

    fn of(&mut self, class: Class) -> &mut u64 {
        match class {
            Class::Streams => &mut self.streams_bytes,
            Class::Datagrams => &mut self.datagrams_bytes,
        }
    }

    /// What of `room_bytes` is left for flows of this class.
    fn left_bytes(self, class: Class, room_bytes: u64) -> u64 {
        let left_bytes = room_bytes.saturating_sub(self.all_bytes());
        match class {
            Class::Streams => left_bytes,
            Class::Datagrams => {
                let part_bytes = room_bytes / DATAGRAMS_DIVISOR;
                left_bytes.min(part_bytes.saturating_sub(self.datagrams_bytes))
            }
        }
    }
}

impl Budget {
    /// A budget of `ceiling_bytes`.
    #[must_use]
    pub fn new(ceiling_bytes: u64) -> Arc<Self> {
        Arc::new(Self { ceiling_bytes: AtomicU64::new(ceiling_bytes), used: Mutex::default() })
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
        self.used.lock().all_bytes()
    }
}

/// What one site has made us promise, in flows of one class.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    class: Class,
    /// Changed under the lock of the budget.
    used_bytes: AtomicU64,
}

impl Account {
    /// An account that holds nothing yet.
    #[must_use]
    pub fn new(budget: Arc<Budget>, class: Class) -> Arc<Self> {
        Arc::new(Self { budget, class, used_bytes: AtomicU64::new(0) })
    }

    /// Reserves `bytes` until the reservation is dropped; `None` at the ceiling, or beyond the site's share.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        self.nothing().grown(bytes)
    }

    /// A reservation that may grow. There is always room for it, also where the site holds more than its share has become.
    #[must_use]
    pub fn nothing(self: &Arc<Self>) -> Reservation {
        Reservation { account: Arc::clone(self), bytes: 0 }
    }

    /// Whether there were `bytes` left of one part in `divisor` of the memory, and no more than the site's share: it has them then.
    fn try_take(&self, bytes: u64, divisor: u64) -> bool {
        let mut used = self.budget.used.lock();
        let ceiling_bytes = self.budget.ceiling_bytes();
        if bytes > used.left_bytes(self.class, ceiling_bytes / divisor) {
            return false;
        }
        let left_bytes = used.left_bytes(self.class, ceiling_bytes) - bytes;
        let own_bytes = self.used_bytes.load(Ordering::Relaxed) + bytes;
        let is_fair = own_bytes <= left_bytes.saturating_mul(SHARE);
        if is_fair {
            *used.of(self.class) += bytes;
            self.used_bytes.store(own_bytes, Ordering::Relaxed);
        }
        is_fair
    }

    fn give_back(&self, bytes: u64) {
        let mut used = self.budget.used.lock();
        *used.of(self.class) -= bytes;
        let own_bytes = self.used_bytes.load(Ordering::Relaxed) - bytes;
        self.used_bytes.store(own_bytes, Ordering::Relaxed);
    }
}

/// A part of the [`Budget`], given back on drop.
#[derive(Debug)]
pub struct Reservation {
    account: Arc<Account>,
    bytes: u64,
}

impl Reservation {
    fn grown(mut self, bytes: u64) -> Option<Self> {
        self.try_grow(bytes).then_some(self)
    }

    /// Who pays.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// The same, but of `bytes` in all and out of `account`, which may be another; `None` where that does not suffice.
    pub(super) fn settled(self, account: &Arc<Account>, bytes: u64) -> Option<Self> {
        if Arc::ptr_eq(&self.account, account) {
            let more = bytes.saturating_sub(self.bytes);
            return self.grown(more);
        }
        drop(self);
        account.reserve(bytes)
    }

    /// What is reserved.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reserves `bytes` more, or nothing and `false` at the ceiling. Nothing more is no question of memory, even where there is none.
    pub fn try_grow(&mut self, bytes: u64) -> bool {
        self.try_grow_in(bytes, 1)
    }

    /// As [`Reservation::try_grow`], for what outlasts its use: only if no more than half is used then of what there is.
    pub(super) fn try_grow_lasting(&mut self, bytes: u64) -> bool {
        self.try_grow_in(bytes, LASTING_DIVISOR)
    }

    fn try_grow_in(&mut self, bytes: u64, divisor: u64) -> bool {
        let is_taken = bytes == 0 || self.account.try_take(bytes, divisor);
        self.bytes += if is_taken { bytes } else { 0 };
        is_taken
    }

    /// Gives back `bytes`, at most what is reserved.
    pub fn shrink(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.account.give_back(bytes);
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

    fn account(budget: &Arc<Budget>, class: Class) -> Arc<Account> {
        Account::new(Arc::clone(budget), class)
    }

    /// All that fits.
    fn fill(account: &Arc<Account>) -> Vec<Reservation> {
        std::iter::from_fn(|| account.reserve(16)).collect()
    }

    #[test]
    fn the_ceiling_holds_and_drop_gives_back() {
        let budget = Budget::new(100);
        let (one, other) = (account(&budget, Class::Streams), account(&budget, Class::Streams));
        let mut first = one.reserve(60).unwrap();
        assert!(other.reserve(41).is_none());
        assert!(first.try_grow(15));
        assert!(!first.try_grow(1), "beyond its share");
        first.shrink(30);
        assert_eq!((budget.used_bytes(), first.bytes()), (45, 45));
        drop(first);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn what_threads_give_back_is_missed_nowhere() {
        let budget = Budget::new(1 << 40);
        let shared = account(&budget, Class::Streams);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for bytes in 1..20_000 {
                        drop(shared.reserve(bytes).unwrap());
                    }
                });
            }
        });
        assert_eq!((budget.used_bytes(), shared.used_bytes.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn a_site_leaves_room_for_others() {
        let budget = Budget::new(1_024);
        let greedy = account(&budget, Class::Streams);
        let taken = fill(&greedy);
        assert_eq!(budget.used_bytes(), 768);
        let others = fill(&account(&budget, Class::Streams));
        assert_eq!(others.len(), 12);
        assert!(greedy.reserve(1).is_none(), "its share has shrunk");
        drop(taken);
        assert!(greedy.reserve(512).is_some());
        drop(others);
        assert_eq!((budget.used_bytes(), greedy.used_bytes.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn associations_take_half_and_one_site_leaves_others_a_part_of_it() {
        let budget = Budget::new(1_024);
        let sites: Vec<_> = (0..8).map(|_| account(&budget, Class::Datagrams)).collect();
        let mut taken: Vec<_> = sites.iter().map(fill).collect();
        assert_eq!((taken[0].len(), taken[1].len()), (24, 6));
        assert!(budget.used_bytes() <= 512);
        assert!(!taken[0][0].try_grow(1));
        assert_eq!(fill(&account(&budget, Class::Streams)).len(), 24, "three quarters of the rest");
    }

    #[test]
    fn streams_and_associations_of_a_site_keep_each_other_from_nothing() {
        let budget = Budget::new(1_024);
        let streams = account(&budget, Class::Streams);
        let datagrams = account(&budget, Class::Datagrams);
        let busy = fill(&streams);
        assert_eq!(fill(&datagrams).len(), 12);
        drop(busy);
        let _flood = fill(&datagrams);
        assert!(fill(&streams).len() >= 24);
    }

    #[test]
    fn what_outlasts_its_use_leaves_half() {
        let budget = Budget::new(100);
        let (streams, datagrams) =
            (account(&budget, Class::Streams), account(&budget, Class::Datagrams));
        let (mut streams, mut datagrams) = (streams.nothing(), datagrams.nothing());
        assert!(!datagrams.try_grow_lasting(26) && datagrams.try_grow_lasting(25));
        assert!(!streams.try_grow_lasting(26) && streams.try_grow_lasting(25));
        assert!(streams.try_grow(1));
    }

    #[test]
    fn a_lowered_ceiling_refuses_new_promises_only() {
        let budget = Budget::new(100);
        let account = account(&budget, Class::Streams);
        let mut held = account.reserve(75).unwrap();
        budget.set_ceiling(10);
        assert!(held.try_grow(0) && !held.try_grow(1));
        held.shrink(70);
        assert!(account.reserve(1).is_some());
    }

    #[test]
    fn who_pays_is_settled_later() {
        let budget = Budget::new(100);
        let streams = account(&budget, Class::Streams);
        let datagrams = account(&budget, Class::Datagrams);
        let paid = streams.reserve(20).unwrap().settled(&datagrams, 30).unwrap();
        let used = |account: &Account| account.used_bytes.load(Ordering::Relaxed);
        assert_eq!((used(&streams), used(&datagrams), budget.used_bytes()), (0, 30, 30));
        budget.set_ceiling(0);
        assert_eq!(paid.settled(&datagrams, 30).unwrap().bytes(), 30);
        assert_eq!(budget.used_bytes(), 0);
    }
}
