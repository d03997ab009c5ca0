//! Putting packets together that were too large for a link of their path.

use skein_core::{Handle, Pin};
use skein_wire::frame::{FRAGMENTS_MAX, FragmentHead};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Packets waiting for pieces; oversized ones are sent only until a session has adapted.
const PACKETS_MAX: usize = 256;
/// Memory of waiting pieces.
const BYTES_MAX: usize = 1 << 20;
/// Pieces of one packet leave together, so they arrive within little more than jitter.
const PATIENCE: Duration = Duration::from_millis(250);

/// Whose packet a piece belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct PacketId {
    pub(super) source: Handle,
    pub(super) pin: Pin,
    pub(super) packet: u16,
}

#[derive(Debug)]
struct Partial {
    since: Instant,
    count: u8,
    pieces: [Option<Box<[u8]>>; FRAGMENTS_MAX],
}

/// Incomplete packets.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    packets: HashMap<PacketId, Partial>,
    bytes: usize,
    /// Pieces given up since the last [`take_dropped`](Self::take_dropped).
    dropped: u64,
}

impl Reassembly {
    /// Takes a piece; returns the packet when it was the last one missing.
    pub(super) fn push(
        &mut self,
        id: PacketId,
        head: FragmentHead,
        piece: &[u8],
        now: Instant,
    ) -> Option<Vec<u8>> {
        let is_new = !self.packets.contains_key(&id);
        if is_new && self.packets.len() >= PACKETS_MAX || self.bytes + piece.len() > BYTES_MAX {
            self.expire(now);
        }
        // The oldest is the least likely to become complete; to refuse the newest would stop all traffic for as long as pieces are lost.
        while is_new && self.packets.len() >= PACKETS_MAX || self.bytes + piece.len() > BYTES_MAX {
            self.remove(self.oldest()?);
        }
        // Numbers come round: a packet that has waited too long is another one.
        if self.packets.get(&id).is_some_and(|old| old.is_over(now) || old.count != head.count) {
            self.remove(id);
        }
        let partial = self.packets.entry(id).or_insert_with(|| Partial {
            since: now,
            count: head.count,
            pieces: Default::default(),
        });
        let slot = partial.pieces.get_mut(usize::from(head.index))?;
        if slot.is_none() {
            *slot = Some(piece.into());
            self.bytes += piece.len();
        }
        if !partial.is_complete() {
            return None;
        }
        let partial = self.packets.remove(&id)?;
        let packet: Vec<u8> = partial.pieces.into_iter().flatten().flatten().collect();
        self.bytes -= packet.len();
        Some(packet)
    }

    /// How many pieces were given up since the last call.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    fn oldest(&self) -> Option<PacketId> {
        self.packets.iter().min_by_key(|(_, partial)| partial.since).map(|(id, _)| *id)
    }

    fn expire(&mut self, now: Instant) {
        let over = self.packets.iter().filter(|(_, partial)| partial.is_over(now));
        for id in over.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: PacketId) {
        for piece in self.packets.remove(&id).into_iter().flat_map(|old| old.pieces).flatten() {
            self.bytes -= piece.len();
            self.dropped += 1;
        }
    }
}

impl Partial {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) > PATIENCE
    }

    fn is_complete(&self) -> bool {
        self.pieces.iter().take(usize::from(self.count)).all(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(packet: u16) -> PacketId {
        PacketId { source: Handle(1), pin: Pin(0), packet }
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_make_the_packet_once(
            order in Just((0..6_u8).collect::<Vec<_>>()).prop_shuffle(), twice in 0..6_usize,
        ) {
            let (mut reassembly, now) = (Reassembly::default(), crate::clock::now());
            let mut order = order;
            order.insert(order.len() - 1, order[twice.min(4)]);
            let packets: Vec<Vec<u8>> = order
                .iter()
                .filter_map(|&index| {
                    let head = FragmentHead { packet: 3, index, count: 6 };
                    reassembly.push(id(3), head, &[index; 10], now)
                })
                .collect();
            let whole: Vec<u8> = (0..6).flat_map(|index| [index; 10]).collect();
            prop_assert_eq!(packets, vec![whole]);
            prop_assert_eq!(reassembly.bytes, 0);
        }
    }

    #[test]
    fn incomplete_packets_are_bounded_and_expire() {
        let (mut reassembly, now) = (Reassembly::default(), crate::clock::now());
        let head = |packet| FragmentHead { packet, index: 0, count: 2 };
        for packet in 0..1_000 {
            let now = now + Duration::from_micros(packet.into());
            assert_eq!(reassembly.push(id(packet), head(packet), &[0; 1_200], now), None);
        }
        assert_eq!(reassembly.packets.len(), PACKETS_MAX);
        assert_eq!(reassembly.take_dropped(), 1_000 - PACKETS_MAX as u64);
        // Those that were lost do not stand in the way of the next.
        let last = FragmentHead { packet: 999, index: 1, count: 2 };
        assert!(reassembly.push(id(999), last, &[1; 8], now).is_some());
        reassembly.push(id(999), head(999), &[0; 1_200], now + Duration::from_micros(999));
        let later = now + 2 * PATIENCE;
        assert_eq!(reassembly.push(id(2_000), head(2_000), &[0; 1_200], later), None);
        assert_eq!((reassembly.packets.len(), reassembly.bytes), (1, 1_200));
        let last = FragmentHead { packet: 2_000, index: 1, count: 2 };
        assert!(reassembly.push(id(2_000), last, &[1; 8], later).is_some());
    }

    #[test]
    fn a_number_used_again_does_not_mix_packets() {
        let (mut reassembly, now) = (Reassembly::default(), crate::clock::now());
        let head = |index| FragmentHead { packet: 1, index, count: 2 };
        reassembly.push(id(1), head(0), b"old", now);
        let later = now + 2 * PATIENCE;
        assert_eq!(reassembly.push(id(1), head(1), b"new", later), None);
        assert_eq!(reassembly.push(id(1), head(0), b"the ", later), Some(b"the new".to_vec()));
    }
}
