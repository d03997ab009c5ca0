//! The certificate authority of a site, and the SPIFFE ids in what it issues.

use crate::identity::router_id;
use aws_lc_rs::rand::SecureRandom;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use skein_core::{RouterId, SiteId};
use std::fmt;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

/// A CA lives for ten years: what limits the damage is that its site names it in a statement valid for a week, and
/// replaces it by naming two for as long as the old one's leaves live.
pub const CA_VALIDITY_S: i64 = 10 * 365 * 24 * 3600;
/// Leaves live three days and are renewed daily: a site outlasts a controller that is away over a weekend.
pub const LEAF_VALIDITY_S: i64 = 72 * 3600;
/// Certificates begin an hour early, because clocks differ.
pub const NOT_BEFORE_SLACK_S: i64 = 3600;
/// Longest name of a router, in bytes: one DNS label.
pub const ROUTER_NAME_LEN_MAX: usize = 63;
/// Longest certificate request read, in bytes; ours have about 200.
pub const CSR_LEN_MAX: usize = 4096;

const SERIAL_LEN: usize = 16;

/// What a certificate of a site is for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum CertificateRole {
    /// A router of this name.
    Router(String),
    /// The controller, which answers claims.
    Controller,
}

/// Who a certificate speaks for: `spiffe://<site id>/router/<name>` or `spiffe://<site id>/controller`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SpiffeId {
    /// The trust domain.
    pub site: SiteId,
    /// The path.
    pub role: CertificateRole,
}

impl SpiffeId {
    /// Parses the exact form written by `Display`, nothing else: no other case, port, query or trailing slash.
    #[must_use]
    pub fn parse(uri: &str) -> Option<Self> {
        let (domain, path) = uri.strip_prefix("spiffe://")?.split_once('/')?;
        let site = SiteId::parse(domain)?;
        let role = match path.split_once('/') {
            None if path == "controller" => CertificateRole::Controller,
            Some(("router", name)) if router_name_is_valid(name) => {
                CertificateRole::Router(name.to_owned())
            }
            _ => return None,
        };
        Some(Self { site, role })
    }

    /// The id of the router it names; `None` for a controller.
    #[must_use]
    pub fn router_id(&self) -> Option<RouterId> {
        match &self.role {
            CertificateRole::Router(name) => Some(router_id(self.site, name)),
            CertificateRole::Controller => None,
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.role {
            CertificateRole::Router(name) => write!(f, "spiffe://{}/router/{name}", self.site),
            CertificateRole::Controller => write!(f, "spiffe://{}/controller", self.site),
        }
    }
}

/// Whether `name` can name a router: a DNS label, so that it is unambiguous in a URI.
#[must_use]
pub fn router_name_is_valid(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=ROUTER_NAME_LEN_MAX).contains(&name.len())
        && name.bytes().all(legal)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The request is not PKCS#10, or longer than [`CSR_LEN_MAX`].
    #[error("the certificate request is malformed")]
    MalformedRequest,
    /// The request is not signed by the key it names.
    #[error("the certificate request does not prove possession of its key")]
    NoProofOfPossession,
    /// Not a name [`router_name_is_valid`] accepts.
    #[error("{0:?} cannot name a router: use a-z, 0-9 and '-', at most 63 characters")]
    RouterName(String),
    /// A time outside what certificates can express.
    #[error("the clock is at a time certificates cannot express")]
    Clock,
    /// The source of randomness failed.
    #[error("the system has no randomness")]
    Randomness,
    /// Stored key or certificate cannot be used.
    #[error("the CA's stored key or certificate is damaged: {0}")]
    Damaged(String),
    /// The library could not encode or sign.
    #[error("cannot sign a certificate: {0}")]
    Sign(rcgen::Error),
}

/// A key pair made here, with the request that gets it a certificate. The key never leaves the process or host.
pub struct KeyRequest {
    key: KeyPair,
    csr: Vec<u8>,
}

impl KeyRequest {
    /// Makes a key.
    ///
    /// # Errors
    /// [`CaError::Sign`].
    pub fn generate() -> Result<Self, CaError> {
        Self::from_key(KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(CaError::Sign)?)
    }

    /// Reads a key stored earlier.
    ///
    /// # Errors
    /// [`CaError::Damaged`].
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, CaError> {
        Self::from_key(key_from_pkcs8(der)?)
    }

    fn from_key(key: KeyPair) -> Result<Self, CaError> {
        let mut params = CertificateParams::default();
        // Name and lifetime are for the issuer to decide, so the request states none.
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&key).map_err(CaError::Sign)?.der().to_vec();
        Ok(Self { key, csr })
    }

    /// DER PKCS#10.
    #[must_use]
    pub fn csr(&self) -> &[u8] {
        &self.csr
    }

    /// The secret key for storage in a file of mode 0600.
    #[must_use]
    pub fn to_pkcs8(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.key.serialized_der().to_vec())
    }

    /// The secret key as rustls takes it.
    #[must_use]
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialized_der().to_vec()))
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRequest").finish_non_exhaustive()
    }
}

/// The CA of a site: issues certificates within the site's own trust domain and no other.
pub struct SiteCa {
    site: SiteId,
    issuer: Issuer<'static, KeyPair>,
    key_der: Zeroizing<Vec<u8>>,
    certificate: CertificateDer<'static>,
}

