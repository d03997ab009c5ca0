//! Links over TLS, and from one carrier to the other, over loopback.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod fabric_net;
mod stopwatch;

use fabric_net::{Node, PATIENCE, Relay, eventually, join, nodes, publish};
use quinn::{Connection, Endpoint};
use skein_core::Pin;
use skein_router::{link::LinkEvent, net};
use skein_wire::proto::{
    control::LinkStatus,
    routing::{DatabaseSummary, LinkMessage, link_message::Message},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use stopwatch::Stopwatch;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const MTU: u16 = 1_200;

/// Two routers with a relay between them that lets TCP pass, and UDP when told to.
async fn over_tls() -> (Vec<Node>, Relay) {
    let mut nodes = nodes(2).await;
    let relay = Relay::with_tcp(nodes[1].address().await);
    relay.cut(true);
    join(&mut nodes, 0, 1, Some(relay.addr)).await;
    assert_eq!(status(&nodes[0]).carrier, "tls");
    (nodes, relay)
}

fn status(node: &Node) -> LinkStatus {
    node.links.status().remove(0)
}

/// Routes over whatever link is there.
fn route(nodes: &[Node]) {
    publish(nodes, 0, &[&[1]], MTU);
    publish(nodes, 1, &[&[0]], MTU);
}

/// Accepts sessions and sends back whatever their streams bring.
fn echo(endpoint: Endpoint) -> JoinHandle<()> {
    #[allow(clippy::disallowed_methods, reason = "the test drops its runtime")]
    tokio::spawn(async move {
        let mut streams = JoinSet::new();
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.await.unwrap();
            while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                streams.spawn(async move {
                    while let Ok(Some(chunk)) = recv.read_chunk(64 << 10, true).await {
                        send.write_chunk(chunk.bytes).await.unwrap();
                    }
                    // The other side may be gone already.
                    let _ = send.finish();
                });
            }
        }
    })
}

/// Sends `len` bytes round and checks every one of them.
async fn round_trip(connection: &Connection, len: usize) {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let bytes: Vec<u8> = (0..=250).cycle().take(len).collect();
    let expected = bytes.clone();
    let writer = async move {
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
    };
    let reader = async move { recv.read_to_end(len + 1).await.unwrap() };
    let both = async { tokio::join!(writer, reader).1 };
    let received = time::timeout(PATIENCE, both).await.expect("bytes stopped");
    assert!(received == expected, "{} of {len} bytes, or wrong ones", received.len());
}

