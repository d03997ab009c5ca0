//! What sessions are for.

use super::{SESSION_BYTES, datagrams::DATAGRAMS_BYTES};
use skein_core::Protocol;

/// What a session is for. Each class has its own, so that floods of datagrams meet streams on the network alone, where congestion
/// control shares it out, and not in one connection, which would send them first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// Byte streams.
    Streams,
    /// Associations.
    Datagrams,
}

/// The peer uses a session for what it has not said it is for, and what nobody has paid for.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(super) enum Misplaced {
    #[error("a datagram in a session for byte streams")]
    Datagram,
    #[error("an association in a session for byte streams")]
    Association,
    #[error("a byte stream in a session for associations")]
    Stream,
}

impl Class {
    /// Checks that flows of this protocol belong into such a session.
    pub(super) fn check(self, protocol: Protocol) -> Result<(), Misplaced> {
        match (self, protocol) {
            (Self::Streams, Protocol::Tcp) | (Self::Datagrams, Protocol::Udp) => Ok(()),
            (Self::Streams, Protocol::Udp) => Err(Misplaced::Association),
            (Self::Datagrams, Protocol::Tcp) => Err(Misplaced::Stream),
        }
    }

    /// What such a session may make us hold whatever its flows are granted.
    pub(super) fn held_bytes(self) -> u64 {
        match self {
            Self::Streams => SESSION_BYTES,
            Self::Datagrams => SESSION_BYTES + DATAGRAMS_BYTES,
        }
    }
}
