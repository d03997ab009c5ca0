//! What links report.

use crate::net::TcpStream;
use skein_core::{LinkId, RouterId, SiteId};
use skein_wire::proto::routing::{LinkHello, LinkMessage};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

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

/// A neighbour's turn to be heard: it has one, so whoever says much delays itself.
#[derive(Debug)]
pub struct Turn {
    _permit: OwnedSemaphorePermit,
}

/// Turns of one neighbour.
#[derive(Clone, Debug)]
pub(super) struct Turns(Arc<Semaphore>);

impl Turns {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }

    /// Waits until what was said before has been dealt with.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(super) async fn next(&self) -> Turn {
        let permit = Arc::clone(&self.0).acquire_owned().await;
        Turn { _permit: permit.expect("invariant: nobody closes it") }
    }
}

/// Where the events of all links arrive: what becomes of links does not wait behind what neighbours say, but of each link everything comes in
/// order.
#[derive(Debug)]
pub struct LinkEvents {
    pub(super) states: mpsc::Receiver<LinkEvent>,
    pub(super) messages: mpsc::Receiver<LinkEvent>,
}

impl LinkEvents {
    /// The next event; `None` when there are no links any more.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn recv(&mut self) -> Option<LinkEvent> {
        tokio::select! {
            biased;
            state = self.states.recv() => state, // cancel-safe
            Some(message) = self.messages.recv() => Some(message), // cancel-safe
        }
    }
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
    /// The neighbour sent a control message. Its next one is read when the turn was dropped.
    Message(LinkId, LinkMessage, Turn),
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
