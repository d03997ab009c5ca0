//! What is held keeps little more memory than it is long. A process of its own, whose memory is measured.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod edges;

use edges::{Network, connector, dead_target, flow_open, hello};
use std::{fs, time::Duration};
use tokio::time::timeout;

/// Of the largest packet, each.
const PACKETS: usize = 4_000;
const PACKET_BYTES: usize = 9_000;

/// Resident memory of this process.
fn memory_bytes() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4_096
}

#[tokio::test]
async fn single_bytes_for_a_target_that_does_not_answer_do_not_keep_their_packets() {
    let mut network = Network::new(2);
    let (_dead, at) = dead_target();
    let mut slow = connector("dead", at);
    slow.connect_timeout_ms = 60_000;
    network.expose_with(1, slow).await;
    let connection = network.rogue_dialler(0, 1).padding().connect().await;
    let (mut control, _from_peer) = connection.open_bi().await.unwrap();
    control.write_all(&hello()).await.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(&flow_open("dead")).await.unwrap();
    let before = memory_bytes();
    let sent = async {
        for _ in 0..PACKETS {
            let packets = connection.stats().udp_tx.datagrams;
            send.write_all(&[1]).await.unwrap();
            while connection.stats().udp_tx.datagrams == packets {
                tokio::task::yield_now().await;
            }
        }
    };
    timeout(Duration::from_secs(60), sent).await.unwrap();
    assert!(connection.stats().udp_tx.bytes >= (PACKETS * PACKET_BYTES) as u64);
    let held = memory_bytes().saturating_sub(before);
    assert!(held < PACKETS * PACKET_BYTES / 3, "{held}");
}
