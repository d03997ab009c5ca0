//! What the network serves, as the routers saw it last.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

use skein_core::{Address, Port, Protocol, SiteId};
use skein_site_core::Services;
use skein_wire::proto::{control::RouterStatus, routing};

/// What nobody serves any more is remembered for so long: a router that restarts learns the network anew, and its listeners must not flap
/// meanwhile.
const KEPT_S: i64 = 3600;
/// Ports of addresses remembered, present and past. A network has 100,000 addresses; more than twice that is somebody's flood.
const PORTS_MAX: usize = 262_144;
/// Sites remembered of those that serve a port. They are asked for to share out what is scarce, and the best placed of them counts.
const PORT_SITES_MAX: usize = 8;

/// Ports of addresses with the sites that serve them.
#[derive(Debug, Default)]
pub(crate) struct Served(BTreeMap<(Address, Port), Seen>);

#[derive(Debug)]
struct Seen {
    sites: Arc<BTreeSet<SiteId>>,
    at_unix_s: i64,
}

impl Served {
    /// Takes note of what a router sees. Where that is too much, every site has its share of what is noted. Returns whether it changes
    /// what is served.
    pub(crate) fn observe(&mut self, status: &RouterStatus, now_unix_s: i64) -> bool {
        let mut changed = false;
        for (key, sites) in offered(status) {
            let seen = Seen { sites, at_unix_s: now_unix_s };
            match self.0.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(seen);
                    changed = true;
                }
                Entry::Occupied(mut entry) => {
                    changed |= entry.get().sites != seen.sites;
                    entry.insert(seen);
                }
            }
        }
        let surplus = self.0.len().saturating_sub(PORTS_MAX);
        if surplus > 0 {
            let mut oldest: Vec<_> =
                self.0.iter().map(|(key, seen)| (seen.at_unix_s, key.clone())).collect();
            oldest.sort();
            for (_, key) in oldest.into_iter().take(surplus) {
                self.0.remove(&key);
            }
        }
        changed
    }

    /// Forgets what nobody has served for long. Returns whether there was any.
    pub(crate) fn forget(&mut self, now_unix_s: i64) -> bool {
        let before = self.0.len();
        self.0.retain(|_, seen| now_unix_s < seen.at_unix_s.saturating_add(KEPT_S));
        before != self.0.len()
    }

    /// By address.
    pub(crate) fn by_address(&self) -> Services {
        let mut out = Services::new();
        for ((address, port), seen) in &self.0 {
            out.entry(address.clone()).or_default().insert(*port, Arc::clone(&seen.sites));
        }
        out
    }
}

/// What a router sees, within bounds. What a site has no room for is never built: a status is long enough for millions.
fn offered(status: &RouterStatus) -> BTreeMap<(Address, Port), Arc<BTreeSet<SiteId>>> {
    let mut asked = BTreeMap::<SiteId, usize>::new();
    for_each_port(status, |_, _, account, _| *asked.entry(account).or_default() += 1);
    let each_max = share(asked.values().copied().collect());
    let mut taken = BTreeMap::<SiteId, usize>::new();
    // Nearly all ports have the same few sites.
    let mut known = BTreeSet::<Arc<BTreeSet<SiteId>>>::new();
    let mut out = BTreeMap::new();
    for_each_port(status, |address, port, account, sites| {
        let taken = taken.entry(account).or_default();
        if *taken < each_max {
            *taken += 1;
            let sites = known.get(&sites).cloned().unwrap_or_else(|| Arc::new(sites));
            known.insert(Arc::clone(&sites));
            out.insert((address.clone(), port), sites);
        }
    });
    let asked: usize = asked.values().sum();
    if asked > out.len() {
        tracing::warn!(asked, noted = out.len(), "the network offers too much");
    }
    out
}

/// Each port once, with the sites that serve it and the one of them on whose account it is: the one that has the least there so far.
fn for_each_port(
    status: &RouterStatus,
    mut each: impl FnMut(&Address, Port, SiteId, BTreeSet<SiteId>),
) {
    let mut accounts = BTreeMap::<SiteId, usize>::new();
    for service in &status.addresses {
        let Ok(address) = service.address.parse::<Address>() else { continue };
        let mut ports = BTreeMap::<Port, BTreeSet<SiteId>>::new();
        for provider in &service.providers {
            // A router that names no site is still one source.
            let site = SiteId(provider.site_id.as_slice().try_into().unwrap_or_default());
            for port in provider.ports.iter().filter_map(port) {
                let sites = ports.entry(port).or_default();
                if sites.len() < PORT_SITES_MAX {
                    sites.insert(site);
                }
            }
        }
        for (port, sites) in ports {
            let sum = |site: &&SiteId| accounts.get(*site).copied().unwrap_or_default();
            let Some(account) = sites.iter().min_by_key(sum).copied() else { continue };
            *accounts.entry(account).or_default() += 1;
            each(&address, port, account, sites);
        }
    }
}

