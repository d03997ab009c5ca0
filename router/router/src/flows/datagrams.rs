//! What became of datagrams.

use crate::fabric::Counter;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a datagram travels between the two edges.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// In one packet.
    Packet,
    /// In two.
    Halves,
    /// On the association's stream.
    Stream,
}

impl Way {
    /// All of them, for tables.
    pub const ALL: [Self; 3] = [Self::Packet, Self::Halves, Self::Stream];

    /// The label in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Halves => "halves",
            Self::Stream => "stream",
        }
    }
}

/// Why a datagram went no further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DatagramDrop {
    /// A newer one took its place in a full queue.
    Queue,
    /// No egress took the association.
    Refused,
    /// There is no room for another association.
    Overloaded,
    /// Nobody serves the address any more; those known from before go on.
    Unserved,
    /// From a peer, for an association that is not there.
    Unknown,
    /// From a peer, and no datagram.
    Malformed,
    /// Its other half did not arrive.
    Half,
    /// There is no memory to put it together.
    Memory,
    /// The local socket did not take it.
    Socket,
    /// More arrived at a time than QUIC holds.
    Buffer,
    /// The path has come to carry smaller packets while it waited.
    Path,
    /// Its association ended while it waited.
    Ended,
    /// The kernel's buffer of the local socket was full: this router did not read in time.
    Kernel,
}

impl DatagramDrop {
    /// All of them, for tables.
    pub const ALL: [Self; 13] = [
        Self::Queue,
        Self::Refused,
        Self::Overloaded,
        Self::Unserved,
        Self::Unknown,
        Self::Malformed,
        Self::Half,
        Self::Memory,
        Self::Socket,
        Self::Buffer,
        Self::Path,
        Self::Ended,
        Self::Kernel,
    ];

    /// The label in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Refused => "refused",
            Self::Overloaded => "overloaded",
            Self::Unserved => "unserved",
            Self::Unknown => "unknown",
            Self::Malformed => "malformed",
            Self::Half => "half",
            Self::Memory => "memory",
            Self::Socket => "socket",
            Self::Buffer => "buffer",
            Self::Path => "path",
            Self::Ended => "ended",
            Self::Kernel => "kernel",
        }
    }
}

/// Datagrams of this router, by what became of them.
#[derive(Debug, Default)]
pub struct DatagramCounters {
    associations: AtomicU64,
    sent: [Counter; Way::ALL.len()],
    dropped: [Counter; DatagramDrop::ALL.len()],
}

impl DatagramCounters {
    /// Associations open now, at either edge.
    #[must_use]
    pub fn associations(&self) -> u64 {
        self.associations.load(Ordering::Relaxed)
    }

    /// Datagrams handed to a session in this way.
    #[must_use]
    pub fn sent(&self, way: Way) -> u64 {
        self.sent[way as usize].total()
    }

    /// Datagrams dropped for this reason.
    #[must_use]
    pub fn dropped(&self, why: DatagramDrop) -> u64 {
        self.dropped[why as usize].total()
    }

    pub(crate) fn add_sent(&self, way: Way) {
        self.sent[way as usize].add(1);
    }

    pub(crate) fn add_dropped(&self, why: DatagramDrop, count: u64) {
        self.dropped[why as usize].add(count);
    }

    pub(super) fn began(&self) {
        self.associations.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ended(&self) {
        self.associations.fetch_sub(1, Ordering::Relaxed);
    }
}
