//! What the router reports to its controller.

use super::Control;
use skein_core::{Membership, Provider, RouterId, RouterView, SiteView};
use skein_wire::proto::{
    control::{AddressProvider, NetworkAddress, NetworkRouter, NetworkSite, RouterStatus},
    routing,
};
use std::sync::{Arc, atomic::Ordering};

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
}

impl Control {
    /// Compares the status with what the controller was told last, and tells it when it differs.
    pub(super) fn report_status(&mut self) {
        self.status_due = None;
        if self.network_stale {
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
            problems: self.problems.clone(),
            metrics_address: self.metrics.address(),
            sites: self.network.sites.clone(),
            certificate_not_after_unix_s: self
                .identity
                .current()
                .map_or(0, |identity| identity.not_after_unix_s()),
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
        Network { routers, addresses, sites }
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
