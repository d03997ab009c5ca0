//! End-to-end connections between ingress and egress routers, and the flows in them.
//!
//! One QUIC connection per (initiator, responder, pin), opened when the first flow needs it. The initiator is the ingress and opens the
//! flows; the first bidirectional stream is the control stream. A session dies at once when its peer's boot or site is gone from the
//! network's view, and after a while when no path is left or nothing uses it.

mod admission;
mod ahead;
mod budget;
mod class;
mod congestion;
mod connection;
mod control;
mod credit;
mod datagrams;
mod fair;
mod flow;
mod halves;
mod inbound;
mod incoming;
mod pool;
mod queue;
mod receive;
mod transport;
mod upkeep;
mod window;

pub use budget::{Account, Budget, Reservation};
pub use class::Class;
pub use credit::{
    CreditViolation, INITIAL_CREDIT_BYTES, ReceiveWindow, SendCredit, TURN_BYTES, WINDOW_BYTES_MAX,
};
pub use pool::DialError;
pub use transport::{SESSION_BYTES, endpoint};

pub(crate) use connection::{Session, Turn};
pub(crate) use datagrams::Deliver;
pub(crate) use flow::{Flow, FlowError, FlowSend};
pub(crate) use incoming::IncomingFlow;
pub(crate) use receive::FlowRecv;

use crate::{egress::Egress, flows::Surroundings};
use connection::Close;
use credit::IDLE_CREDIT_BYTES;
use pool::Pool;
use skein_core::{Pin, RouterId};
use skein_trust::RouterTls;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// What the last packets of closed sessions get to leave; their peers notice the rest by themselves.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

/// What [`Sessions::start`] needs.
#[derive(Debug)]
pub struct SessionsConfig {
    /// Made by [`endpoint`], for this alone.
    pub endpoint: quinn::Endpoint,
    /// Credentials for dialling and accepting.
    pub tls: RouterTls,
    /// Where flows that peers open leave.
    pub egress: Egress,
    /// The rest of the router.
    pub surroundings: Surroundings,
}

/// The sessions of this router. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sessions(Arc<Pool>);

impl Sessions {
    /// Accepts sessions of peers and is ready to dial.
    #[must_use]
    pub fn start(config: SessionsConfig) -> Self {
        Self(Pool::start(config))
    }

    /// The session to `router` on the path `pin` for flows of this class, dialled if there is none.
    ///
    /// # Errors
    /// [`DialError`].
    ///
    /// # Cancel safety
    /// Cancel-safe: a dial goes on for the next who asks.
    pub(crate) async fn session(
        &self,
        router: RouterId,
        pin: Pin,
        class: Class,
    ) -> Result<Arc<Session>, DialError> {
        self.0.session(router, pin, class).await
    }

    /// Smoothed round-trip time of the session to `router` on the path `pin`; `None` when there is no session.
    #[must_use]
    pub fn rtt(&self, router: RouterId, pin: Pin) -> Option<Duration> {
        let matches = |s: &&Arc<Session>| s.peer.router == router && s.peer.pin == pin;
        self.0.sessions().iter().find(matches).map(|session| session.rtt())
    }

    /// Sessions established now.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.sessions().len()
    }

    /// Streams open in all sessions now, besides control streams.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.0.sessions().iter().map(|session| session.flow_count()).sum()
    }

    /// Tells peers to open no more flows; to be called when a drain begins, before ingress and egress drain.
    pub fn refuse_flows(&self) {
        for session in self.0.sessions() {
            session.drain();
        }
    }

    /// Closes every session and joins the tasks. Flows that still run are lost: drain ingress and egress before.
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub async fn close(&self, deadline: Instant) {
        self.0.stop.cancel();
        self.0.tasks.close();
        for session in self.0.sessions() {
            session.close(Close::Shutdown);
        }
        self.0.config.endpoint.close(0_u32.into(), b"the router stops");
        self.0.tasks.wait().await;
        let grace = deadline.saturating_duration_since(crate::clock::now()).max(CLOSE_GRACE);
        if timeout(grace.min(CLOSE_GRACE), self.0.config.endpoint.wait_idle()).await.is_err() {
            tracing::debug!("some peers did not acknowledge the end of their session");
        }
    }
}
