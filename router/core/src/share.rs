//! Sharing out what is scarce among sites, so that none takes the others' part.

use crate::SiteId;
use std::collections::{BTreeMap, BTreeSet};

/// Something that takes room.
#[derive(Clone, Copy, Debug)]
pub struct Portion<'a, K> {
    /// What it is.
    pub key: K,
    /// How much room it takes, in the unit of the [`Room`].
    pub weight: usize,
    /// On whose account it is; any one of them suffices.
    pub sites: &'a BTreeSet<SiteId>,
}

/// How much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// For the portions of one site.
    pub per_site: usize,
    /// For all of them.
    pub total: usize,
}

/// Which of the portions get room: each site gets it for its own in the order given, all sites in turn, so that a site with few portions
/// has them whatever the others ask for. What several sites account for is where the best placed of them has it.
#[must_use]
pub fn fair_share<'a, K: Ord>(
    portions: impl IntoIterator<Item = Portion<'a, K>>,
    room: Room,
) -> BTreeSet<K> {
    let mut used = BTreeMap::<SiteId, usize>::new();
    let mut ranked = Vec::new();
    for portion in portions {
        let sums = portion.sites.iter().map(|site| {
            let sum = used.entry(*site).or_default();
            *sum = sum.saturating_add(portion.weight);
            *sum
        });
        // All sums grow, so `min` must see each of them.
        if let Some(rank) = sums.min().filter(|rank| *rank <= room.per_site) {
            ranked.push((rank, portion));
        }
    }
    // Stable: equals stay in the order given.
    ranked.sort_by_key(|(rank, _)| *rank);
    let mut left = room.total;
    let fitting = ranked.into_iter().map_while(|(_, portion)| {
        left = left.checked_sub(portion.weight)?;
        Some(portion.key)
    });
    fitting.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sites(of: &[u8]) -> BTreeSet<SiteId> {
        of.iter().map(|site| SiteId([*site; 32])).collect()
    }

    #[test]
    fn a_greedy_site_takes_only_its_own_part() {
        let (greedy, modest, both) = (sites(&[1]), sites(&[2]), sites(&[1, 2]));
        let portion = |key, sites| Portion { key, weight: 1, sites };
        let mut portions: Vec<_> = (0..100).map(|key| portion(key, &greedy)).collect();
        portions.extend([portion(100, &modest), portion(101, &both)]);
        let fits = |per_site, total| fair_share(portions.clone(), Room { per_site, total });
        assert_eq!(fits(3, 100), BTreeSet::from([0, 1, 2, 100, 101]));
        // Before the greedy site's third there is the second of the modest one, which both have.
        assert_eq!(fits(100, 4), BTreeSet::from([0, 1, 100, 101]));
        assert_eq!(fits(0, 100).len(), 0);
    }

    proptest! {
        #[test]
        fn the_room_is_never_exceeded(
            asked in prop::collection::vec((0_usize..5, prop::collection::btree_set(0_u8..4, 0..3)), 0..40),
            per_site in 0_usize..30, total in 0_usize..60,
        ) {
            let asked: Vec<_> = asked.into_iter()
                .map(|(weight, of)| (weight, sites(&of.into_iter().collect::<Vec<_>>())))
                .collect();
            let portions = asked.iter().enumerate()
                .map(|(key, (weight, sites))| Portion { key, weight: *weight, sites });
            let fits = fair_share(portions, Room { per_site, total });
            let sum = |keys: &mut dyn Iterator<Item = &usize>| keys.map(|key| asked[*key].0).sum::<usize>();
            prop_assert!(sum(&mut fits.iter()) <= total);
            for site in 0..4 {
                let only = sites(&[site]);
                prop_assert!(sum(&mut fits.iter().filter(|key| asked[**key].1 == only)) <= per_site);
            }
        }
    }
}
