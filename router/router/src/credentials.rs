//! The router's certificate and the network's trust, as links and sessions ask for them.

use crate::{clock, session::Credentials};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::time_provider::TimeProvider;
use rustls_pki_types::{CertificateDer, UnixTime};
use skein_core::{RouterId, SiteId};
use skein_trust::{IdentityCell, RouterTls, TrustCell, peer_identity};
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

    /// For links, which need the configurations as they are.
    pub(crate) fn tls(&self) -> &RouterTls {
        &self.0
    }
}

impl Credentials for RouterCredentials {
    fn client(
        &self,
        peer: RouterId,
    ) -> Result<Arc<dyn quinn::crypto::ClientConfig>, rustls::Error> {
        quic_client(self.0.session_client(peer).config)
    }

    fn server(&self) -> Result<Arc<dyn quinn::crypto::ServerConfig>, rustls::Error> {
        let config = QuicServerConfig::try_from(self.0.session_server()).map_err(no_initial)?;
        Ok(Arc::new(config))
    }

    fn peer(&self, chain: &[CertificateDer<'_>]) -> Option<(RouterId, SiteId)> {
        let identity = peer_identity(chain).ok()?;
        Some((identity.router?, identity.site))
    }
}

fn quic_client(
    config: Arc<rustls::ClientConfig>,
) -> Result<Arc<dyn quinn::crypto::ClientConfig>, rustls::Error> {
    Ok(Arc::new(QuicClientConfig::try_from(config).map_err(no_initial)?))
}

fn no_initial(error: quinn::crypto::rustls::NoInitialCipherSuite) -> rustls::Error {
    rustls::Error::General(error.to_string())
}
