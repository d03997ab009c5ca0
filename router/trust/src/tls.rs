//! Ready TLS configurations for every kind of connection, and the router's own certificate, replaceable at run time.
//!
//! TLS 1.3 only, X25519MLKEM768 preferred; no tickets, no resumption, no early data anywhere.

use crate::{
    ca::{CertificateRole, SpiffeId},
    certificate::{
        CaPin, Expected, PeerError, PeerIdentity, Usage, leaf_id, peer_identity,
        verify_introduction,
    },
    claim::ALPN_CLAIM,
    verifier::{ClaimPeer, ClaimVerifier, Failure, RouterVerifier, TrustCell},
};
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption, danger::ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use skein_core::{RouterId, SiteId};
use skein_wire::proto::routing::Record;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// ALPN protocol between neighbouring routers.
pub const ALPN_LINK: &[u8] = b"skein-link/1";
/// ALPN protocol of the outer TLS connection that carries a link's datagrams over TCP.
pub const ALPN_CARRIER: &[u8] = b"skein-carrier/1";
/// ALPN protocol from ingress to egress router.
pub const ALPN_SESSION: &[u8] = b"skein-e2e/1";
/// What to pass where a TLS or QUIC library wants a server name. It is not sent: identities are site ids.
pub const SERVER_NAME: &str = "skein.invalid";

/// Why a certificate and key cannot be a router's identity.
#[derive(Debug, thiserror::Error)]
pub enum RouterIdentityError {
    /// The chain is empty, unreadable, or not a Skein certificate.
    #[error("{0}")]
    Certificate(#[from] PeerError),
    /// Key and certificate do not belong together, or the key cannot be read.
    #[error("the router's key does not fit its certificate: {0}")]
    Key(rustls::Error),
}

/// A router's certificate chain and key.
#[derive(Debug)]
pub struct RouterIdentity {
    certified: Arc<CertifiedKey>,
    id: SpiffeId,
    router: RouterId,
    not_before_unix_s: i64,
    not_after_unix_s: i64,
}

impl RouterIdentity {
    /// Joins a chain, leaf first, with its key.
    ///
    /// # Errors
    /// See [`RouterIdentityError`].
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, RouterIdentityError> {
        let leaf = chain.first().ok_or(PeerError::Missing)?;
        let id = leaf_id(leaf)?;
        let Some(router) = id.router_id() else { return Err(PeerError::WrongRole(id).into()) };
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| PeerError::Malformed)?;
        let not_before_unix_s = parsed.validity().not_before.timestamp();
        let not_after_unix_s = parsed.validity().not_after.timestamp();
        let certified =
            CertifiedKey::from_der(chain, key, &provider()).map_err(RouterIdentityError::Key)?;
        Ok(Self { certified: Arc::new(certified), id, router, not_before_unix_s, not_after_unix_s })
    }

    /// Its site.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.id.site
    }

    /// Its id.
    #[must_use]
    pub fn router_id(&self) -> RouterId {
        self.router
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match &self.id.role {
            CertificateRole::Router(name) => name,
            CertificateRole::Controller => unreachable!("invariant: `new` accepts routers only"),
        }
    }

    /// Its leaf certificate, for the LSA.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certified.cert[0]
    }

    /// When it becomes valid, in Unix time.
    #[must_use]
    pub fn not_before_unix_s(&self) -> i64 {
        self.not_before_unix_s
    }

    /// When it expires, in Unix time.
    #[must_use]
    pub fn not_after_unix_s(&self) -> i64 {
        self.not_after_unix_s
    }

    /// Signs with the router key.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        const SCHEMES: [SignatureScheme; 2] =
            [SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP256_SHA256];
        let unfit =
            || rustls::Error::General("the router's key is neither Ed25519 nor P-256".into());
        self.certified.key.choose_scheme(&SCHEMES).ok_or_else(unfit)?.sign(message)
    }
}

/// The identity in force: configurations refer to the cell, so a renewal needs no new ones and drops nothing.
#[derive(Debug, Default)]
pub struct IdentityCell(RwLock<Option<Arc<RouterIdentity>>>);

impl IdentityCell {
    /// Starts without an identity: every handshake fails until there is one.
    #[must_use]
    pub fn empty() -> Arc<Self> {
        Arc::default()
    }

    /// Starts with an identity.
    #[must_use]
    pub fn new(identity: Arc<RouterIdentity>) -> Arc<Self> {
        Arc::new(Self(RwLock::new(Some(identity))))
    }

    /// Puts a new identity in force for handshakes and signatures from now on.
    pub fn replace(&self, identity: Arc<RouterIdentity>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(identity);
    }

    /// The identity in force.
    #[must_use]
    pub fn current(&self) -> Option<Arc<RouterIdentity>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        self.current().map(|identity| Arc::clone(&identity.certified))
    }
}

impl ResolvesServerCert for IdentityCell {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }
}

impl ResolvesClientCert for IdentityCell {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn has_certs(&self) -> bool {
        self.current().is_some()
    }
}

