//! Associations: what happens to datagrams between a client and a target.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod edges;

use bytes::Bytes;
use edges::{
    Network, SERVICE_PORT, accept, connect, connector, eventually, listen_on_loopback, listener,
};
use prost::Message as _;
use skein_router::{
    flows::{DatagramDrop, Edge, Outcome, Way},
    net,
};
use skein_wire::{
    association::{self, Piece},
    proto::{
        control::{ConnectorConfig, ConnectorPort, ListenerConfig, ListenerPort},
        routing::Protocol,
        session::{FlowOpen, SessionHello},
    },
};
use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UdpSocket,
    time::timeout,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Ends a test that hangs.
async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("the test hangs")
}

fn bind() -> UdpSocket {
    net::udp_bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

async fn client(of: SocketAddr) -> UdpSocket {
    let client = bind();
    client.connect(of).await.unwrap();
    client
}

fn udp_connector(address: &str, target: SocketAddr) -> ConnectorConfig {
    ConnectorConfig {
        ports: vec![ConnectorPort {
            port: SERVICE_PORT,
            target_port: target.port().into(),
            protocol: Protocol::Udp.into(),
        }],
        ..connector(address, target)
    }
}

fn udp_listener(address: &str) -> ListenerConfig {
    let port = ListenerPort {
        port: SERVICE_PORT,
        protocol: Protocol::Udp.into(),
        ..ListenerPort::default()
    };
    ListenerConfig { ports: vec![port], ..listener(address) }
}

async fn listen(network: &Network, at: usize, address: &str) -> SocketAddr {
    let ingress = &network.edges[at].ingress;
    ingress.configure(vec![udp_listener(address)]);
    loop {
        let port = ingress.status()[0].ports[0].clone();
        assert_eq!(port.error, "");
        if !port.bound.is_empty() {
            return port.bound.parse().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Two routers, a target of datagrams behind the second, and where the first listens for it.
async fn service() -> (Network, UdpSocket, SocketAddr) {
    let mut network = Network::new(2);
    let target = bind();
    network.expose_with(1, udp_connector("echo", target.local_addr().unwrap())).await;
    let entrance = listen(&network, 0, "echo").await;
    (network, target, entrance)
}

/// Sends back what comes, for as long as it is polled.
async fn echo(target: &UdpSocket) {
    let mut buffer = vec![0; 65_536];
    loop {
        let (len, from) = target.recv_from(&mut buffer).await.unwrap();
        target.send_to(&buffer[..len], from).await.unwrap();
    }
}

/// Sends a datagram until there is an answer, which must be the same.
async fn ask(client: &UdpSocket, payload: &[u8]) {
    let mut buffer = vec![0; 65_536];
    loop {
        client.send(payload).await.unwrap();
        // What the network says of a closed port is no answer.
        if let Ok(Ok(len)) = timeout(Duration::from_millis(300), client.recv(&mut buffer)).await
            && buffer[..len] == *payload
        {
            return;
        }
    }
}

/// Establishes a session on a bare connection, for associations or not; to be kept, since the session ends with it.
async fn say_hello(
    connection: &quinn::Connection,
    datagrams: bool,
) -> (quinn::SendStream, quinn::RecvStream) {
    let hello = SessionHello {
        protocol_min: 1,
        protocol_max: 1,
        boot_epoch: 1,
        initial_credit_bytes: 1 << 18,
        datagrams,
        ..SessionHello::default()
    };
    let (mut control, mut from_peer) = connection.open_bi().await.unwrap();
    control.write_all(&hello.encode_length_delimited_to_vec()).await.unwrap();
    assert!(from_peer.read_chunk(100, true).await.unwrap().is_some());
    (control, from_peer)
}

fn open(address: &str, protocol: Protocol) -> Vec<u8> {
    let open = FlowOpen {
        address: address.into(),
        port: SERVICE_PORT,
        protocol: protocol.into(),
        flow_id: vec![7; 16],
        ..FlowOpen::default()
    };
    open.encode_length_delimited_to_vec()
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[tokio::test]
async fn datagrams_of_every_size_arrive_whole_both_ways() {
    let (network, target, entrance) = service().await;
    let client = client(entrance).await;
    let serve = echo(&target);
    let asks = async {
        for len in [0, 1, 200, 1_200, 1_350, 1_420, 1_452, 1_472, 2_000, 3_000, 9_000, 65_507] {
            ask(&client, &payload(len)).await;
        }
    };
    within(async {
        tokio::select! { () = asks => {} () = serve => {} }
    })
    .await;
    for edge in &network.edges {
        let counters = &edge.counters.datagrams;
        assert_eq!(counters.associations(), 1);
        for way in Way::ALL {
            assert!(counters.sent(way) > 0, "{way:?}");
        }
        for why in DatagramDrop::ALL {
            assert_eq!(counters.dropped(why), 0, "{why:?}");
        }
    }
}

#[tokio::test]
async fn a_first_datagram_of_any_size_goes_along_with_the_open() {
    let (_network, target, entrance) = service().await;
    for len in [0, 100, 65_507] {
        let client = client(entrance).await;
        client.send(&payload(len)).await.unwrap();
        let mut buffer = vec![0; 65_536];
        let (got, from) = within(target.recv_from(&mut buffer)).await.unwrap();
        assert_eq!(buffer[..got], payload(len));
        target.send_to(b"answer", from).await.unwrap();
        let got = within(client.recv(&mut buffer)).await.unwrap();
        assert_eq!(&buffer[..got], b"answer");
    }
}

#[tokio::test]
async fn an_address_that_is_served_here_needs_no_session() {
    let mut network = Network::new(1);
    let target = bind();
    network.expose_with(0, udp_connector("echo", target.local_addr().unwrap())).await;
    let entrance = listen(&network, 0, "echo").await;
    let client = client(entrance).await;
    let asks = async {
        for len in [0, 1, 1_472, 65_507] {
            ask(&client, &payload(len)).await;
        }
    };
    within(async {
        tokio::select! { () = asks => {} () = echo(&target) => {} }
    })
    .await;
    assert_eq!(network.edges[0].sessions.count(), 0);
    assert!(network.edges[0].holds_nothing());
}

#[tokio::test]
async fn every_client_has_an_association_of_its_own() {
    const CLIENTS: usize = 200;
    let (network, target, entrance) = service().await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(client(entrance).await);
    }
    let asks = async {
        for (n, client) in clients.iter().enumerate() {
            ask(client, &n.to_be_bytes()).await;
        }
    };
    within(async {
        tokio::select! { () = asks => {} () = echo(&target) => {} }
    })
    .await;
    assert_eq!(network.edges[1].counters.datagrams.associations(), CLIENTS as u64);
    // The target tells them apart, and their site from others.
    let mut sources = HashSet::new();
    for client in &clients {
        client.send(b"who").await.unwrap();
        let (_, from) = within(target.recv_from(&mut [0; 8])).await.unwrap();
        assert_ne!(from.ip(), IpAddr::from([127, 0, 0, 1]));
        sources.insert(from);
    }
    assert_eq!(sources.len(), CLIENTS);
}

#[tokio::test]
async fn an_idle_association_ends_at_both_ends_and_begins_anew() {
    let mut network = Network::new(2);
    let target = bind();
    let config = ConnectorConfig {
        idle_timeout_ms: 200,
        ..udp_connector("echo", target.local_addr().unwrap())
    };
    network.expose_with(1, config).await;
    let entrance = listen(&network, 0, "echo").await;
    let client = client(entrance).await;
    let ends = async {
        for round in 1..=2 {
            ask(&client, b"x").await;
            for (edge, side) in network.edges.iter().zip([Edge::Ingress, Edge::Egress]) {
                eventually(|| edge.counters.ended(side, Outcome::Idle) >= round).await;
                eventually(|| edge.counters.datagrams.associations() == 0).await;
            }
        }
    };
    within(async {
        tokio::select! { () = ends => {} () = echo(&target) => {} }
    })
    .await;
}

#[tokio::test]
async fn a_dead_egress_is_replaced_with_the_next_datagram() {
    let mut network = Network::new(3);
    let targets = [bind(), bind()];
    for (at, target) in [(1, &targets[0]), (2, &targets[1])] {
        let config = udp_connector("echo", target.local_addr().unwrap());
        network.expose_with(at, config).await;
    }
    let entrance = listen(&network, 0, "echo").await;
    let client = client(entrance).await;
    let serve = async { tokio::join!(echo(&targets[0]), echo(&targets[1])) };
    let moves = async {
        ask(&client, b"first").await;
        let first = network.edges[1].counters.datagrams.associations() == 1;
        let (gone, left) = if first { (1, 2) } else { (2, 1) };
        network.edges[gone].cut();
        let router = network.edges[gone].local.router;
        network.unreachable.insert(router);
        network.publish();
        ask(&client, b"second").await;
        assert_eq!(network.edges[left].counters.datagrams.associations(), 1);
        let ingress = &network.edges[0].counters;
        assert_eq!(ingress.ended(Edge::Ingress, Outcome::SessionLost), 1);
        assert_eq!(ingress.datagrams.dropped(DatagramDrop::Refused), 0, "not kept waiting");
    };
    within(async {
        tokio::select! { () = moves => {} _ = serve => {} }
    })
    .await;
}

#[tokio::test]
async fn a_target_that_is_not_there_is_noted_and_may_come_back() {
    let (network, target, entrance) = service().await;
    let at = target.local_addr().unwrap();
    let client = client(entrance).await;
    within(async {
        tokio::select! { () = ask(&client, b"up") => {} () = echo(&target) => {} }
    })
    .await;
    drop(target);
    let noted = || !network.edges[1].egress.status()[0].targets[0].error.is_empty();
    // One is enough: nothing need be sent for it to be heard.
    client.send(b"down").await.unwrap();
    within(eventually(noted)).await;
    let status = network.edges[1].egress.status();
    assert!(status[0].advertised && status[0].targets[0].healthy);
    let target = net::udp_bind(at).unwrap();
    within(async {
        tokio::select! { () = ask(&client, b"back") => {} () = echo(&target) => {} }
    })
    .await;
    assert!(!noted());
    assert_eq!(network.edges[1].counters.opened.total(), 1, "the same association");
}

#[tokio::test]
async fn nobody_serves_it_any_more_and_running_associations_go_on() {
    let (mut network, target, entrance) = service().await;
    let known = client(entrance).await;
    let serve = echo(&target);
    let test = async {
        ask(&known, b"before").await;
        let mut config = udp_connector("echo", target.local_addr().unwrap());
        config.draining = true;
        network.edges[1].egress.configure(vec![config.clone()]);
        network.publish();
        ask(&known, b"after").await;
        let late = client(entrance).await;
        let unserved = || network.edges[0].counters.datagrams.dropped(DatagramDrop::Unserved);
        while unserved() == 0 {
            // Refused at once when the socket is closed, which it must not be.
            late.send(b"late").await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        ask(&known, b"still").await;
        config.reset = true;
        network.edges[1].egress.configure(vec![config]);
        eventually(|| network.edges[0].counters.datagrams.associations() == 0).await;
        eventually(|| network.edges[0].ingress.status()[0].ports[0].bound.is_empty()).await;
    };
    within(async {
        tokio::select! { () = test => {} () = serve => {} }
    })
    .await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_associations() {
    let (network, target, entrance) = service().await;
    let client = client(entrance).await;
    within(async {
        tokio::select! { () = ask(&client, b"x") => {} () = echo(&target) => {} }
    })
    .await;
    let deadline = skein_router::clock::now() + LIMIT * 2;
    within(network.edges[1].egress.drain(deadline)).await;
    within(network.edges[0].ingress.drain(deadline)).await;
}

#[tokio::test]
async fn what_a_peer_makes_up_is_counted_and_harms_nothing() {
    let mut network = Network::new(2);
    let target = bind();
    network.expose_with(1, udp_connector("echo", target.local_addr().unwrap())).await;
    let dialler = network.rogue_dialler(0, 1);
    let connection = within(dialler.connect()).await;
    let _control = within(say_hello(&connection, true)).await;
    let counters = &network.edges[1].counters.datagrams;
    // Of associations that are not there, and none at all.
    for flow in [1, 7, 1 << 40] {
        connection.send_datagram(association::encode(flow, Piece::Whole, b"x")).unwrap();
    }
    for malformed in [&b""[..], &[0xff], &[0x40], &[1], &[1, 0]] {
        connection.send_datagram(Bytes::from_static(malformed)).unwrap();
    }
    within(eventually(|| counters.dropped(DatagramDrop::Unknown) == 3)).await;
    within(eventually(|| counters.dropped(DatagramDrop::Malformed) == 5)).await;

    // An association that is there: halves without their other one, each number anew.
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&open("echo", Protocol::Udp)).await.unwrap();
    assert!(within(recv.read_chunk(100, true)).await.unwrap().is_some(), "accepted");
    let flow = send.id().index();
    for number in 0..10 {
        let half = Piece::Half { number, second: false };
        connection.send_datagram(association::encode(flow, half, b"half")).unwrap();
    }
    within(eventually(|| counters.dropped(DatagramDrop::Half) == 6)).await;
    let whole = association::encode(flow, Piece::Whole, b"whole");
    connection.send_datagram(whole).unwrap();
    let mut buffer = [0; 16];
    assert_eq!(within(target.recv(&mut buffer)).await.unwrap(), 5, "goes on all the same");
    // A length that no datagram has ends the association, not the session.
    send.write_all(&65_508_u16.to_be_bytes()).await.unwrap();
    within(eventually(|| counters.associations() == 0)).await;
    assert_eq!(counters.dropped(DatagramDrop::Half), 10, "those that waited are counted, too");
    assert!(connection.close_reason().is_none());
}

#[tokio::test]
async fn who_uses_a_session_for_what_it_is_not_loses_it() {
    let mut network = Network::new(2);
    let target = bind();
    network.expose_with(1, udp_connector("echo", target.local_addr().unwrap())).await;
    let dialler = network.rogue_dialler(0, 1);
    for (is_for_datagrams, misplaced) in
        [(true, Some(Protocol::Tcp)), (false, Some(Protocol::Udp)), (false, None)]
    {
        let connection = within(dialler.connect()).await;
        let _control = within(say_hello(&connection, is_for_datagrams)).await;
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        match misplaced {
            Some(protocol) => send.write_all(&open("echo", protocol)).await.unwrap(),
            None => connection.send_datagram(Bytes::from_static(b"x")).unwrap(),
        }
        let reason = within(connection.closed()).await.to_string();
        assert!(reason.contains("broke the protocol"), "{misplaced:?}: {reason}");
    }
    let counters = &network.edges[1].counters;
    within(eventually(|| counters.ended(Edge::Egress, Outcome::Violation) == 2)).await;
    assert_eq!(counters.ended(Edge::Egress, Outcome::SessionLost), 0);
    assert_eq!(network.edges[1].counters.datagrams.associations(), 0);
}

#[tokio::test]
async fn a_client_that_is_early_and_fast_has_its_newest_datagrams_kept() {
    let (network, target, entrance) = service().await;
    let client = client(entrance).await;
    // More than is held, before the ingress has looked once: all of this is one turn of this thread.
    const SENT: u32 = 200;
    client.writable().await.unwrap();
    for n in 0..SENT {
        client.try_send(&n.to_be_bytes()).unwrap();
    }
    let (mut got, mut buffer) = (Vec::new(), [0; 16]);
    while got.last() != Some(&(SENT - 1)) {
        within(target.recv(&mut buffer)).await.unwrap();
        got.push(u32::from_be_bytes(*buffer.first_chunk().unwrap()));
    }
    let dropped = network.edges[0].counters.datagrams.dropped(DatagramDrop::Queue);
    assert_eq!(got.len() as u64 + dropped, u64::from(SENT));
    assert!(dropped > 0 && got.is_sorted());
}

#[tokio::test]
async fn many_associations_hold_little_and_leave_nothing() {
    const ASSOCIATIONS: u64 = 400;
    const CREDIT: u64 = 4 << 10;
    let mut network = Network::new(2);
    let target = bind();
    let config = udp_connector("echo", target.local_addr().unwrap());
    network.expose_with(1, config.clone()).await;
    let entrance = listen(&network, 0, "echo").await;
    let mut clients = Vec::new();
    let asks = async {
        for _ in 0..ASSOCIATIONS {
            let client = client(entrance).await;
            ask(&client, b"x").await;
            clients.push(client);
        }
    };
    within(async {
        tokio::select! { () = asks => {} () = echo(&target) => {} }
    })
    .await;
    for edge in &network.edges {
        assert_eq!(edge.counters.datagrams.associations(), ASSOCIATIONS);
        let held = || edge.budget.used_bytes();
        // What a session for associations holds, and four kibibytes each.
        within(eventually(|| held() <= ASSOCIATIONS * CREDIT + (2 << 20))).await;
    }
    let end = ConnectorConfig { draining: true, reset: true, ..config };
    network.edges[1].egress.configure(vec![end]);
    for edge in &network.edges {
        within(eventually(|| edge.counters.datagrams.associations() == 0)).await;
        within(eventually(|| edge.budget.used_bytes() <= 2 << 20)).await;
    }
}

#[tokio::test]
async fn associations_begin_however_much_memory_streams_of_the_same_site_take() {
    const BUDGET_BYTES: u64 = 16 << 20;
    let mut network = Network::with_budget(2, BUDGET_BYTES);
    let (target, tcp) = (bind(), listen_on_loopback());
    let datagrams = udp_connector("echo", target.local_addr().unwrap());
    let streams = connector("stream", tcp.local_addr().unwrap());
    network.edges[1].egress.configure(vec![datagrams, streams]);
    network.edges[1].egress.entries().wait_for(|entries| entries.len() == 2).await.unwrap();
    network.publish();
    let entrance = listen(&network, 0, "echo").await;
    let connection = network.rogue(0, 1).await;
    let _control = say_hello(&connection, false).await;
    let mut busy = Vec::new();
    // As much as one site may.
    loop {
        let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
        send.write_all(&open("stream", Protocol::Tcp)).await.unwrap();
        tokio::select! {
            server = accept(&tcp) => busy.push((send, recv, server)),
            refused = recv.read_chunk(100, true) => {
                refused.unwrap();
                break;
            }
        }
    }
    assert!(network.edges[1].budget.used_bytes() > BUDGET_BYTES * 5 / 8);
    let client = client(entrance).await;
    within(async {
        let asks = async {
            for len in [1, 2_000, 9_000] {
                ask(&client, &payload(len)).await;
            }
        };
        tokio::select! { () = asks => {} () = echo(&target) => {} }
    })
    .await;
    assert_eq!(network.edges[1].counters.datagrams.dropped(DatagramDrop::Memory), 0);
    assert_eq!(connection.close_reason(), None, "nothing had to end for it");
}

#[tokio::test]
async fn a_flood_leaves_streams_of_the_same_pair_alone() {
    let (mut network, target, entrance) = service().await;
    let tcp = listen_on_loopback();
    let datagrams = udp_connector("echo", target.local_addr().unwrap());
    let streams = connector("stream", tcp.local_addr().unwrap());
    network.edges[1].egress.configure(vec![datagrams, streams]);
    network.edges[1].egress.entries().wait_for(|entries| entries.len() == 2).await.unwrap();
    network.publish();
    let ingress = &network.edges[0].ingress;
    ingress.configure(vec![udp_listener("echo"), listener("stream")]);
    eventually(|| ingress.status().iter().all(|l| !l.ports[0].bound.is_empty())).await;
    let stream = ingress.status()[1].ports[0].bound.parse().unwrap();
    let flooder = client(entrance).await;
    let full = payload(1_200);
    let flood = async {
        loop {
            for _ in 0..32 {
                // A full socket is what a flood meets.
                let _ = flooder.try_send(&full);
            }
            tokio::task::yield_now().await;
        }
    };
    let drain = async {
        let mut buffer = vec![0; 65_536];
        loop {
            target.recv_from(&mut buffer).await.unwrap();
        }
    };
    let streams = async {
        let mut client = connect(stream).await;
        let mut server = accept(&tcp).await;
        let (mut up, mut down) = (vec![0; 8 << 20], vec![0; 8 << 20]);
        tokio::try_join!(
            async { client.write_all(&payload(8 << 20)).await },
            server.read_exact(&mut up)
        )
        .unwrap();
        tokio::try_join!(
            async { server.write_all(&payload(8 << 20)).await },
            client.read_exact(&mut down)
        )
        .unwrap();
        assert!(up == payload(8 << 20) && down == up);
    };
    within(async {
        tokio::select! { () = streams => {} () = flood => {} () = drain => {} }
    })
    .await;
    assert!(network.edges[0].counters.datagrams.sent(Way::Packet) > 100);
}
