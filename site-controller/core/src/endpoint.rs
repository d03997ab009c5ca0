//! Automatic local endpoints: which loopback address and port leads to which address of the network.
//!
//! An address keeps its endpoint for as long as the state of the site lives, whatever other addresses come and go: clients have it in
//! their configuration files.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::Ipv4Addr,
};

use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use skein_core::{Address, Port, Protocol, SiteId};
use std::hash::Hasher as _;

/// First port used where a service's own port is not: below the ephemeral range of Linux (32768), above registered services.
pub const FALLBACK_PORT_FIRST: u16 = 20_000;
/// Last such port.
pub const FALLBACK_PORT_LAST: u16 = 29_999;
/// Ports below are for the machine's own services: while `127.64.1.2:22` listened, nobody could bind `0.0.0.0:22`.
const PRIVILEGED_PORT_END: u16 = 1024;
/// 127.64.0.0/10 leaves 22 bits.
const NETWORK: u32 = 0x7f40_0000;
const HOST_MASK: u32 = 0x003f_ffff;

/// The automatic endpoints of a site, by address.
pub type AutoEndpoints = BTreeMap<Address, AutoEndpoint>;

/// Where an address can be reached on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoEndpoint {
    /// Of 127.64.0.0/10.
    pub ip: Ipv4Addr,
    /// By port of the service.
    pub ports: Vec<AutoPort>,
    /// Since when nobody serves the address, Unix time; `None` while somebody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unused_since_unix_s: Option<i64>,
}

/// An endpoint whose address nobody has served for so long is forgotten; until then clients may still have it in their configuration.
const UNUSED_MAX_S: i64 = 90 * 86_400;
/// Endpoints kept, whatever the network offered in the meantime: four times what can be open at once.
const KEPT_MAX: usize = 4 * skein_core::AUTOMATIC_MAX;
/// Ports kept of one endpoint beyond those in use: as many as four routers can offer of an address.
const PORTS_KEPT_MAX: usize = 256;

/// Notes which endpoints nobody serves, and forgets those unused for 90 days. Returns whether anything changed.
pub fn forget_unused(
    endpoints: &mut AutoEndpoints,
    is_served: impl Fn(&Address) -> bool,
    now_unix_s: i64,
) -> bool {
    let mut changed = false;
    endpoints.retain(|address, endpoint| {
        let since = if is_served(address) {
            None
        } else {
            Some(endpoint.unused_since_unix_s.unwrap_or(now_unix_s))
        };
        changed |= since != endpoint.unused_since_unix_s;
        endpoint.unused_since_unix_s = since;
        let keep = since.is_none_or(|since| now_unix_s < since.saturating_add(UNUSED_MAX_S));
        changed |= !keep;
        keep
    });
    changed
}

/// One port of an automatic endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoPort {
    /// Port of the service.
    pub port: u16,
    /// Whether it carries datagrams.
    #[serde(default)]
    pub udp: bool,
    /// Port to listen on.
    pub local: u16,
    /// Port to listen on where `local` is taken; equal to it when there is no other choice.
    pub fallback: u16,
}

impl AutoPort {
    /// The port of the service.
    #[must_use]
    pub fn service(&self) -> Port {
        let protocol = if self.udp { Protocol::Udp } else { Protocol::Tcp };
        Port { port: self.port, protocol }
    }
}

/// What the planner must know of the ports of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPorts {
    /// Bound on the wildcard by some process: an endpoint there would fail.
    pub wildcard: BTreeSet<(u16, Protocol)>,
    /// Not to be taken: the site's own ports and what the kernel was told to reserve.
    pub reserved: BTreeSet<u16>,
}

impl LocalPorts {
    fn own_port_is_free(&self, port: Port) -> bool {
        let key = (port.port, port.protocol);
        port.port >= PRIVILEGED_PORT_END
            && !(FALLBACK_PORT_FIRST..=FALLBACK_PORT_LAST).contains(&port.port)
            && !self.wildcard.contains(&key)
            && !self.reserved.contains(&port.port)
    }
}

