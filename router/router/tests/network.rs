//! Whole routers on loopback: two edges that reach each other through a hub, controllers played by the test.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod stopwatch;
mod support;

use skein_router::net;
use skein_wire::proto::{
    control::{
        RouterStatus, TraceReply, TraceRequest, from_router, link_status::LinkState, to_router,
    },
    routing::Role,
};
use std::{net::SocketAddr, time::Duration};
use stopwatch::Stopwatch;
use support::site::{SOON, Site};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    runtime::Handle,
    task::JoinSet,
    time,
};

const ADDRESS: &str = "backend";
const PORT: u32 = 5432;
/// How long a link under traffic is silent until it counts as dead.
const DETECTION: Duration = Duration::from_millis(300);

struct Network {
    hubs: Vec<Site>,
    a: Site,
    b: Site,
    hub_endpoints: Vec<SocketAddr>,
    _tasks: JoinSet<()>,
}

impl Network {
    /// Waits until a reaches b through either of two transits.
    async fn two_ways_to_b(&mut self) {
        let b = self.b.id();
        self.a
            .until("two links and a route to b", |status| {
                let of_b = status.routers.iter().find(|router| router.site_id == b.0)?;
                (links_up(status) == 2 && of_b.links.len() == 2 && of_b.reachable).then_some(())
            })
            .await;
    }

    /// A and B, joined by each of the hubs; B serves an echo under `backend:5432`, A listens for it.
    async fn start(hub_names: &[&'static str]) -> Self {
        Self::start_on("127.0.0.1:0", hub_names).await
    }

    /// The same with hubs that listen elsewhere.
    async fn start_on(listen: &str, hub_names: &[&'static str]) -> Self {
        support::log();
        let mut tasks = JoinSet::new();
        let mut hubs: Vec<Site> = Vec::new();
        for name in hub_names {
            hubs.push(Site::new(name, hubs.first().map(Site::id)));
        }
        let founder = Some(hubs[0].id());
        let (mut a, mut b) = (Site::new("a", founder), Site::new("b", founder));
        let mut hub_endpoints = Vec::new();
        for hub in &mut hubs {
            hub.settings(|settings| {
                settings.role = Role::Interior.into();
                settings.listen = vec![listen.into()];
            });
            for edge in [&a, &b] {
                edge.befriend(hub);
                hub.befriend(edge);
            }
            hub.start();
            let endpoint = hub.until("bound socket", bound_socket).await.parse().unwrap();
            for edge in [&a, &b] {
                edge.dial(hub.name, hub, endpoint);
            }
            hub_endpoints.push(endpoint);
        }
        b.serve(ADDRESS, PORT, echo(&mut tasks));
        a.listen_for(ADDRESS, PORT);
        a.start();
        b.start();
        Self { hubs, a, b, hub_endpoints, _tasks: tasks }
    }

    async fn connect(&mut self) -> TcpStream {
        let bound: SocketAddr = self.a.until("open listener", open_listener).await.parse().unwrap();
        net::tcp_connect(bound, None).await.unwrap()
    }

    async fn trace(&mut self) -> TraceReply {
        let request =
            TraceRequest { id: 5, address: ADDRESS.into(), port: PORT, ..Default::default() };
        self.a.order(to_router::Message::Trace(request)).await;
        loop {
            let answer = self.a.answers.recv().await.unwrap();
            if let from_router::Message::Trace(reply) = answer {
                return reply;
            }
        }
    }
}

fn bound_socket(status: &RouterStatus) -> Option<String> {
    status.sockets.iter().find(|s| s.error.is_empty()).map(|s| s.address.clone())
}

fn open_listener(status: &RouterStatus) -> Option<String> {
    let port = status.listeners.first()?.ports.first()?;
    Some(port.bound.clone()).filter(|bound| !bound.is_empty())
}

fn links_up(status: &RouterStatus) -> usize {
    status.links.iter().filter(|link| link.state() == LinkState::Up).count()
}

fn echo(tasks: &mut JoinSet<()>) -> SocketAddr {
    let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut read, mut write) = stream.split();
                // Clients that are reset are part of the tests.
                drop(tokio::io::copy(&mut read, &mut write).await);
                drop(write.shutdown().await);
            });
        }
    });
    address
}

/// Sends `rounds` numbered lines and checks that each comes back.
async fn converse(stream: &mut TcpStream, rounds: u32) {
    for round in 0..rounds {
        let line = format!("round {round:08}\n");
        stream.write_all(line.as_bytes()).await.unwrap();
        let mut back = vec![0; line.len()];
        time::timeout(SOON, stream.read_exact(&mut back)).await.expect("an echo").unwrap();
        assert_eq!(back, line.as_bytes());
    }
}

