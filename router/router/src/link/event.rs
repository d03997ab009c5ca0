//! What links report.

use skein_core::{LinkId, RouterId, SiteId};
use skein_wire::proto::routing::{LinkHello, LinkMessage};
use std::{net::SocketAddr, time::Duration};
use tokio::net::TcpStream;

/// The verified owner of a certificate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its site.
    pub site: SiteId,
    /// The router.
    pub router: RouterId,
    /// The router's name within its site.
    pub name: String,
}

/// A link that has come up.
#[derive(Clone, Debug)]
pub struct LinkUp {
    /// Its identity.
    pub id: LinkId,
    /// Whether the neighbour dialled.
    pub incoming: bool,
    /// As configured here, or by the neighbour if incoming.
    pub name: String,
    /// Who is there, from the verified certificate.
    pub peer: Peer,
    /// The neighbour's hello, consistent with the certificate.
    pub hello: LinkHello,
    /// Cost of the link, the same at both ends.
    pub cost: u32,
    /// Round-trip time.
    pub rtt: Duration,
    /// Largest end-to-end packet, frame header excluded, in bytes.
    pub mtu: u16,
}

/// What links report to the one task that consumes their events, in order.
#[derive(Debug)]
pub enum LinkEvent {
    /// A link came up.
    Up(Box<LinkUp>),
    /// Its properties changed noticeably.
    Changed {
        /// Which.
        id: LinkId,
        /// Smoothed round-trip time.
        rtt: Duration,
        /// Largest end-to-end packet, frame header excluded, in bytes.
        mtu: u16,
    },
    /// The neighbour sent a control message.
    Message(LinkId, LinkMessage),
    /// The link is gone for good; a dialled one comes back under another id.
    Down {
        /// Which.
        id: LinkId,
        /// Why, for people.
        reason: String,
    },
    /// Somebody wants to redeem a token; the bytes are for the controller, unread.
    Claim(Claim),
}

/// A claim connection, TLS bytes unread.
#[derive(Debug)]
pub enum Claim {
    /// Over TCP.
    Tcp {
        /// The connection.
        stream: TcpStream,
        /// Bytes already taken from it, to be passed on first.
        head: Vec<u8>,
        /// Who connects.
        remote: SocketAddr,
    },
    /// The same bytes over a QUIC stream.
    Quic {
        /// Keeps the connection open; close it when the claim is done.
        connection: quinn::Connection,
        /// Towards the redeemer.
        send: quinn::SendStream,
        /// From the redeemer.
        recv: quinn::RecvStream,
    },
}