#[tokio::test]
async fn where_udp_is_dropped_a_link_comes_up_over_tls_and_says_why() {
    let (mut nodes, relay) = over_tls().await;
    let (dialled, incoming) = (status(&nodes[0]), status(&nodes[1]));
    assert_eq!(dialled.carrier_reason, format!("UDP to {} unanswered", relay.addr));
    assert_eq!((dialled.mtu, incoming.mtu, incoming.carrier.as_str()), (1_440, 1_440, "tls"));
    let id = nodes[0].up[&nodes[1].router].id;
    let message = LinkMessage {
        message: Some(Message::Summary(DatabaseSummary { headers: vec![], last: true })),
    };
    for (from, to) in [(0, 1), (1, 0)] {
        for _ in 0..200 {
            nodes[from].links.send(id, message.clone()).await.unwrap();
            assert!(matches!(nodes[to].event().await, LinkEvent::Message(..)));
        }
    }
    route(&nodes);
    let (a, server) = (nodes[0].endpoint(), echo(nodes[1].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[1], Pin(0)).await;
    round_trip(&connection, 16 * MIB).await;
    for node in &nodes {
        assert_eq!(node.fabric.counters().dropped_unauthenticated.total(), 0);
    }
    nodes[1].links.close(id, "enough");
    assert_eq!(nodes[0].next_down().await, (id, "the peer: enough".to_owned()));
    server.abort();
}

#[tokio::test]
async fn a_link_moves_to_udp_under_its_flows() {
    let (mut nodes, relay) = over_tls().await;
    route(&nodes);
    let (a, server) = (nodes[0].endpoint(), echo(nodes[1].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[1], Pin(0)).await;
    let mut flows = JoinSet::new();
    let watch = Stopwatch::start();
    for _ in 0..10 {
        let connection = connection.clone();
        flows.spawn(async move {
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            let until = Instant::now() + Duration::from_secs(5);
            let (mut n, mut gap_max) = (0_u32, Duration::ZERO);
            while Instant::now() < until {
                let began = Instant::now();
                send.write_all(&n.to_be_bytes()).await.unwrap();
                let mut back = [0; 4];
                recv.read_exact(&mut back).await.unwrap();
                assert_eq!(back, n.to_be_bytes());
                (n, gap_max) = (n + 1, gap_max.max(began.elapsed()));
            }
            gap_max
        });
    }
    let old = nodes[0].up[&nodes[1].router].id;
    relay.cut(false);
    let new = nodes[0].next_up().await.id;
    assert_eq!(nodes[1].next_up().await.id, new);
    route(&nodes);
    assert_eq!(nodes[0].next_down().await, (old, "moved to udp".to_owned()));
    assert_eq!(nodes[1].next_down().await, (old, "the peer: moved to udp".to_owned()));
    let status = status(&nodes[0]);
    assert_eq!((status.carrier.as_str(), status.carrier_reason.as_str()), ("udp", ""));
    assert_eq!(status.error, "", "a move is no loss");
    while let Some(gap) = flows.join_next().await {
        let gap = gap.unwrap();
        let gap_max = watch.extended(Duration::from_millis(900));
        assert!(gap < gap_max, "a flow stood still for {gap:?}, {gap_max:?}");
    }
    server.abort();
}

/// `SKEIN_LONG=1` switches a hundred times.
#[tokio::test]
async fn flows_stay_whole_while_their_link_changes_carriers() {
    let switches = if std::env::var_os("SKEIN_LONG").is_some() { 100 } else { 4 };
    let (mut nodes, relay) = over_tls().await;
    route(&nodes);
    let (a, server) = (nodes[0].endpoint(), echo(nodes[1].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[1], Pin(0)).await;
    let stop = CancellationToken::new();
    let mut flows = JoinSet::new();
    for flow in 0..100_u32 {
        let (connection, stop) = (connection.clone(), stop.clone());
        flows.spawn(async move {
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            let mut n = 0_u32;
            while !stop.is_cancelled() {
                let block: Vec<u8> = (n..n + 500).flat_map(|i| (i ^ flow).to_be_bytes()).collect();
                send.write_all(&block).await.unwrap();
                let mut back = vec![0; block.len()];
                recv.read_exact(&mut back).await.unwrap();
                assert!(back == block, "flow {flow} after {n}");
                n += 500;
                time::sleep(Duration::from_millis(50)).await;
            }
            n
        });
    }
    for switch in 0..switches {
        let to_udp = switch % 2 == 0;
        relay.cut(!to_udp);
        let carrier = if to_udp { "udp" } else { "tls" };
        let since = Instant::now();
        while !nodes.iter().all(|node| node.links.status().iter().all(|l| l.carrier == carrier)) {
            assert!(since.elapsed() < PATIENCE, "not over {carrier} in time");
            let (first, second) = nodes.split_at_mut(1);
            tokio::select! {
                _ = first[0].event() => {}
                _ = second[0].event() => {}
                () = time::sleep(Duration::from_millis(20)) => {}
            }
            route(&nodes);
        }
    }
    stop.cancel();
    while let Some(blocks) = time::timeout(PATIENCE, flows.join_next()).await.unwrap() {
        assert!(blocks.unwrap() > 0);
    }
    server.abort();
}

#[tokio::test]
async fn udp_that_dies_leaves_the_link_to_tls() {
    let mut nodes = nodes(2).await;
    let relay = Relay::with_tcp(nodes[1].address().await);
    join(&mut nodes, 0, 1, Some(relay.addr)).await;
    assert_eq!(status(&nodes[0]).carrier, "udp");
    relay.cut(true);
    nodes[0].next_down().await;
    let lost = Stopwatch::start();
    nodes[0].next_up().await;
    lost.assert_within(Duration::from_millis(1_500));
    assert_eq!(status(&nodes[0]).carrier, "tls");
}

/// Where tasks run later than this, the machine may decide who wins a race of carriers.
const LATE_MAX: Duration = Duration::from_millis(50);
/// How often it may do so.
const DISTURBED_MAX: usize = 5;

/// Repeats a scenario in which carriers race for as long as it fails and the machine may be why.
async fn race(scenario: impl AsyncFn() -> Result<(), String>) {
    for _ in 0..DISTURBED_MAX {
        let watch = Stopwatch::start();
        let Err(why) = scenario().await else { return };
        assert!(watch.late_max() > LATE_MAX, "{why}");
    }
    panic!("fails again and again, on a machine that is too busy to tell why");
}

fn ensure(is_so: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(why()) }
}

#[tokio::test]
async fn udp_that_comes_up_and_dies_again_and_again_leaves_the_link_to_tls() {
    udp_dies_young(|relay, lifetime| relay.kill_after(lifetime)).await;
}

#[tokio::test]
async fn so_does_udp_whose_death_only_the_neighbour_notices() {
    udp_dies_young(|relay, lifetime| relay.kill_sent_after(lifetime)).await;
}

async fn udp_dies_young(kill_after: impl Fn(&Relay, Duration)) {
    race(async || {
        let mut nodes = nodes(2).await;
        let relay = Relay::with_tcp(nodes[1].address().await);
        // Long enough for a handshake wherever.
        kill_after(&relay, Duration::from_secs(1));
        join(&mut nodes, 0, 1, Some(relay.addr)).await;
        let mut lives = 0;
        while status(&nodes[0]).carrier == "udp" {
            lives += 1;
            ensure(lives <= 8, || "flaps for ever".into())?;
            nodes[0].next_down().await;
            nodes[0].next_up().await;
        }
        ensure(lives > 2, || format!("it may have been anything: {lives} lives"))?;
        let reason = status(&nodes[0]).carrier_reason;
        ensure(reason == "UDP comes up, and falls silent soon after", || reason)
    })
    .await;
}

#[tokio::test]
async fn a_neighbour_that_is_back_is_linked_over_udp_though_tls_finds_it_first() {
    race(async || {
        let mut nodes = nodes(2).await;
        let relay = Relay::with_tcp(nodes[1].address().await);
        relay.cut_until_tcp();
        join(&mut nodes, 0, 1, Some(relay.addr)).await;
        assert_eq!(nodes[0].up.len(), 1);
        let carrier = status(&nodes[0]).carrier;
        ensure(carrier == "udp", || carrier)
    })
    .await;
}

#[tokio::test]
async fn a_tls_connection_that_ends_takes_its_link_with_it_at_once() {
    let (mut nodes, relay) = over_tls().await;
    relay.reset_tcp();
    let reset = Stopwatch::start();
    for node in &mut nodes {
        // Not by its silence, which takes longer; closed or reset, as what was under way has it.
        let (_, reason) = node.next_down().await;
        assert!(!reason.contains("no sign of life"), "{reason}");
    }
    nodes[0].next_up().await;
    reset.assert_within(Duration::from_millis(1_500));
    assert_eq!(status(&nodes[0]).carrier, "tls");
}

/// Answers each TCP connection by `answer`.
fn server<F: Future<Output = ()> + Send + 'static>(
    answer: impl Fn(TcpStream) -> F + Send + 'static,
) -> SocketAddr {
    let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = listener.local_addr().unwrap();
    #[allow(clippy::disallowed_methods, reason = "the test drops its runtime")]
    tokio::spawn(async move {
        let mut answers = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            answers.spawn(answer(stream));
        }
    });
    addr
}

