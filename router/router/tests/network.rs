//! Whole routers on loopback: two edges that reach each other through a hub, controllers played by the test.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod support;

use skein_router::net;
use skein_wire::proto::{
    control::{RouterStatus, TraceRequest, from_router, link_status::LinkState, to_router},
    routing::Role,
};
use std::net::SocketAddr;
use support::site::{SOON, Site};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time,
};

const ADDRESS: &str = "backend";
const PORT: u32 = 5432;

struct Network {
    hub: Site,
    a: Site,
    b: Site,
    hub_endpoint: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Network {
    /// A – hub – B; B serves an echo under `backend:5432`, A listens for it.
    async fn start() -> Self {
        support::log();
        let mut tasks = JoinSet::new();
        let mut hub = Site::new("hub", None);
        hub.settings(|settings| {
            settings.role = Role::Interior.into();
            settings.listen = vec!["127.0.0.1:0".into()];
        });
        let (mut a, mut b) = (Site::new("a", Some(hub.id())), Site::new("b", Some(hub.id())));
        for edge in [&a, &b] {
            edge.befriend(&hub);
            hub.befriend(edge);
        }
        hub.start();
        let hub_endpoint: SocketAddr = hub
            .until("bound socket", |status| {
                status.sockets.iter().find(|s| s.error.is_empty()).map(|s| s.address.clone())
            })
            .await
            .parse()
            .unwrap();
        for edge in [&mut a, &mut b] {
            edge.dial("hub", &hub, hub_endpoint);
            edge.start();
        }
        b.serve(ADDRESS, PORT, echo(&mut tasks));
        a.listen_for(ADDRESS, PORT);
        Self { hub, a, b, hub_endpoint, _tasks: tasks }
    }

    async fn connect(&mut self) -> TcpStream {
        let bound: SocketAddr = self.a.until("open listener", open_listener).await.parse().unwrap();
        net::tcp_connect(bound, None).await.unwrap()
    }
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
    let mut network = Network::start().await;
    network.hub.until("two links", |s| (links_up(s) == 2).then_some(())).await;
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
async fn bytes_flow_between_sites_through_a_hub() {
    let mut network = Network::start().await;
    let mut stream = network.connect().await;
    converse(&mut stream, 20).await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_trace_shows_the_path_and_why() {
    let mut network = Network::start().await;
    network.connect().await;
    let request = TraceRequest { id: 5, address: ADDRESS.into(), port: PORT };
    network.a.order(to_router::Message::Trace(request)).await;
    let reply = loop {
        let answer = network.a.answers.recv().await.unwrap();
        if let from_router::Message::Trace(reply) = answer {
            break reply;
        }
    };
    assert_eq!((reply.id, reply.chosen, reply.error.as_str()), (5, 0, ""));
    let hops: Vec<_> =
        reply.candidates[0].paths[0].hops.iter().map(|hop| hop.site_name.as_str()).collect();
    assert_eq!(hops, ["hub", "b"]);
}

#[tokio::test]
async fn a_flow_survives_a_restart_of_its_transit() {
    let mut network = Network::start().await;
    let mut stream = network.connect().await;
    converse(&mut stream, 3).await;
    network.hub.kill();
    let listen = network.hub_endpoint.to_string();
    network.hub.settings(|settings| settings.listen = vec![listen]);
    network.hub.start();
    converse(&mut stream, 3).await;
}

#[tokio::test]
async fn a_drained_router_withdraws_what_it_serves() {
    let mut network = Network::start().await;
    let mut stream = network.connect().await;
    converse(&mut stream, 1).await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(network.b.drain(false).await, 0);
    network.a.until("closed listener", |s| open_listener(s).is_none().then_some(())).await;
}

#[tokio::test]
async fn a_farewell_removes_the_router_from_the_network() {
    let mut network = Network::start().await;
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
