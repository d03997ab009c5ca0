//! Which of the ports the network offers get a local endpoint by themselves. Whoever may offer anything decides how much there is of it; what
//! opens here is bounded, and shared out among the sites that offer it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::AutoListen;
use skein_core::{Address, Port, Portion, Room, SiteId, fair_share, share_out_files};

/// No site takes more than this part of them for what it alone offers.
const SITE_SHARE: usize = 4;

/// Addresses served in the network: their ports, and the sites that serve each.
pub type Services = BTreeMap<Address, BTreeMap<Port, Arc<BTreeSet<SiteId>>>>;

/// Ports for which there is no room, by address.
pub type LeftOut = BTreeMap<Address, BTreeSet<Port>>;

/// How many automatic endpoints fit a router that may open so many files, if that is known.
#[must_use]
pub fn automatic_room(open_files_max: Option<u64>) -> Room {
    let total = share_out_files(open_files_max.unwrap_or(u64::MAX)).automatic;
    Room { per_site: total / SITE_SHARE, total }
}

/// Divides what matches `pattern` into what gets an endpoint and what does not.
pub(crate) fn admit(
    services: &Services,
    pattern: &AutoListen,
    room: Room,
) -> (BTreeMap<Address, BTreeSet<Port>>, LeftOut) {
    let matching = services.iter().filter(|(address, _)| pattern.matches(address.as_str()));
    let wanted: Vec<_> = matching
        .flat_map(|(address, ports)| ports.iter().map(move |(port, sites)| (address, port, sites)))
        .collect();
    let portions = wanted.iter().enumerate();
    let portions = portions.map(|(key, (_, _, sites))| Portion { key, weight: 1, sites });
    let fits = fair_share(portions, room);
    let (mut admitted, mut left_out) = (BTreeMap::new(), LeftOut::new());
    for (key, (address, port, _)) in wanted.into_iter().enumerate() {
        let to = if fits.contains(&key) { &mut admitted } else { &mut left_out };
        to.entry(address.clone()).or_insert_with(BTreeSet::new).insert(*port);
    }
    (admitted, left_out)
}
