//! What the router reports to its controller.

use super::Control;
use skein_core::{
    Membership, Portion, Provider, Room, RouterId, RouterView, SiteId, SiteView, fair_share,
};
use skein_wire::{
    convert,
    proto::{
        control::{AddressProvider, NetworkAddress, NetworkRouter, NetworkSite, RouterStatus},
        routing,
    },
};
use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

/// Encoded bytes of addresses in a status: 100,000 take half of it. Together with what follows well below the 64 MiB a controller reads.
const ADDRESSES_LEN_MAX: usize = 24 << 20;
/// Encoded bytes of routers.
const ROUTERS_LEN_MAX: usize = 16 << 20;
/// Encoded bytes of sites.
const SITES_LEN_MAX: usize = 8 << 20;

/// This router's names in documents.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalSite {
    pub(super) router: RouterId,
    pub(super) boot_epoch: u64,
}

/// The part of the status that changes with the network's view only.
#[derive(Clone, Debug, Default)]
pub(super) struct Network {
    routers: Vec<NetworkRouter>,
    addresses: Vec<NetworkAddress>,
    sites: Vec<NetworkSite>,
    /// Of all of these, how many are left out.
    left_out: usize,
}

impl Network {
    /// As much of it as a status has room for, each site having its share.
    fn fitting(
        mut routers: Vec<NetworkRouter>,
        mut addresses: Vec<NetworkAddress>,
        mut sites: Vec<NetworkSite>,
    ) -> Self {
        let left_out = fit(&mut routers, ROUTERS_LEN_MAX, |router| vec![&router.site_id])
            + fit(&mut addresses, ADDRESSES_LEN_MAX, |address| {
                address.providers.iter().map(|provider| &provider.site_id).collect()
            })
            + fit(&mut sites, SITES_LEN_MAX, |site| vec![&site.site_id]);
        Self { routers, addresses, sites, left_out }
    }

    fn problem(&self) -> Option<String> {
        let left_out = self.left_out;
        (left_out > 0).then(|| {
            format!("the network is too large to be shown: {left_out} of its sites, routers and addresses are left out")
        })
    }
}

/// Drops what exceeds so many encoded bytes, and returns how many that were.
fn fit<T: prost::Message>(
    items: &mut Vec<T>,
    len_max: usize,
    sites: impl Fn(&T) -> Vec<&Vec<u8>>,
) -> usize {
    if items.iter().map(T::encoded_len).sum::<usize>() <= len_max {
        return 0;
    }
    let sites: Vec<BTreeSet<SiteId>> = items
        .iter()
        .map(|item| sites(item).into_iter().filter_map(|id| convert::parse_site_id(id).ok()))
        .map(Iterator::collect)
        .collect();
    let portions = items.iter().zip(&sites).enumerate();
    let portions =
        portions.map(|(key, (item, sites))| Portion { key, weight: item.encoded_len(), sites });
    let fits = fair_share(portions, Room { per_site: len_max / 2, total: len_max });
    let mut index = 0..;
    items.retain(|_| index.next().is_some_and(|index| fits.contains(&index)));
    sites.len() - fits.len()
}

impl Control {
    /// Compares the status with what the controller was told last, and tells it when it differs.
    pub(super) fn report_status(&mut self) {
        self.status_due = None;
        // Not everything that is shown changes where frames go.
        let edition = self.engine.lsdb().edition();
        if self.network_stale || self.network_edition != edition {
            self.network_edition = edition;
            self.network = self.network();
            self.network_stale = false;
        }
        self.update_gauges();
        let status = self.status();
        self.controller.facts.status.send_if_modified(|last| {
            let changed = last.as_deref() != Some(&status);
            if changed {
                *last = Some(Arc::new(status));
            }
            changed
        });
    }

    fn status(&self) -> RouterStatus {
        let (data, flows) = (&self.data, &self.data.flows);
        RouterStatus {
            router_id: self.site.router.0.to_vec(),
            boot_epoch: self.site.boot_epoch,
            links: data.links.status(),
            listeners: data.ingress.status(),
            connectors: data.egress.status(),
            routers: self.network.routers.clone(),
            addresses: self.network.addresses.clone(),
            sockets: data.links.sockets(),
            flows_active: flows.active(),
            flows_total: flows.opened.total(),
            bytes_sent: flows.bytes_sent.total(),
            bytes_received: flows.bytes_received.total(),
            memory_used_bytes: data.budget.used_bytes(),
            problems: self.problems.iter().cloned().chain(self.network.problem()).collect(),
            metrics_address: self.metrics.address(),
            sites: self.network.sites.clone(),
            certificate_not_after_unix_s: self
                .identity
                .current()
                .map_or(0, |identity| identity.not_after_unix_s()),
            open_files_max: rustix::process::getrlimit(rustix::process::Resource::Nofile)
                .current
                .unwrap_or_default(),
            config_version: self.config_version,
        }
    }

