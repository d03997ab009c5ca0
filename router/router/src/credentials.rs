//! The router's certificate and the network's trust, as links and sessions ask for them.

use crate::{
    clock,
    link::{LinkTls, Peer},
    session::Credentials,
};
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

/// Makes the TLS configurations of one router; certificate and trust are read from their cells at each handshake.
#[derive(Debug)]
pub(crate) struct RouterCredentials(RouterTls);

impl RouterCredentials {
    pub(crate) fn new(trust: Arc<TrustCell>, identity: Arc<IdentityCell>) -> Arc<Self> {
        Arc::new(Self(RouterTls::new(trust, identity, Arc::new(Clock))))
    }
}

impl LinkTls for RouterCredentials {
    fn client(&self, peer: SiteId) -> Arc<rustls::ClientConfig> {
        self.0.link_client(peer).config
    }

    fn server(&self) -> Arc<rustls::ServerConfig> {
        self.0.port_server()
    }

    fn identify(&self, chain: &[CertificateDer<'_>]) -> Result<Peer, String> {
        let identity = peer_identity(chain).map_err(|error| error.to_string())?;
        let name = identity.router_name().map(str::to_owned);
        match (identity.router, name) {
            (Some(router), Some(name)) => Ok(Peer { site: identity.site, router, name }),
            _ => Err("the certificate is not a router's".into()),
        }
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
