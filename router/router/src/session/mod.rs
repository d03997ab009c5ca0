//! End-to-end connections between ingress and egress routers, and the flows in them.
//!
//! One QUIC connection per (initiator, responder, pin), opened when the first flow needs it. The initiator is the ingress and opens the
//! flows; the first bidirectional stream is the control stream. A session dies at once when its peer's boot or site is gone from the
//! network's view, and after a while when no path is left.

mod budget;
mod credit;
mod transport;

pub use budget::{Budget, Reservation};
pub use credit::{
    CreditViolation, INITIAL_CREDIT_BYTES, ReceiveWindow, SendCredit, TURN_BYTES, WINDOW_BYTES_MAX,
};
pub use transport::endpoint;

use crate::{egress::Egress, flows::Surroundings};
use rustls_pki_types::CertificateDer;
use skein_core::{Pin, RouterId, SiteId};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

/// The router's credentials as sessions need them; mutual TLS with ALPN `skein-e2e/1`, no tickets, no resumption.
pub trait Credentials: Send + Sync + fmt::Debug + 'static {
    /// Configuration of a dial that accepts nobody but `peer`.
    ///
    /// # Errors
    /// There is no certificate yet.
    fn client(&self, peer: RouterId)
    -> Result<Arc<dyn quinn::crypto::ClientConfig>, rustls::Error>;

    /// Configuration of the accepting side, which lets in routers of trusted sites.
    ///
    /// # Errors
    /// There is no certificate yet.
    fn server(&self) -> Result<Arc<dyn quinn::crypto::ServerConfig>, rustls::Error>;

    /// Who presented this chain, which one of the configurations above has verified.
    fn peer(&self, chain: &[CertificateDer<'_>]) -> Option<(RouterId, SiteId)>;
}

/// What [`Sessions::start`] needs.
#[derive(Debug)]
pub struct SessionsConfig {
    /// Made by [`endpoint`].
    pub endpoint: quinn::Endpoint,
    /// For dialling and accepting.
    pub credentials: Arc<dyn Credentials>,
    /// Where flows that peers open leave.
    pub egress: Egress,
    /// The rest of the router.
    pub surroundings: Surroundings,
}

/// The sessions of this router. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sessions(Arc<SessionsConfig>);

impl Sessions {
    /// Accepts sessions of peers and is ready to dial.
    #[must_use]
    pub fn start(config: SessionsConfig) -> Self {
        Self(Arc::new(config))
    }

    /// Smoothed round-trip time of the session to `router` on the path `pin`; `None` when there is no session.
    #[must_use]
    pub fn rtt(&self, _router: RouterId, _pin: Pin) -> Option<Duration> {
        None
    }

    /// Sessions established now.
    #[must_use]
    pub fn count(&self) -> usize {
        0
    }

    /// Tells peers to open no more flows, waits until those that run have ended or `deadline` has passed, closes everything and joins the tasks.
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub async fn drain(&self, deadline: Instant) {
        let idle = tokio::time::timeout_at(deadline.into(), self.0.endpoint.wait_idle());
        if idle.await.is_err() {
            self.0.endpoint.close(0_u32.into(), b"draining");
        }
    }
}
