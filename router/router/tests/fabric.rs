//! End-to-end QUIC over several routers: forwarding, failure, repair, fragments.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod fabric_net;
mod stopwatch;

use fabric_net::{Node, PATIENCE, Relay, eventually, join, nodes, publish};
use quinn::{Connection, Endpoint};
use skein_core::Pin;
use std::time::Duration;
use stopwatch::Stopwatch;
use tokio::{task::JoinHandle, time};

const MIB: usize = 1 << 20;
/// What every path in these tests carries.
const MTU: u16 = 1_200;

/// Accepts one session and sends back whatever its streams bring.
fn echo(endpoint: Endpoint) -> JoinHandle<()> {
    #[allow(clippy::disallowed_methods, reason = "the test awaits or drops its runtime")]
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.await.unwrap();
            while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                while let Ok(Some(chunk)) = recv.read_chunk(64 << 10, true).await {
                    send.write_chunk(chunk.bytes).await.unwrap();
                }
                // The other side may be gone already.
                let _ = send.finish();
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

/// A–B–C and A–D–C: routers 0, 1, 2 and 3, everything through relays `ab, bc, ad, dc`.
async fn diamond() -> (Vec<Node>, [Relay; 4]) {
    let mut nodes = nodes(4).await;
    let mut relays = Vec::new();
    for (from, to) in [(0, 1), (1, 2), (0, 3), (3, 2)] {
        let relay = Relay::new(nodes[to].address().await);
        join(&mut nodes, from, to, Some(relay.addr)).await;
        relays.push(relay);
    }
    publish(&nodes, 0, &[&[1, 2], &[3, 2]], MTU);
    publish(&nodes, 2, &[&[1, 0], &[3, 0]], MTU);
    // A transit's own routes are what it repairs with.
    publish(&nodes, 1, &[&[2], &[0, 3, 2], &[0], &[2, 3, 0]], MTU);
    publish(&nodes, 3, &[&[2], &[0]], MTU);
    let relays = relays.try_into().unwrap_or_else(|_| unreachable!("four were made"));
    (nodes, relays)
}

#[tokio::test]
async fn bytes_pass_through_a_transit_that_sees_none_of_them() {
    let (nodes, _relays) = diamond().await;
    let (a, c) = (nodes[0].endpoint(), nodes[2].endpoint());
    let server = echo(c);
    let connection = nodes[0].connect(&a, &nodes[2], Pin(0)).await;
    round_trip(&connection, 8 * MIB).await;
    let (b, d) = (nodes[1].fabric.counters(), nodes[3].fabric.counters());
    assert!(b.bytes_forwarded.total() > 16 * MIB as u64);
    assert_eq!(d.bytes_forwarded.total(), 0, "pin 0 goes through B alone");
    server.abort();
}

#[tokio::test]
async fn pins_take_their_own_paths() {
    let (nodes, _relays) = diamond().await;
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[2], Pin(1)).await;
    round_trip(&connection, MIB).await;
    assert_eq!(nodes[1].fabric.counters().bytes_forwarded.total(), 0);
    assert!(nodes[3].fabric.counters().bytes_forwarded.total() > 2 * MIB as u64);
    server.abort();
}

#[tokio::test]
async fn the_first_link_dies_and_flows_go_on_at_once() {
    let (mut nodes, [ab, bc, _ad, _dc]) = diamond().await;
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[2], Pin(0)).await;
    round_trip(&connection, MIB).await;
    // The transit is gone for both of its neighbours, as when its host has lost power.
    ab.cut(true);
    bc.cut(true);
    let cut = Stopwatch::start();
    round_trip(&connection, MIB).await;
    cut.assert_within(Duration::from_secs(2));
    nodes[0].next_down().await;
    nodes[2].next_down().await;
    assert!(nodes[3].fabric.counters().bytes_forwarded.total() > 2 * MIB as u64);
    assert!(nodes[0].fabric.counters().kicks.total() >= 1);
    round_trip(&connection, MIB).await;
    server.abort();
}

#[tokio::test]
async fn a_dial_that_the_loss_of_a_path_interrupts_goes_on_at_once() {
    let (mut nodes, [ab, bc, _ad, _dc]) = diamond().await;
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    ab.cut(true);
    bc.cut(true);
    let cut = Stopwatch::start();
    // Its first flight, which a post-quantum key makes two packets, would be sent again after 9 s.
    let rtt = Duration::from_secs(3);
    let connection = nodes[0].connect_with(&a, &nodes[2], Pin(0), rtt).await;
    cut.assert_within(Duration::from_secs(3));
    // All of the flight was repeated, so that none of it had to be found missing first.
    assert_eq!(connection.stats().path.lost_packets, 0);
    nodes[0].next_down().await;
    round_trip(&connection, MIB).await;
    server.abort();
}

