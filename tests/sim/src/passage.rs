//! Watches frames pass between hosts: none may go in circles.
//!
//! Routers on the way change what is before the packet in a frame, never the packet, and whoever sends a packet again encrypts it anew;
//! but for a new path, onto which a source says its last packets once more. So a packet that passes from one host to the same other
//! far more often than its source has sent it goes in circles.

use parking_lot::Mutex;
use skein_wire::frame::{self, FrameKind, Header};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
};

/// A packet that goes in circles does so until its frame is full of labels or its links are full: soon this many times.
const SURPLUS: u32 = 4;

/// What has passed.
#[derive(Debug, Default)]
pub(crate) struct Passages(Mutex<Seen>);

/// Packets by their hashes.
#[derive(Debug, Default)]
struct Seen {
    /// How often sources have sent them.
    sent: HashMap<u64, u32>,
    /// How often they passed, from where to where.
    passed: HashMap<(u64, IpAddr, IpAddr), u32>,
    first_loop: Option<String>,
}

impl Passages {
    /// A datagram has been sent.
    pub(crate) fn note(&self, now_us: u64, from: IpAddr, to: IpAddr, datagram: &[u8]) {
        let Some((header, packet)) = packet(datagram) else { return };
        let mut hasher = DefaultHasher::new();
        packet.hash(&mut hasher);
        let hash = hasher.finish();
        let seen = &mut *self.0.lock();
        let sent = seen.sent.entry(hash).or_default();
        *sent += u32::from(header.position == 0 && !header.repaired);
        let passed = seen.passed.entry((hash, from, to)).or_default();
        *passed += 1;
        // What its source sent over TCP was not seen.
        if *passed > SURPLUS * (*sent + 1) {
            seen.first_loop.get_or_insert_with(|| {
                format!("a packet sent {sent} times passed {passed} times from {from} to {to} by {now_us} us")
            });
        }
    }

    /// The first packet that went in circles.
    pub(crate) fn first_loop(&self) -> Option<String> {
        self.0.lock().first_loop.clone()
    }
}

/// The header and the packet of a frame, if it is one with a packet.
fn packet(datagram: &[u8]) -> Option<(Header, &[u8])> {
    if !frame::is_frame(*datagram.first()?) {
        return None;
    }
    let header = Header::parse(datagram).ok()?;
    let packet = &datagram[header.len..];
    (header.kind != FrameKind::Control).then_some((header, packet))
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_core::{Handle, Label, Pin};
    use skein_wire::frame::Template;

    #[test]
    fn the_same_packet_again_and_again_on_the_same_way_is_a_loop() {
        let template = Template::data(Handle(1), Pin(0), &[Label(7); 7]);
        let frame = [template.expect("invariant: seven labels").bytes(), &[5; 40]].concat();
        let [a, b] = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        let (kicked, circling) = (Passages::default(), Passages::default());
        (0..50).for_each(|n| kicked.note(n, a, b, &frame));
        assert_eq!(kicked.first_loop(), None, "its source may send it again");
        let mut frame = frame;
        circling.note(0, a, b, &frame);
        frame::advance(&mut frame);
        (0..50).for_each(|n| circling.note(n, b, a, &frame));
        assert!(circling.first_loop().is_some());
    }
}
