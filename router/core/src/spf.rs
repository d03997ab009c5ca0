//! The topology as this router sees it, and the shortest paths through it.

use crate::{
    Handle, Label, LinkAdvert, LinkId, Lsdb, Path, Role, RouterId, RouterLsa, SiteId, TrustView,
};
use petgraph::{
    Direction,
    algo::dijkstra,
    graph::{DiGraph, EdgeIndex, NodeIndex},
    visit::EdgeRef,
};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Add,
    sync::Arc,
};

/// Longest path in links: what the long frame header has room for.
pub const HOPS_MAX: usize = 24;
/// What one unit of link cost weighs.
const COST_US: u64 = 1_000;

/// A router in the topology.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) router: RouterId,
    pub(crate) site: SiteId,
    pub(crate) site_name: Arc<str>,
    pub(crate) handle: Handle,
    pub(crate) boot_epoch: u64,
}

/// One direction of a link that both ends advertise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Edge {
    pub(crate) link: LinkId,
    /// The number of the router at its beginning for it.
    pub(crate) label: Label,
    pub(crate) cost: u64,
    pub(crate) metric_us: u64,
    pub(crate) mtu: u16,
}

/// Routers we trust and the links between them, as seen from `root`: routers that may not be transit have no links leaving
/// them, but for the root itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Topology {
    pub(crate) graph: DiGraph<Node, Edge>,
    nodes: BTreeMap<RouterId, NodeIndex>,
    /// Where every label leads, links that are down at the other end included.
    pub(crate) neighbors: HashMap<(RouterId, Label), RouterId>,
    root: Option<NodeIndex>,
}

impl Topology {
    /// The topology of trusted routers in the database; `root_links` stand for those in the root's LSA.
    pub(crate) fn new(
        root: RouterId,
        root_links: Vec<LinkAdvert>,
        lsdb: &Lsdb,
        trust: &TrustView,
    ) -> Self {
        let mut topology = Self::default();
        let is_trusted = |lsa: &&RouterLsa| !lsa.leaving && trust.site(lsa.site).is_some();
        let root_lsa =
            lsdb.lsa(root).map(|lsa| RouterLsa { links: root_links, ..RouterLsa::clone(lsa) });
        let others = lsdb.lsas().map(|lsa| &**lsa).filter(|lsa| lsa.router != root);
        let lsas: Vec<&RouterLsa> = others.chain(&root_lsa).filter(is_trusted).collect();
        for lsa in &lsas {
            let node = topology.graph.add_node(Node {
                router: lsa.router,
                site: lsa.site,
                site_name: Arc::clone(&lsa.site_name),
                handle: lsa.handle,
                boot_epoch: lsa.boot_epoch,
            });
            topology.nodes.insert(lsa.router, node);
            let neighbors = lsa.links.iter().map(|link| ((lsa.router, link.label), link.neighbor));
            topology.neighbors.extend(neighbors);
        }
        topology.root = topology.node(root);
        let ends: HashMap<(RouterId, LinkId), &LinkAdvert> = lsas
            .iter()
            .flat_map(|lsa| lsa.links.iter().map(|link| ((lsa.router, link.link), link)))
            .collect();
        for lsa in lsas {
            let may_transit = lsa.role == Role::Interior
                && trust.site(lsa.site).is_some_and(|site| site.may_transit());
            if may_transit || lsa.router == root {
                topology.add_links(lsa, &ends);
            }
        }
        topology
    }

    /// Links count only if both ends advertise them; of the two views the worse one counts, so that both ends agree.
    fn add_links(&mut self, lsa: &RouterLsa, ends: &HashMap<(RouterId, LinkId), &LinkAdvert>) {
        let Some(&from) = self.nodes.get(&lsa.router) else { return };
        for near in &lsa.links {
            let Some(&to) = self.nodes.get(&near.neighbor) else { continue };
            let far = ends.get(&(near.neighbor, near.link));
            let Some(far) = far.filter(|far| far.neighbor == lsa.router && to != from) else {
                continue;
            };
            let cost = u64::from(near.cost.max(far.cost));
            let edge = Edge {
                link: near.link,
                label: near.label,
                cost,
                metric_us: cost * COST_US + u64::from(near.rtt_us.max(far.rtt_us)),
                mtu: near.mtu.min(far.mtu),
            };
            self.graph.add_edge(from, to, edge);
        }
    }

    pub(crate) fn node(&self, router: RouterId) -> Option<NodeIndex> {
        self.nodes.get(&router).copied()
    }

    pub(crate) fn root(&self) -> Option<NodeIndex> {
        self.root
    }

    /// The link of that identity that leaves `from`.
    pub(crate) fn edge(&self, from: RouterId, link: LinkId) -> Option<EdgeIndex> {
        let mut edges = self.graph.edges(self.node(from)?);
        edges.find(|edge| edge.weight().link == link).map(|edge| edge.id())
    }

    /// The path along `edges`, which begin at the root and follow one another.
    pub(crate) fn path(&self, edges: &[EdgeIndex]) -> Option<Path> {
        let (&first, rest) = edges.split_first()?;
        let hops = edges.iter().map(|&edge| {
            let (_, to) = self.graph.edge_endpoints(edge)?;
            Some(self.graph[to].router)
        });
        Some(Path {
            first_link: self.graph[first].link,
            labels: rest.iter().map(|&edge| self.graph[edge].label).collect(),
            hops: hops.collect::<Option<_>>()?,
            cost: edges.iter().map(|&edge| self.graph[edge].cost).sum(),
            metric_us: edges.iter().map(|&edge| self.graph[edge].metric_us).sum(),
            mtu: edges.iter().map(|&edge| self.graph[edge].mtu).min()?,
        })
    }
}

