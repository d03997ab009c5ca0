//! How a link moves frames.
//!
//! A [`Port`] moves datagrams between this router and one or many others: QUIC packets of hop connections and sealed frames, told
//! apart by their first byte. A [`Carrier`] is a link's share of a port: it takes batches of sealed frames towards one neighbour
//! and never blocks; what arrives goes to [`Fabric::receive`](crate::fabric::Fabric). Nothing outside of this module knows which
//! kinds there are.

mod hop;
mod tls;
mod udp;

pub(crate) use hop::HopSocket;
pub(crate) use tls::TlsPort;
pub(crate) use udp::{UdpCarrier, UdpPort};

use crate::{fabric::FrameLink, link::FrameSize};
use hop::HopQueue;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use skein_wire::frame::CONTROL_LEN;
use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// Schedulers stall for less.
const UDP_SILENCE_MIN: Duration = Duration::from_millis(300);
/// TCP delivers nothing after a lost segment until it was repeated: after 200 ms at the earliest, and if that was lost too after
/// 400 more.
const TLS_SILENCE_MIN: Duration = Duration::from_secs(1);

/// Where datagrams leave and arrive, shared by hop connections and links.
#[derive(Clone, Debug)]
pub(crate) enum Port {
    /// A UDP socket, for any number of neighbours.
    Udp(Arc<UdpPort>),
    /// A TLS connection over TCP, for one.
    Tls(Arc<TlsPort>),
}

impl Port {
    /// A link's share: its frames go to `remote`. `seed` is secret and used for nothing else.
    pub(crate) fn carrier(&self, remote: Remote, seed: [u8; 32]) -> Carrier {
        match self {
            Self::Udp(port) => {
                Carrier::Udp(Box::new(UdpCarrier::new(Arc::clone(port), remote, seed)))
            }
            Self::Tls(port) => Carrier::Tls(Arc::clone(port)),
        }
    }

    /// Passes a QUIC packet to the hop endpoint; `false` when it had to be dropped.
    pub(crate) fn push_hop(&self, packet: &[u8], meta: &RecvMeta) -> bool {
        self.hop_queue().push(packet, meta)
    }

    /// The link whose frames come from where `meta` says, most likely.
    pub(crate) fn link_from(&self, meta: &RecvMeta) -> Option<Arc<FrameLink>> {
        match self {
            Self::Udp(port) => port.link_from(&meta.addr),
            Self::Tls(port) => port.link(),
        }
    }

    /// The link for which `opens` holds: a neighbour whose address has changed is known by its key only.
    pub(crate) fn find_link(
        &self,
        now: Instant,
        opens: impl Fn(&FrameLink) -> bool,
    ) -> Option<Arc<FrameLink>> {
        match self {
            Self::Udp(port) => port.find_link(now, opens),
            Self::Tls(_) => None,
        }
    }

    /// Whether there are links whose frames could come here.
    pub(crate) fn has_links(&self) -> bool {
        match self {
            Self::Udp(port) => port.has_links(),
            Self::Tls(port) => port.link().is_some(),
        }
    }

    /// Forgets every link. Links hold their port, so without this the two would keep each other, and the socket, alive.
    pub(crate) fn detach_all(&self) {
        match self {
            Self::Udp(port) => port.detach_all(),
            Self::Tls(port) => port.detach(),
        }
    }

    /// Waits until the port has come to its end by itself; returns why.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn ended(&self) -> String {
        match self {
            Self::Udp(_) => std::future::pending().await,
            Self::Tls(port) => port.ended().await,
        }
    }

    fn hop_queue(&self) -> &HopQueue {
        match self {
            Self::Udp(port) => port.hop_queue(),
            Self::Tls(port) => port.hop_queue(),
        }
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self {
            Self::Udp(port) => port.try_send(transmit),
            Self::Tls(port) => port.try_send(transmit),
        }
    }

    async fn writable(&self) {
        match self {
            Self::Udp(port) => port.writable().await,
            Self::Tls(port) => port.writable().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Udp(port) => port.local_addr(),
            Self::Tls(port) => Ok(port.local_addr()),
        }
    }

    fn segments_max(&self) -> usize {
        match self {
            Self::Udp(port) => port.segments_max(),
            Self::Tls(port) => port.segments_max(),
        }
    }

    fn may_fragment(&self) -> bool {
        match self {
            Self::Udp(port) => port.may_fragment(),
            Self::Tls(_) => false,
        }
    }
}

/// Where a neighbour is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remote {
    pub(crate) addr: SocketAddr,
    /// The address of ours it talks to: on a host with several, replies must come from that one.
    pub(crate) local_ip: Option<std::net::IpAddr>,
}