impl SiteCa {
    /// Makes a CA valid from `unix_s`, less an hour, for [`CA_VALIDITY_S`].
    ///
    /// # Errors
    /// [`CaError::Randomness`], [`CaError::Clock`], [`CaError::Sign`].
    pub fn generate(site: SiteId, random: &dyn SecureRandom, unix_s: i64) -> Result<Self, CaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(CaError::Sign)?;
        let mut params = params(random, unix_s, CA_VALIDITY_S)?;
        params.distinguished_name.push(DnType::OrganizationName, "Skein");
        params.distinguished_name.push(DnType::CommonName, format!("site {}", site.short()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{site}"))?];
        let certificate = params.self_signed(&key).map_err(CaError::Sign)?;
        Self::from_parts(site, key, certificate.der().clone())
    }

    /// Reads a CA stored earlier, or an external one whose key the controller may use.
    ///
    /// # Errors
    /// [`CaError::Damaged`], also when key and certificate do not belong together.
    pub fn load(site: SiteId, key_pkcs8: &[u8], certificate: &[u8]) -> Result<Self, CaError> {
        let key = key_from_pkcs8(key_pkcs8)?;
        Self::from_parts(site, key, CertificateDer::from(certificate.to_vec()))
    }

    fn from_parts(
        site: SiteId,
        key: KeyPair,
        certificate: CertificateDer<'static>,
    ) -> Result<Self, CaError> {
        let damaged = |why: &str| CaError::Damaged(why.to_owned());
        let (_, parsed) = X509Certificate::from_der(&certificate)
            .map_err(|_| damaged("the certificate cannot be read"))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(damaged("key and certificate do not belong together"));
        }
        if !parsed.is_ca() {
            return Err(damaged("the certificate is not a CA's"));
        }
        let key_der = Zeroizing::new(key.serialized_der().to_vec());
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| CaError::Damaged(error.to_string()))?;
        Ok(Self { site, issuer, key_der, certificate })
    }

    /// The site it issues for.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// Its certificate: goes into the site statement, its hash into tokens.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// When the certificate ends, Unix time; `None` for an external one that cannot be read.
    #[must_use]
    pub fn not_after_unix_s(&self) -> Option<i64> {
        let (_, parsed) = x509_parser::parse_x509_certificate(&self.certificate).ok()?;
        Some(parsed.validity().not_after.timestamp())
    }

    /// The secret key for storage in a file of mode 0600.
    #[must_use]
    pub fn key_pkcs8(&self) -> &[u8] {
        &self.key_der
    }

    /// Answers a router's request. Whatever the request says about names, uses and times is ignored: `name` is what
    /// the controller knows the router as.
    ///
    /// # Errors
    /// See [`CaError`].
    pub fn issue_router(
        &self,
        csr: &[u8],
        name: &str,
        random: &dyn SecureRandom,
        unix_s: i64,
    ) -> Result<Issued, CaError> {
        if !router_name_is_valid(name) {
            return Err(CaError::RouterName(name.to_owned()));
        }
        self.issue(csr, CertificateRole::Router(name.to_owned()), random, unix_s)
    }

    /// Issues the certificate under which the controller answers claims.
    ///
    /// # Errors
    /// See [`CaError`].
    pub fn issue_controller(
        &self,
        csr: &[u8],
        random: &dyn SecureRandom,
        unix_s: i64,
    ) -> Result<Issued, CaError> {
        self.issue(csr, CertificateRole::Controller, random, unix_s)
    }

    fn issue(
        &self,
        csr: &[u8],
        role: CertificateRole,
        random: &dyn SecureRandom,
        unix_s: i64,
    ) -> Result<Issued, CaError> {
        if csr.len() > CSR_LEN_MAX {
            return Err(CaError::MalformedRequest);
        }
        let request = CertificateSigningRequestParams::from_der(
            &CertificateSigningRequestDer::from(csr.to_vec()),
        )
        .map_err(|error| match error {
            rcgen::Error::InvalidCertificationRequestSignature => CaError::NoProofOfPossession,
            _ => CaError::MalformedRequest,
        })?;
        let id = SpiffeId { site: self.site, role };
        let mut params = params(random, unix_s, LEAF_VALIDITY_S)?;
        params.subject_alt_names = vec![uri(&id.to_string())?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(CaError::Sign)?;
        Ok(Issued {
            chain: vec![leaf.der().clone(), self.certificate.clone()],
            not_after_unix_s: params.not_after.unix_timestamp(),
        })
    }
}

impl fmt::Debug for SiteCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SiteCa").field("site", &self.site).finish_non_exhaustive()
    }
}

/// A certificate just issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, then the CA.
    pub chain: Vec<CertificateDer<'static>>,
    /// When the leaf expires, in Unix time; renew when two thirds of its life are left.
    pub not_after_unix_s: i64,
}

fn params(
    random: &dyn SecureRandom,
    unix_s: i64,
    validity_s: i64,
) -> Result<CertificateParams, CaError> {
    let mut serial = [0; SERIAL_LEN];
    random.fill(&mut serial).map_err(|_| CaError::Randomness)?;
    // Positive and of full length, as RFC 5280 4.1.2.2 wants.
    serial[0] = serial[0] & 0x7f | 0x40;
    let now = OffsetDateTime::from_unix_timestamp(unix_s).map_err(|_| CaError::Clock)?;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.not_before =
        now.checked_sub(Duration::seconds(NOT_BEFORE_SLACK_S)).ok_or(CaError::Clock)?;
    params.not_after = now.checked_add(Duration::seconds(validity_s)).ok_or(CaError::Clock)?;
    Ok(params)
}

fn uri(text: &str) -> Result<SanType, CaError> {
    Ok(SanType::URI(text.try_into().map_err(CaError::Sign)?))
}

fn key_from_pkcs8(der: &[u8]) -> Result<KeyPair, CaError> {
    KeyPair::try_from(der).map_err(|error| CaError::Damaged(error.to_string()))
}
