//! Alternatives to the shortest path: together with it as disjoint, in routers and links, as the topology allows.
//!
//! First the pair of paths that share least, whether the shortest is one of them or not; then what shares least with all of these.
//! Both are flows of minimum cost, in which the first use of a link or router costs nothing extra and each further use a penalty
//! larger than any metric. Paths found before count as uses that stay.

use crate::{PINS_MAX, spf::Topology};
use petgraph::graph::{EdgeIndex, NodeIndex};
use std::{cmp::Reverse, collections::BinaryHeap};

/// Paths besides the shortest.
const ALTERNATIVES_MAX: usize = PINS_MAX as usize - 1;
/// What sharing a link or router costs: more than the metric of any path, yet summable without overflow.
const SHARING_PENALTY: i64 = 1 << 44;

/// An arc of the flow network. Routers are split in two, so that passing through one is an arc as well.
#[derive(Clone, Copy, Debug)]
struct Arc {
    from: usize,
    to: usize,
    metric: i64,
    /// Uses by paths found before, which stay.
    fixed: i64,
    /// Uses by the paths being looked for.
    flow: i64,
    /// Whether more than one use is penalised.
    exclusive: bool,
    edge: Option<EdgeIndex>,
}

impl Arc {
    fn cost_of_one_more(&self) -> i64 {
        self.metric + self.penalty(self.fixed + self.flow)
    }

    fn gain_of_one_less(&self) -> i64 {
        self.metric + self.penalty(self.fixed + self.flow - 1)
    }

    fn penalty(&self, other_uses: i64) -> i64 {
        if self.exclusive && other_uses > 0 { SHARING_PENALTY } else { 0 }
    }
}

/// The flow network of a topology; made once per topology and reused for every destination.
#[derive(Debug)]
pub(crate) struct Network {
    arcs: Vec<Arc>,
    /// By node: arcs that leave it, and arcs that enter it, on which flow can be taken back.
    leaving: Vec<Vec<usize>>,
    entering: Vec<Vec<usize>>,
    potentials: Vec<i64>,
}

impl Network {
    pub(crate) fn new(topology: &Topology) -> Self {
        let nodes = topology.graph.node_count();
        let through = (0..nodes).map(|node| (2 * node, 2 * node + 1, 0, None));
        let links = topology.graph.edge_indices().filter_map(|edge| {
            let (from, to) = topology.graph.edge_endpoints(edge)?;
            let metric = i64::try_from(topology.graph[edge].metric_us).ok()?;
            Some((2 * from.index() + 1, 2 * to.index(), metric, Some(edge)))
        });
        let arc = |(from, to, metric, edge)| Arc {
            from,
            to,
            metric,
            fixed: 0,
            flow: 0,
            exclusive: true,
            edge,
        };
        let arcs: Vec<Arc> = through.chain(links).map(arc).collect();
        let (mut leaving, mut entering) =
            (vec![Vec::new(); 2 * nodes], vec![Vec::new(); 2 * nodes]);
        for (i, arc) in arcs.iter().enumerate() {
            leaving[arc.from].push(i);
            entering[arc.to].push(i);
        }
        Self { arcs, leaving, entering, potentials: vec![0; 2 * nodes] }
    }

    /// Number of arcs: a measure of the work per destination.
    pub(crate) fn len(&self) -> usize {
        self.arcs.len()
    }

    /// Up to three paths besides `shortest`, the least like it first; empty when there is only one way. If any two ways have no router and
    /// no link in common, there are two such among these and `shortest`.
    pub(crate) fn alternatives(
        &mut self,
        topology: &Topology,
        shortest: &[EdgeIndex],
    ) -> Vec<Vec<EdgeIndex>> {
        let Some(ends) = ends(topology, shortest) else { return Vec::new() };
        let mut paths = self.flow(topology, ends, &[], 2);
        paths.retain(|path| path != shortest);
        paths.dedup();
        let used: Vec<&[EdgeIndex]> = paths.iter().map(Vec::as_slice).chain([shortest]).collect();
        for path in self.flow(topology, ends, &used, ALTERNATIVES_MAX - used.len() + 1) {
            if path != shortest && !paths.contains(&path) {
                paths.push(path);
            }
        }
        paths.sort_by_cached_key(|path| {
            let metric: u64 = path.iter().map(|&edge| topology.graph[edge].metric_us).sum();
            (shared(topology, path, shortest), metric, path.len())
        });
        paths
    }

