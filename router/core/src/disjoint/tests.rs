use super::*;
use crate::lsdb::Standing;
use crate::{
    Digest, Handle, Label, LinkAdvert, LinkId, Lsdb, Membership, Origin, Payload,
    ROUTER_RECORD_LIFETIME, Record, RecordKey, Role, RouterId, RouterLsa, Scope, Sealed, SiteId,
    TrustView, TrustedSite, spf::ShortestPaths,
};
use petgraph::{algo::ford_fulkerson, graph::DiGraph};
use proptest::prelude::*;
use std::{collections::BTreeMap, sync::Arc as Rc, time::Instant};

fn router(n: usize) -> RouterId {
    let mut id = [7; 16];
    id[..8].copy_from_slice(&(n as u64).to_be_bytes());
    RouterId(id)
}

/// Links as (end, end, cost); all routers are interior, the root is router 0.
#[allow(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
fn topology(routers: usize, links: &[(usize, usize, u16)]) -> Topology {
    let site = SiteId([9; 32]);
    let trusted = TrustedSite {
        site,
        name: "site".into(),
        membership: Membership::Member,
        scope: Scope::default(),
        anchors: Vec::new(),
        network: site,
        endpoints: Vec::new(),
    };
    let trust =
        TrustView { sites: BTreeMap::from([(site, Rc::new(trusted))]), ..TrustView::empty(site) };
    let (mut lsdb, mut own) = (Lsdb::default(), Vec::new());
    for n in 0..routers {
        let mine = links.iter().enumerate().filter(|(_, link)| link.0 == n || link.1 == n);
        let adverts: Vec<LinkAdvert> = mine
            .map(|(i, &(a, b, cost))| LinkAdvert {
                neighbor: router(if a == n { b } else { a }),
                link: LinkId(i as u64),
                label: Label(u16::try_from(i + 1).unwrap()),
                cost,
                rtt_us: 0,
                mtu: 1_400,
            })
            .collect();
        if n == 0 {
            own.clone_from(&adverts);
        }
        let lsa = RouterLsa {
            router: router(n),
            site,
            name: "router".into(),
            site_name: "site".into(),
            role: Role::Interior,
            handle: Handle(1),
            boot_epoch: 1,
            pages_since: 0,
            certificate: Rc::from([1]),
            links: adverts,
            protocol_min: 1,
            protocol_max: 1,
            endpoints: Vec::new(),
            version: "".into(),
            leaving: false,
        };
        let record = Record {
            key: RecordKey { origin: Origin::Router(router(n)), ..RecordKey::lsa(router(n)) },
            sequence: 1,
            lifetime_s: 3_600,
            payload: Payload::RouterLsa(Rc::new(lsa)),
            sealed: Sealed { body: Rc::from([]), signature: Rc::from([]), digest: Digest([0; 16]) },
        };
        lsdb.insert(Rc::new(record), ROUTER_RECORD_LIFETIME, Standing::Member, Instant::now());
    }
    Topology::new(router(0), own, &lsdb, &trust)
}

/// Every path without a router twice.
fn simple_paths(topology: &Topology, from: NodeIndex, to: NodeIndex) -> Vec<Vec<EdgeIndex>> {
    let mut found = Vec::new();
    let mut open = vec![(from, Vec::new(), vec![from])];
    while let Some((at, edges, passed)) = open.pop() {
        if at == to {
            found.push(edges);
            continue;
        }
        for edge in topology.graph.edge_indices() {
            let (near, far) = topology.graph.edge_endpoints(edge).unwrap();
            if near == at && !passed.contains(&far) {
                let longer = [&edges[..], &[edge]].concat();
                open.push((far, longer, [&passed[..], &[far]].concat()));
            }
        }
    }
    found
}

/// Metric of the paths, and a penalty for every use of a link or transit router beyond its first, those by `used` counted.
fn cost(topology: &Topology, used: &[&[EdgeIndex]], paths: &[&[EdgeIndex]]) -> i64 {
    let (mut uses, mut metric) = (BTreeMap::<(bool, usize), i64>::new(), 0);
    for path in paths.iter().chain(used) {
        for (i, &edge) in path.iter().enumerate() {
            *uses.entry((true, edge.index())).or_default() += 1;
            if i + 1 < path.len() {
                let (_, node) = topology.graph.edge_endpoints(edge).unwrap();
                *uses.entry((false, node.index())).or_default() += 1;
            }
        }
    }
    for path in paths {
        metric += path
            .iter()
            .map(|&edge| i64::try_from(topology.graph[edge].metric_us).unwrap())
            .sum::<i64>();
    }
    metric + uses.values().map(|uses| (uses - 1) * SHARING_PENALTY).sum::<i64>()
}

/// How many routes have no router or link in common, by maximum flow.
fn most_disjoint(topology: &Topology, from: NodeIndex, to: NodeIndex) -> u32 {
    let mut split = DiGraph::<(), u32>::new();
    for _ in 0..2 * topology.graph.node_count() {
        split.add_node(());
    }
    for node in topology.graph.node_indices() {
        let (enter, leave) = (2 * node.index(), 2 * node.index() + 1);
        let uses = if node == from || node == to { 100 } else { 1 };
        split.add_edge(NodeIndex::new(enter), NodeIndex::new(leave), uses);
    }
    for edge in topology.graph.edge_indices() {
        let (near, far) = topology.graph.edge_endpoints(edge).unwrap();
        let (leave, enter) = (2 * near.index() + 1, 2 * far.index());
        split.add_edge(NodeIndex::new(leave), NodeIndex::new(enter), 1);
    }
    let (source, sink) = (2 * from.index() + 1, 2 * to.index());
    ford_fulkerson(&split, NodeIndex::new(source), NodeIndex::new(sink)).0
}