#[tokio::test]
async fn links_come_up_and_routers_learn_of_each_other() {
    let mut network = Network::start(&["hub"]).await;
    network.hubs[0].until("two links", |s| (links_up(s) == 2).then_some(())).await;
    let hub = network.hubs[0].id();
    network.hubs[0]
        .until("itself with two links", |status| {
            let itself = status.routers.iter().find(|router| router.site_id == hub.0)?;
            (itself.links.len() == 2).then_some(())
        })
        .await;
    let b = network.b.id();
    network
        .a
        .until("route to b", |status| {
            let of_b = status.routers.iter().find(|r| r.site_id == b.0)?;
            (of_b.reachable && of_b.hops == 2).then_some(())
        })
        .await;
}

#[tokio::test]
async fn sites_that_were_apart_for_long_link_again() {
    support::log();
    let (mut hub, mut edge) = (Site::new("hub", None), Site::new("edge", None));
    hub.settings(|settings| settings.listen = vec!["127.0.0.1:0".into()]);
    hub.remember(&edge);
    edge.remember(&hub);
    hub.start();
    let endpoint = hub.until("bound socket", bound_socket).await.parse().unwrap();
    edge.dial("hub", &hub, endpoint);
    edge.start();
    for site in [&mut hub, &mut edge] {
        site.until("trust and a link", |status| {
            let trusted = status.sites.iter().filter(|site| site.trusted).count();
            (links_up(status) == 1 && trusted == 2).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn bytes_flow_between_sites_through_a_hub() {
    let mut network = Network::start(&["hub"]).await;
    let mut stream = network.connect().await;
    converse(&mut stream, 20).await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_trace_shows_the_path_and_why() {
    let mut network = Network::start(&["hub"]).await;
    network.connect().await;
    let reply = network.trace().await;
    assert_eq!((reply.id, reply.chosen, reply.error.as_str()), (5, 0, ""));
    let hops: Vec<_> =
        reply.candidates[0].paths[0].hops.iter().map(|hop| hop.site_name.as_str()).collect();
    assert_eq!(hops, ["hub", "b"]);
}

#[tokio::test]
async fn a_flow_survives_a_restart_of_its_transit() {
    // No other test takes its port while it is free.
    let mut network = Network::start_on("127.0.0.2:0", &["hub"]).await;
    let mut stream = network.connect().await;
    converse(&mut stream, 3).await;
    network.hubs[0].kill();
    let listen = network.hub_endpoints[0].to_string();
    network.hubs[0].settings(|settings| settings.listen = vec![listen]);
    network.hubs[0].start();
    converse(&mut stream, 3).await;
}

#[tokio::test]
async fn flows_move_to_another_transit_when_theirs_is_lost() {
    let mut network = Network::start(&["hub", "other"]).await;
    network.two_ways_to_b().await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        let mut stream = network.connect().await;
        converse(&mut stream, 1).await;
        streams.push(stream);
    }
    let path = network.trace().await.candidates[0].paths[0].clone();
    let used = path.hops[0].site_name.clone();
    network.hubs.iter_mut().find(|hub| hub.name == used).unwrap().kill();
    for stream in &mut streams {
        converse(stream, 3).await;
    }
    let mut stream = network.connect().await;
    converse(&mut stream, 3).await;
    let path = network.trace().await.candidates[0].paths[0].clone();
    assert_ne!(path.hops[0].site_name, used);
    assert!(path.measured_rtt_us > 0, "{path:?}");
}

#[tokio::test]
async fn a_new_connection_right_after_the_loss_of_an_idle_transit_waits_for_one_detection() {
    let mut network = Network::start(&["hub", "other"]).await;
    network.two_ways_to_b().await;
    let mut stream = network.connect().await;
    converse(&mut stream, 1).await;
    // Both ends of the path are idle when it is lost.
    time::sleep(Duration::from_millis(2_500)).await;
    // Equal paths may have changed places meanwhile.
    let path = network.trace().await.candidates[0].paths[0].clone();
    let used = path.hops[0].site_name.clone();
    network.hubs.iter_mut().find(|hub| hub.name == used).unwrap().kill();
    // The test's own runtime, and those of the routers that are left.
    let left = network.hubs.iter().chain([&network.a, &network.b]).filter_map(Site::runtime);
    let lost = Stopwatch::start_on([Handle::current()].into_iter().chain(left));
    let mut stream = network.connect().await;
    converse(&mut stream, 1).await;
    // The other end need not find out for itself: it is told.
    lost.assert_within(2 * DETECTION);
}

#[tokio::test]
async fn a_drained_router_withdraws_what_it_serves() {
    let mut network = Network::start(&["hub"]).await;
    let mut stream = network.connect().await;
    converse(&mut stream, 1).await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(network.b.drain(false).await, 0);
    network.a.until("closed listener", |s| open_listener(s).is_none().then_some(())).await;
}

#[tokio::test]
async fn a_farewell_removes_the_router_from_the_network() {
    let mut network = Network::start(&["hub"]).await;
    network.connect().await;
    let b = network.b.id();
    network.b.drain(true).await;
    network
        .a
        .until("farewell", |status| {
            let of_b = status.routers.iter().find(|router| router.site_id == b.0);
            of_b.is_none_or(|router| !router.reachable && router.links.is_empty()).then_some(())
        })
        .await;
}
