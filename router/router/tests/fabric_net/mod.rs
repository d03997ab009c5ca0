//! Routers of several sites in one process, with static routes, over loopback.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    reason = "a test stops at what it cannot unwrap"
)]

mod relay;

pub(crate) use relay::Relay;

use aws_lc_rs::rand::SystemRandom;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use skein_core::{
    Fib, Handle, Label, LinkId, LocalRouter, Membership, Path, Pin, Route, RouterId, Scope, SiteId,
    TrustView, TrustedSite, vaddr,
};
use skein_router::{
    clock,
    fabric::Fabric,
    link::{LinkEvent, LinkEvents, LinkUp, Links, LinksConfig},
};
use skein_trust::{
    IdentityCell, KeyRequest, RouterIdentity, RouterTls, SERVER_NAME, SiteCa, SiteIdentity,
    TrustCell,
};
use skein_wire::proto::{control::LinkConfig, routing::LinkHello};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};
use tokio::time;

/// Nothing in these tests takes this long unless it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A router, alone in its site.
pub(crate) struct Node {
    pub(crate) site: SiteId,
    pub(crate) router: RouterId,
    pub(crate) handle: Handle,
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) links: Links,
    pub(crate) events: LinkEvents,
    pub(crate) trust: Arc<TrustCell>,
    pub(crate) tls: RouterTls,
    /// Links that are up, by neighbour.
    pub(crate) up: BTreeMap<RouterId, LinkUp>,
}

/// Sites that trust each other, with one router each.
pub(crate) struct Network(Vec<(SiteIdentity, SiteCa)>);

impl Network {
    pub(crate) fn new(n: u8) -> Self {
        let site = |_| {
            let identity = SiteIdentity::generate(&SystemRandom::new()).unwrap();
            let ca = SiteCa::generate(identity.site_id(), &SystemRandom::new(), clock::unix_s());
            (identity, ca.unwrap())
        };
        Self((0..n).map(site).collect())
    }

    /// Starts the router of site `i`, on the current runtime.
    pub(crate) fn start(&self, i: u8, listen: SocketAddr) -> Node {
        let node = node(i, &self.0);
        node.links.listen(&[listen]);
        node
    }
}

/// `n` routers whose sites trust each other, listening on loopback.
pub(crate) async fn nodes(n: u8) -> Vec<Node> {
    let network = Network::new(n);
    let nodes: Vec<Node> =
        (0..n).map(|i| network.start(i, "127.0.0.1:0".parse().unwrap())).collect();
    for node in &nodes {
        node.address().await;
    }
    nodes
}

fn node(i: u8, sites: &[(SiteIdentity, SiteCa)]) -> Node {
    let (identity, ca) = &sites[usize::from(i)];
    let site = identity.site_id();
    let request = KeyRequest::generate().unwrap();
    let issued =
        ca.issue_router(request.csr(), "router", &SystemRandom::new(), clock::unix_s()).unwrap();
    let identity = Arc::new(RouterIdentity::new(issued.chain, request.private_key()).unwrap());
    let router = identity.router_id();
    let mut view = TrustView::empty(site);
    for (identity, ca) in sites {
        view.sites.insert(identity.site_id(), trusted(identity.site_id(), ca));
    }
    let trust = TrustCell::new(Arc::new(view));
    let time: Arc<dyn TimeProvider> = Arc::new(DefaultTimeProvider);
    let tls = RouterTls::new(Arc::clone(&trust), IdentityCell::new(identity), Arc::clone(&time));
    let handle = Handle(u32::from(i) + 1);
    let fabric = Fabric::new(handle);
    let mut seed = [0; 32];
    aws_lc_rs::rand::fill(&mut seed).unwrap();
    let (links, events) = Links::start(LinksConfig {
        fabric: Arc::clone(&fabric),
        router,
        tls: tls.clone(),
        time,
        hello: Arc::new(move |_| LinkHello {
            router_id: router.0.to_vec(),
            site_id: site.0.to_vec(),
            site_name: format!("site{i}"),
            ..LinkHello::default()
        }),
        site_secret: [i; 32],
        udp_interval: Duration::from_millis(50),
        seed,
    });
    Node { site, router, handle, fabric, links, events, trust, tls, up: BTreeMap::new() }
}