/// Gives every address of `services` an endpoint, as long as there is an IP address for it. `known` is the earlier result: what it says is
/// kept, also for addresses that are away at the moment. Only where there is too much of it, those away for longest are forgotten.
#[must_use]
pub fn assign(
    site: SiteId,
    services: &BTreeMap<Address, BTreeSet<Port>>,
    known: &AutoEndpoints,
    host: &LocalPorts,
) -> AutoEndpoints {
    let mut out = known.clone();
    let mut taken: BTreeSet<Ipv4Addr> = known.values().map(|endpoint| endpoint.ip).collect();
    for (address, ports) in services {
        let endpoint = match out.entry(address.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let Some(ip) = free_ip(site, address, &taken) else { continue };
                taken.insert(ip);
                new.insert(AutoEndpoint { ip, ports: Vec::new(), unused_since_unix_s: None })
            }
        };
        assign_ports(address, ports, endpoint, host);
    }
    forget_oldest(&mut out, services);
    out
}

fn assign_ports(
    address: &Address,
    ports: &BTreeSet<Port>,
    endpoint: &mut AutoEndpoint,
    host: &LocalPorts,
) {
    for port in ports {
        if endpoint.ports.iter().any(|known| known.service() == *port) {
            continue;
        }
        let udp = port.protocol == Protocol::Udp;
        let used: BTreeSet<u16> = endpoint
            .ports
            .iter()
            .filter(|known| known.udp == udp)
            .flat_map(|known| [known.local, known.fallback])
            .collect();
        // The same number for both protocols of a service, such as DNS, where that is possible.
        let twin = endpoint.ports.iter().find(|known| known.port == port.port && known.udp != udp);
        let is_free = |candidate: &u16| {
            !used.contains(candidate) && !host.wildcard.contains(&(*candidate, port.protocol))
        };
        let fallback = twin
            .map(|twin| twin.fallback)
            .filter(is_free)
            .unwrap_or_else(|| fallback_port(address, *port, &used, host));
        let own = || host.own_port_is_free(*port) && !used.contains(&port.port);
        let local = twin
            .map(|twin| twin.local)
            .filter(is_free)
            .unwrap_or_else(|| if own() { port.port } else { fallback });
        endpoint.ports.push(AutoPort { port: port.port, udp, local, fallback });
    }
    if endpoint.ports.len() > PORTS_KEPT_MAX {
        endpoint.ports.retain(|known| ports.contains(&known.service()));
    }
    endpoint.ports.sort_by_key(|port| (port.port, port.udp));
}

/// Forgets what is above [`KEPT_MAX`]: of the endpoints not in use those nobody has served for longest.
fn forget_oldest(endpoints: &mut AutoEndpoints, used: &BTreeMap<Address, BTreeSet<Port>>) {
    let surplus = endpoints.len().saturating_sub(KEPT_MAX);
    if surplus == 0 {
        return;
    }
    let mut unused: Vec<_> = endpoints
        .iter()
        .filter(|(address, _)| !used.contains_key(*address))
        // Not noted yet is later than any time noted.
        .map(|(address, kept)| (kept.unused_since_unix_s.unwrap_or(i64::MAX), address.clone()))
        .collect();
    unused.sort();
    for (_, address) in unused.into_iter().take(surplus) {
        endpoints.remove(&address);
    }
}

/// A pseudo-random but stable number: the same site and address give the same endpoint on every machine.
fn hash(parts: &[&[u8]]) -> u64 {
    // The key is part of the format: another one moves every endpoint.
    let mut hasher = SipHasher24::new_with_keys(0x736b_6569_6e2d_6175, 0x746f_2d65_6e64_7074);
    for part in parts {
        hasher.write_u64(part.len() as u64);
        hasher.write(part);
    }
    hasher.finish()
}

fn free_ip(site: SiteId, address: &Address, taken: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    let start = hash(&[&site.0, address.as_str().as_bytes()]) & u64::from(HOST_MASK);
    let start = u32::try_from(start).expect("invariant: masked to 22 bits");
    (0..=HOST_MASK)
        .map(|step| Ipv4Addr::from(NETWORK | (start + step) & HOST_MASK))
        // Some software takes .0 and .255 for network and broadcast addresses.
        .find(|ip| !matches!(ip.octets()[3], 0 | 255) && !taken.contains(ip))
}

