//! Sessions, ingress and egress of several routers in one process, joined by loopback UDP sockets instead of a fabric.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

use aws_lc_rs::rand::SystemRandom;
use parking_lot::Mutex;
use prost::Message as _;
use quinn::{
    AsyncUdpSocket, Runtime as _, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rustls::time_provider::DefaultTimeProvider;
use skein_core::{
    Address, Fib, Handle, LinkId, Membership, Path, Pattern, Pin, Provider, Route, RouterId, Scope,
    SiteId, TrustView, TrustedSite, parse_vaddr, vaddr,
};
use skein_router::{
    clock,
    egress::Egress,
    flows::{FlowCounters, FlowLimit, LocalRouter, Surroundings},
    ingress::{Ingress, IngressConfig},
    net,
    session::{self, Budget, Sessions, SessionsConfig},
};
use skein_trust::{
    IdentityCell, KeyRequest, RouterIdentity, RouterTls, SERVER_NAME, SiteCa, TrustCell, router_id,
};
use skein_wire::proto::{
    control::{ConnectorConfig, ConnectorPort, ListenerConfig, ListenerPort, SourceAddress},
    routing::Protocol,
    session::{FlowOpen, SessionHello},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

pub(crate) const BUDGET_BYTES: u64 = 512 << 20;
pub(crate) const SERVICE_PORT: u32 = 80;

/// A socket on which the other routers have virtual addresses, and which can be cut off.
#[derive(Debug)]
pub(crate) struct Wire {
    inner: Arc<dyn AsyncUdpSocket>,
    handle: Handle,
    peers: Mutex<HashMap<Handle, SocketAddr>>,
    cut: AtomicBool,
    /// What its paths claim to carry.
    mtu: AtomicU16,
    /// Packets sent that were larger.
    oversized: AtomicU64,
    /// Packets sent.
    sent: AtomicU64,
}

impl Wire {
    fn new(handle: Handle) -> Arc<Self> {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let inner = quinn::TokioRuntime.wrap_udp_socket(socket).unwrap();
        Arc::new(Self {
            inner,
            handle,
            peers: Mutex::default(),
            cut: AtomicBool::new(false),
            mtu: AtomicU16::new(1_452),
            oversized: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        })
    }

    fn handle_of(&self, from: SocketAddr) -> Option<Handle> {
        self.peers.lock().iter().find(|(_, addr)| **addr == from).map(|(handle, _)| *handle)
    }
}

impl AsyncUdpSocket for Wire {
    fn create_io_poller(self: Arc<Self>) -> std::pin::Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let (handle, _) = parse_vaddr(&transmit.destination).unwrap();
        let to = self.peers.lock().get(&handle).copied();
        let (Some(destination), false) = (to, self.cut.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let len = transmit.segment_size.unwrap_or(transmit.contents.len());
        let packets = transmit.contents.len().div_ceil(len.max(1));
        self.sent.fetch_add(packets as u64, Ordering::Relaxed);
        if len > self.mtu.load(Ordering::Relaxed).into() {
            self.oversized.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.try_send(&Transmit { destination, src_ip: None, ..*transmit })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let count = match self.inner.poll_recv(cx, bufs, meta) {
                Poll::Ready(Ok(count)) => count,
                other => return other,
            };
            if self.cut.load(Ordering::Relaxed) {
                continue;
            }
            for meta in &mut meta[..count] {
                let Some(handle) = self.handle_of(meta.addr) else { continue };
                meta.addr = vaddr(handle, Pin(0));
                meta.dst_ip = None;
            }
            return Poll::Ready(Ok(count));
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(vaddr(self.handle, Pin(0)))
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// The data path of one router.
pub(crate) struct Edge {
    pub(crate) local: LocalRouter,
    pub(crate) handle: Handle,
    pub(crate) wire: Arc<Wire>,
    pub(crate) ingress: Ingress,
    pub(crate) egress: Egress,
    pub(crate) sessions: Sessions,
    pub(crate) budget: Arc<Budget>,
    pub(crate) limit: Arc<FlowLimit>,
    pub(crate) counters: Arc<FlowCounters>,
    fib: watch::Sender<Arc<Fib>>,
    trust: watch::Sender<Arc<TrustView>>,
    cell: Arc<TrustCell>,
    trusted: Arc<TrustedSite>,
    tls: RouterTls,
}

/// A few routers, each of a site of its own, that all trust and reach each other.
pub(crate) struct Network {
    pub(crate) edges: Vec<Edge>,
    /// Routers that no path leads to.
    pub(crate) unreachable: BTreeSet<RouterId>,
    /// More handles of routers.
    aliases: Vec<(Handle, RouterId)>,
    version: u64,
}

impl Network {
    pub(crate) fn new(count: u8) -> Self {
        Self::with_budget(count, BUDGET_BYTES)
    }

    pub(crate) fn with_budget(count: u8, budget_bytes: u64) -> Self {
        let edges: Vec<_> = (1..=count).map(|n| Edge::new(n, budget_bytes)).collect();
        for edge in &edges {
            for other in &edges {
                let addr = other.wire.inner.local_addr().unwrap();
                edge.wire.peers.lock().insert(other.handle, addr);
            }
        }
        let mut network =
            Self { edges, unreachable: BTreeSet::new(), aliases: Vec::new(), version: 0 };
        network.trust_all_but(&[]);
        network.publish();
        network
    }

    /// Everybody trusts everybody, except these.
    pub(crate) fn trust_all_but(&self, untrusted: &[SiteId]) {
        let trusted = self.edges.iter().filter(|edge| !untrusted.contains(&edge.local.site));
        self.trust(trusted.map(|edge| (edge.local.site, Arc::clone(&edge.trusted))).collect());
    }

    /// Everybody trusts everybody, the site of this edge as a guest that may reach and serve these.
    pub(crate) fn trust_as_guest(&self, guest: usize, addresses: &[&str]) {
        let patterns: BTreeSet<_> = addresses.iter().map(|&a| Pattern(a.into())).collect();
        let scope = Scope { consume: patterns.clone(), provide: patterns, transit: false };
        let mut sites: BTreeMap<_, _> =
            self.edges.iter().map(|edge| (edge.local.site, Arc::clone(&edge.trusted))).collect();
        let site = (*self.edges[guest].trusted).clone();
        let site = TrustedSite { membership: Membership::Guest, scope, ..site };
        sites.insert(site.site, Arc::new(site));
        self.trust(sites);
    }

    fn trust(&self, sites: BTreeMap<SiteId, Arc<TrustedSite>>) {
        for edge in &self.edges {
            let view =
                Arc::new(TrustView { sites: sites.clone(), ..TrustView::empty(edge.local.site) });
            edge.cell.publish(Arc::clone(&view));
            edge.trust.send_replace(view);
        }
    }

    /// Gives every router its view of what the others serve now.
    pub(crate) fn publish(&mut self) {
        self.version += 1;
        for edge in &self.edges {
            edge.fib.send_replace(Arc::new(self.fib_of(edge)));
        }
    }

    fn fib_of(&self, edge: &Edge) -> Fib {
        let is_reachable = |other: &&Edge| {
            other.local.router == edge.local.router
                || !(self.unreachable.contains(&other.local.router)
                    || self.unreachable.contains(&edge.local.router))
        };
        let mut addresses = BTreeMap::<Address, Vec<Provider>>::new();
        let mut routes = HashMap::new();
        for other in self.edges.iter().filter(is_reachable) {
            let is_local = other.local.router == edge.local.router;
            for entry in other.egress.entries().borrow().iter() {
                addresses.entry(entry.address.clone()).or_default().push(Provider {
                    router: other.local.router,
                    site: other.local.site,
                    entry: Arc::new(entry.clone()),
                    cost: u64::from(!is_local),
                    metric_us: if is_local { 0 } else { 1_000 },
                });
            }
            if !is_local {
                let mtu = edge.wire.mtu.load(Ordering::Relaxed);
                routes.insert(other.local.router, Arc::new(route(other, mtu)));
            }
        }
        let local = skein_core::LocalRouter {
            router: edge.local.router,
            site: edge.local.site,
            handle: edge.handle,
        };
        Fib {
            version: self.version,
            local: Some(local),
            routes,
            handles: self
                .edges
                .iter()
                .map(|e| (e.handle, e.local.router))
                .chain(self.aliases.iter().copied())
                .collect(),
            addresses: Arc::new(addresses.into_iter().map(|(a, p)| (a, p.into())).collect()),
            ..Fib::default()
        }
    }

    /// Serves `address` at an edge with `target`, and tells everybody once it answers.
    pub(crate) async fn expose(&mut self, at: usize, address: &str, target: SocketAddr) {
        self.expose_with(at, connector(address, target)).await;
    }

    pub(crate) async fn expose_with(&mut self, at: usize, config: ConnectorConfig) {
        let egress = self.edges[at].egress.clone();
        egress.configure(vec![config]);
        egress.entries().wait_for(|entries| !entries.is_empty()).await.unwrap();
        self.publish();
    }

    /// Listens for `address` at an edge, and returns where.
    pub(crate) async fn listen(&self, at: usize, address: &str) -> SocketAddr {
        self.listen_all(at, &[address]).await[0]
    }

    /// Listens for `addresses`, which must be in order, at an edge, and returns where.
    pub(crate) async fn listen_all(&self, at: usize, addresses: &[&str]) -> Vec<SocketAddr> {
        let ingress = &self.edges[at].ingress;
        ingress.configure(addresses.iter().map(|address| listener(address)).collect());
        loop {
            let status = ingress.status();
            let ports = || status.iter().map(|listener| &listener.ports[0]);
            assert!(ports().all(|port| port.error.is_empty()));
            if ports().all(|port| !port.bound.is_empty()) {
                return ports().map(|port| port.bound.parse().unwrap()).collect();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// A bare connection to an edge with the credentials of another, to say what a router never says.
    pub(crate) async fn rogue(&mut self, from: usize, to: usize) -> quinn::Connection {
        self.rogue_dialler(from, to).connect().await
    }

    /// Makes as many of them as one likes.
    pub(crate) fn rogue_dialler(&mut self, from: usize, to: usize) -> RogueDialler {
        let (from, to) = (&self.edges[from], &self.edges[to]);
        let handle = Handle(1_000);
        let wire = Wire::new(handle);
        wire.peers.lock().insert(to.handle, to.wire.inner.local_addr().unwrap());
        to.wire.peers.lock().insert(handle, wire.inner.local_addr().unwrap());
        let config = from.tls.session_client(to.local.router).config;
        let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(config));
        let remote = vaddr(to.handle, Pin(0));
        self.aliases.push((handle, from.local.router));
        self.publish();
        let endpoint = session::endpoint(wire, &[0; 32]).unwrap();
        RogueDialler { endpoint, config, remote }
    }

    /// An address served at edge 1 by the returned socket, and where edge 0 listens for it.
    pub(crate) async fn service() -> (Self, TcpListener, SocketAddr) {
        let mut network = Self::new(2);
        let target = listen_on_loopback();
        network.expose(1, "echo", target.local_addr().unwrap()).await;
        let entrance = network.listen(0, "echo").await;
        (network, target, entrance)
    }
}

/// Dials as a router, and then does as it likes.
pub(crate) struct RogueDialler {
    endpoint: quinn::Endpoint,
    config: quinn::ClientConfig,
    remote: SocketAddr,
}

impl RogueDialler {
    /// Whatever it sends takes a whole packet of the largest size.
    pub(crate) fn padding(self) -> Self {
        self.with(|transport| {
            transport.initial_mtu(9_000).mtu_discovery_config(None).pad_to_mtu(true);
        })
    }

    /// Lets the other send so many bytes, besides what it reads.
    pub(crate) fn taking(self, bytes: u32) -> Self {
        self.with(|transport| {
            transport.receive_window(bytes.into());
        })
    }

    fn with(mut self, set: impl FnOnce(&mut quinn::TransportConfig)) -> Self {
        let mut transport = quinn::TransportConfig::default();
        // Only the other may end it for being idle.
        transport.keep_alive_interval(Some(Duration::from_secs(5))).max_idle_timeout(None);
        set(&mut transport);
        self.config.transport_config(Arc::new(transport));
        self
    }

    pub(crate) async fn connect(&self) -> quinn::Connection {
        self.dial().await.unwrap()
    }

    pub(crate) fn dial(&self) -> quinn::Connecting {
        self.endpoint.connect_with(self.config.clone(), self.remote, SERVER_NAME).unwrap()
    }
}

fn route(other: &Edge, mtu: u16) -> Route {
    Route {
        router: other.local.router,
        site: other.local.site,
        site_name: "site".into(),
        handle: other.handle,
        boot_epoch: 1,
        paths: vec![Path {
            first_link: LinkId(1),
            labels: Vec::new(),
            hops: vec![other.local.router],
            cost: 1,
            metric_us: 1_000,
            mtu,
        }],
    }
}

impl Edge {
    fn new(n: u8, budget_bytes: u64) -> Self {
        let (site, handle) = (SiteId([n; 32]), Handle(n.into()));
        let random = SystemRandom::new();
        let ca = SiteCa::generate(site, &random, clock::unix_s()).unwrap();
        let key = KeyRequest::generate().unwrap();
        let issued = ca.issue_router(key.csr(), "router", &random, clock::unix_s()).unwrap();
        let identity = RouterIdentity::new(issued.chain, key.private_key()).unwrap();
        let cell = TrustCell::new(Arc::new(TrustView::empty(site)));
        let identity = IdentityCell::new(Arc::new(identity));
        let tls = RouterTls::new(Arc::clone(&cell), identity, Arc::new(DefaultTimeProvider));
        let wire = Wire::new(handle);
        let (fib, fib_seen) = watch::channel(Arc::default());
        let (trust, trust_seen) = watch::channel(Arc::new(TrustView::empty(site)));
        let local = LocalRouter { router: router_id(site, "router"), site, boot_epoch: 1 };
        let surroundings = Surroundings {
            runtime: tokio::runtime::Handle::current(),
            local,
            services: fib_seen.clone(),
            fib: fib_seen,
            trust: trust_seen,
            budget: Budget::new(budget_bytes),
            limit: FlowLimit::new(site, 100_000, usize::MAX),
            counters: Arc::default(),
            buffer: Arc::default(),
        };
        let egress = Egress::start(surroundings.clone());
        let sessions = Sessions::start(SessionsConfig {
            endpoint: session::endpoint(Arc::clone(&wire) as _, &[n; 32]).unwrap(),
            tls: tls.clone(),
            egress: egress.clone(),
            surroundings: surroundings.clone(),
        });
        let ingress = Ingress::start(IngressConfig {
            sessions: sessions.clone(),
            egress: egress.clone(),
            surroundings: surroundings.clone(),
            seed: [n; 32],
        });
        let trusted = Arc::new(TrustedSite {
            site,
            name: "site".into(),
            membership: Membership::Member,
            scope: Scope::default(),
            anchors: vec![ca.certificate().as_ref().into()],
            network: site,
            endpoints: Vec::new(),
        });
        let Surroundings { budget, limit, counters, .. } = surroundings;
        Self {
            local,
            handle,
            wire,
            ingress,
            egress,
            sessions,
            budget,
            limit,
            counters,
            fib,
            trust,
            cell,
            trusted,
            tls,
        }
    }

    /// Whether its peers make it hold nothing but sessions.
    pub(crate) fn holds_nothing(&self) -> bool {
        self.budget.used_bytes() == session::SESSION_BYTES * self.sessions.count() as u64
    }

    /// Nothing leaves or reaches this router any more.
    pub(crate) fn cut(&self) {
        self.wire.cut.store(true, Ordering::Relaxed);
    }

    /// Largest packet that its paths carry, from the next publication on.
    pub(crate) fn set_mtu(&self, mtu: u16) {
        self.wire.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Packets sent so far that were larger than that.
    pub(crate) fn oversized(&self) -> u64 {
        self.wire.oversized.load(Ordering::Relaxed)
    }

    /// Packets sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.wire.sent.load(Ordering::Relaxed)
    }

    /// Takes the place of this router's endpoint without a word to its peers, as after a crash.
    pub(crate) async fn restart_endpoint(&self) -> quinn::Endpoint {
        self.cut();
        self.sessions.close(clock::now()).await;
        self.mend();
        session::endpoint(Arc::clone(&self.wire) as _, &[99; 32]).unwrap()
    }

    /// Lets an endpoint accept sessions in this router's name, in which peers may have so many streams.
    pub(crate) fn serve_streams(&self, endpoint: &quinn::Endpoint, streams: u32) {
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(self.tls.session_server());
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto.unwrap()));
        let mut transport = quinn::TransportConfig::default();
        transport.max_concurrent_bidi_streams(streams.into());
        config.transport_config(Arc::new(transport));
        endpoint.set_server_config(Some(config));
    }

    /// Undoes [`Edge::cut`].
    pub(crate) fn mend(&self) {
        self.wire.cut.store(false, Ordering::Relaxed);
    }
}

pub(crate) fn connector(address: &str, target: SocketAddr) -> ConnectorConfig {
    ConnectorConfig {
        name: address.into(),
        address: address.into(),
        targets: vec![target.ip().to_string()],
        ports: vec![ConnectorPort {
            port: SERVICE_PORT,
            target_port: target.port().into(),
            ..ConnectorPort::default()
        }],
        // Tells flows from health checks, which come from 127.0.0.1.
        source: SourceAddress::Site.into(),
        ..ConnectorConfig::default()
    }
}

/// Accepts the next flow, passing over health checks.
pub(crate) async fn accept(target: &TcpListener) -> TcpStream {
    loop {
        let (stream, from) = target.accept().await.unwrap();
        if from.ip() != IpAddr::V4(Ipv4Addr::LOCALHOST) {
            return stream;
        }
    }
}

/// A target whose queue the first health check fills: every later connect is left without an answer.
pub(crate) fn dead_target() -> (socket2::Socket, SocketAddr) {
    let dead = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    dead.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    dead.listen(0).unwrap();
    let at = dead.local_addr().unwrap().as_socket().unwrap();
    (dead, at)
}

/// The head of a flow to `address`.
pub(crate) fn flow_open(address: &str) -> Vec<u8> {
    let open = FlowOpen {
        address: address.into(),
        port: SERVICE_PORT,
        protocol: Protocol::Tcp.into(),
        ..FlowOpen::default()
    };
    open.encode_length_delimited_to_vec()
}

/// What a peer says first in a session.
pub(crate) fn hello() -> Vec<u8> {
    let hello = SessionHello {
        protocol_min: 1,
        protocol_max: 1,
        initial_credit_bytes: u32::MAX,
        ..SessionHello::default()
    };
    hello.encode_length_delimited_to_vec()
}

pub(crate) fn listener(address: &str) -> ListenerConfig {
    ListenerConfig {
        name: address.into(),
        address: address.into(),
        host: "127.0.0.1".into(),
        ports: vec![ListenerPort { port: SERVICE_PORT, ..ListenerPort::default() }],
        ..ListenerConfig::default()
    }
}

pub(crate) fn listen_on_loopback() -> TcpListener {
    net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap()
}

pub(crate) async fn connect(to: SocketAddr) -> TcpStream {
    net::tcp_connect(to, None).await.unwrap()
}

/// Waits until a condition holds; the test's own time limit bounds it.
pub(crate) async fn eventually(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
