//! Links: authenticated relations with neighbouring routers.
//!
//! A link is one mTLS QUIC connection (ALPN `skein-link/1`) that carries control messages and from which the keys of the
//! frames derive, and the carrier that moves those frames.

mod event;

pub use event::{Claim, LinkEvent, LinkUp, Peer};

use crate::fabric::Fabric;
use skein_core::{LinkId, RouterId, SiteId};
use skein_wire::proto::{
    control::{BoundSocket, LinkConfig, LinkStatus, ProbeResult},
    routing::{LinkHello, LinkMessage},
};
use std::{net::SocketAddr, sync::Arc};
use tokio::sync::mpsc;

/// Unhandled events until link tasks wait for their consumer.
const EVENTS_MAX: usize = 256;

/// The trust decisions a link needs.
pub trait LinkTls: Send + Sync + 'static {
    /// TLS for dialling `peer`: ALPN `skein-link/1`, our certificate, the peer's site pinned.
    fn client(&self, peer: SiteId) -> Arc<rustls::ClientConfig>;

    /// TLS for accepting over QUIC: ALPN `skein-link/1` with a client certificate, `skein-claim/1` without.
    fn server(&self) -> Arc<rustls::ServerConfig>;

    /// Who presented this verified chain.
    ///
    /// # Errors
    /// The reason for people, when it is not a router's certificate.
    fn identify(&self, chain: &[rustls_pki_types::CertificateDer<'_>]) -> Result<Peer, String>;
}

/// Writes our side of the hello for a neighbour of the given site; cost, name and nonce are filled in by the link.
pub type HelloFor = dyn Fn(SiteId) -> LinkHello + Send + Sync;

/// What [`Links::start`] needs.
#[allow(missing_debug_implementations, reason = "holds closures and key material")]
pub struct LinksConfig {
    /// Where frames go to and come from.
    pub fabric: Arc<Fabric>,
    /// This router.
    pub router: RouterId,
    /// Trust decisions.
    pub tls: Arc<dyn LinkTls>,
    /// Our side of each hello.
    pub hello: Arc<HelloFor>,
}

/// All links of this router, dialled and accepted. Cheap to clone; may be used from any thread.
#[derive(Clone, Debug)]
pub struct Links {
    _fabric: Arc<Fabric>,
}

/// The link is gone; its `Down` event has been or is being delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the link is down")]
pub struct LinkGone;

impl Links {
    /// Starts without any link or socket. Must be called on the runtime that shall carry the data path.
    #[must_use]
    pub fn start(config: LinksConfig) -> (Self, mpsc::Receiver<LinkEvent>) {
        let (_, events) = mpsc::channel(EVENTS_MAX);
        (Self { _fabric: config.fabric }, events)
    }

    /// Takes the complete list of links to dial: new ones are dialled, changed ones dialled anew, missing ones closed.
    pub fn configure(&self, _links: Vec<LinkConfig>) {}

    /// Replaces the endpoints of the link to `site`, which has told of new ones.
    pub fn set_endpoints(&self, _site: SiteId, _endpoints: Vec<String>) {}

    /// Takes the complete list of addresses to accept on, UDP and TCP. What cannot be bound is tried again.
    pub fn listen(&self, _addresses: Vec<SocketAddr>) {}

    /// The addresses asked for and what became of each.
    #[must_use]
    pub fn sockets(&self) -> Vec<BoundSocket> {
        Vec::new()
    }

    /// Queues a message to the neighbour; waits while the queue is full.
    ///
    /// # Errors
    /// When the link is down.
    ///
    /// # Cancel safety
    /// Cancelled, the message is not sent.
    #[allow(clippy::unused_async, reason = "the signature others code against")]
    pub async fn send(&self, _id: LinkId, _message: LinkMessage) -> Result<(), LinkGone> {
        Err(LinkGone)
    }

    /// Closes a link for a reason the neighbour is told; a dialled one is dialled again.
    pub fn close(&self, _id: LinkId, _reason: &str) {}

    /// State of every configured and every incoming link.
    #[must_use]
    pub fn status(&self) -> Vec<LinkStatus> {
        Vec::new()
    }

    /// Tries endpoints from where this router stands: UDP handshake and TCP connect.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    #[allow(clippy::unused_async, reason = "the signature others code against")]
    pub async fn probe(&self, _endpoints: Vec<String>) -> Vec<ProbeResult> {
        Vec::new()
    }

    /// Says goodbye on every link, closes all sockets and waits for every task.
    ///
    /// # Cancel safety
    /// Cancelled, tasks end on their own time.
    #[allow(clippy::unused_async, reason = "the signature others code against")]
    pub async fn shutdown(&self, _reason: &str) {}
}
