//! Immutable forwarding snapshots: what the data path reads, without a lock.

use crate::{Address, AddressEntry, Handle, Label, LinkId, Pin, RouterId, SiteId};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

/// Labels a short frame header has room for; with the ingress's own first link that makes eight hops.
pub const LABELS_MAX: usize = 7;

/// One way to a router, chosen by this one: source routing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Path {
    /// Our own link on which the frame leaves.
    pub first_link: LinkId,
    /// For each transit router in order, its label of the link to use; empty when the router is our neighbour.
    pub labels: Vec<Label>,
    /// Routers passed, the destination last.
    pub hops: Vec<RouterId>,
    /// Sum of the costs its links are configured with.
    pub cost: u64,
    /// Sum over its links of cost × 1 ms + quantised RTT, in microseconds.
    pub metric_us: u64,
    /// Largest end-to-end packet every link of the path carries, frame header excluded, in bytes.
    pub mtu: u16,
}

/// Everything the data path needs to reach one router.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// The router.
    pub router: RouterId,
    /// Its site.
    pub site: SiteId,
    /// Site name, for logs.
    pub site_name: Arc<str>,
    /// Its handle of this boot.
    pub handle: Handle,
    /// Its boot epoch; sessions to an older one are dropped at once.
    pub boot_epoch: u64,
    /// Paths by pin, `paths[0]` the shortest, the others as disjoint from it and each other as the graph allows; never empty.
    pub paths: Vec<Path>,
}

/// A router that serves an address. The entry is as advertised, the route as it is now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Provider {
    /// Who serves.
    pub router: RouterId,
    /// Its site.
    pub site: SiteId,
    /// What it advertises.
    pub entry: Arc<AddressEntry>,
    /// Cost of its shortest path plus the entry's; 0 for this router itself. Unlike the metric it is without measured times.
    pub cost: u64,
    /// Metric of its shortest path plus the entry's cost, in microseconds; 0 for this router itself.
    pub metric_us: u64,
}

/// Providers by address, of each at least one.
pub type Providers = BTreeMap<Address, Arc<[Provider]>>;

/// This router as others see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalRouter {
    /// Its id.
    pub router: RouterId,
    /// Its site.
    pub site: SiteId,
    /// What it writes as source into frame headers; changes when another router turns out to use the same.
    pub handle: Handle,
}

/// One consistent view of the network, replaced as a whole.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fib {
    /// Grows with every snapshot of this process.
    pub version: u64,
    /// This router; `None` only before the first snapshot.
    pub local: Option<LocalRouter>,
    /// Reachable, trusted routers (this one is not among them).
    pub routes: HashMap<RouterId, Arc<Route>>,
    /// Routers by the handle in frame headers; holds trusted routers even while no path leads to them.
    pub handles: HashMap<Handle, RouterId>,
    /// Our links by label: the transit look-up.
    pub labels: HashMap<Label, LinkId>,
    /// Our links to guests who may not be served as transit: what comes from there goes no farther than [`Fib::may_pass`] says.
    pub guests: HashSet<LinkId>,
    /// Reachable providers by address, in ascending order of (metric, router). The same allocation as long as nothing in it
    /// changes.
    pub addresses: Arc<Providers>,
    /// Grows when it changes who serves what, on which ports; not when a provider is merely nearer or farther than before.
    pub services_version: u64,
    /// Where each router's labels lead, dead links included: what a transit needs to find a detour.
    pub neighbors: Arc<HashMap<(RouterId, Label), RouterId>>,
}

impl Fib {
    /// The path to `handle` under `pin`; a pin beyond the paths there are wraps around.
    #[must_use]
    pub fn path(&self, handle: Handle, pin: Pin) -> Option<&Path> {
        let route = self.routes.get(self.handles.get(&handle)?)?;
        route.paths.get(usize::from(pin.0) % route.paths.len().max(1))
    }

    /// Whether `router` is this one.
    #[must_use]
    pub fn is_local(&self, router: RouterId) -> bool {
        self.local.is_some_and(|local| local.router == router)
    }

    /// Whether a frame that came on `from` may be sent on along `label` and then `rest`.
    ///
    /// What comes from a guest stays within our own site and passes no router twice: a guest chooses the labels it writes, and
    /// would otherwise have others carry its traffic, or the same frame over and over.
    #[must_use]
    pub fn may_pass(&self, from: LinkId, label: Label, rest: impl Iterator<Item = Label>) -> bool {
        if !self.guests.contains(&from) {
            return true;
        }
        let Some(local) = self.local else { return false };
        let mut passed = vec![local.router];
        for label in [label].into_iter().chain(rest) {
            let at = passed.last().and_then(|&at| self.neighbors.get(&(at, label)));
            let Some(&next) = at.filter(|next| !passed.contains(next)) else { return false };
            let is_ours = self.routes.get(&next).is_some_and(|route| route.site == local.site);
            if !is_ours {
                return false;
            }
            passed.push(next);
        }
        true
    }

    /// A detour for a frame that came to this router and should leave on `label`, whose link is down.
    ///
    /// `rest` are the labels after this one. They are walked to the frame's destination; the answer is the first of our
    /// paths there that starts on a link that `is_up`. Paths pass only through routers that may be transit.
    #[must_use]
    pub fn repair(
        &self,
        label: Label,
        rest: &[Label],
        is_up: impl Fn(LinkId) -> bool,
    ) -> Option<&Path> {
        let at = self.neighbors.get(&(self.local?.router, label))?;
        let destination =
            rest.iter().try_fold(at, |at, &label| self.neighbors.get(&(*at, label)))?;
        let route = self.routes.get(destination)?;
        route.paths.iter().find(|path| is_up(path.first_link))
    }
}
