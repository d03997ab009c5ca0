//! From the database to what the data path reads.

use super::{Engine, Notary, addresses::Reach};
use crate::{
    Fib, LinkId, LocalRouter, Path, Route, RouterId,
    adjacency::Adjacency,
    disjoint::Network,
    spf::{HOPS_MAX, LimitedPaths, NoPath, ShortestPaths, Topology},
    throttle::Throttle,
};
use petgraph::{graph::EdgeIndex, visit::EdgeRef};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// Changes that come in a burst are computed together, but the first one at once.
const SPF_HOLD_MIN: Duration = Duration::from_millis(10);
const SPF_HOLD_MAX: Duration = Duration::from_millis(100);
/// Work on alternative paths between two looks at the queue of events, in arcs of the flow network: some milliseconds.
const ALTERNATIVES_WORK: usize = 30_000;

/// The last snapshot and what is to be done for the next.
#[derive(Debug)]
pub(super) struct Snapshot {
    fib: Arc<Fib>,
    dirty: bool,
    topology_dirty: bool,
    throttle: Throttle,
    topology: Topology,
    shortest: BTreeMap<RouterId, Vec<EdgeIndex>>,
    too_long: BTreeSet<RouterId>,
    network: Option<Network>,
    /// Alternatives by destination; of an earlier topology until recomputed.
    alternatives: BTreeMap<RouterId, Vec<Path>>,
    /// Destinations whose alternatives are to be computed, those with fewest first.
    queue: Vec<RouterId>,
    /// When the rest of the queue is due: at once, after other events had their turn.
    queue_due: Option<Instant>,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            fib: Arc::default(),
            dirty: true,
            topology_dirty: true,
            throttle: Throttle::new(SPF_HOLD_MIN, SPF_HOLD_MAX),
            topology: Topology::default(),
            shortest: BTreeMap::new(),
            too_long: BTreeSet::new(),
            network: None,
            alternatives: BTreeMap::new(),
            queue: Vec::new(),
            queue_due: None,
        }
    }
}

impl Snapshot {
    /// Routers, links or trust changed.
    pub(super) fn mark(&mut self) {
        self.dirty = true;
        self.topology_dirty = true;
    }

    /// Addresses changed; paths did not.
    pub(super) fn mark_addresses(&mut self) {
        self.dirty = true;
    }

    pub(super) fn fib(&self) -> &Arc<Fib> {
        &self.fib
    }

    pub(super) fn is_too_far(&self, router: RouterId) -> bool {
        self.too_long.contains(&router)
    }

    pub(super) fn due(&self) -> Option<(Instant, &'static str)> {
        let spf = self.throttle.not_before().filter(|_| self.dirty).map(|at| (at, "SPF"));
        let rest = self.queue_due.map(|at| (at, "alternative paths"));
        [spf, rest].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Shortest paths to every router of a new topology.
    fn compute(&mut self, topology: Topology) {
        self.shortest.clear();
        self.too_long.clear();
        if let Some(paths) = ShortestPaths::new(&topology) {
            for node in topology.graph.node_indices() {
                let router = topology.graph[node].router;
                match paths.path(&topology, node) {
                    Ok(edges) if edges.is_empty() => {}
                    Ok(edges) => {
                        self.shortest.insert(router, edges);
                    }
                    Err(NoPath::TooLong) => {
                        self.too_long.insert(router);
                    }
                    Err(NoPath::Unreachable) => {}
                }
            }
        }
        self.detour(&topology);
        self.topology = topology;
        self.network = None;
        self.keep_valid_alternatives();
        self.queue = self.shortest.keys().copied().collect();
        self.queue.sort_by_key(|router| {
            std::cmp::Reverse(self.alternatives.get(router).map_or(0, Vec::len))
        });
    }

    /// Finds routers whose shortest path has too many links by the best path that has not.
    fn detour(&mut self, topology: &Topology) {
        if self.too_long.is_empty() {
            return;
        }
        let Some(limited) = LimitedPaths::new(topology) else { return };
        let Self { too_long, shortest, .. } = self;
        too_long.retain(|&router| {
            let node = topology.node(router);
            let Some(edges) = node.and_then(|node| limited.path(topology, node)) else {
                return true;
            };
            shortest.insert(router, edges);
            false
        });
    }

    /// Alternatives found in an earlier topology serve on while all their links exist.
    fn keep_valid_alternatives(&mut self) {
        let Self { alternatives, topology, shortest, .. } = self;
        alternatives.retain(|router, paths| {
            let Some(first) = shortest.get(router) else { return false };
            let again = paths.iter().filter_map(|path| retrace(topology, path));
            *paths = again
                .filter(|edges| edges != first)
                .filter_map(|edges| topology.path(&edges))
                .collect();
            true
        });
    }

    /// Computes some of the alternatives in the queue; says whether any was.
    fn work_on_queue(&mut self, now: Instant) -> bool {
        let Self { topology, network, alternatives, shortest, queue, .. } = self;
        if queue.is_empty() {
            self.queue_due = None;
            return false;
        }
        let network = network.get_or_insert_with(|| Network::new(topology));
        let count = (ALTERNATIVES_WORK / network.len().max(1)).max(1);
        for _ in 0..count {
            let Some(router) = queue.pop() else { break };
            let Some(first) = shortest.get(&router) else { continue };
            let found = network.alternatives(topology, first);
            let found = found.iter().filter(|edges| edges.len() <= HOPS_MAX);
            alternatives.insert(router, found.filter_map(|e| topology.path(e)).collect());
        }
        self.queue_due = (!self.queue.is_empty()).then_some(now);
        true
    }

    fn routes(&self) -> HashMap<RouterId, Arc<Route>> {
        let route = |(&router, edges): (&RouterId, &Vec<EdgeIndex>)| {
            let node = &self.topology.graph[self.topology.node(router)?];
            let shortest = self.topology.path(edges)?;
            let others = self.alternatives.get(&router).into_iter().flatten().cloned();
            let route = Route {
                router,
                site: node.site,
                site_name: Arc::clone(&node.site_name),
                handle: node.handle,
                boot_epoch: node.boot_epoch,
                paths: std::iter::once(shortest).chain(others).collect(),
            };
            // What did not change stays the same allocation, so that readers can tell cheaply.
            let old = self.fib.routes.get(&router).filter(|old| ***old == route);
            Some((router, old.map_or_else(|| Arc::new(route), Arc::clone)))
        };
        self.shortest.iter().filter_map(route).collect()
    }
}

/// The links of a path in another topology, if they are all there.
fn retrace(topology: &Topology, path: &Path) -> Option<Vec<EdgeIndex>> {
    let root = topology.root()?;
    let first = topology.edge(topology.graph[root].router, path.first_link)?;
    let mut edges = vec![first];
    for (label, pair) in path.labels.iter().zip(path.hops.windows(2)) {
        let from = topology.node(pair[0])?;
        let mut leaving = topology.graph.edges(from);
        let same = leaving.find(|edge| {
            edge.weight().label == *label && topology.graph[edge.target()].router == pair[1]
        });
        edges.push(same?.id());
    }
    let (_, to) = topology.graph.edge_endpoints(*edges.last()?)?;
    (Some(&topology.graph[to].router) == path.hops.last()).then_some(edges)
}

impl<N: Notary> Engine<N> {
    /// Publishes a snapshot if what it is made of changed and the throttle is open, or goes on with alternative paths.
    pub(super) fn publish(&mut self, now: Instant) {
        if self.snapshot.dirty && self.snapshot.throttle.is_open(now) {
            self.snapshot.dirty = false;
            self.snapshot.throttle.ran(now);
            if std::mem::take(&mut self.snapshot.topology_dirty) {
                self.yield_handle();
                let topology = self.topology();
                self.snapshot.compute(topology);
                self.snapshot.work_on_queue(now);
            }
            self.emit();
        } else if self.snapshot.queue_due.is_some_and(|due| due <= now)
            && self.snapshot.work_on_queue(now)
            && self.snapshot.queue.is_empty()
        {
            self.emit();
        }
    }