    /// So many `units` of flow, path by path, beside paths that are `used` already; some may be the same.
    fn flow(
        &mut self,
        topology: &Topology,
        (source, target): (NodeIndex, NodeIndex),
        used: &[&[EdgeIndex]],
        units: usize,
    ) -> Vec<Vec<EdgeIndex>> {
        self.reset(topology, source, target, used);
        let (source, target) = (2 * source.index() + 1, 2 * target.index());
        for _ in 0..units {
            if !self.augment(source, target) {
                break;
            }
        }
        std::iter::from_fn(|| self.take_path(source, target)).collect()
    }

    fn reset(
        &mut self,
        topology: &Topology,
        source: NodeIndex,
        target: NodeIndex,
        used: &[&[EdgeIndex]],
    ) {
        self.potentials.fill(0);
        let nodes = topology.graph.node_count();
        for (i, arc) in self.arcs.iter_mut().enumerate() {
            arc.fixed = 0;
            arc.flow = 0;
            arc.exclusive = i != source.index() && i != target.index();
        }
        for &edge in used.iter().copied().flatten() {
            self.arcs[nodes + edge.index()].fixed += 1;
            if let Some((_, to)) = topology.graph.edge_endpoints(edge) {
                self.arcs[to.index()].fixed += 1;
            }
        }
    }

    /// Adds one unit of flow along the cheapest way in the residual network (Dijkstra with potentials, which keep reduced
    /// costs from being negative although taking flow back gains).
    fn augment(&mut self, source: usize, target: usize) -> bool {
        let mut distance = vec![i64::MAX; self.leaving.len()];
        let mut came_by: Vec<Option<(usize, bool)>> = vec![None; self.leaving.len()];
        let mut heap = BinaryHeap::from([Reverse((0, source))]);
        distance[source] = 0;
        while let Some(Reverse((at_distance, at))) = heap.pop() {
            if at_distance > distance[at] {
                continue;
            }
            if at == target {
                break;
            }
            let forward = self.leaving[at].iter().map(|&i| (i, true));
            let backward = self.entering[at].iter().map(|&i| (i, false));
            for (i, is_forward) in forward.chain(backward) {
                let Some((to, cost)) = self.step(i, is_forward) else { continue };
                let reached = at_distance + cost + self.potentials[at] - self.potentials[to];
                if reached < distance[to] {
                    distance[to] = reached;
                    came_by[to] = Some((i, is_forward));
                    heap.push(Reverse((reached, to)));
                }
            }
        }
        if distance[target] == i64::MAX {
            return false;
        }
        let reached = distance[target];
        for (potential, distance) in self.potentials.iter_mut().zip(&distance) {
            *potential += (*distance).min(reached);
        }
        let mut at = target;
        while let Some((i, is_forward)) = came_by[at] {
            let arc = &mut self.arcs[i];
            arc.flow += if is_forward { 1 } else { -1 };
            at = if is_forward { arc.from } else { arc.to };
        }
        true
    }

    /// Where an arc leads in the residual network, and at what cost.
    fn step(&self, arc: usize, is_forward: bool) -> Option<(usize, i64)> {
        let arc = &self.arcs[arc];
        if is_forward {
            Some((arc.to, arc.cost_of_one_more()))
        } else {
            (arc.flow > 0).then(|| (arc.from, -arc.gain_of_one_less()))
        }
    }

    /// Takes one unit of flow out again, as a path. Costs are positive, so the flow has no cycles.
    fn take_path(&mut self, source: usize, target: usize) -> Option<Vec<EdgeIndex>> {
        let (mut path, mut at) = (Vec::new(), source);
        while at != target {
            let next = self.leaving[at].iter().copied().find(|&i| self.arcs[i].flow > 0)?;
            let arc = &mut self.arcs[next];
            arc.flow -= 1;
            path.extend(arc.edge);
            at = arc.to;
        }
        Some(path)
    }
}

/// Where a path begins and ends.
fn ends(topology: &Topology, path: &[EdgeIndex]) -> Option<(NodeIndex, NodeIndex)> {
    let (source, _) = topology.graph.edge_endpoints(*path.first()?)?;
    let (_, target) = topology.graph.edge_endpoints(*path.last()?)?;
    Some((source, target))
}

/// Links and transit routers a path has in common with another.
fn shared(topology: &Topology, path: &[EdgeIndex], other: &[EdgeIndex]) -> usize {
    let transits = |path: &[EdgeIndex]| -> Vec<NodeIndex> {
        let links = path.split_last().map_or(&[][..], |(_, links)| links);
        links.iter().filter_map(|&edge| Some(topology.graph.edge_endpoints(edge)?.1)).collect()
    };
    let of_other = transits(other);
    path.iter().filter(|edge| other.contains(edge)).count()
        + transits(path).iter().filter(|node| of_other.contains(node)).count()
}

#[cfg(test)]
mod tests;
