//! Who serves what. 100,000 addresses stay where they are as long as no provider of any comes, goes, or is nearer or farther
//! than before; then what changed is computed anew and the map that readers hold is copied once.

use crate::{
    Address, AddressEntry, Payload, Provider, Providers, Record, Route, RouterId, SiteId,
    TrustView, pages::Pages,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

/// Addresses by the routers that list them, reachable or not, and the providers published last.
#[derive(Debug, Default)]
pub(super) struct AddressIndex {
    served: BTreeMap<Address, BTreeMap<RouterId, Arc<AddressEntry>>>,
    by_router: BTreeMap<RouterId, BTreeSet<Address>>,
    dirty: BTreeSet<Address>,
    /// Metrics of routers at the last publication.
    metrics: BTreeMap<RouterId, u64>,
    providers: Arc<Providers>,
    services_version: u64,
}

/// What providers are made of, besides the index.
pub(super) struct Reach<'a> {
    pub(super) local: (RouterId, SiteId),
    pub(super) trust: &'a TrustView,
    pub(super) routes: &'a HashMap<RouterId, Arc<Route>>,
}

impl AddressIndex {
    /// A router's page was replaced, or is gone.
    pub(super) fn replace(&mut self, router: RouterId, old: Option<&Record>, new: Option<&Record>) {
        for entry in entries(old) {
            self.remove(router, &entry.address);
        }
        for entry in entries(new) {
            self.insert(router, entry);
        }
    }

    /// This router serves something else; its own pages in the database do not matter.
    pub(super) fn replace_local(&mut self, router: RouterId, pages: &Pages) {
        for address in self.by_router.remove(&router).unwrap_or_default() {
            self.remove(router, &address);
        }
        for entry in pages.values().flatten() {
            self.insert(router, entry);
        }
    }

    /// Trust changed, and with it who may serve what.
    pub(super) fn mark_all(&mut self) {
        self.dirty.extend(self.served.keys().cloned());
    }

    /// Providers as of now, of every address that has any, and the version of who serves what.
    pub(super) fn providers(&mut self, reach: &Reach<'_>) -> (Arc<Providers>, u64) {
        self.mark_moved(reach);
        for address in std::mem::take(&mut self.dirty) {
            let new = self.providers_of(&address, reach);
            let old = self.providers.get(&address).map_or(&[][..], |old| old);
            if *new == *old {
                continue;
            }
            self.services_version += u64::from(!is_same_service(old, &new));
            let providers = Arc::make_mut(&mut self.providers);
            if new.is_empty() {
                providers.remove(&address);
            } else {
                providers.insert(address, new.into());
            }
        }
        (Arc::clone(&self.providers), self.services_version)
    }

    /// Marks what routers serve that came, went, or are nearer or farther than before.
    fn mark_moved(&mut self, reach: &Reach<'_>) {
        let metric = |router: &RouterId| Some(reach.routes.get(router)?.paths.first()?.metric_us);
        let now: BTreeMap<RouterId, u64> =
            self.by_router.keys().filter_map(|router| Some((*router, metric(router)?))).collect();
        for (router, addresses) in &self.by_router {
            if now.get(router) != self.metrics.get(router) {
                self.dirty.extend(addresses.iter().cloned());
            }
        }
        self.metrics = now;
    }

    fn providers_of(&self, address: &Address, reach: &Reach<'_>) -> Vec<Provider> {
        let listed = self.served.get(address).into_iter().flatten();
        let mut providers: Vec<Provider> =
            listed.filter_map(|(router, entry)| reach.provider(*router, address, entry)).collect();
        providers.sort_by_key(|provider| (provider.metric_us, provider.router));
        providers
    }

    fn insert(&mut self, router: RouterId, entry: &Arc<AddressEntry>) {
        let address = &entry.address;
        self.served.entry(address.clone()).or_default().insert(router, Arc::clone(entry));
        self.by_router.entry(router).or_default().insert(address.clone());
        self.dirty.insert(address.clone());
    }

    fn remove(&mut self, router: RouterId, address: &Address) {
        if let Some(routers) = self.served.get_mut(address) {
            routers.remove(&router);
            if routers.is_empty() {
                self.served.remove(address);
            }
        }
        if let Some(addresses) = self.by_router.get_mut(&router) {
            addresses.remove(address);
            if addresses.is_empty() {
                self.by_router.remove(&router);
            }
        }
        self.dirty.insert(address.clone());
    }
}

impl Reach<'_> {
    /// This router itself, or one that can be reached and may serve the address.
    fn provider(
        &self,
        router: RouterId,
        address: &Address,
        entry: &Arc<AddressEntry>,
    ) -> Option<Provider> {
        let entry = Arc::clone(entry);
        if router == self.local.0 {
            return Some(Provider { router, site: self.local.1, entry, cost: 0, metric_us: 0 });
        }
        let route = self.routes.get(&router)?;
        let allowed = self.trust.site(route.site)?.may_provide(address);
        let path = route.paths.first()?;
        let cost = path.cost.saturating_add(u64::from(entry.cost));
        let metric_us = path.metric_us.saturating_add(u64::from(entry.cost) * 1_000);
        allowed.then_some(Provider { router, site: route.site, entry, cost, metric_us })
    }
}

/// Whether the same routers serve the same ports.
fn is_same_service(old: &[Provider], new: &[Provider]) -> bool {
    let serves = |all: &[Provider], one: &Provider| {
        all.iter().any(|p| p.router == one.router && p.entry.ports == one.entry.ports)
    };
    old.len() == new.len() && old.iter().all(|one| serves(new, one))
}

fn entries(page: Option<&Record>) -> &[Arc<AddressEntry>] {
    match page.map(|record| &record.payload) {
        Some(Payload::AddressPage(page)) => &page.entries,
        _ => &[],
    }
}