#[tokio::test]
async fn who_answers_instead_of_a_router_is_named() {
    let nodes = nodes(1).await;
    let web = server(|mut stream| async move {
        stream.read_u8().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        // Kept open: what has been said is enough.
        time::sleep(PATIENCE).await;
    });
    let cert = rcgen::generate_simple_self_signed(vec!["proxy.corp.example".into()]).unwrap();
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(cert.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.cert.der().clone()], key.into())
        .unwrap();
    let config = Arc::new(config);
    let interceptor = server(move |stream| {
        let accepting = tokio_rustls::TlsAcceptor::from(Arc::clone(&config)).accept(stream);
        async move { drop(accepting.await) }
    });
    let silent = server(|stream| async move {
        time::sleep(PATIENCE).await;
        drop(stream);
    });
    let gone = server(|stream| async move { drop(stream) });
    let endpoints = [web, interceptor, silent, gone].map(|addr| addr.to_string()).to_vec();
    let results = nodes[0].links.probe(endpoints).await;
    for (result, expected) in results.iter().zip([
        "does not speak TLS",
        "intercepts TLS",
        "does not answer TLS",
        "closes TLS connections",
    ]) {
        assert!(result.tcp.contains(expected), "{}: {}", expected, result.tcp);
    }
}

/// A QUIC server that is no router and answers whoever comes.
fn foreign_quic() -> Endpoint {
    let cert = rcgen::generate_simple_self_signed(vec!["www.example".into()]).unwrap();
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(cert.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.cert.der().clone()], key.into())
        .unwrap();
    config.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    Endpoint::server(config, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap()
}

