//! What the frame layer counts; the metrics page exports these.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Frames and bytes by what became of them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames of our own sessions handed to a carrier.
    pub frames_sent: Counter,
    /// Frames delivered to our own sessions.
    pub frames_delivered: Counter,
    /// Frames passed on to another router.
    pub frames_forwarded: Counter,
    /// Bytes of frames passed on, headers included.
    pub bytes_forwarded: Counter,
    /// Frames sent round a dead link.
    pub frames_repaired: Counter,
    /// Frames that came as fragments and were put together.
    pub packets_reassembled: Counter,
    /// End-to-end packets that had to be split.
    pub packets_fragmented: Counter,
    /// Dropped: no path to the destination.
    pub dropped_no_path: Counter,
    /// Dropped: the label names no link of ours.
    pub dropped_unknown_label: Counter,
    /// Dropped: the link is dead and there was no repair, or the frame had been repaired before.
    pub dropped_dead_link: Counter,
    /// Dropped: this router is an edge and the frame is not for it, or the frame asks for a way that its neighbour may not use.
    pub dropped_not_transit: Counter,
    /// Dropped: the source handle is of no router we trust.
    pub dropped_unknown_source: Counter,
    /// Dropped: the socket or a queue was full.
    pub dropped_congestion: Counter,
    /// Dropped: too large for its link and not to be split further.
    pub dropped_oversize: Counter,
    /// Dropped: a fragment whose packet never became complete, or did not fit the bounds.
    pub dropped_fragments: Counter,
    /// Dropped: neither QUIC nor a frame of a known link: wrong authentication code, random bytes.
    pub dropped_unauthenticated: Counter,
    /// Dropped: a frame on a port without links, e.g. before the keys of its first link are known.
    pub dropped_no_link: Counter,
    /// Dropped: a counter seen before or too old.
    pub dropped_replayed: Counter,
    /// QUIC packets of hop connections dropped because their queue, of a port's or of a TLS connection, was full.
    pub dropped_handshake: Counter,
    /// Last packets replayed on a new path.
    pub kicks: Counter,
    /// TCP connections to our port that were not for us, and handshakes refused or timed out.
    pub connections_refused: Counter,
    /// Probes that stayed unanswered for an interval.
    pub probes_lost: Counter,
}
