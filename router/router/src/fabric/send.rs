//! Ingress: end-to-end packets become frames.

use super::{
    Fabric,
    forwarding::{Forwarding, Way},
};
use crate::{clock, fabric::FrameLink};
use quinn::udp::{EcnCodepoint, Transmit};
use skein_core::{Handle, Pin, parse_vaddr};
use skein_wire::frame::{FRAGMENT_HEAD_LEN, FRAGMENTS_MAX, FragmentHead};
use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

/// Destinations kicked per change of paths; the others recover by their own timers.
const KICKS_MAX: usize = 1_024;
/// Copies of a kick: the new path may drop one.
const KICK_COPIES: usize = 2;

/// What was sent longer ago than that is not replayed: its acknowledgement would be taken for a round trip as long as the outage. Sessions
/// then find out with new packets.
const KICK_FRESH: Duration = Duration::from_millis(500);

/// Packets of handshakes kept per destination: the longest flight, a certificate chain, takes four.
const HANDSHAKE_MAX: usize = 8;
/// A handshake that has taken longer repeats itself often enough.
const HANDSHAKE_FRESH: Duration = Duration::from_secs(2);
/// The first bit of QUIC's long headers, which handshakes have.
const LONG_HEADER: u8 = 0x80;

/// A peer router under a pin, and what was last sent to it.
#[derive(Debug)]
struct Destination {
    way: Option<Way>,
    generation: u64,
    /// The last packet, replayed when the path changes: the peer has never seen it, so it acknowledges at once, and loss
    /// recovery need not wait for a timer that has backed off.
    last: Vec<u8>,
    last_sent: Option<Instant>,
    /// Packets of handshakes, oldest first: a flight takes several, and whoever dials has no other measure of a good time to repeat them.
    handshake: VecDeque<(Instant, Vec<u8>)>,
    packet: u16,
}

/// Destinations in use.
#[derive(Debug, Default)]
pub(super) struct Destinations(BTreeMap<(Handle, Pin), Destination>);

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// The link that refused the last batch of this thread. An endpoint that is told to wait asks what for in its next step on
    /// the same thread, and the question does not name the destination.
    static BLOCKED: RefCell<Option<Arc<FrameLink>>> = const { RefCell::new(None) };
}

/// Takes the link on which the calling thread's last batch was refused.
pub(super) fn take_blocked() -> Option<Arc<FrameLink>> {
    BLOCKED.take()
}

impl Fabric {
    /// Sends a batch of end-to-end packets; what cannot be sent is lost.
    ///
    /// # Errors
    /// Only `WouldBlock`.
    pub(super) fn transmit(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some((handle, pin)) = parse_vaddr(&transmit.destination) else {
            self.counters.dropped_no_path.add(1);
            return Ok(());
        };
        let stride = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        if transmit.contents.is_empty() {
            return Ok(());
        }
        let table = self.forwarding();
        let way =
            self.destinations.lock().way(self, &table, (handle, pin), transmit.contents, stride);
        let Some((way, packet)) = way else {
            self.counters.dropped_no_path.add(transmit.contents.len().div_ceil(stride) as u64);
            return Ok(());
        };
        if stride > way.mtu {
            for (i, whole) in (0_u16..).zip(transmit.contents.chunks(stride)) {
                self.send_fragments(&way, packet.wrapping_add(i), whole, transmit.ecn);
            }
            return Ok(());
        }
        let sent = self.send_frames(&way, transmit.contents, stride, transmit.ecn);
        if sent.is_err() {
            BLOCKED.set(Some(way.link));
        }
        sent
    }

    fn send_frames(
        &self,
        way: &Way,
        packets: &[u8],
        stride: usize,
        ecn: Option<EcnCodepoint>,
    ) -> io::Result<()> {
        let header = way.template.bytes();
        let sent = SCRATCH.with_borrow_mut(|frames| {
            frames.clear();
            for packet in packets.chunks(stride) {
                let start = frames.len();
                frames.extend_from_slice(header);
                frames.extend_from_slice(packet);
                way.link.seal(&mut frames[start..]);
            }
            way.link.send(frames, stride + header.len(), ecn, clock::now())
        })?;
        let (sent, all) = (sent.div_ceil(stride + header.len()), packets.len().div_ceil(stride));
        self.counters.frames_sent.add(sent as u64);
        self.counters.dropped_congestion.add((all - sent) as u64);
        Ok(())
    }

