//! Numbers for our links, as written into frame headers.

use crate::{Label, LinkId, ROUTER_RECORD_LIFETIME, RouterId, SiteId};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// How long a label keeps its meaning after its link is gone: no path made of an LSA that named it can still be in use then.
const RETENTION: Duration = Duration::from_secs(2 * ROUTER_RECORD_LIFETIME.as_secs());

/// How far apart labels of consecutive boots begin: more than a router may have links; a prime, so that boots take long to
/// meet again.
const LABELS_PER_BOOT: u64 = 4_099;

/// Which label means which neighbour. A link that comes back gets its label back; no label changes its meaning while anybody
/// may still use it.
#[derive(Debug)]
pub(crate) struct Labels {
    slots: BTreeMap<Label, Slot>,
    last: u16,
}

#[derive(Debug)]
struct Slot {
    peer: RouterId,
    site: SiteId,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    InUse(LinkId),
    FreeSince(Instant),
}

impl Labels {
    /// Labels for one boot. They begin elsewhere at every boot, so that a path learnt before a restart misses rather than
    /// misleads.
    pub(crate) fn new(boot_epoch: u64) -> Self {
        let last = boot_epoch.wrapping_mul(LABELS_PER_BOOT) % u64::from(u16::MAX);
        Self { slots: BTreeMap::new(), last: u16::try_from(last).unwrap_or(0) }
    }

    /// A label for a link to a router of a site; `None` when all are taken, or the site has `site_max` already.
    pub(crate) fn assign(
        &mut self,
        (peer, site): (RouterId, SiteId),
        link: LinkId,
        site_max: usize,
        now: Instant,
    ) -> Option<Label> {
        self.slots.retain(|_, slot| match slot.state {
            State::InUse(_) => true,
            State::FreeSince(since) => now.saturating_duration_since(since) < RETENTION,
        });
        let free = |slot: &Slot| slot.peer == peer && matches!(slot.state, State::FreeSince(_));
        let label = match self.slots.iter().find(|(_, slot)| free(slot)) {
            Some((&label, _)) => label,
            None if self.slots.values().filter(|slot| slot.site == site).count() >= site_max => {
                return None;
            }
            None => self.unused()?,
        };
        self.slots.insert(label, Slot { peer, site, state: State::InUse(link) });
        Some(label)
    }

    /// Keeps the label of a link that is gone for the next link to the same neighbour.
    pub(crate) fn release(&mut self, link: LinkId, now: Instant) {
        for slot in self.slots.values_mut().filter(|slot| slot.state == State::InUse(link)) {
            slot.state = State::FreeSince(now);
        }
    }

    /// Every label with the neighbour it means, dead links included.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Label, RouterId)> {
        self.slots.iter().map(|(&label, slot)| (label, slot.peer))
    }

    /// The next number without a meaning, in turn, so that those given up longest ago come last.
    fn unused(&mut self) -> Option<Label> {
        for _ in 0..u16::MAX {
            self.last = self.last.checked_add(1).unwrap_or(1);
            if !self.slots.contains_key(&Label(self.last)) {
                return Some(Label(self.last));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test is its own clock")]
    use super::*;

    const SITE: SiteId = SiteId([7; 32]);
    const A: (RouterId, SiteId) = (RouterId([1; 16]), SITE);
    const B: (RouterId, SiteId) = (RouterId([2; 16]), SITE);
    const MANY: usize = 100;

    #[test]
    fn a_link_that_comes_back_has_its_label_back_and_parallel_links_differ() {
        let (mut labels, now) = (Labels::new(1), Instant::now());
        let first = labels.assign(A, LinkId(1), MANY, now).unwrap();
        let second = labels.assign(A, LinkId(2), MANY, now).unwrap();
        assert_ne!(first, second);
        labels.release(LinkId(1), now);
        assert_eq!(labels.assign(A, LinkId(3), MANY, now), Some(first));
    }

    #[test]
    fn a_label_means_nobody_else_for_twice_the_lifetime() {
        let (mut labels, now) = (Labels::new(1), Instant::now());
        let label = labels.assign(A, LinkId(1), MANY, now).unwrap();
        labels.release(LinkId(1), now);
        let almost = now + RETENTION - Duration::from_secs(1);
        // The counter has come round to the label.
        labels.last = label.0 - 1;
        assert_ne!(labels.assign(B, LinkId(2), MANY, almost), Some(label));
        labels.last = label.0 - 1;
        assert_eq!(labels.assign(B, LinkId(3), MANY, now + RETENTION), Some(label));
    }

    #[test]
    fn a_site_that_makes_up_routers_uses_up_its_own_share_only() {
        let (mut labels, now) = (Labels::new(1), Instant::now());
        let made_up = |n: u8| (RouterId([n; 16]), SITE);
        for n in 0..3 {
            assert!(labels.assign(made_up(n), LinkId(n.into()), 3, now).is_some());
            labels.release(LinkId(n.into()), now);
        }
        assert_eq!(labels.assign(made_up(9), LinkId(9), 3, now), None);
        assert!(labels.assign(made_up(2), LinkId(10), 3, now).is_some(), "one it has");
        assert!(labels.assign((RouterId([9; 16]), SiteId([8; 32])), LinkId(11), 3, now).is_some());
        assert!(labels.assign(made_up(9), LinkId(12), 3, now + RETENTION).is_some());
    }
}