    /// The topology by the database, but for our own links: those are as they are now.
    fn topology(&self) -> Topology {
        let root = self.identity.router;
        let links = self.adjacencies.values().map(Adjacency::advert).collect();
        let mut topology = Topology::new(root, links, &self.lsdb, &self.trust);
        let own_labels = self.labels.iter().map(|(label, peer)| ((root, label), peer));
        topology.neighbors.extend(own_labels);
        topology
    }

    /// Of two routers with the same handle the one with the larger id draws anew.
    fn yield_handle(&mut self) {
        let handle = self.handle();
        let smaller = self.lsdb.lsas().take_while(|lsa| lsa.router < self.identity.router);
        let mut trusted = smaller.filter(|lsa| self.trust.site(lsa.site).is_some());
        if trusted.any(|lsa| lsa.handle == handle && !lsa.leaving) {
            tracing::info!("another router has the same handle: drawing a new one");
            self.own.redraw_handle();
            self.snapshot.mark();
        }
    }

    fn emit(&mut self) {
        let routes = self.snapshot.routes();
        let local = (self.identity.router, self.identity.site);
        let reach = Reach { local, trust: &self.trust, routes: &routes };
        let (addresses, services_version) = self.addresses.providers(&reach);
        let fib = Fib {
            version: self.snapshot.fib.version,
            local: Some(LocalRouter {
                router: self.identity.router,
                site: self.identity.site,
                handle: self.handle(),
            }),
            addresses,
            services_version,
            routes,
            handles: self.handles(),
            guests: self.guests(),
            labels: self.adjacencies.values().map(|a| (a.label(), a.link)).collect(),
            neighbors: Arc::new(self.snapshot.topology.neighbors.clone()),
        };
        if fib != *self.snapshot.fib {
            let fib = Arc::new(Fib { version: fib.version + 1, ..fib });
            self.snapshot.fib = Arc::clone(&fib);
            self.outputs.push_back(super::Output::Publish(fib));
        }
    }

    /// Links to guests who may not be served as transit.
    fn guests(&self) -> HashSet<LinkId> {
        let links = self.adjacencies.values();
        let confined = links.filter(|adjacency| {
            !self.trust.site(adjacency.peer_site).is_some_and(|site| site.may_transit())
        });
        confined.map(|adjacency| adjacency.link).collect()
    }

    fn handles(&self) -> HashMap<crate::Handle, RouterId> {
        let mut handles = HashMap::new();
        let trusted = |lsa: &&Arc<crate::RouterLsa>| {
            !lsa.leaving
                && lsa.router != self.identity.router
                && self.trust.site(lsa.site).is_some()
        };
        for lsa in self.lsdb.lsas().filter(trusted) {
            handles.entry(lsa.handle).or_insert(lsa.router);
        }
        handles
    }
}
