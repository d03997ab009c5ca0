//! Address pages: a router's addresses hashed over a fixed number of records, so that a change re-floods little.

use crate::{ADDRESS_PAGES, Address, AddressEntry};
use std::{collections::BTreeMap, sync::Arc};

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// The page an address is on: 64-bit FNV-1a over its bytes, the upper half folded onto the lower, modulo [`ADDRESS_PAGES`].
#[must_use]
pub fn page_of(address: &Address) -> u8 {
    let hash = address
        .as_str()
        .bytes()
        .fold(FNV_OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME));
    let page = (hash ^ (hash >> 32)) % u64::from(ADDRESS_PAGES);
    u8::try_from(page).expect("invariant: less than ADDRESS_PAGES")
}

/// A router's addresses by page.
pub(crate) type Pages = BTreeMap<u8, Vec<Arc<AddressEntry>>>;

/// Spreads entries over pages, each ascending by address; of two entries for one address the later one counts.
pub(crate) fn paginate(entries: impl IntoIterator<Item = AddressEntry>) -> Pages {
    let unique: BTreeMap<Address, AddressEntry> =
        entries.into_iter().map(|entry| (entry.address.clone(), entry)).collect();
    let mut pages = Pages::new();
    for (address, entry) in unique {
        pages.entry(page_of(&address)).or_default().push(Arc::new(entry));
    }
    pages
}

/// Pages that differ between two sets, the ones that became empty included.
pub(crate) fn changed_pages(old: &Pages, new: &Pages) -> Vec<u8> {
    (0..ADDRESS_PAGES).filter(|page| old.get(page) != new.get(page)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Port, Protocol, Strategy};

    fn entry(address: &str, cost: u32) -> AddressEntry {
        AddressEntry {
            address: address.parse().unwrap(),
            ports: vec![Port { port: 80, protocol: Protocol::Tcp }],
            strategy: Strategy::Balanced,
            cost,
            priority: 0,
            weight: 1,
            at_least_once: false,
        }
    }

    #[test]
    fn page_numbers_are_those_of_the_protocol() {
        // Frozen: another implementation has to come to the same.
        let page = |text: &str| page_of(&text.parse().unwrap());
        assert_eq!([page("backend"), page("payments.prod"), page("a")], [59, 60, 0]);
    }

    #[test]
    fn a_thousand_addresses_spread_and_one_change_touches_one_page() {
        let all: Vec<_> = (0..1_000).map(|i| entry(&format!("svc-{i}.prod"), 1)).collect();
        let before = paginate(all.clone());
        assert_eq!(before.len(), usize::from(ADDRESS_PAGES));
        assert!(before.values().all(|page| page.len() < 40));
        let mut changed = all;
        changed[500].cost = 2;
        let after = paginate(changed);
        assert_eq!(changed_pages(&before, &after), [page_of(&"svc-500.prod".parse().unwrap())]);
        assert_eq!(changed_pages(&after, &Pages::new()).len(), 64);
    }
}