fn fallback_port(address: &Address, port: Port, used: &BTreeSet<u16>, host: &LocalPorts) -> u16 {
    let udp = [u8::from(port.protocol == Protocol::Udp)];
    let span = u64::from(FALLBACK_PORT_LAST - FALLBACK_PORT_FIRST) + 1;
    let start = hash(&[address.as_str().as_bytes(), &port.port.to_be_bytes(), &udp]) % span;
    let nth = |step: u64| {
        FALLBACK_PORT_FIRST
            + u16::try_from((start + step) % span).expect("invariant: below the span")
    };
    (0..span)
        .map(nth)
        .find(|candidate| {
            !used.contains(candidate)
                && !host.reserved.contains(candidate)
                && !host.wildcard.contains(&(*candidate, port.protocol))
        })
        // All 10,000 taken: the router reports that it cannot bind.
        .unwrap_or_else(|| nth(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SITE: SiteId = SiteId([7; 32]);

    fn tcp(port: u16) -> Port {
        Port { port, protocol: Protocol::Tcp }
    }

    #[test]
    fn both_protocols_of_a_port_have_one_local_number_where_that_is_possible() {
        let both = |port: u16| {
            let udp = Port { port, protocol: Protocol::Udp };
            BTreeMap::from([("dns".parse().unwrap(), BTreeSet::from([tcp(port), udp]))])
        };
        let locals = |services: BTreeMap<_, _>, known: &AutoEndpoints, host: &LocalPorts| {
            let endpoints = assign(SITE, &services, known, host);
            let ports = &endpoints[&"dns".parse::<Address>().unwrap()].ports;
            let [tcp, udp] = ports[..] else { panic!("{ports:?}") };
            assert!(!tcp.udp && udp.udp);
            (tcp, udp)
        };
        let (none, free) = (AutoEndpoints::new(), LocalPorts::default());
        for port in [53, 5300] {
            let (tcp, udp) = locals(both(port), &none, &free);
            assert_eq!((udp.local, udp.fallback), (tcp.local, tcp.fallback));
        }
        let wildcard = BTreeSet::from([(5300, Protocol::Udp)]);
        let taken = LocalPorts { wildcard, ..LocalPorts::default() };
        let (tcp, udp) = locals(both(5300), &none, &taken);
        assert_eq!((tcp.local, udp.local), (5300, udp.fallback));
        // One protocol comes later than the other.
        let known = assign(SITE, &services(&[("dns", &[53])]), &none, &free);
        let (tcp, udp) = locals(both(53), &known, &free);
        assert_eq!(tcp.local, udp.local);
    }

    fn services(of: &[(&str, &[u16])]) -> BTreeMap<Address, BTreeSet<Port>> {
        of.iter()
            .map(|(address, ports)| {
                (address.parse().unwrap(), ports.iter().map(|port| tcp(*port)).collect())
            })
            .collect()
    }

    #[test]
    fn the_own_port_is_used_where_nobody_is_harmed() {
        let mut host = LocalPorts::default();
        host.wildcard.insert((5433, Protocol::Tcp));
        host.reserved.insert(7443);
        let services = services(&[("db", &[22, 5432, 5433, 7443, 20_500])]);
        let endpoints = assign(SITE, &services, &AutoEndpoints::new(), &host);
        let ports = &endpoints[&"db".parse::<Address>().unwrap()].ports;
        for port in ports {
            let range = FALLBACK_PORT_FIRST..=FALLBACK_PORT_LAST;
            assert!(range.contains(&port.fallback));
            assert_eq!(port.local == port.port, port.port == 5432, "{port:?}");
        }
        let locals: BTreeSet<_> = ports.iter().map(|port| port.local).collect();
        assert_eq!(locals.len(), ports.len());
    }

    #[test]
    fn the_format_is_stable() {
        let endpoints = assign(
            SITE,
            &services(&[("postgres", &[5432])]),
            &AutoEndpoints::new(),
            &LocalPorts::default(),
        );
        let endpoint = &endpoints[&"postgres".parse::<Address>().unwrap()];
        // Computed once; a change here moves every endpoint of every user.
        assert_eq!(endpoint.ip.to_string(), "127.71.215.80");
        assert_eq!(endpoint.ports[0].fallback, 22_473);
    }

    #[test]
    fn collisions_are_resolved() {
        let taken: BTreeSet<_> =
            [free_ip(SITE, &"a".parse().unwrap(), &BTreeSet::new()).unwrap()].into();
        let second = free_ip(SITE, &"a".parse().unwrap(), &taken).unwrap();
        assert!(!taken.contains(&second) && second.octets()[0] == 127);
    }

    proptest! {
        #[test]
        fn endpoints_are_kept_distinct_and_in_their_network(
            rounds in prop::collection::vec(
                (prop::collection::btree_map("[a-z]{1,3}", prop::collection::btree_set(1_u16.., 1..4), 0..12),
                 prop::collection::btree_set(1_u16.., 0..4)), 1..6),
        ) {
            let mut known = AutoEndpoints::new();
            for (names, wildcard) in rounds {
                let services = names.iter()
                    .map(|(name, ports)| (name.parse().unwrap(), ports.iter().map(|port| tcp(*port)).collect()))
                    .collect();
                let host = LocalPorts {
                    wildcard: wildcard.into_iter().map(|port| (port, Protocol::Tcp)).collect(),
                    ..LocalPorts::default()
                };
                let next = assign(SITE, &services, &known, &host);
                for (address, before) in &known {
                    let after = &next[address];
                    prop_assert_eq!(after.ip, before.ip);
                    for port in &before.ports {
                        prop_assert!(after.ports.contains(port));
                    }
                }
                let ips: BTreeSet<_> = next.values().map(|endpoint| endpoint.ip).collect();
                prop_assert_eq!(ips.len(), next.len());
                prop_assert!(ips.iter().all(|ip| u32::from(*ip) & !HOST_MASK == NETWORK));
                prop_assert_eq!(assign(SITE, &services, &next, &host), next.clone());
                known = next;
            }
        }
    }

    #[test]
    fn an_endpoint_nobody_serves_is_kept_for_ninety_days() {
        let address: Address = "db".parse().unwrap();
        let port = Port { port: 5432, protocol: Protocol::Tcp };
        let services = BTreeMap::from([(address, BTreeSet::from([port]))]);
        let mut known =
            assign(SiteId([1; 32]), &services, &AutoEndpoints::new(), &LocalPorts::default());
        let day = 86_400;
        assert!(!forget_unused(&mut known, |_| true, 0));
        assert!(forget_unused(&mut known, |_| false, 0));
        assert!(!forget_unused(&mut known, |_| false, 89 * day));
        assert!(forget_unused(&mut known, |_| true, 89 * day), "it is back");
        assert!(forget_unused(&mut known, |_| false, 100 * day) && known.len() == 1);
        assert!(forget_unused(&mut known, |_| false, 190 * day) && known.is_empty());
    }

    #[test]
    fn names_that_change_all_the_time_do_not_fill_the_disk() {
        let host = LocalPorts::default();
        let endpoint = |n: u32, unused_since_unix_s| {
            let ip = Ipv4Addr::from(NETWORK + n);
            (
                format!("old-{n}").parse().unwrap(),
                AutoEndpoint { ip, ports: Vec::new(), unused_since_unix_s },
            )
        };
        let mut known: AutoEndpoints =
            (1..).map(|n| endpoint(n, Some(n.into()))).take(KEPT_MAX).collect();
        known.extend([endpoint(0, None)]);
        let next = assign(SITE, &services(&[("new", &[80])]), &known, &host);
        assert_eq!(next.len(), KEPT_MAX);
        let has = |name: &str| next.contains_key(&name.parse::<Address>().unwrap());
        assert!(has("new") && has("old-0") && has("old-3") && !has("old-2") && !has("old-1"));

        let ports: Vec<u16> = (2_000..2_000 + 300).collect();
        let before = assign(SITE, &services(&[("a", &ports)]), &AutoEndpoints::new(), &host);
        let after = assign(SITE, &services(&[("a", &[2_000, 9_000])]), &before, &host);
        assert_eq!(after[&"a".parse::<Address>().unwrap()].ports.len(), 2);
    }
}
