//! How a link moves frames.
//!
//! A carrier takes batches of sealed frames towards one neighbour and never blocks; what arrives goes to
//! [`Fabric::receive`](crate::fabric::Fabric). Carriers differ in nothing else, so a TLS carrier over TCP is one more variant:
//! its frames need no authentication code, its `send` refuses while its queue is full, and its writer wakes `writable`.

mod hop;
mod udp;

pub(crate) use hop::HopSocket;
pub(crate) use udp::{UdpCarrier, UdpPort};

use quinn::udp::EcnCodepoint;
use std::{io, net::SocketAddr};

/// The way frames leave for one neighbour.
#[derive(Debug)]
pub(crate) enum Carrier {
    /// Datagrams on a UDP socket, shared with QUIC.
    Udp(UdpCarrier),
}

impl Carrier {
    /// Sends sealed frames, each `stride` bytes long but the last, which may be shorter; returns how many bytes were taken. The
    /// rest is lost.
    ///
    /// # Errors
    /// Only `WouldBlock`, when nothing was taken. Anything else is loss, as on any network, and end-to-end recovery deals with it.
    pub(crate) fn send(
        &self,
        frames: &[u8],
        stride: usize,
        ecn: Option<EcnCodepoint>,
    ) -> io::Result<usize> {
        match self {
            Self::Udp(carrier) => carrier.send(frames, stride, ecn),
        }
    }

    /// Waits until sending may work again.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn writable(&self) {
        match self {
            Self::Udp(carrier) => carrier.port().writable().await,
        }
    }

    /// Frames that one call of [`send`](Self::send) hands to the kernel at once.
    pub(crate) fn segments_max(&self) -> usize {
        match self {
            Self::Udp(carrier) => carrier.port().segments_max(),
        }
    }

    /// The neighbour's address.
    pub(crate) fn remote(&self) -> SocketAddr {
        match self {
            Self::Udp(carrier) => carrier.remote(),
        }
    }

    /// Our own address, where the carrier knows it.
    pub(crate) fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp(carrier) => carrier.port().local_addr().ok(),
        }
    }

    /// As shown to people.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Udp(_) => "udp",
        }
    }
}