#[tokio::test]
async fn a_transit_repairs_round_its_dead_link() {
    let (mut nodes, [_ab, bc, _ad, _dc]) = diamond().await;
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[2], Pin(0)).await;
    round_trip(&connection, MIB).await;
    // Nobody tells A: its view of the network stays as it is.
    bc.cut(true);
    round_trip(&connection, MIB).await;
    nodes[1].next_down().await;
    nodes[2].next_down().await;
    round_trip(&connection, MIB).await;
    assert!(nodes[1].fabric.counters().frames_repaired.total() > 100);
    server.abort();
}

#[tokio::test]
async fn a_path_of_eleven_links_takes_the_long_header() {
    const LAST: usize = 11;
    let mut nodes = nodes(u8::try_from(LAST).unwrap() + 1).await;
    for from in 0..LAST {
        join(&mut nodes, from, from + 1, None).await;
    }
    let there: Vec<usize> = (1..=LAST).collect();
    let back: Vec<usize> = (0..LAST).rev().collect();
    publish(&nodes, 0, &[&there], MTU);
    publish(&nodes, LAST, &[&back], MTU);
    for transit in 1..LAST {
        publish(&nodes, transit, &[&[transit + 1], &[transit - 1]], MTU);
    }
    let (a, server) = (nodes[0].endpoint(), echo(nodes[LAST].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[LAST], Pin(0)).await;
    round_trip(&connection, MIB).await;
    // The long header takes 32 bytes more than the path leaves for it.
    assert!(nodes[0].fabric.counters().packets_fragmented.total() > 800);
    server.abort();
}

#[tokio::test]
async fn a_path_that_shrinks_under_traffic_is_noticed_and_the_link_stays_up() {
    let (nodes, [ab, _bc, _ad, _dc]) = diamond().await;
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[2], Pin(0)).await;
    let mtu = |node: &Node| node.links.status().iter().map(|link| link.mtu).min();
    eventually(|| (mtu(&nodes[0]) == Some(8_940)).then_some(())).await;
    ab.set_len_max(1_400);
    let noticed = async {
        while mtu(&nodes[0]) != Some(1_392 - 32) {
            round_trip(&connection, 10_000).await;
        }
    };
    time::timeout(PATIENCE, noticed).await.expect("the old size is still believed in");
    assert_eq!(nodes[0].links.status().len(), 2);
    assert!(nodes[0].links.status().iter().all(|link| link.error.is_empty()));
    server.abort();
}

#[tokio::test]
async fn packets_too_large_for_their_path_arrive_in_pieces() {
    let (nodes, _relays) = diamond().await;
    for (me, path) in [(0, [1, 2]), (2, [1, 0])] {
        publish(&nodes, me, &[&path], 500);
    }
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[2], Pin(0)).await;
    round_trip(&connection, MIB).await;
    let (sent, received) = (nodes[0].fabric.counters(), nodes[2].fabric.counters());
    assert!(sent.packets_fragmented.total() > 800);
    assert!(received.packets_reassembled.total() > 800);
    server.abort();
}

#[tokio::test]
async fn an_edge_passes_nothing_on() {
    let (nodes, _relays) = diamond().await;
    nodes[1].fabric.set_transit(false);
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    // The path through B is a dead end; the one through D is not.
    let connection = nodes[0].connect(&a, &nodes[2], Pin(1)).await;
    round_trip(&connection, MIB).await;
    let counters = nodes[1].fabric.counters();
    let config = nodes[0].session_config(&nodes[2]);
    let connecting =
        a.connect_with(config, skein_core::vaddr(nodes[2].handle, Pin(0)), "x").unwrap();
    eventually(|| (counters.dropped_not_transit.total() > 0).then_some(())).await;
    assert_eq!(counters.frames_forwarded.total(), 0);
    drop(connecting);
    server.abort();
}

#[tokio::test]
async fn all_paths_gone_and_back_within_the_patience_of_a_session() {
    let (mut nodes, relays) = diamond().await;
    let (a, server) = (nodes[0].endpoint(), echo(nodes[2].endpoint()));
    let connection = nodes[0].connect(&a, &nodes[2], Pin(0)).await;
    round_trip(&connection, MIB).await;
    for relay in &relays {
        relay.cut(true);
    }
    for node in &mut nodes {
        node.next_down().await;
        node.next_down().await;
    }
    for relay in &relays {
        relay.cut(false);
    }
    for node in &mut nodes {
        node.next_up().await;
        node.next_up().await;
    }
    publish(&nodes, 0, &[&[1, 2], &[3, 2]], MTU);
    publish(&nodes, 2, &[&[1, 0], &[3, 0]], MTU);
    publish(&nodes, 1, &[&[2], &[0]], MTU);
    publish(&nodes, 3, &[&[2], &[0]], MTU);
    round_trip(&connection, MIB).await;
    server.abort();
}