/// How many ports each site may have where they ask for so many, so that together they have no more than [`PORTS_MAX`]: who asks for less
/// leaves the rest to the others.
fn share(mut asked: Vec<usize>) -> usize {
    asked.sort_unstable();
    let (mut room, mut sites) = (PORTS_MAX, asked.len());
    for asked in asked {
        if asked > room / sites {
            return room / sites;
        }
        room -= asked;
        sites -= 1;
    }
    PORTS_MAX
}

fn port(port: &routing::Port) -> Option<Port> {
    let protocol = match routing::Protocol::try_from(port.protocol) {
        Ok(routing::Protocol::Tcp) => Protocol::Tcp,
        Ok(routing::Protocol::Udp) => Protocol::Udp,
        Ok(routing::Protocol::Unspecified) | Err(_) => return None,
    };
    Some(Port { port: u16::try_from(port.port).ok()?, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_wire::proto::control::{AddressProvider, NetworkAddress};

    fn status(prefix: &str, site: u8, addresses: usize) -> RouterStatus {
        let ports = (1..=64).map(|port| routing::Port { port, protocol: 1 }).collect();
        let provider = AddressProvider { site_id: vec![site; 32], ports, ..Default::default() };
        let address = |n| NetworkAddress {
            address: format!("{prefix}{n}"),
            providers: vec![provider.clone()],
        };
        RouterStatus { addresses: (0..addresses).map(address).collect(), ..Default::default() }
    }

    #[test]
    fn a_flood_leaves_what_others_serve() {
        let mut served = Served::default();
        let mut flood = status("a", 1, PORTS_MAX / 64 + 10);
        flood.addresses.extend(status("z", 2, 1).addresses);
        served.observe(&flood, 0);
        assert_eq!(served.0.len(), PORTS_MAX);
        assert_eq!(served.by_address()["z0"].len(), 64);
        // Other names take the place of what is gone, not of what is there.
        let mut flood = status("b", 1, 100);
        flood.addresses.extend(status("z", 2, 1).addresses);
        served.observe(&flood, 10);
        assert_eq!(served.0.len(), PORTS_MAX);
        assert!(served.by_address().contains_key("z0") && served.by_address().contains_key("b99"));
        assert!(!served.observe(&flood, 10), "nothing new");
        assert!(!served.forget(KEPT_S - 1));
        assert!(served.forget(KEPT_S) && served.0.len() == 101 * 64);
    }

    #[test]
    fn what_has_no_room_is_not_built() {
        // Each alone asks for more than there is.
        let many = PORTS_MAX / 64 + 1_000;
        let mut flood = status("a", 1, many);
        flood.addresses.extend(status("m", 3, many).addresses);
        flood.addresses.extend(status("z", 2, 100).addresses);
        let offered = offered(&flood);
        assert!((PORTS_MAX - 1..=PORTS_MAX).contains(&offered.len()), "{}", offered.len());
        let of = |site: u8| {
            let sites = BTreeSet::from([SiteId([site; 32])]);
            offered.values().filter(|of| ***of == sites).collect::<Vec<_>>()
        };
        assert_eq!((of(1).len(), of(2).len()), (of(3).len(), 6_400));
        assert!(of(1).windows(2).all(|two| Arc::ptr_eq(two[0], two[1])), "one set for all");
    }

    #[test]
    fn what_many_serve_is_one_to_all_of_them() {
        const ADDRESSES: usize = 300;
        const SITES: u8 = 20;
        assert!(ADDRESSES * 64 * usize::from(SITES) > PORTS_MAX, "no room for each of them");
        let mut status = status("a", 1, ADDRESSES);
        for service in &mut status.addresses {
            let provider = service.providers[0].clone();
            let of = |site| AddressProvider { site_id: vec![site; 32], ..provider.clone() };
            service.providers = (1..=SITES).map(of).collect();
        }
        let offered = offered(&status);
        assert_eq!(offered.len(), ADDRESSES * 64, "asked for by twenty, and there once");
        assert!(offered.values().all(|sites| sites.len() == PORT_SITES_MAX));
    }
}
