//! Sites, certificates and in-memory handshakes for the tests.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    reason = "a test stops at what it cannot unwrap"
)]

use aws_lc_rs::rand::SystemRandom;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, ServerConfig, ServerConnection,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{aws_lc_rs::default_provider, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use skein_core::{Membership, Scope, SiteId, TrustView, TrustedSite};
use skein_trust::{KeyRequest, RouterIdentity, SERVER_NAME, SiteCa, SiteIdentity};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use time::OffsetDateTime;

pub(crate) const NOW: i64 = 1_800_000_000;
pub(crate) const DAY: i64 = 86_400;

/// A clock that tests turn.
#[derive(Debug)]
pub(crate) struct Clock(pub(crate) AtomicI64);

impl Clock {
    pub(crate) fn at(unix_s: i64) -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(unix_s)))
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = self.0.load(Ordering::Relaxed).try_into().unwrap();
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

pub(crate) struct Site {
    pub(crate) identity: SiteIdentity,
    pub(crate) ca: SiteCa,
}

impl Site {
    pub(crate) fn new() -> Self {
        let identity = SiteIdentity::generate(&SystemRandom::new()).unwrap();
        let ca = SiteCa::generate(identity.site_id(), &SystemRandom::new(), NOW).unwrap();
        Self { identity, ca }
    }

    pub(crate) fn id(&self) -> SiteId {
        self.identity.site_id()
    }

    pub(crate) fn router(&self, name: &str) -> Presented {
        self.router_at(name, NOW)
    }

    pub(crate) fn router_at(&self, name: &str, unix_s: i64) -> Presented {
        let request = KeyRequest::generate().unwrap();
        let issued =
            self.ca.issue_router(request.csr(), name, &SystemRandom::new(), unix_s).unwrap();
        Presented { chain: issued.chain, key: request.private_key() }
    }

    pub(crate) fn controller(&self) -> Presented {
        let request = KeyRequest::generate().unwrap();
        let issued = self.ca.issue_controller(request.csr(), &SystemRandom::new(), NOW).unwrap();
        Presented { chain: issued.chain, key: request.private_key() }
    }

    /// The CA's own certificate and key, presented as if it were a leaf.
    pub(crate) fn ca_as_leaf(&self) -> Presented {
        let key = PrivateKeyDer::Pkcs8(self.ca.key_pkcs8().to_vec().into());
        Presented { chain: vec![self.ca.certificate().clone()], key }
    }

    /// A leaf under this site's CA with whatever names and uses an attacker who has the CA key wishes.
    pub(crate) fn mint(
        &self,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
    ) -> Presented {
        let ca_key = KeyPair::try_from(self.ca.key_pkcs8()).unwrap();
        let issuer = Issuer::from_ca_cert_der(self.ca.certificate(), ca_key).unwrap();
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let leaf = leaf_params(names, usages).signed_by(&key, &issuer).unwrap();
        let chain = vec![leaf.der().clone(), self.ca.certificate().clone()];
        Presented { chain, key: PrivateKeyDer::Pkcs8(key.serialize_der().into()) }
    }

    pub(crate) fn trusted(&self) -> Arc<TrustedSite> {
        Arc::new(TrustedSite {
            site: self.id(),
            name: "site".into(),
            membership: Membership::Member,
            scope: Scope::default(),
            anchors: vec![self.ca.certificate().as_ref().into()],
            network: self.id(),
            endpoints: Vec::new(),
        })
    }
}

pub(crate) fn self_signed(names: Vec<SanType>) -> Presented {
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let leaf = leaf_params(names, both_usages()).self_signed(&key).unwrap();
    Presented {
        chain: vec![leaf.der().clone()],
        key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
    }
}

fn leaf_params(names: Vec<SanType>, usages: Vec<ExtendedKeyUsagePurpose>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = OffsetDateTime::from_unix_timestamp(NOW - 3600).unwrap();
    params.not_after = OffsetDateTime::from_unix_timestamp(NOW + DAY).unwrap();
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages;
    params
}

pub(crate) fn both_usages() -> Vec<ExtendedKeyUsagePurpose> {
    vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(crate) fn view(local: &Site, trusted: &[&Site]) -> Arc<TrustView> {
    let sites: BTreeMap<_, _> =
        trusted.iter().chain([&local]).map(|site| (site.id(), site.trusted())).collect();
    Arc::new(TrustView { sites, ..TrustView::empty(local.id()) })
}

/// What a peer presents in a handshake.
pub(crate) struct Presented {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Presented {
    pub(crate) fn identity(&self) -> Arc<RouterIdentity> {
        Arc::new(RouterIdentity::new(self.chain.clone(), self.key.clone_key()).unwrap())
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        let key = default_provider().key_provider.load_private_key(self.key.clone_key()).unwrap();
        Arc::new(CertifiedKey::new(self.chain.clone(), key))
    }

    /// A server that presents this and accepts everybody.
    pub(crate) fn server(&self, alpn: &[u8]) -> Arc<ServerConfig> {
        let certified = CertifiedKey::clone(&self.certified());
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::new(Gullible))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = vec![alpn.to_vec()];
        Arc::new(config)
    }

    /// A client that presents this and accepts everybody.
    pub(crate) fn client(&self, alpn: &[u8]) -> Arc<ClientConfig> {
        let certified = CertifiedKey::clone(&self.certified());
        let mut config = gullible_client()
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = vec![alpn.to_vec()];
        Arc::new(config)
    }
}

pub(crate) fn anonymous_client(alpn: &[u8]) -> Arc<ClientConfig> {
    let mut config = gullible_client().with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Arc::new(config)
}

fn gullible_client() -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
}

/// Accepts every certificate, but still wants its key to sign the handshake.
#[derive(Debug)]
struct Gullible;

fn check(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    verify_tls13_signature(
        message,
        cert,
        dss,
        &default_provider().signature_verification_algorithms,
    )
}

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Gullible {
    fn client_auth_mandatory(&self) -> bool {
        false
    }
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Both ends after a completed handshake.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) client: ClientConnection,
    pub(crate) server: ServerConnection,
}

/// Runs a handshake in memory; the error is that of the end that refused.
pub(crate) fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<Connected, Error> {
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    let mut bytes = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        bytes.clear();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(Connected { client, server })
}