fn disjoint(topology: &Topology, a: &[EdgeIndex], b: &[EdgeIndex]) -> bool {
    shared(topology, a, b) == 0
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn alternatives_share_as_little_as_any_choice_could(
        links in prop::collection::vec((0..5_usize, 0..5_usize, 1..9_u16), 4..12),
    ) {
        let topology = topology(5, &links);
        let shortest = ShortestPaths::new(&topology).unwrap();
        let root = topology.root().unwrap();
        let mut network = Network::new(&topology);
        for target in topology.graph.node_indices().filter(|node| *node != root) {
            let Ok(first) = shortest.path(&topology, target) else { continue };
            let all = simple_paths(&topology, root, target);
            let ends = (root, target);
            let best_pair = (0..all.len())
                .flat_map(|i| (i..all.len()).map(move |j| (i, j)))
                .map(|(i, j)| cost(&topology, &[], &[&all[i], &all[j]]))
                .min();
            let pair = network.flow(&topology, ends, &[], 2);
            prop_assert_eq!(pair.len(), 2);
            prop_assert_eq!(Some(cost(&topology, &[], &[&pair[0], &pair[1]])), best_pair);
            let used = [&pair[0][..], &pair[1], &first];
            let best = all.iter().map(|path| cost(&topology, &used, &[path])).min();
            let third = network.flow(&topology, ends, &used, 1);
            prop_assert_eq!(Some(cost(&topology, &used, &[&third[0]])), best);

            let mut paths = network.alternatives(&topology, &first);
            prop_assert!(paths.len() <= ALTERNATIVES_MAX);
            paths.push(first);
            for path in &paths {
                prop_assert!(all.contains(path));
            }
            let any_pair = paths.iter().enumerate().any(|(i, a)| {
                paths[i + 1..].iter().any(|b| disjoint(&topology, a, b))
            });
            prop_assert_eq!(any_pair, most_disjoint(&topology, root, target) >= 2);
        }
    }
}

/// The shortest path uses one router of each of two disjoint ones: both are found besides it.
#[test]
fn the_shortest_path_does_not_hide_a_disjoint_pair() {
    // 0-1-2-3 is shortest; 0-1-3 and 0-2-3 are disjoint.
    let topology = topology(4, &[(0, 1, 1), (1, 2, 1), (2, 3, 1), (0, 2, 5), (1, 3, 5)]);
    let shortest = ShortestPaths::new(&topology).unwrap();
    let target = topology.node(router(3)).unwrap();
    let first = shortest.path(&topology, target).unwrap();
    assert_eq!(first.len(), 3);
    let others = Network::new(&topology).alternatives(&topology, &first);
    assert!(others.len() >= 2);
    assert!(disjoint(&topology, &others[0], &others[1]));
}

/// 0-2-3-1-4 is shortest, and shares least with 0-2-4 three times over; yet 0-2-4 and 0-3-1-4 are disjoint.
#[test]
fn a_disjoint_pair_is_found_where_sharing_all_with_one_path_costs_less() {
    let topology = topology(5, &[(3, 2, 1), (2, 0, 1), (1, 4, 1), (3, 1, 1), (0, 3, 3), (4, 2, 4)]);
    let shortest = ShortestPaths::new(&topology).unwrap();
    let first = shortest.path(&topology, topology.node(router(4)).unwrap()).unwrap();
    let others = Network::new(&topology).alternatives(&topology, &first);
    assert!(others.iter().any(|a| others.iter().any(|b| disjoint(&topology, a, b))), "{others:?}");
}

/// `cargo test --release -p skein-core thousand -- --nocapture` prints how long it takes.
#[test]
#[allow(clippy::disallowed_methods, reason = "real time is what is printed")]
fn shortest_paths_of_a_thousand_routers() {
    let links: Vec<(usize, usize, u16)> = (0..1_000)
        .flat_map(|n| [1, 7, 31, 83].map(|step| (n, (n + step) % 1_000)))
        .map(|(a, b)| (a, b, u16::try_from(1 + (a * b) % 7).unwrap()))
        .collect();
    let topology = topology(1_000, &links);
    let began = Instant::now();
    let shortest = ShortestPaths::new(&topology).unwrap();
    println!("SPF over 1,000 routers and 8,000 directed links: {:?}", began.elapsed());
    let began = Instant::now();
    let found = topology.graph.node_indices().filter(|&n| shortest.path(&topology, n).is_ok());
    assert_eq!(found.count(), 1_000);
    println!("all paths: {:?}", began.elapsed());
    let target = topology.node(router(500)).unwrap();
    let first = shortest.path(&topology, target).unwrap();
    let mut network = Network::new(&topology);
    let began = Instant::now();
    let alternatives = network.alternatives(&topology, &first);
    println!("alternatives to one router: {:?}", began.elapsed());
    assert_eq!(alternatives.len(), 3);
}
