//! Room for handshakes of peers: anybody who may send frames can write any router's handle into them, so what is unproven gets little.

use parking_lot::Mutex;
use skein_core::{RouterId, SiteId};
use std::{collections::HashMap, hash::Hash, sync::Arc};

/// Handshakes going on at a time; a router has as many neighbours at most that dial at once after a restart.
const ALL_MAX: usize = 256;
/// Of these, so many may be with whoever has not shown that it gets our answers. The others are asked to show it, for a round trip.
const UNPROVEN_MAX: usize = 64;
/// Likewise in the name of one router: one dial and its repetition.
const UNPROVEN_PER_ROUTER_MAX: usize = 2;
/// One router needs one per pin, and one for each session that gets a successor.
const PER_ROUTER_MAX: usize = 16;
/// One site, whatever the number of its routers, leaves half of the room to others.
const PER_SITE_MAX: usize = ALL_MAX / 2;

/// What becomes of a first packet.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The handshake may go on for as long as the slot is held.
    Enter(Slot),
    /// Its sender shall first show that it gets our answers.
    Prove,
    /// Not now: it comes again.
    Ignore,
}

/// The handshakes that go on.
#[derive(Debug, Default)]
pub(super) struct Admission(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    unproven: usize,
    by_site: HashMap<SiteId, usize>,
    by_router: HashMap<RouterId, usize>,
    unproven_by_router: HashMap<RouterId, usize>,
}

/// A slot, given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    admission: Arc<Admission>,
    router: RouterId,
    site: SiteId,
    is_proven: bool,
}

impl Admission {
    /// What becomes of a dial in the name of `router`, a router of `site`.
    pub(super) fn enter(
        self: &Arc<Self>,
        router: RouterId,
        site: SiteId,
        is_proven: bool,
    ) -> Verdict {
        let mut taken = self.0.lock();
        let is_crowded = taken.unproven >= UNPROVEN_MAX
            || count(&taken.unproven_by_router, &router) >= UNPROVEN_PER_ROUTER_MAX;
        if !is_proven && is_crowded {
            return Verdict::Prove;
        }
        if taken.all >= ALL_MAX
            || count(&taken.by_site, &site) >= PER_SITE_MAX
            || count(&taken.by_router, &router) >= PER_ROUTER_MAX
        {
            return Verdict::Ignore;
        }
        taken.all += 1;
        *taken.by_site.entry(site).or_default() += 1;
        *taken.by_router.entry(router).or_default() += 1;
        if !is_proven {
            taken.unproven += 1;
            *taken.unproven_by_router.entry(router).or_default() += 1;
        }
        Verdict::Enter(Slot { admission: Arc::clone(self), router, site, is_proven })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.admission.0.lock();
        taken.all -= 1;
        give_back(&mut taken.by_site, self.site);
        give_back(&mut taken.by_router, self.router);
        if !self.is_proven {
            taken.unproven -= 1;
            give_back(&mut taken.unproven_by_router, self.router);
        }
    }
}

fn count<K: Hash + Eq>(counts: &HashMap<K, usize>, key: &K) -> usize {
    counts.get(key).copied().unwrap_or(0)
}

fn give_back<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    if let Some(left) = counts.get_mut(&key) {
        *left -= 1;
        if *left == 0 {
            counts.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(n: u8) -> RouterId {
        RouterId([n; 16])
    }

    fn site(n: u8) -> SiteId {
        SiteId([n; 32])
    }

    fn slots(verdicts: impl Iterator<Item = Verdict>) -> Vec<Slot> {
        let slot = |verdict| match verdict {
            Verdict::Enter(slot) => Some(slot),
            Verdict::Prove | Verdict::Ignore => None,
        };
        verdicts.filter_map(slot).collect()
    }

    #[test]
    fn forged_dials_keep_nobody_out_who_gets_our_answers() {
        let admission = Arc::<Admission>::default();
        let forged = |n: u8| admission.enter(router(n), site(n), false);
        let held = slots((0..=255).flat_map(|n| [n; 10]).map(forged));
        assert_eq!(held.len(), UNPROVEN_MAX);
        for n in 0..=99 {
            assert!(matches!(forged(n), Verdict::Prove));
        }
        let genuine = slots((0..=99).map(|n| admission.enter(router(n), site(n), true)));
        assert_eq!(genuine.len(), 100);
    }

    #[test]
    fn one_router_and_one_site_leave_room() {
        let admission = Arc::<Admission>::default();
        let greedy = |n: u8| admission.enter(router(n), site(1), true);
        assert_eq!(slots((0..100).map(|_| greedy(0))).len(), PER_ROUTER_MAX);
        let held = slots((0..=255).flat_map(|n| [n; 2]).map(greedy));
        assert_eq!(held.len(), PER_SITE_MAX);
        assert!(matches!(greedy(0), Verdict::Ignore));
        assert!(matches!(admission.enter(router(9), site(2), false), Verdict::Enter(_)));
    }

    #[test]
    fn slots_come_back() {
        let admission = Arc::<Admission>::default();
        for n in 0..=255 {
            for is_proven in [false, true] {
                let entered = admission.enter(router(n), site(1), is_proven);
                assert!(matches!(entered, Verdict::Enter(_)));
            }
        }
        let taken = admission.0.lock();
        assert_eq!((taken.all, taken.unproven), (0, 0));
        assert!(taken.by_site.is_empty() && taken.by_router.is_empty());
        assert!(taken.unproven_by_router.is_empty());
    }
}