#[tokio::test]
async fn a_web_server_on_the_udp_port_does_not_keep_a_link_from_tls() {
    let mut nodes = nodes(2).await;
    let web = foreign_quic();
    let relay = Relay::to_both(web.local_addr().unwrap(), nodes[1].address().await);
    let refusal = async { assert!(web.accept().await.unwrap().await.is_err()) };
    tokio::join!(refusal, join(&mut nodes, 0, 1, Some(relay.addr)));
    assert_eq!(status(&nodes[0]).carrier, "tls");
    let reason = status(&nodes[0]).carrier_reason;
    assert!(reason.starts_with(&format!("UDP to {}: ", relay.addr)), "{reason}");
}

#[tokio::test]
async fn balancers_see_the_name_of_the_endpoint() {
    let nodes = nodes(1).await;
    let (names, mut seen) = mpsc::unbounded_channel();
    let addr = server(move |mut stream| {
        let names = names.clone();
        async move {
            let mut acceptor = rustls::server::Acceptor::default();
            let mut buffer = [0; 4_096];
            let hello = loop {
                let n = stream.read(&mut buffer).await.unwrap();
                acceptor.read_tls(&mut &buffer[..n]).unwrap();
                if let Some(hello) = acceptor.accept().ok().flatten() {
                    break hello;
                }
            };
            names.send(hello.client_hello().server_name().map(str::to_owned)).unwrap();
        }
    });
    for (host, expected) in [("localhost", Some("localhost")), ("127.0.0.1", None)] {
        nodes[0].links.probe(vec![format!("{host}:{}", addr.port())]).await;
        assert_eq!(seen.recv().await.unwrap().as_deref(), expected);
    }
}

#[tokio::test]
async fn what_strangers_send_in_a_tls_connection_ends_it() {
    let nodes = nodes(1).await;
    let addr = nodes[0].address().await;
    let counters = nodes[0].fabric.counters();
    let noise: [&[u8]; 3] = [b"GET / HTTP/1.1\r\n\r\n", &[0, 0], &[0, 4, 1, 2, 3, 4]];
    for (i, noise) in (1..).zip(noise) {
        let dial = nodes[0].tls.carrier_client(nodes[0].site);
        let name = rustls_pki_types::ServerName::try_from(skein_trust::SERVER_NAME).unwrap();
        let stream = net::tcp_connect(addr, None).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(dial.config);
        let mut stream = connector.connect(name, stream).await.unwrap();
        stream.write_all(noise).await.unwrap();
        stream.flush().await.unwrap();
        let began = Stopwatch::start();
        let mut rest = Vec::new();
        // Closed or reset: either is fine, as long as it ends.
        let _ = time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap();
        began.assert_within(Duration::from_secs(7));
        assert!(rest.is_empty());
        eventually(|| (counters.connections_refused.total() == i).then_some(())).await;
    }
    assert!(nodes[0].links.status().is_empty());
}