/// A client configuration for one dial, and afterwards why the peer was refused.
#[derive(Clone, Debug)]
pub struct Dial {
    /// For rustls, or for QUIC.
    pub config: Arc<ClientConfig>,
    failure: Failure,
}

impl Dial {
    /// Why the peer's certificate was refused; `None` if it was not.
    #[must_use]
    pub fn refusal(&self) -> Option<&PeerError> {
        self.failure.get()
    }

    /// Sends the name that is passed to the TLS library, which otherwise stays here: balancers that pass TLS through route by
    /// it. It has no part in who is trusted.
    #[must_use]
    pub fn naming_server(self) -> Self {
        let mut config = Arc::unwrap_or_clone(self.config);
        config.enable_sni = true;
        Self { config: Arc::new(config), ..self }
    }
}

/// A connection to the router's port, after its handshake.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Admitted {
    /// A neighbour.
    Link(PeerIdentity),
    /// A claim, to be passed on to the controller: nothing is known of who makes it.
    Claim,
}

/// Makes the configurations of a router.
#[derive(Clone, Debug)]
pub struct RouterTls {
    trust: Arc<TrustCell>,
    identity: Arc<IdentityCell>,
    time: Arc<dyn TimeProvider>,
}

impl RouterTls {
    /// Verifies by `trust`, presents `identity`, and reads the time from `time`.
    #[must_use]
    pub fn new(
        trust: Arc<TrustCell>,
        identity: Arc<IdentityCell>,
        time: Arc<dyn TimeProvider>,
    ) -> Self {
        Self { trust, identity, time }
    }

    /// Dials a link to any router of `site`.
    #[must_use]
    pub fn link_client(&self, site: SiteId) -> Dial {
        self.router_client(Expected::RouterOf(site), ALPN_LINK)
    }

    /// Checks what a neighbour introduced itself with, before anything else it says is believed. `usage` is that of its chain.
    ///
    /// # Errors
    /// See [`verify_introduction`].
    pub fn introduced(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        introduction: &[Record],
    ) -> Result<(), PeerError> {
        let now = self.time.current_time().ok_or(PeerError::Malformed)?;
        verify_introduction(chain, usage, introduction, &self.trust.view(), now)
    }

    /// Dials a session to exactly `router`.
    #[must_use]
    pub fn session_client(&self, router: RouterId) -> Dial {
        self.router_client(Expected::Router(router), ALPN_SESSION)
    }

    /// Accepts links from routers of trusted sites, and claims from anyone, on the router's QUIC port.
    ///
    /// TLS asks for a client certificate before it knows the protocol, so a client without one gets through the
    /// handshake: every connection must then pass [`admit`].
    #[must_use]
    pub fn port_server(&self) -> Arc<ServerConfig> {
        self.router_server(true, &[ALPN_LINK, ALPN_CLAIM])
    }

    /// Accepts links only, where claims are told apart before the handshake.
    #[must_use]
    pub fn link_server(&self) -> Arc<ServerConfig> {
        self.router_server(false, &[ALPN_LINK])
    }

    /// Dials the outer TLS connection of a link to any router of `site`.
    ///
    /// It presents no certificate and proves nothing that the link inside does not prove again. That it verifies the peer tells
    /// a device that intercepts TLS, or a wrong server, from a site that is not there.
    #[must_use]
    pub fn carrier_client(&self, site: SiteId) -> Dial {
        let (failure, verifier) = self.verifier(Expected::RouterOf(site), true);
        let config =
            client_settings(provider(), Arc::clone(&self.time), verifier, None, ALPN_CARRIER);
        Dial { config: Arc::new(config), failure }
    }

    /// Accepts the outer TLS connection of links.
    #[must_use]
    pub fn carrier_server(&self) -> Arc<ServerConfig> {
        let config = ServerConfig::builder_with_details(provider(), Arc::clone(&self.time))
            .with_protocol_versions(&[&TLS13])
            .expect("invariant: the provider has TLS 1.3 suites")
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&self.identity) as Arc<dyn ResolvesServerCert>);
        Arc::new(without_resumption(config, &[ALPN_CARRIER]))
    }

    /// Accepts sessions from routers of trusted sites.
    #[must_use]
    pub fn session_server(&self) -> Arc<ServerConfig> {
        self.router_server(false, &[ALPN_SESSION])
    }

    fn router_client(&self, expected: Expected, alpn: &[u8]) -> Dial {
        let (failure, verifier) = self.verifier(expected, alpn == ALPN_LINK);
        let identity = Some(Arc::clone(&self.identity));
        let time = Arc::clone(&self.time);
        let config = client_settings(provider(), time, verifier, identity, alpn);
        Dial { config: Arc::new(config), failure }
    }

    fn verifier(
        &self,
        expected: Expected,
        introduces: bool,
    ) -> (Failure, Arc<dyn ServerCertVerifier>) {
        let failure = Failure::default();
        let verifier = RouterVerifier {
            trust: Arc::clone(&self.trust),
            expected,
            algorithms: provider().signature_verification_algorithms,
            optional: false,
            introduces,
            failure: Arc::clone(&failure),
        };
        (failure, Arc::new(verifier))
    }

    fn router_server(&self, optional: bool, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        let provider = provider();
        let verifier = RouterVerifier {
            trust: Arc::clone(&self.trust),
            expected: Expected::AnyRouter,
            algorithms: provider.signature_verification_algorithms,
            optional,
            introduces: alpn.contains(&ALPN_LINK),
            failure: Failure::default(),
        };
        let config = ServerConfig::builder_with_details(provider, Arc::clone(&self.time))
            .with_protocol_versions(&[&TLS13])
            .expect("invariant: the provider has TLS 1.3 suites")
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::clone(&self.identity) as Arc<dyn ResolvesServerCert>);
        Arc::new(without_resumption(config, alpn))
    }
}

