//! The router's certificate and the network's trust, as links and sessions ask for them.

use crate::clock;
use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;
use skein_trust::{IdentityCell, RouterTls, TrustCell};
use std::{sync::Arc, time::Duration};

/// rustls asks the same clock as everything else.
#[derive(Debug)]
struct Clock;

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let since_epoch = u64::try_from(clock::unix_s()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(since_epoch)))
    }
}

/// The time certificates are judged by.
pub(crate) fn time() -> Arc<dyn TimeProvider> {
    Arc::new(Clock)
}

/// Makes the TLS configurations of one router; certificate and trust are read from their cells at each handshake.
#[derive(Debug)]
pub(crate) struct RouterCredentials(RouterTls);

impl RouterCredentials {
    pub(crate) fn new(trust: Arc<TrustCell>, identity: Arc<IdentityCell>) -> Arc<Self> {
        Arc::new(Self(RouterTls::new(trust, identity, time())))
    }

    /// The configurations for links and sessions.
    pub(crate) fn tls(&self) -> &RouterTls {
        &self.0
    }
}
