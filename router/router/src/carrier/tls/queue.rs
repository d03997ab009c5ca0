//! What waits to be written to a TLS connection. Pure: time is an argument.

use bytes::{Buf as _, BytesMut};
use skein_wire::datagram;
use std::time::{Duration, Instant};

/// Probes and their answers, a few a second each.
const CONTROL_BYTES_MAX: usize = 8 << 10;
/// Packets of the hop connection, whose congestion control sees nothing of this link's but a queue that is full.
const PACKETS_BYTES_MAX: usize = 64 << 10;
/// Data waits no longer than this, if the connection goes on as fast as it did.
const DELAY_MAX: Duration = Duration::from_millis(40);
/// Data that may wait however slow the connection is: a few turns of the writer.
const DATA_BYTES_MIN: usize = 32 << 10;
/// Data that may wait however fast it is: 40 ms at 50 Mbit/s. A writer that is faster than that does not need more.
const DATA_BYTES_MAX: usize = 256 << 10;
/// The same before anything was measured.
const DATA_BYTES_INITIAL: usize = 64 << 10;
/// Written at a time: a TLS record. Each class gets at least one datagram, however little room the others leave: with all control frames that
/// may wait and two datagrams of the largest size it is 26 KiB. Control frames wait for one of them.
pub(super) const CHUNK_BYTES: usize = 16 << 10;
/// The rate is measured over spans of at least this.
const RATE_SPAN: Duration = Duration::from_millis(20);

/// Datagrams behind their prefixes, in three classes: control frames go first, QUIC packets and data take turns.
#[derive(Debug)]
pub(super) struct SendQueue {
    control: BytesMut,
    packets: BytesMut,
    data: BytesMut,
    data_max: usize,
    /// Whoever sends packets found no room and waits until there is some.
    packets_refused: bool,
    /// The same for data.
    data_refused: bool,
    rate: DrainRate,
}

impl Default for SendQueue {
    fn default() -> Self {
        Self {
            control: BytesMut::new(),
            packets: BytesMut::new(),
            data: BytesMut::new(),
            data_max: DATA_BYTES_INITIAL,
            packets_refused: false,
            data_refused: false,
            rate: DrainRate::default(),
        }
    }
}

impl SendQueue {
    /// Queues a control frame ahead of everything else; `false` when there is no room.
    pub(super) fn push_control(&mut self, frame: &[u8]) -> bool {
        self.control.len() + frame.len() <= CONTROL_BYTES_MAX && push(&mut self.control, frame)
    }

    /// Queues a QUIC packet; `false` when there is no room.
    pub(super) fn push_packet(&mut self, packet: &[u8]) -> bool {
        let fits = self.packets.len() + packet.len() <= PACKETS_BYTES_MAX;
        self.packets_refused |= !fits;
        fits && push(&mut self.packets, packet)
    }

    /// Queues frames, each `stride` long but the last; returns how many bytes of them there was room for.
    pub(super) fn push_data(&mut self, frames: &[u8], stride: usize) -> usize {
        let mut taken = 0;
        for frame in frames.chunks(stride.max(1)) {
            if self.data.len() + frame.len() > self.data_max {
                self.data_refused = true;
                break;
            }
            // No link makes frames of a length that the carrier has no room for; they would be lost.
            let _ = push(&mut self.data, frame);
            taken += frame.len();
        }
        taken
    }

    /// Whether whoever wants to send QUIC packets has to wait.
    pub(super) fn is_refusing_packets(&self) -> bool {
        self.packets_refused
    }

    /// Whether whoever wants to send data has to wait.
    pub(super) fn is_refusing_data(&self) -> bool {
        self.data_refused
    }

    /// Puts what is to be written next into `chunk`, in whole datagrams; says whether those who wait are to be woken.
    pub(super) fn take(&mut self, chunk: &mut BytesMut, now: Instant) -> bool {
        chunk.clear();
        self.measure(now);
        chunk.extend_from_slice(&self.control);
        self.control.clear();
        // Half of the rest for either where both wait: a database that is exchanged must not stop the flows.
        let room = CHUNK_BYTES.saturating_sub(chunk.len());
        let share = if self.data.is_empty() { room } else { room / 2 };
        move_datagrams(&mut self.packets, chunk, share);
        let room = CHUNK_BYTES.saturating_sub(chunk.len());
        let data = move_datagrams(&mut self.data, chunk, room);
        self.rate.taken(data, now);
        let wake_packets = self.packets_refused && self.packets.len() < PACKETS_BYTES_MAX / 2;
        let wake_data = self.data_refused && self.data.len() < self.data_max / 2;
        self.packets_refused &= !wake_packets;
        self.data_refused &= !wake_data;
        wake_packets || wake_data
    }

    /// Everything taken before has left.
    fn measure(&mut self, now: Instant) {
        if self.data.is_empty() {
            // Nobody knows how fast it would have gone on.
            self.rate.pause();
        } else if let Some(bytes_per_s) = self.rate.bytes_per_s(now) {
            let bytes = u128::from(bytes_per_s) * DELAY_MAX.as_millis() / 1_000;
            self.data_max =
                usize::try_from(bytes).unwrap_or(usize::MAX).clamp(DATA_BYTES_MIN, DATA_BYTES_MAX);
        }
    }
}

/// Moves the first datagrams of `queue`, as many as `room` holds but at least one; returns how many bytes.
fn move_datagrams(queue: &mut BytesMut, chunk: &mut BytesMut, room: usize) -> usize {
    let mut cut = 0;
    while let Some(len) = datagram::first_len(&queue[cut..]).ok().flatten() {
        if cut > 0 && cut + datagram::PREFIX_LEN + len > room {
            break;
        }
        cut += datagram::PREFIX_LEN + len;
    }
    chunk.extend_from_slice(&queue[..cut]);
    queue.advance(cut);
    cut
}