    fn network(&self) -> Network {
        let view = self.engine.view();
        let routers = view.routers.iter().map(|router| self.network_router(router)).collect();
        let addresses = self
            .fib
            .addresses
            .iter()
            .map(|(address, providers)| NetworkAddress {
                address: address.to_string(),
                providers: providers.iter().map(address_provider).collect(),
            })
            .collect();
        let sites = view.sites.iter().map(|site| self.network_site(site)).collect();
        Network::fitting(routers, addresses, sites)
    }

    fn network_router(&self, view: &RouterView) -> NetworkRouter {
        let path = view.route.as_ref().and_then(|route| route.paths.first());
        let lsa = routing::RouterLsa::from(&*view.lsa);
        NetworkRouter {
            router_id: lsa.router_id,
            site_id: lsa.site_id,
            name: lsa.name,
            site_name: lsa.site_name,
            role: lsa.role,
            boot_epoch: lsa.boot_epoch,
            links: lsa.links,
            version: lsa.version,
            reachable: view.lsa.router == self.site.router || path.is_some(),
            trusted: view.trusted,
            hops: path.map_or(0, |path| u32::try_from(path.hops.len()).unwrap_or(u32::MAX)),
            metric_us: path.map_or(0, |path| path.metric_us),
            next_hop: path.and_then(|p| p.hops.first()).map_or_else(Vec::new, |hop| hop.0.to_vec()),
        }
    }

    fn network_site(&self, view: &SiteView) -> NetworkSite {
        let trusted = self.view.site(view.statement.site);
        NetworkSite {
            site_id: view.statement.site.0.to_vec(),
            name: view.statement.name.to_string(),
            trusted: trusted.is_some(),
            member: trusted.is_some_and(|site| site.membership == Membership::Member),
            network_id: view.statement.network.0.to_vec(),
        }
    }

    fn update_gauges(&self) {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let gauges = &self.gauges;
        gauges.attached.store((*self.controller.attached.borrow()).into(), Ordering::Relaxed);
        gauges.lsdb_records.store(count(self.engine.lsdb().len()), Ordering::Relaxed);
        gauges.lsdb_bytes.store(count(self.engine.lsdb().bytes()), Ordering::Relaxed);
        gauges.routes.store(count(self.fib.routes.len()), Ordering::Relaxed);
        gauges.addresses.store(count(self.fib.addresses.len()), Ordering::Relaxed);
        gauges.sites_trusted.store(count(self.view.sites.len()), Ordering::Relaxed);
    }
}

fn address_provider(provider: &Provider) -> AddressProvider {
    let entry = routing::AddressEntry::from(&*provider.entry);
    AddressProvider {
        router_id: provider.router.0.to_vec(),
        site_id: provider.site.0.to_vec(),
        ports: entry.ports,
        reachable: true,
        strategy: entry.strategy,
        priority: entry.priority,
        weight: entry.weight,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[test]
    fn a_flood_of_addresses_does_not_hide_those_of_others() {
        let address = |n: usize, site: u8| {
            let provider = AddressProvider { site_id: vec![site; 32], ..Default::default() };
            NetworkAddress { address: format!("{n:0200}"), providers: vec![provider] }
        };
        let mut addresses: Vec<_> = (0..120_000).map(|n| address(n, 1)).collect();
        addresses.push(address(120_000, 2));
        let network = Network::fitting(Vec::new(), addresses, Vec::new());
        let len: usize = network.addresses.iter().map(NetworkAddress::encoded_len).sum();
        assert!(len <= ADDRESSES_LEN_MAX / 2 + 1_000 && network.addresses.len() > 40_000);
        assert_eq!(network.addresses.last().unwrap().providers[0].site_id, [2; 32]);
        assert!(network.problem().is_some());
    }
}