/// Sorts a connection accepted with [`RouterTls::port_server`] by what its handshake established.
///
/// # Errors
/// [`PeerError::Missing`] for a link without certificate, [`PeerError::Protocol`] for anything that is neither link nor
/// claim; the connection must be closed then.
pub fn admit(
    alpn: Option<&[u8]>,
    chain: Option<&[CertificateDer<'_>]>,
) -> Result<Admitted, PeerError> {
    match alpn {
        Some(alpn) if alpn == ALPN_LINK => {
            peer_identity(chain.unwrap_or_default()).map(Admitted::Link)
        }
        Some(alpn) if alpn == ALPN_CLAIM => Ok(Admitted::Claim),
        other => {
            let name = String::from_utf8_lossy(other.unwrap_or_default());
            Err(PeerError::Protocol(name.escape_debug().take(64).collect()))
        }
    }
}

/// Dials the controller of `issuer` under the CA of a token.
#[must_use]
pub fn claim_client(issuer: SiteId, ca_pin: CaPin, time: Arc<dyn TimeProvider>) -> Dial {
    claim_dial(ClaimPeer::Controller { issuer, ca_pin }, time, ALPN_CLAIM)
}

/// Dials a router over QUIC as a mere carrier of a claim's TLS bytes. It proves nothing about the peer: the connection
/// of [`claim_client`] inside does.
#[must_use]
pub fn claim_carrier_client(time: Arc<dyn TimeProvider>) -> Dial {
    claim_dial(ClaimPeer::Carrier, time, ALPN_CLAIM)
}

/// Finds out whether the TLS carrier of some Skein router answers; proves no more than that.
#[must_use]
pub fn carrier_probe_client(time: Arc<dyn TimeProvider>) -> Dial {
    claim_dial(ClaimPeer::Carrier, time, ALPN_CARRIER)
}

fn claim_dial(peer: ClaimPeer, time: Arc<dyn TimeProvider>, alpn: &[u8]) -> Dial {
    let provider = provider();
    let failure = Failure::default();
    let algorithms = provider.signature_verification_algorithms;
    let verifier = ClaimVerifier { peer, algorithms, failure: Arc::clone(&failure) };
    let config = client_settings(provider, time, Arc::new(verifier), None, alpn);
    Dial { config: Arc::new(config), failure }
}

/// Answers claims as the controller whose chain, with the CA certificate in it, and key these are.
///
/// # Errors
/// When key and certificate do not belong together.
pub fn claim_server(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    time: Arc<dyn TimeProvider>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = provider();
    let certified = CertifiedKey::from_der(chain, key, &provider)?;
    let config = ServerConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    Ok(Arc::new(without_resumption(config, &[ALPN_CLAIM])))
}

/// What an alert of the peer says about this side's certificate, for the user; `None` for alerts about anything else.
#[must_use]
pub fn explain_alert(alert: u8) -> Option<&'static str> {
    Some(match alert {
        40 | 42 | 43 => "the peer cannot use this site's certificate",
        44 => "the peer says this site was revoked",
        45 => {
            "the peer says this router's certificate is not valid now: one of the two clocks is wrong"
        }
        46 => "the peer refuses this router's certificate",
        48 => "the peer does not trust this site (or has not heard of it yet)",
        116 => "the peer wants a certificate, and this router has none yet",
        120 => "the peer is not a Skein router of a version this one can talk to",
        _ => return None,
    })
}

fn client_settings(
    provider: Arc<CryptoProvider>,
    time: Arc<dyn TimeProvider>,
    verifier: Arc<dyn ServerCertVerifier>,
    identity: Option<Arc<IdentityCell>>,
    alpn: &[u8],
) -> ClientConfig {
    let builder = ClientConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&TLS13])
        .expect("invariant: the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(identity),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_early_data = false;
    config
}

fn without_resumption(mut config: ServerConfig, alpn: &[&[u8]]) -> ServerConfig {
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config
}

/// One provider for all: aws-lc-rs, hybrid post-quantum key exchange first, then X25519.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| {
        Arc::new(CryptoProvider {
            kx_groups: vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519],
            ..aws_lc_rs::default_provider()
        })
    }))
}
