//! Links over loopback: coming up, going down, moving, and what strangers can do to them.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod fabric_net;
mod stopwatch;

use fabric_net::{Network, PATIENCE, Relay, eventually, join, nodes};
use skein_router::{
    link::{Claim, LinkEvent},
    net,
};
use skein_wire::proto::{
    control::{LinkConfig, link_status::LinkState},
    routing::{DatabaseSummary, LinkMessage, link_message::Message},
};
use std::{sync::Arc, time::Duration};
use stopwatch::Stopwatch;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime,
    sync::oneshot,
    time::{self, Instant},
};

#[tokio::test]
async fn both_ends_agree_on_a_link_and_talk_over_it() {
    let mut nodes = nodes(2).await;
    join(&mut nodes, 0, 1, None).await;
    let (a, b) = (&nodes[0].up[&nodes[1].router], &nodes[1].up[&nodes[0].router]);
    assert_eq!((a.id, a.cost, a.incoming), (b.id, b.cost, !b.incoming));
    assert_eq!((a.cost, b.name.as_str(), a.name.as_str()), (3, "site0", "to-2"));
    let id = a.id;
    let message = LinkMessage {
        message: Some(Message::Summary(DatabaseSummary { headers: vec![], last: true })),
    };
    for (from, to) in [(0, 1), (1, 0)] {
        for _ in 0..200 {
            nodes[from].links.send(id, message.clone()).await.unwrap();
            match nodes[to].event().await {
                LinkEvent::Message(from, received, _turn) => {
                    assert_eq!((from, &received), (id, &message));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    let statuses = [nodes[0].links.status(), nodes[1].links.status()].concat();
    assert_eq!(statuses.len(), 2);
    assert!(statuses.iter().all(|link| link.state() == LinkState::Up && link.carrier == "udp"));
    eventually(|| nodes[0].links.status()[0].mtu.eq(&8_940).then_some(())).await;
    for node in &nodes {
        assert_eq!(node.fabric.counters().dropped_unauthenticated.total(), 0);
    }
    nodes[1].links.close(id, "enough");
    assert_eq!(nodes[0].next_down().await, (id, "the peer: enough".to_owned()));
    assert_eq!(nodes[1].next_down().await, (id, "enough".to_owned()));
    let again = nodes[0].next_up().await;
    assert_ne!(again.id, id);
}

#[tokio::test]
async fn two_links_of_a_pair_are_two_over_either_protocol() {
    let network = Network::new(2);
    let mut a = network.start(0, "127.0.0.1:0".parse().unwrap());
    let mut b = network.start(1, "[::]:0".parse().unwrap());
    let listening = b.address().await;
    let mut configs = Vec::new();
    // Where IPv6 is off, the second is another link over IPv4.
    let second = if listening.is_ipv6() { "[::1]" } else { "127.0.0.2" };
    for host in ["127.0.0.1", second] {
        let endpoint = format!("{host}:{}", listening.port()).parse().unwrap();
        configs.push(LinkConfig { name: host.to_owned(), ..a.link_to(&b, &[endpoint]) });
    }
    a.links.configure(configs);
    let (first, second) = (a.next_up().await, a.next_up().await);
    assert_ne!(first.id, second.id);
    let mut at_b = [b.next_up().await.id, b.next_up().await.id];
    at_b.sort_unstable();
    let mut at_a = [first.id, second.id];
    at_a.sort_unstable();
    assert_eq!(at_a, at_b);
    for node in [&a, &b] {
        let mtus: Vec<u32> = node.links.status().iter().map(|link| link.mtu).collect();
        assert!(mtus.iter().all(|mtu| *mtu >= 8_920), "{mtus:?}");
        let remotes: Vec<String> = node.links.status().into_iter().map(|l| l.remote).collect();
        assert!(remotes.iter().any(|remote| remote.starts_with("127.")), "{remotes:?}");
    }
}

#[tokio::test]
async fn a_cut_link_goes_down_and_comes_back_with_the_network() {
    let mut nodes = nodes(2).await;
    let relay = Relay::new(nodes[1].address().await);
    join(&mut nodes, 0, 1, Some(relay.addr)).await;
    relay.cut(true);
    let (_, reason) = nodes[0].next_down().await;
    assert!(reason.starts_with("no sign of life"), "{reason}");
    nodes[1].next_down().await;
    let attempts = eventually(|| {
        let status = nodes[0].links.status().remove(0);
        (!status.attempts.is_empty()).then_some(status.attempts)
    })
    .await;
    let unanswered = format!("UDP to {} unanswered; TCP to {}: ", relay.addr, relay.addr);
    assert!(attempts[0].outcome.starts_with(&unanswered), "{}", attempts[0].outcome);
    relay.cut(false);
    let healed = Stopwatch::start();
    nodes[0].next_up().await;
    healed.assert_within(Duration::from_secs(2));
}

#[tokio::test]
async fn a_router_that_was_killed_resets_its_links_when_it_is_back() {
    let network = Arc::new(Network::new(2));
    // No other test takes the victim's port while it is free.
    let [any, own] = ["127.0.0.1:0", "127.0.0.3:0"].map(|addr| addr.parse().unwrap());
    let (kill, killed) = oneshot::channel::<()>();
    let (born, birth) = oneshot::channel();
    let of_host = Arc::clone(&network);
    let host = std::thread::spawn(move || {
        let host = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        host.block_on(async move {
            born.send(of_host.start(1, own)).ok().unwrap();
            killed.await.unwrap();
        });
        // Nothing gets to say goodbye.
        host.shutdown_background();
    });
    let victim = birth.await.unwrap();
    let addr = victim.address().await;
    let mut nodes = vec![network.start(0, any), victim];
    join(&mut nodes, 0, 1, None).await;
    kill.send(()).unwrap();
    host.join().unwrap();
    drop(nodes.pop());
    let _reborn = network.start(1, addr);
    let (_, reason) = nodes[0].next_down().await;
    assert_eq!(reason, "the peer restarted");
    nodes[0].next_up().await;
}

#[tokio::test]
async fn a_link_survives_a_nat_that_forgets() {
    let mut nodes = nodes(2).await;
    let relay = Relay::new(nodes[1].address().await);
    join(&mut nodes, 0, 1, Some(relay.addr)).await;
    for _ in 0..3 {
        let new = relay.rebind().to_string();
        eventually(|| (nodes[1].links.status()[0].remote == new).then_some(())).await;
    }
    // A link that was lost and dialled again would have another id.
    let id = nodes[0].up[&nodes[1].router].id;
    assert_eq!(nodes[1].up[&nodes[0].router].id, id);
    let quiet = time::timeout(Duration::from_secs(3), nodes[0].event()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

#[tokio::test]
async fn refusals_say_why() {
    let nodes = nodes(3).await;
    let (a, b) = (&nodes[0], &nodes[1]);
    let mut wrong_site = a.link_to(&nodes[2], &[b.address().await]);
    wrong_site.name = "wrong-site".into();
    let mut myself = a.link_to(a, &[a.address().await]);
    myself.name = "myself".into();
    let mut nowhere = a.link_to(b, &[]);
    nowhere.endpoints = vec!["does-not-exist.invalid:7443".into()];
    nowhere.name = "nowhere".into();
    a.links.configure(vec![wrong_site, myself, nowhere]);
    for (name, expected) in [
        ("wrong-site", "answered instead of site"),
        ("myself", "this router itself"),
        ("nowhere", "does not resolve"),
    ] {
        let error = eventually(|| {
            let status = a.links.status().into_iter().find(|link| link.name == name)?;
            (!status.error.is_empty()).then_some(status.error)
        })
        .await;
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[tokio::test]
async fn a_site_that_is_not_trusted_is_told() {
    let nodes = nodes(2).await;
    let mut view = (*nodes[1].trust.view()).clone();
    view.sites.remove(&nodes[0].site);
    nodes[1].trust.publish(view.into());
    let config = nodes[0].link_to(&nodes[1], &[nodes[1].address().await]);
    nodes[0].links.configure(vec![config]);
    let error = eventually(|| {
        let status = nodes[0].links.status().remove(0);
        (!status.error.is_empty()).then_some(status.error)
    })
    .await;
    assert!(error.contains("does not trust this site"), "{error}");
}

#[tokio::test]
async fn links_follow_their_configuration() {
    let mut nodes = nodes(2).await;
    let addr = nodes[1].address().await;
    let mut config = nodes[0].link_to(&nodes[1], &["127.0.0.1:9".parse().unwrap()]);
    nodes[0].links.configure(vec![config.clone()]);
    // Endpoints learned later are taken up at once.
    config.endpoints.push(addr.to_string());
    nodes[0].links.configure(vec![config.clone()]);
    let first = nodes[0].next_up().await;
    config.endpoints = vec![addr.to_string()];
    nodes[0].links.configure(vec![config.clone()]);
    config.cost = 9;
    nodes[0].links.configure(vec![config]);
    assert_eq!(nodes[0].next_down().await.0, first.id, "another cost needs another hello");
    assert_eq!(nodes[0].next_up().await.cost, 9);
    nodes[0].links.configure(Vec::new());
    nodes[0].next_down().await;
    assert!(nodes[0].links.status().is_empty());
}

#[tokio::test]
async fn strangers_are_counted_and_leave_nothing() {
    let mut nodes = nodes(2).await;
    join(&mut nodes, 0, 1, None).await;
    let addr = nodes[1].address().await;
    let counters = nodes[1].fabric.counters();
    let stranger = net::udp_towards(addr).unwrap();
    for first in 0..=u8::MAX {
        let noise: Vec<u8> = (0..=250).cycle().map(|byte: u8| byte ^ first).take(1_200).collect();
        stranger.send_to(&[&[first], &noise[..]].concat(), addr).await.unwrap();
        stranger.send_to(&[first], addr).await.unwrap();
    }
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 255, 255], &[0; 64]] {
        let mut stream = net::tcp_connect(addr, None).await.unwrap();
        stream.write_all(noise).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        // Closed or reset: either is fine, as long as it ends.
        let _ = time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap();
        assert!(rest.is_empty());
    }
    eventually(|| (counters.connections_refused.total() >= 3).then_some(())).await;
    eventually(|| (counters.dropped_unauthenticated.total() >= 128).then_some(())).await;
    assert_eq!(nodes[1].links.status().len(), 1);
    assert_eq!(nodes[1].links.status()[0].state(), LinkState::Up);
}

#[tokio::test]
async fn who_holds_connections_without_a_word_keeps_nobody_out() {
    let nodes = nodes(1).await;
    let addr = nodes[0].address().await;
    let began = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(net::tcp_connect(addr, None).await.unwrap());
    }
    // The first had to give way at once, the last within seconds.
    for stream in [0, 299].map(|i| silent.swap_remove(i % silent.len())) {
        let mut stream = stream;
        let end = time::timeout(Duration::from_secs(4), stream.read(&mut [0])).await;
        assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?} after {:?}", began.elapsed());
    }
    let mut stream = net::tcp_connect(addr, None).await.unwrap();
    stream.write_all(&claim_hello()).await.unwrap();
    let mut nodes = nodes;
    assert!(matches!(nodes[0].event().await, LinkEvent::Claim(Claim::Tcp { .. })));
}

/// How a claim over TCP begins.
fn claim_hello() -> Vec<u8> {
    let dial =
        skein_trust::claim_carrier_client(Arc::new(rustls::time_provider::DefaultTimeProvider));
    let name = rustls_pki_types::ServerName::try_from(skein_trust::SERVER_NAME).unwrap();
    let mut tls = rustls::ClientConnection::new(dial.config, name).unwrap();
    let mut hello = Vec::new();
    tls.write_tls(&mut hello).unwrap();
    hello
}

#[tokio::test]
async fn claims_nobody_takes_give_way_to_later_ones() {
    let nodes = nodes(1).await;
    let addr = nodes[0].address().await;
    let (hello, mut claims) = (claim_hello(), Vec::new());
    // More than are queued, and more than may wait to be.
    for _ in 0..256 + 2 * 32 {
        let mut stream = net::tcp_connect(addr, None).await.unwrap();
        stream.write_all(&hello).await.unwrap();
        claims.push(stream);
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
    let counters = nodes[0].fabric.counters();
    eventually(|| (counters.connections_refused.total() >= 32).then_some(())).await;
}

#[tokio::test]
async fn claims_are_handed_out_unread_over_tcp_and_quic() {
    let mut nodes = nodes(1).await;
    let addr = nodes[0].address().await;
    let dial =
        skein_trust::claim_carrier_client(Arc::new(rustls::time_provider::DefaultTimeProvider));
    let name = rustls_pki_types::ServerName::try_from(skein_trust::SERVER_NAME).unwrap();
    let mut tls = rustls::ClientConnection::new(dial.config.clone(), name).unwrap();
    let mut hello = Vec::new();
    tls.write_tls(&mut hello).unwrap();
    let mut stream = net::tcp_connect(addr, None).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    match nodes[0].event().await {
        LinkEvent::Claim(Claim::Tcp { head, stream: mut handed, .. }) => {
            assert_eq!(head, hello);
            handed.write_all(b"answer").await.unwrap();
            let mut answer = [0; 6];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"answer");
        }
        other => panic!("{other:?}"),
    }
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(dial.config).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let socket = std::net::UdpSocket::bind::<std::net::SocketAddr>(any).unwrap();
    let config = quinn::EndpointConfig::default();
    let endpoint =
        quinn::Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime)).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(quic));
    let connection =
        endpoint.connect_with(config, addr, skein_trust::SERVER_NAME).unwrap().await.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(b"claim").await.unwrap();
    match nodes[0].event().await {
        LinkEvent::Claim(Claim::Quic { mut recv, .. }) => {
            let mut claim = [0; 5];
            recv.read_exact(&mut claim).await.unwrap();
            assert_eq!(&claim, b"claim");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn probes_tell_what_answers() {
    let nodes = nodes(2).await;
    let addr = nodes[1].address().await;
    let silent = net::udp_bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = silent.local_addr().unwrap();
    let endpoints = vec![addr.to_string(), silent.to_string(), "no.invalid:1".to_owned()];
    let results = nodes[0].links.probe(endpoints).await;
    assert_eq!((results[0].udp.as_str(), results[0].tcp.as_str()), ("ok", "ok"));
    assert!(results[0].rtt_us > 0);
    assert_eq!(results[1].udp, format!("UDP to {silent} unanswered"));
    assert!(results[1].tcp.contains("refused"), "{}", results[1].tcp);
    assert!(results[2].udp.contains("does not resolve"));
}

#[tokio::test]
async fn a_neighbour_that_says_much_delays_nobody_else() {
    let mut nodes = nodes(3).await;
    join(&mut nodes, 0, 1, None).await;
    let id = nodes[0].up[&nodes[1].router].id;
    let summary = DatabaseSummary { headers: Vec::new(), last: true };
    for _ in 0..40 {
        let message = LinkMessage { message: Some(Message::Summary(summary.clone())) };
        nodes[1].links.send(id, message).await.unwrap();
    }
    let LinkEvent::Message(_, _, turn) = nodes[0].event().await else { panic!("nothing said") };
    let hub = nodes[0].address().await;
    nodes[2].links.configure(vec![nodes[2].link_to(&nodes[0], &[hub])]);
    assert_eq!(nodes[0].next_up().await.peer.router, nodes[2].router, "it came up meanwhile");
    nodes[1].links.close(id, "done");
    let started = Instant::now();
    drop(turn);
    let mut heard = 1;
    while let LinkEvent::Message(..) = nodes[0].event().await {
        heard += 1;
    }
    assert_eq!(heard, 40, "and its end after all it said, {:?}", started.elapsed());
}

#[tokio::test]
async fn what_was_said_before_shutdown_arrives() {
    let mut nodes = nodes(2).await;
    join(&mut nodes, 0, 1, None).await;
    let id = nodes[0].up[&nodes[1].router].id;
    let summary = DatabaseSummary { headers: Vec::new(), last: true };
    for _ in 0..60 {
        let message = LinkMessage { message: Some(Message::Summary(summary.clone())) };
        nodes[0].links.send(id, message).await.unwrap();
    }
    let links = nodes[0].links.clone();
    let (received, ()) = tokio::join!(
        async {
            let mut received = 0;
            while let LinkEvent::Message(..) = nodes[1].event().await {
                received += 1;
            }
            received
        },
        links.shutdown(),
    );
    assert_eq!(received, 60);
}

#[tokio::test]
async fn shutdown_ends_every_link_and_socket() {
    let mut nodes = nodes(2).await;
    join(&mut nodes, 0, 1, None).await;
    let addr = nodes[1].address().await;
    time::timeout(PATIENCE, nodes[1].links.shutdown()).await.unwrap();
    nodes[0].next_down().await;
    eventually(|| net::port_pair(addr).ok()).await;
}