/// What leads to a neighbour where the connection itself ends somewhere else.
#[derive(Clone, Debug)]
pub(crate) struct Through {
    /// What was asked for, `host:port`.
    pub(crate) endpoint: String,
    /// The proxy, without credentials.
    pub(crate) proxy: String,
}

/// The way frames leave for one neighbour.
#[derive(Debug)]
pub(crate) enum Carrier {
    /// Datagrams on a UDP socket, shared with QUIC.
    Udp(Box<UdpCarrier>),
    /// The same datagrams on a TLS connection.
    Tls(Arc<TlsPort>),
}

impl Carrier {
    /// Sends sealed frames that carry data, each `stride` bytes long but the last, which may be shorter; returns how many bytes
    /// were taken. The rest is lost.
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
            Self::Tls(port) => port.send_data(frames, stride),
        }
    }

    /// Sends a sealed control frame, ahead of data where there is a queue.
    ///
    /// # Errors
    /// Only `WouldBlock`.
    pub(crate) fn send_control(&self, frame: &[u8]) -> io::Result<usize> {
        match self {
            Self::Udp(carrier) => carrier.send(frame, frame.len(), None),
            Self::Tls(port) => port.send_control(frame),
        }
    }

    /// Waits until sending may work again.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn writable(&self) {
        match self {
            Self::Udp(carrier) => carrier.port().writable().await,
            Self::Tls(port) => port.writable_data().await,
        }
    }

    /// Frames that one call of [`send`](Self::send) hands to the kernel at once.
    pub(crate) fn segments_max(&self) -> usize {
        match self {
            Self::Udp(carrier) => carrier.port().segments_max(),
            Self::Tls(port) => port.segments_max(),
        }
    }

    /// The neighbour's address.
    pub(crate) fn remote(&self) -> SocketAddr {
        match self {
            Self::Udp(carrier) => carrier.remote(),
            Self::Tls(port) => port.remote(),
        }
    }

    /// The proxy in between, where there is one.
    pub(crate) fn through(&self) -> Option<&Through> {
        match self {
            Self::Udp(_) => None,
            Self::Tls(port) => port.through(),
        }
    }

    /// Our own address, where the carrier knows it.
    pub(crate) fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp(carrier) => carrier.port().local_addr().ok(),
            Self::Tls(port) => Some(port.local_addr()),
        }
    }

    /// As shown to people.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Udp(_) => "udp",
            Self::Tls(_) => "tls",
        }
    }

    /// Silence for less than this says nothing about the path.
    pub(crate) fn silence_min(&self) -> Duration {
        match self {
            Self::Udp(_) => UDP_SILENCE_MIN,
            Self::Tls(_) => TLS_SILENCE_MIN,
        }
    }

    /// Waits until the carrier has come to its end by itself, which some do; returns why.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn ended(&self) -> String {
        match self {
            Self::Udp(_) => std::future::pending().await,
            Self::Tls(port) => port.ended().await,
        }
    }

    /// How the size of frames is found.
    pub(crate) fn frame_size(&self, now: Instant) -> FrameSize {
        // An IPv4 address on a dual-stack socket is IPv4.
        let is_ipv6 = self.remote().ip().to_canonical().is_ipv6();
        match self {
            Self::Udp(_) => FrameSize::new(now, is_ipv6),
            Self::Tls(_) => FrameSize::fixed(now, is_ipv6),
        }
    }

    /// Frames that arrive at the port may be of `link`, which is the one this carrier is of.
    pub(crate) fn attach(&self, link: &Arc<FrameLink>) {
        match self {
            Self::Udp(carrier) => carrier.attach(link),
            Self::Tls(port) => port.attach(link),
        }
    }

    /// Takes `link` out of the port's tables.
    pub(crate) fn detach(&self, link: &FrameLink) {
        match self {
            Self::Udp(carrier) => carrier.detach(link),
            Self::Tls(port) => port.detach(),
        }
    }

    /// Authentic frames of `bytes` in all came from where `meta` says; `by_key` when nothing else told that they are of `link`.
    pub(crate) fn arrived(
        &self,
        link: &Arc<FrameLink>,
        bytes: usize,
        by_key: bool,
        meta: &RecvMeta,
    ) {
        match self {
            Self::Udp(carrier) => carrier.arrived(link, bytes, by_key, meta),
            Self::Tls(_) => {}
        }
    }

    /// The neighbour has answered a challenge from where `meta` says.
    pub(crate) fn echoed(&self, link: &Arc<FrameLink>, nonce: [u8; CONTROL_LEN], meta: &RecvMeta) {
        match self {
            Self::Udp(carrier) => carrier.echoed(link, nonce, meta),
            Self::Tls(_) => {}
        }
    }
}