fn trusted(site: SiteId, ca: &SiteCa) -> Arc<TrustedSite> {
    Arc::new(TrustedSite {
        site,
        name: "site".into(),
        membership: Membership::Member,
        scope: Scope::default(),
        anchors: vec![ca.certificate().as_ref().into()],
        network: site,
        endpoints: Vec::new(),
    })
}

impl Node {
    /// Where it listens.
    pub(crate) async fn address(&self) -> SocketAddr {
        eventually(|| {
            let socket = self.links.sockets().into_iter().next()?;
            socket.address.parse().ok().filter(|addr: &SocketAddr| addr.port() != 0)
        })
        .await
    }

    /// What to configure for dialling `peer` at `endpoints`.
    pub(crate) fn link_to(&self, peer: &Self, endpoints: &[SocketAddr]) -> LinkConfig {
        LinkConfig {
            name: format!("to-{}", peer.handle.0),
            peer_site_id: peer.site.0.to_vec(),
            endpoints: endpoints.iter().map(ToString::to_string).collect(),
            cost: 3,
        }
    }

    /// The next event that is not a mere change.
    pub(crate) async fn event(&mut self) -> LinkEvent {
        loop {
            match time::timeout(PATIENCE, self.events.recv()).await.unwrap().unwrap() {
                LinkEvent::Changed { .. } => {}
                event => {
                    match &event {
                        LinkEvent::Up(up) => {
                            self.up.insert(up.peer.router, (**up).clone());
                        }
                        LinkEvent::Down { id, .. } => self.up.retain(|_, up| up.id != *id),
                        _ => {}
                    }
                    return event;
                }
            }
        }
    }

    /// Waits for the next link to come up.
    pub(crate) async fn next_up(&mut self) -> LinkUp {
        match self.event().await {
            LinkEvent::Up(up) => *up,
            other => panic!("not up: {other:?}"),
        }
    }

    /// Waits for the next link to go down.
    pub(crate) async fn next_down(&mut self) -> (LinkId, String) {
        match self.event().await {
            LinkEvent::Down { id, reason } => (id, reason),
            other => panic!("not down: {other:?}"),
        }
    }

    /// An end-to-end endpoint over the fabric.
    pub(crate) fn endpoint(&self) -> quinn::Endpoint {
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(self.tls.session_server());
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls.unwrap()));
        server.transport_config(transport(INITIAL_RTT));
        quinn::Endpoint::new_with_abstract_socket(
            quinn::EndpointConfig::default(),
            Some(server),
            Arc::clone(&self.fabric) as Arc<dyn quinn::AsyncUdpSocket>,
            Arc::new(quinn::TokioRuntime),
        )
        .unwrap()
    }

    /// For dialling a session to `peer`.
    pub(crate) fn session_config(&self, peer: &Self) -> quinn::ClientConfig {
        let tls = Arc::clone(&self.tls.session_client(peer.router).config);
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(transport(INITIAL_RTT));
        config
    }

    /// A session to `peer` under `pin`.
    pub(crate) async fn connect(
        &self,
        endpoint: &quinn::Endpoint,
        peer: &Self,
        pin: Pin,
    ) -> quinn::Connection {
        self.connect_with(endpoint, peer, pin, INITIAL_RTT).await
    }

    /// The same, with as long a wait before packets are sent again as `initial_rtt` makes it.
    pub(crate) async fn connect_with(
        &self,
        endpoint: &quinn::Endpoint,
        peer: &Self,
        pin: Pin,
        initial_rtt: Duration,
    ) -> quinn::Connection {
        let mut config = self.session_config(peer);
        config.transport_config(transport(initial_rtt));
        let connecting = endpoint.connect_with(config, vaddr(peer.handle, pin), SERVER_NAME);
        time::timeout(PATIENCE, connecting.unwrap()).await.unwrap().unwrap()
    }
}

