//! Watches frames pass between hosts: none may go in circles.
//!
//! Routers on the way change what is before the packet in a frame, never the packet, and whoever sends a packet again encrypts it anew;
//! but for a new path, onto which a source says its last packets once more. No path passes a router twice, and neither does the detour
//! onto which a frame is led, once in its life. So there are two ways to go in circles: by labels that lead to the same hop again, each time
//! at another position, or by routers that do not take their label away or lead the frame round again.

use parking_lot::Mutex;
use skein_core::Handle;
use skein_wire::frame::{self, FrameKind, Header};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
};

/// At so many positions on the same hop a packet goes in circles. Said again for other paths it may pass there at another or two; labels
/// that lead to and fro as long as there is room for them in an ordinary header lead there four times.
const POSITIONS: u32 = 4;
/// What a source sends over TCP is not seen; so often it may have said a packet again besides what is seen.
const UNSEEN: u32 = 6;

/// What has passed.
#[derive(Debug, Default)]
pub(crate) struct Passages(Mutex<Seen>);

/// From where to where.
type Hop = (IpAddr, IpAddr);

/// Packets by their hashes.
#[derive(Debug, Default)]
struct Seen {
    /// Whose handles are whose. Whoever leads frames round wrongly must not pass for their source.
    sources: HashMap<Handle, IpAddr>,
    /// How often sources have sent them.
    sent: HashMap<u64, u32>,
    /// At which positions they passed, a bit each.
    positions: HashMap<(u64, Hop), u32>,
    /// How often they passed at the same position, on a detour or not.
    passed: HashMap<(u64, Hop, u8, bool), u32>,
    first_loop: Option<String>,
}

impl Passages {
    /// A datagram has been sent.
    pub(crate) fn note(&self, now_us: u64, from: IpAddr, to: IpAddr, datagram: &[u8]) {
        let Some((header, packet)) = packet(datagram) else { return };
        let mut hasher = DefaultHasher::new();
        (header.source.0, packet).hash(&mut hasher);
        let (hash, hop) = (hasher.finish(), (from, to));
        let seen = &mut *self.0.lock();
        let sent = seen.sent.entry(hash).or_default();
        if header.position == 0 && !header.repaired {
            let source = *seen.sources.entry(header.source).or_insert(from);
            *sent += u32::from(source == from);
        }
        let positions = seen.positions.entry((hash, hop)).or_default();
        // A detour begins at the first position again.
        if !header.repaired {
            *positions |= 1 << header.position;
        }
        let positions = positions.count_ones();
        let passed = seen.passed.entry((hash, hop, header.position, header.repaired)).or_default();
        *passed += 1;
        if *passed > *sent + UNSEEN || positions >= POSITIONS {
            seen.first_loop.get_or_insert_with(|| {
                format!(
                    "a packet sent {sent} times passed {passed} times at each of {positions} positions from {from} to {to} by {now_us} us"
                )
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
    use skein_core::{Label, Pin};
    use skein_wire::frame::Template;
    use std::net::Ipv4Addr;

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    const C: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3));
    /// The bit of a header's first byte that says so.
    const REPAIRED: u8 = 0b0001_0000;
    const LABELS: [Label; 7] = [Label(7); 7];

    fn frame() -> Vec<u8> {
        let template = Template::data(Handle(1), Pin(0), &LABELS);
        [template.expect("invariant: seven labels").bytes(), &[5; 40]].concat()
    }

    #[test]
    fn a_source_may_say_its_packet_again_and_each_may_be_led_round_once() {
        let passages = Passages::default();
        for n in 0..50 {
            let mut frame = frame();
            passages.note(n, A, B, &frame);
            frame::advance(&mut frame);
            passages.note(n, B, C, &frame);
            frame::reroute(&mut frame, &LABELS[..2]).expect("invariant: there is room");
            passages.note(n, C, B, &frame);
            frame::advance(&mut frame);
            passages.note(n, B, C, &frame);
        }
        assert_eq!(passages.first_loop(), None);
    }

    #[test]
    fn labels_that_lead_to_and_fro_are_a_loop() {
        let (passages, mut frame) = (Passages::default(), frame());
        let mut hops = [(A, B), (B, A)].into_iter().cycle().take(LABELS.len() + 1);
        let is_noticed = |(from, to)| {
            passages.note(0, from, to, &frame);
            frame::advance(&mut frame);
            passages.first_loop().is_some()
        };
        assert_eq!(hops.position(is_noticed), Some(6));
    }

    /// Sends a frame from A, and then round between B and C until that is noticed.
    fn rounds(mut lead_on: impl FnMut(&mut [u8])) -> u64 {
        let (passages, mut frame) = (Passages::default(), frame());
        passages.note(0, A, B, &frame);
        frame::advance(&mut frame);
        let is_noticed = |round: &u64| {
            for (from, to) in [(B, C), (C, B)] {
                lead_on(&mut frame);
                passages.note(*round, from, to, &frame);
            }
            passages.first_loop().is_some()
        };
        (1..50).find(is_noticed).expect("it is noticed")
    }

    #[test]
    fn a_frame_that_is_led_round_again_and_again_or_keeps_its_label_is_a_loop() {
        let reroute = |frame: &mut [u8]| frame::reroute(frame, &LABELS).expect("invariant: room");
        let marked = rounds(reroute);
        let unmarked = rounds(|frame| {
            reroute(frame);
            frame[0] &= !REPAIRED;
        });
        let kept = rounds(|_| {});
        assert_eq!((marked, unmarked, kept), (8, 8, 8));
    }
}