/// Distance: the metric, and among equals the fewer links.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
struct Distance {
    metric_us: u64,
    hops: u32,
}

impl Add for Distance {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { metric_us: self.metric_us + other.metric_us, hops: self.hops + other.hops }
    }
}

/// Shortest paths from the root to everywhere.
#[derive(Debug)]
pub(crate) struct ShortestPaths {
    /// The last links of shortest paths to each node, by index.
    last_links: Vec<Vec<EdgeIndex>>,
    root: NodeIndex,
}

/// Why there is no path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoPath {
    Unreachable,
    TooLong,
}

impl ShortestPaths {
    /// Dijkstra from the root; `None` when the root is not in the topology.
    pub(crate) fn new(topology: &Topology) -> Option<Self> {
        let root = topology.root()?;
        let weight = |edge: &Edge| Distance { metric_us: edge.metric_us, hops: 1 };
        let distances = dijkstra(&topology.graph, root, None, |edge| weight(edge.weight()));
        let mut by_index = vec![None; topology.graph.node_count()];
        for node in topology.graph.node_indices() {
            by_index[node.index()] = distances.get(&node).copied();
        }
        let last_links = topology.graph.node_indices().map(|node| {
            let edges = topology.graph.edges_directed(node, Direction::Incoming);
            let shortest = edges.filter(|edge| {
                let before = by_index[edge.source().index()];
                node != root
                    && before.map(|at| at + weight(edge.weight())) == by_index[node.index()]
            });
            let mut shortest: Vec<EdgeIndex> = shortest.map(|edge| edge.id()).collect();
            shortest.sort_unstable();
            shortest
        });
        Some(Self { last_links: last_links.collect(), root })
    }

    /// The links of a shortest path. Where several are equally short, a hash of the destination picks one, so that
    /// destinations spread over them and one destination stays where it is.
    pub(crate) fn path(
        &self,
        topology: &Topology,
        to: NodeIndex,
    ) -> Result<Vec<EdgeIndex>, NoPath> {
        let spread = spread(topology.graph[to].router);
        let (mut edges, mut at) = (Vec::new(), to);
        while at != self.root {
            let choices = &self.last_links[at.index()];
            if choices.is_empty() {
                return Err(NoPath::Unreachable);
            }
            if edges.len() == HOPS_MAX {
                return Err(NoPath::TooLong);
            }
            let edge = choices[spread % choices.len()];
            edges.push(edge);
            at = topology.graph.edge_endpoints(edge).ok_or(NoPath::Unreachable)?.0;
        }
        edges.reverse();
        Ok(edges)
    }
}

/// The shortest among the paths of at most [`HOPS_MAX`] links, for destinations whose shortest path of all is longer.
#[derive(Debug)]
pub(crate) struct LimitedPaths {
    /// By number of links and node: the least metric of a walk of that many links, and its last one.
    walks: Vec<Vec<Option<(u64, EdgeIndex)>>>,
}

impl LimitedPaths {
    /// Bellman-Ford, a round for each link a path may have; `None` when the root is not in the topology.
    pub(crate) fn new(topology: &Topology) -> Option<Self> {
        let graph = &topology.graph;
        let mut at = vec![None; graph.node_count()];
        at[topology.root()?.index()] = Some(0);
        let mut walks = Vec::with_capacity(HOPS_MAX);
        for _ in 0..HOPS_MAX {
            let mut walk: Vec<Option<(u64, EdgeIndex)>> = vec![None; at.len()];
            for edge in graph.edge_references() {
                let Some(before) = at[edge.source().index()] else { continue };
                let metric: u64 = before + edge.weight().metric_us;
                let best = &mut walk[edge.target().index()];
                if best.is_none_or(|(least, _)| metric < least) {
                    *best = Some((metric, edge.id()));
                }
            }
            at = walk.iter().map(|best| best.map(|(metric, _)| metric)).collect();
            walks.push(walk);
        }
        Some(Self { walks })
    }

    /// The links of the path. A walk that passed a router twice would be longer than one that does not, so the best is a path.
    pub(crate) fn path(&self, topology: &Topology, to: NodeIndex) -> Option<Vec<EdgeIndex>> {
        let metric = |links: &usize| Some(self.walks[links - 1][to.index()]?.0);
        let reaching = (1..=self.walks.len()).filter(|links| metric(links).is_some());
        let links = reaching.min_by_key(|links| (metric(links), *links))?;
        let (mut edges, mut at) = (Vec::with_capacity(links), to);
        for walk in self.walks[..links].iter().rev() {
            let (_, edge) = walk[at.index()]?;
            edges.push(edge);
            at = topology.graph.edge_endpoints(edge)?.0;
        }
        edges.reverse();
        Some(edges)
    }
}

/// Router ids are hashes already.
fn spread(router: RouterId) -> usize {
    router.0.iter().rev().take(4).fold(0, |sum, &byte| (sum << 8) | usize::from(byte))
}
