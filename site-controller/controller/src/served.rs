//! What the network serves, as the routers saw it last.

use std::collections::{BTreeMap, BTreeSet};

use skein_core::{Address, Port, Portion, Protocol, Room, SiteId, fair_share};
use skein_site_core::Services;
use skein_wire::proto::{control::RouterStatus, routing};

/// What nobody serves any more is remembered for so long: a router that restarts learns the network anew, and its listeners must not flap
/// meanwhile.
const KEPT_S: i64 = 3600;
/// Ports of addresses remembered, present and past. A network has 100,000 addresses; more than twice that is somebody's flood.
const PORTS_MAX: usize = 262_144;

/// Ports of addresses with the sites that serve them.
#[derive(Debug, Default)]
pub(crate) struct Served(BTreeMap<(Address, Port), Seen>);

#[derive(Debug)]
struct Seen {
    sites: BTreeSet<SiteId>,
    at_unix_s: i64,
}

impl Served {
    /// Takes note of what a router sees. Where that is too much, every site has its share of what is noted.
    pub(crate) fn observe(&mut self, status: &RouterStatus, now_unix_s: i64) {
        let mut seen = offered(status);
        if seen.len() > PORTS_MAX {
            let portions = seen.iter().map(|(key, sites)| Portion { key, weight: 1, sites });
            let room = Room { per_site: PORTS_MAX, total: PORTS_MAX };
            let fits: BTreeSet<_> = fair_share(portions, room).into_iter().cloned().collect();
            tracing::warn!(offered = seen.len(), noted = fits.len(), "the network offers too much");
            seen.retain(|key, _| fits.contains(key));
        }
        for (key, sites) in seen {
            self.0.insert(key, Seen { sites, at_unix_s: now_unix_s });
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
            out.entry(address.clone()).or_default().insert(*port, seen.sites.clone());
        }
        out
    }
}

fn offered(status: &RouterStatus) -> BTreeMap<(Address, Port), BTreeSet<SiteId>> {
    let mut out = BTreeMap::<_, BTreeSet<SiteId>>::new();
    for service in &status.addresses {
        let Ok(address) = service.address.parse::<Address>() else { continue };
        for provider in &service.providers {
            // A router that names no site is still one source.
            let site = SiteId(provider.site_id.as_slice().try_into().unwrap_or_default());
            for port in provider.ports.iter().filter_map(port) {
                out.entry((address.clone(), port)).or_default().insert(site);
            }
        }
    }
    out
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
        assert!(!served.forget(KEPT_S - 1));
        assert!(served.forget(KEPT_S) && served.0.len() == 101 * 64);
    }
}