const INITIAL_RTT: Duration = Duration::from_millis(20);

fn transport(initial_rtt: Duration) -> Arc<quinn::TransportConfig> {
    let mut config = quinn::TransportConfig::default();
    config.mtu_discovery_config(None).initial_rtt(initial_rtt);
    Arc::new(config)
}

/// Link of `a` to `b`, dialled by `a`, through `endpoint` or directly.
pub(crate) async fn join(nodes: &mut [Node], a: usize, b: usize, endpoint: Option<SocketAddr>) {
    let endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => nodes[b].address().await,
    };
    let config = nodes[a].link_to(&nodes[b], &[endpoint]);
    let mut configs = configured(&nodes[a]);
    configs.push(config);
    nodes[a].links.configure(configs);
    let up = nodes[a].next_up().await;
    assert_eq!(nodes[b].next_up().await.id, up.id);
}

/// What is configured already, as far as a configuration needs it.
fn configured(node: &Node) -> Vec<LinkConfig> {
    let outgoing = node.links.status().into_iter().filter(|link| !link.incoming);
    outgoing
        .map(|link| LinkConfig {
            name: link.name,
            peer_site_id: link.peer_site_id,
            endpoints: vec![link.remote],
            cost: link.cost,
        })
        .collect()
}

/// The label by which every router knows its link to router `to`.
pub(crate) fn label(to: usize) -> Label {
    Label(u16::try_from(to).unwrap() + 1)
}

/// Publishes static routes at `me`: `paths` are lists of routers to pass, the destination last, pin 0 first.
pub(crate) fn publish(nodes: &[Node], me: usize, paths: &[&[usize]], mtu: u16) {
    let node = &nodes[me];
    let mut fib = Fib {
        version: 1,
        local: Some(LocalRouter { router: node.router, site: node.site, handle: node.handle }),
        handles: nodes.iter().map(|node| (node.handle, node.router)).collect(),
        ..Fib::default()
    };
    let mut neighbors = HashMap::new();
    for (at, node) in nodes.iter().enumerate() {
        for (to, peer) in nodes.iter().enumerate().filter(|(to, _)| *to != at) {
            neighbors.insert((node.router, label(to)), peer.router);
        }
    }
    fib.neighbors = Arc::new(neighbors);
    for (to, peer) in nodes.iter().enumerate() {
        if let Some(up) = node.up.get(&peer.router) {
            fib.labels.insert(label(to), up.id);
        }
    }
    let destinations: BTreeSet<usize> =
        paths.iter().filter_map(|path| path.last()).copied().collect();
    for destination in destinations {
        let to_it = paths.iter().filter(|path| path.last() == Some(&destination));
        let paths: Vec<Path> = to_it
            .filter_map(|path| {
                let first = nodes[path[0]].router;
                Some(Path {
                    first_link: node.up.get(&first)?.id,
                    labels: path[1..].iter().map(|&hop| label(hop)).collect(),
                    hops: path.iter().map(|&hop| nodes[hop].router).collect(),
                    cost: 1,
                    metric_us: 1_000,
                    mtu,
                })
            })
            .collect();
        if paths.is_empty() {
            continue;
        }
        let peer = &nodes[destination];
        let route = Route {
            router: peer.router,
            site: peer.site,
            site_name: "site".into(),
            handle: peer.handle,
            boot_epoch: 1,
            paths,
        };
        fib.routes.insert(peer.router, Arc::new(route));
    }
    node.fabric.publish(Arc::new(fib));
}

/// Looks until there is something to see.
pub(crate) async fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let seen = async {
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    time::timeout(PATIENCE, seen).await.expect("it never came to pass")
}