fn push(queue: &mut BytesMut, datagram: &[u8]) -> bool {
    let Some(prefix) = datagram::prefix(datagram.len()) else { return false };
    queue.extend_from_slice(&prefix);
    queue.extend_from_slice(datagram);
    true
}

/// How fast data leaves while there is always more of it.
#[derive(Debug, Default)]
struct DrainRate {
    since: Option<Instant>,
    bytes: u64,
    bytes_per_s: Option<u64>,
}

impl DrainRate {
    fn taken(&mut self, bytes: usize, now: Instant) {
        if bytes > 0 {
            self.since.get_or_insert(now);
            self.bytes += bytes as u64;
        }
    }

    fn pause(&mut self) {
        (self.since, self.bytes) = (None, 0);
    }

    /// The smoothed rate, when there is news of it.
    fn bytes_per_s(&mut self, now: Instant) -> Option<u64> {
        let span = now.saturating_duration_since(self.since?);
        if span < RATE_SPAN {
            return None;
        }
        let micros = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        let sample = self.bytes.saturating_mul(1_000_000) / micros;
        (self.since, self.bytes) = (Some(now), 0);
        let smoothed = self.bytes_per_s.map_or(sample, |old| (3 * old + sample) / 4);
        self.bytes_per_s = Some(smoothed);
        Some(smoothed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that takes `bytes_per_s` from a sender that never pauses, for two seconds; returns how much waits then.
    fn waiting(bytes_per_s: u64) -> usize {
        let (mut queue, mut chunk) = (SendQueue::default(), BytesMut::new());
        let mut now = crate::clock::now();
        let end = now + Duration::from_secs(2);
        while now < end {
            queue.push_data(&[7; 1 << 20], 1_472);
            queue.take(&mut chunk, now);
            now += Duration::from_micros(chunk.len() as u64 * 1_000_000 / bytes_per_s);
        }
        queue.push_data(&[7; 1 << 20], 1_472);
        queue.data.len()
    }

    #[test]
    fn what_waits_is_what_leaves_in_40_ms() {
        for (mbit_per_s, least, most) in
            [(1, 28 << 10, 32 << 10), (20, 90_000, 104_000), (1_000, 250_000, 256 << 10)]
        {
            let bytes = waiting(mbit_per_s * 125_000);
            assert!((least..=most).contains(&bytes), "{bytes} at {mbit_per_s} Mbit/s");
        }
    }

    #[test]
    fn control_overtakes_data_and_nothing_is_torn() {
        let (mut queue, mut chunk, now) =
            (SendQueue::default(), BytesMut::new(), crate::clock::now());
        let frames = vec![0x80; 40_000];
        assert_eq!(queue.push_data(&frames, 1_000), 40_000);
        let mut decoder = datagram::Decoder::default();
        let (mut out, mut first, mut len) = (vec![0; 64 << 10], Vec::new(), 0);
        while len < 40_000 {
            queue.push_control(&[0xa0; 46]);
            queue.take(&mut chunk, now);
            assert!(chunk.len() <= CHUNK_BYTES);
            decoder.push(&chunk);
            let control = decoder.next_batch(&mut out).unwrap().unwrap();
            first.push(control.len);
            while let Some(batch) = decoder.next_batch(&mut out).unwrap() {
                assert_eq!(batch.stride, 1_000);
                len += batch.len;
            }
        }
        assert_eq!(first, [46; 3]);
    }

    #[test]
    fn packets_without_end_leave_data_half_of_the_connection() {
        let (mut queue, mut chunk, now) =
            (SendQueue::default(), BytesMut::new(), crate::clock::now());
        let (mut packets, mut data) = (0, 0);
        for _ in 0..100 {
            while queue.push_packet(&[0xc0; 1_472]) {}
            queue.push_data(&[0x80; 1 << 20], 1_472);
            let before = (queue.packets.len(), queue.data.len());
            queue.take(&mut chunk, now);
            assert!(chunk.len() <= CHUNK_BYTES);
            packets += before.0 - queue.packets.len();
            data += before.1 - queue.data.len();
        }
        assert!(data > packets * 9 / 10 && packets > data * 6 / 10, "{packets} {data}");
        while queue.push_control(&[0xa0; 46]) {}
        queue.take(&mut chunk, now);
        assert!(queue.control.is_empty(), "control frames wait for nobody");
        queue.data.clear();
        queue.take(&mut chunk, now);
        assert!(chunk.len() > CHUNK_BYTES - 1_500, "alone they have all of it");
    }

    #[test]
    fn who_finds_no_room_is_told_when_there_is_some() {
        let (mut queue, mut chunk, now) =
            (SendQueue::default(), BytesMut::new(), crate::clock::now());
        let taken = queue.push_data(&[1; 1 << 20], 1_000);
        assert!(taken < DATA_BYTES_INITIAL && queue.is_refusing_data());
        assert!(!queue.is_refusing_packets());
        assert_eq!(queue.push_data(&[1; 1_000], 1_000), 0);
        let turns = (1..).find(|_| queue.take(&mut chunk, now)).unwrap();
        assert!(turns > 1 && !queue.is_refusing_data());
        assert!(queue.data.len() < DATA_BYTES_INITIAL / 2);
        while queue.push_packet(&[1; 1_000]) {}
        assert!(queue.packets.len() <= PACKETS_BYTES_MAX + 1_000 && queue.is_refusing_packets());
        let turns = (1..).find(|_| queue.take(&mut chunk, now)).unwrap();
        assert!(turns > 1 && !queue.is_refusing_packets());
    }
}