    /// Splits a packet that the path has become too small for. Pieces that find the link full are lost.
    fn send_fragments(&self, way: &Way, packet: u16, whole: &[u8], ecn: Option<EcnCodepoint>) {
        let room = way.mtu.saturating_sub(FRAGMENT_HEAD_LEN);
        let count = if room == 0 { usize::MAX } else { whole.len().div_ceil(room) };
        if count > FRAGMENTS_MAX {
            self.counters.dropped_oversize.add(1);
            return;
        }
        // Equal pieces, so that they leave as one batch.
        let piece_len = whole.len().div_ceil(count);
        let count = u8::try_from(count).expect("invariant: at most FRAGMENTS_MAX");
        let mut pieces = Vec::with_capacity(whole.len() + FRAGMENTS_MAX * FRAGMENT_HEAD_LEN);
        for (index, piece) in (0_u8..).zip(whole.chunks(piece_len)) {
            pieces.extend_from_slice(&FragmentHead { packet, index, count }.to_bytes());
            pieces.extend_from_slice(piece);
        }
        let way = Way { template: way.template.fragment(), ..way.clone() };
        match self.send_frames(&way, &pieces, piece_len + FRAGMENT_HEAD_LEN, ecn) {
            Ok(()) => self.counters.packets_fragmented.add(1),
            Err(_) => self.counters.dropped_congestion.add(1),
        }
    }

    /// Finds every destination's path anew and kicks those whose path has changed.
    pub(super) fn reroute(&self) {
        let table = self.forwarding();
        let kicks = self.destinations.lock().reroute(self, &table);
        for (way, packets) in kicks.iter().take(KICKS_MAX) {
            self.counters.kicks.add(1);
            for _ in 0..KICK_COPIES {
                for (i, packet) in (0_u16..).zip(packets) {
                    if packet.len() > way.mtu {
                        self.send_fragments(way, i, packet, None);
                    } else if self.send_frames(way, packet, packet.len(), None).is_err() {
                        self.counters.dropped_congestion.add(1);
                    }
                }
            }
        }
    }
}

impl Destination {
    /// Keeps what a change of the path would make us repeat.
    fn note(&mut self, packets: &[u8], stride: usize) {
        for packet in packets.chunks(stride).filter(|packet| packet[0] & LONG_HEADER != 0) {
            if self.handshake.len() >= HANDSHAKE_MAX {
                self.handshake.pop_front();
            }
            self.handshake.push_back((clock::now(), packet.to_vec()));
        }
        if let Some(last) = packets.chunks(stride).next_back() {
            self.last.clear();
            self.last.extend_from_slice(last);
            self.last_sent = Some(clock::now());
        }
    }

    /// What may be on its way: handshakes, then the last packet.
    fn recent(&mut self, now: Instant) -> Vec<Vec<u8>> {
        self.handshake.retain(|(at, _)| now.saturating_duration_since(*at) < HANDSHAKE_FRESH);
        let mut packets: Vec<_> = self.handshake.iter().map(|(_, packet)| packet.clone()).collect();
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < KICK_FRESH;
        if self.last_sent.is_some_and(is_fresh) && packets.last() != Some(&self.last) {
            packets.push(self.last.clone());
        }
        packets
    }
}

impl Destinations {
    /// The way to a destination and the number of its next packet, should it need fragmenting.
    fn way(
        &mut self,
        fabric: &Fabric,
        table: &Forwarding,
        (handle, pin): (Handle, Pin),
        packets: &[u8],
        stride: usize,
    ) -> Option<(Way, u16)> {
        if !table.fib.handles.contains_key(&handle) {
            return None;
        }
        let destination = self.0.entry((handle, pin)).or_insert_with(|| Destination {
            way: table.way(fabric.source(), handle, pin),
            generation: table.generation,
            last: Vec::new(),
            last_sent: None,
            handshake: VecDeque::new(),
            packet: 0,
        });
        destination.note(packets, stride);
        let stale = destination.generation != table.generation
            || destination.way.as_ref().is_none_or(|way| !way.link.is_up());
        if stale {
            destination.way = table.way(fabric.source(), handle, pin);
            destination.generation = table.generation;
        }
        destination.packet = destination.packet.wrapping_add(1);
        // Far apart, since a batch numbers its packets upwards from here.
        Some((destination.way.clone()?, destination.packet.wrapping_mul(64)))
    }

    /// Brings all destinations up to date; returns what to replay where.
    fn reroute(&mut self, fabric: &Fabric, table: &Forwarding) -> Vec<(Way, Vec<Vec<u8>>)> {
        let now = clock::now();
        self.0.retain(|(handle, _), _| table.fib.handles.contains_key(handle));
        let mut kicks = Vec::new();
        for ((handle, pin), destination) in &mut self.0 {
            let old = destination.way.take();
            destination.way = table.way(fabric.source(), *handle, *pin);
            destination.generation = table.generation;
            let Some(new) = &destination.way else { continue };
            if old.is_some_and(|old| old.is_same(new)) {
                continue;
            }
            let new = new.clone();
            let packets = destination.recent(now);
            if !packets.is_empty() {
                kicks.push((new, packets));
            }
        }
        kicks
    }
}
