//! The rustls verifiers, one for each role of a connection.

use crate::certificate::{
    CaPin, Expected, PeerError, PeerIdentity, Usage, leaf_id, verify_controller, verify_neighbour,
    verify_router,
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use skein_core::{SiteId, TrustView};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// The trust view in force, as verifiers and notary read it.
#[derive(Debug)]
pub struct TrustCell(RwLock<Arc<TrustView>>);

impl TrustCell {
    /// Starts with `view`.
    #[must_use]
    pub fn new(view: Arc<TrustView>) -> Arc<Self> {
        Arc::new(Self(RwLock::new(view)))
    }

    /// Replaces the view; handshakes from now on go by it.
    pub fn publish(&self, view: Arc<TrustView>) {
        // The value is replaced as a whole, so a panic elsewhere cannot have left it half written.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = view;
    }

    /// The view in force.
    #[must_use]
    pub fn view(&self) -> Arc<TrustView> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Keeps why a dialled connection was refused, in more words than fit into a TLS alert.
pub(crate) type Failure = Arc<OnceLock<PeerError>>;

/// Accepts routers: of any trusted site, of the site, or the router that was dialled.
#[derive(Debug)]
pub(crate) struct RouterVerifier {
    pub(crate) trust: Arc<TrustCell>,
    pub(crate) expected: Expected,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    /// Accept clients without a certificate; whoever admits the connection must ask for one where it is needed.
    pub(crate) optional: bool,
    /// Let routers of sites whose statement has lapsed get as far as their introduction.
    pub(crate) introduces: bool,
    pub(crate) failure: Failure,
}

impl RouterVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<PeerIdentity, PeerError> {
        let verify = if self.introduces { verify_neighbour } else { verify_router };
        verify(leaf, intermediates, usage, self.expected, &self.trust.view(), now)
    }
}

impl ServerCertVerifier for RouterVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, intermediates, Usage::Server, now)
            .map(|_| ServerCertVerified::assertion())
            .map_err(|error| refuse(&self.failure, error))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for RouterVerifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: they would tell everybody who is trusted here.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, Usage::Client, now)
            .map(|_| ClientCertVerified::assertion())
            .map_err(|error| {
                // The library's error is shorter; strangers can cause this at will, hence no louder.
                tracing::debug!(%error, "a dialling peer is refused");
                tls_error(error)
            })
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whom a claim dials.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ClaimPeer {
    /// The controller of the site, under the CA of the token.
    Controller { issuer: SiteId, ca_pin: CaPin },
    /// Any Skein router: its QUIC connection only carries the bytes of the TLS connection to the controller, which is
    /// the one that is authenticated.
    Carrier,
}

/// Accepts what a claim dials.
#[derive(Debug)]
pub(crate) struct ClaimVerifier {
    pub(crate) peer: ClaimPeer,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) failure: Failure,
}

impl ServerCertVerifier for ClaimVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let identity = match self.peer {
            ClaimPeer::Controller { issuer, ca_pin } => {
                verify_controller(leaf, intermediates, issuer, &ca_pin, now).map(|_| ())
            }
            ClaimPeer::Carrier => leaf_id(leaf).map(|_| ()),
        };
        identity
            .map(|()| ServerCertVerified::assertion())
            .map_err(|error| refuse(&self.failure, error))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn refuse(failure: &Failure, error: PeerError) -> Error {
    // Only the first refusal is kept; a verifier of a dial is asked once.
    failure.get_or_init(|| error.clone());
    tls_error(error)
}

/// Chooses the alert the peer will see; see [`crate::explain_alert`].
fn tls_error(error: PeerError) -> Error {
    let certificate_error = match &error {
        PeerError::Malformed => CertificateError::BadEncoding,
        PeerError::Expired { .. } => CertificateError::Expired,
        PeerError::NotYetValid { .. } => CertificateError::NotValidYet,
        PeerError::UnknownSite(_) => CertificateError::UnknownIssuer,
        PeerError::Revoked(_) => CertificateError::Revoked,
        _ => CertificateError::Other(OtherError(Arc::new(error))),
    };
    Error::InvalidCertificate(certificate_error)
}

fn tls12() -> Error {
    Error::General("invariant: only TLS 1.3 is offered".to_owned())
}
