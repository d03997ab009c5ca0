//! Who a leaf certificate speaks for, and whether it may.
//!
//! Identity comes from the leaf and nothing else. Its trust domain names the site, and only the anchors which that site
//! itself states can vouch for it: with a union of all anchors, any site could mint certificates for any other.

use crate::{
    ca::{CertificateRole, SpiffeId},
    hash::sha256,
    statement::{CAS_MAX, CERTIFICATE_LEN_MAX, VerifiedStatement, verify_statement},
};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use skein_core::{RouterId, SiteId, TrustView};
use skein_wire::proto::routing::Record;
use std::fmt;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Longest chain a peer may present: leaf, two intermediates of an external CA, root.
pub const CHAIN_LEN_MAX: usize = 4;
/// Records of an introduction that are looked at: the neighbour's statement and its endorsement of us, and room for what may come.
const INTRODUCTION_LEN_MAX: usize = 4;
/// Longest text quoted from a peer's certificate, in characters.
const QUOTE_LEN_MAX: usize = 128;

/// Which end of a connection a certificate is presented by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Usage {
    /// The accepting end.
    Server,
    /// The dialling end.
    Client,
}

/// Whom a router certificate must speak for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// A router of any trusted site.
    AnyRouter,
    /// A router of this site: what a link dials.
    RouterOf(SiteId),
    /// This router: what a session dials.
    Router(RouterId),
}

/// Whom a verified leaf speaks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerIdentity {
    /// Its site.
    pub site: SiteId,
    /// What it is there.
    pub role: CertificateRole,
    /// Its router id, when it is a router.
    pub router: Option<RouterId>,
}

impl PeerIdentity {
    /// The router's name; `None` for a controller.
    #[must_use]
    pub fn router_name(&self) -> Option<&str> {
        match &self.role {
            CertificateRole::Router(name) => Some(name),
            CertificateRole::Controller => None,
        }
    }
}

impl From<SpiffeId> for PeerIdentity {
    fn from(id: SpiffeId) -> Self {
        let router = id.router_id();
        Self { site: id.site, role: id.role, router }
    }
}

/// Why a peer's certificate is refused, in words for the user.
// Debug prints the same words, because QUIC reports a verifier's error by its Debug form.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// None was presented.
    #[error("the peer presented no certificate")]
    Missing,
    /// It cannot be parsed, or the chain is beyond bounds.
    #[error("the peer's certificate cannot be read")]
    Malformed,
    /// It is someone else's: a web server, or a device that intercepts TLS.
    #[error(
        "the certificate presented is not a Skein certificate; it was issued to \"{subject}\" by \"{issuer}\": \
         another program listens there, or something in between intercepts TLS"
    )]
    NotSkein {
        /// Its subject.
        subject: String,
        /// Its issuer.
        issuer: String,
    },
    /// The site is not trusted here, or not known yet.
    #[error("site {0} is not trusted here (not linked, no longer endorsed, or not yet heard of)")]
    UnknownSite(SiteId),
    /// What is known of the site has expired, and the peer has not brought anything newer.
    #[error(
        "what site {site} last said here expired {} ago, and it brought nothing newer: one of the two clocks is wrong, or its controller \
         is away", duration(.ago_s)
    )]
    Lapsed {
        /// The site.
        site: SiteId,
        /// Seconds since it expired.
        ago_s: u64,
    },
    /// The site was revoked.
    #[error("site {0} was revoked")]
    Revoked(SiteId),
    /// Another site answers than the one dialled.
    #[error("site {presented} answered instead of site {expected}")]
    WrongSite {
        /// The site dialled.
        expected: SiteId,
        /// The site that answered.
        presented: SiteId,
    },
    /// Another router answers than the one dialled.
    #[error("{presented} answered instead of router {expected}")]
    WrongRouter {
        /// The router dialled.
        expected: RouterId,
        /// Who answered.
        presented: SpiffeId,
    },
    /// A certificate for another purpose.
    #[error("{0} cannot be used for this connection")]
    WrongRole(SpiffeId),
    /// Names a site whose CA did not issue it.
    #[error("the certificate of {id} was not issued by that site's CA but by \"{issuer}\"")]
    WrongIssuer {
        /// Whom it claims to speak for.
        id: SpiffeId,
        /// Who issued it.
        issuer: String,
    },
    /// No longer valid.
    #[error(
        "the peer's certificate expired {} ago by the clock here: one of the two clocks is wrong, or the peer's \
         controller has been away for days", duration(.ago_s)
    )]
    Expired {
        /// Seconds since it expired.
        ago_s: u64,
    },
    /// Not yet valid.
    #[error(
        "the peer's certificate becomes valid in {} by the clock here: one of the two clocks is wrong",
        duration(.in_s)
    )]
    NotYetValid {
        /// Seconds until it becomes valid.
        in_s: u64,
    },
    /// The key usage or the signature algorithm does not fit.
    #[error("the peer's certificate is unfit: {0}")]
    Unfit(String),
    /// The connection agreed on no protocol, or one not served here.
    #[error("the peer asked for protocol \"{0}\", which is not served here")]
    Protocol(String),
}

impl fmt::Debug for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Checks that the leaf of a router speaks for whom it should, under the anchors of its own site.
///
/// # Errors
/// See [`PeerError`].
pub fn verify_router(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: Usage,
    expected: Expected,
    trust: &TrustView,
    now: UnixTime,
) -> Result<PeerIdentity, PeerError> {
    let id = expected_router(leaf, expected, trust)?;
    let site = trust.site(id.site).ok_or(PeerError::UnknownSite(id.site))?;
    verify_chain(leaf, intermediates, usage, &as_slices(&site.anchors), &id, now)?;
    Ok(id.into())
}

/// As [`verify_router`], where a neighbour is met: a router of a site whose statement has lapsed gets as far as its introduction, which
/// must go through [`verify_introduction`] before anything else is believed or told.
///
/// # Errors
/// See [`PeerError`].
pub fn verify_neighbour(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: Usage,
    expected: Expected,
    trust: &TrustView,
    now: UnixTime,
) -> Result<PeerIdentity, PeerError> {
    let id = expected_router(leaf, expected, trust)?;
    let anchors = match (trust.site(id.site), trust.lapsed.get(&id.site)) {
        (Some(site), _) => &site.anchors,
        (None, Some(lapsed)) => &lapsed.ca_certificates,
        (None, None) => return Err(PeerError::UnknownSite(id.site)),
    };
    verify_chain(leaf, intermediates, usage, &as_slices(anchors), &id, now)?;
    Ok(id.into())
}

/// Checks what a neighbour has introduced itself with, if its site needs it: with a statement that has lapsed, one in force that is newer
/// and of the same key history, whose CAs have issued the chain as well. A CA that was replaced since lets nobody in.
///
/// # Errors
/// See [`PeerError`].
pub fn verify_introduction(
    chain: &[CertificateDer<'_>],
    usage: Usage,
    introduction: &[Record],
    trust: &TrustView,
    now: UnixTime,
) -> Result<(), PeerError> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerError::Missing)?;
    let id = expected_router(leaf, Expected::AnyRouter, trust)?;
    if trust.site(id.site).is_some() {
        return Ok(());
    }
    let known = trust.lapsed.get(&id.site).ok_or(PeerError::UnknownSite(id.site))?;
    let unix_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let is_newer = |said: &VerifiedStatement| {
        said.site == id.site
            && said.statement.epoch > known.epoch
            && said.continues(known)
            && said.current_at(unix_s).is_ok()
    };
    let said = introduction.iter().take(INTRODUCTION_LEN_MAX);
    let Some(said) = said.filter_map(|record| verify_statement(record).ok()).find(is_newer) else {
        let ago_s = u64::try_from(unix_s.saturating_sub(known.expires_unix_s)).unwrap_or(0);
        return Err(PeerError::Lapsed { site: id.site, ago_s });
    };
    let anchors = as_slices(&said.statement.ca_certificates);
    verify_chain(leaf, intermediates, usage, &anchors, &id, now)
}

/// Whom a leaf speaks for, if that is a router, the one expected, and not revoked.
fn expected_router(
    leaf: &CertificateDer<'_>,
    expected: Expected,
    trust: &TrustView,
) -> Result<SpiffeId, PeerError> {
    let id = leaf_id(leaf)?;
    let Some(router) = id.router_id() else { return Err(PeerError::WrongRole(id)) };
    match expected {
        Expected::AnyRouter => {}
        Expected::RouterOf(site) if site == id.site => {}
        Expected::RouterOf(site) => {
            return Err(PeerError::WrongSite { expected: site, presented: id.site });
        }
        Expected::Router(expected) if expected == router => {}
        Expected::Router(expected) => {
            return Err(PeerError::WrongRouter { expected, presented: id });
        }
    }
    if trust.revoked.contains(&id.site) {
        return Err(PeerError::Revoked(id.site));
    }
    Ok(id)
}

fn as_slices(certificates: &[impl AsRef<[u8]>]) -> Vec<&[u8]> {
    certificates.iter().map(AsRef::as_ref).collect()
}

/// Checks that the leaf is the controller of `issuer`, under the one CA whose certificate hashes to `ca_pin`.
///
/// # Errors
/// See [`PeerError`].
pub fn verify_controller(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    issuer: SiteId,
    ca_pin: &CaPin,
    now: UnixTime,
) -> Result<PeerIdentity, PeerError> {
    let id = leaf_id(leaf)?;
    if id.role != CertificateRole::Controller {
        return Err(PeerError::WrongRole(id));
    }
    if id.site != issuer {
        return Err(PeerError::WrongSite { expected: issuer, presented: id.site });
    }
    let anchors: Vec<&[u8]> =
        intermediates.iter().map(AsRef::as_ref).filter(|der| CaPin::of(der) == *ca_pin).collect();
    verify_chain(leaf, intermediates, Usage::Server, &anchors, &id, now)?;
    Ok(id.into())
}

/// SHA-256 of a CA certificate, as tokens carry it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CaPin(pub [u8; 32]);

impl CaPin {
    /// The pin of this certificate.
    #[must_use]
    pub fn of(certificate_der: &[u8]) -> Self {
        Self(sha256(&[certificate_der]))
    }
}

/// Whom the leaf of a chain that was verified by the handshake speaks for.
///
/// # Errors
/// [`PeerError::Missing`], or another when the chain cannot have been verified here.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, PeerError> {
    leaf_id(chain.first().ok_or(PeerError::Missing)?).map(Into::into)
}

/// The one name in a leaf: exactly one subject alternative name, and that a SPIFFE id of the exact form.
pub(crate) fn leaf_id(leaf: &CertificateDer<'_>) -> Result<SpiffeId, PeerError> {
    if leaf.len() > CERTIFICATE_LEN_MAX {
        return Err(PeerError::Malformed);
    }
    let (rest, parsed) = X509Certificate::from_der(leaf).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    let names = parsed.subject_alternative_name().map_err(|_| PeerError::Malformed)?;
    let id = match names.map(|names| names.value.general_names.as_slice()) {
        Some([GeneralName::URI(uri)]) => SpiffeId::parse(uri),
        _ => None,
    };
    id.ok_or_else(|| PeerError::NotSkein {
        subject: quote(&parsed.subject().to_string()),
        issuer: quote(&parsed.issuer().to_string()),
    })
}

pub(crate) fn verify_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: Usage,
    anchors: &[&[u8]],
    id: &SpiffeId,
    now: UnixTime,
) -> Result<(), PeerError> {
    if intermediates.len() >= CHAIN_LEN_MAX
        || intermediates.iter().any(|der| der.len() > CERTIFICATE_LEN_MAX)
    {
        return Err(PeerError::Malformed);
    }
    let anchors: Vec<CertificateDer<'_>> =
        anchors.iter().take(CAS_MAX).map(|der| CertificateDer::from(*der)).collect();
    // A site may state nonsense beside a good CA; that must not take the good one away.
    let anchors: Vec<TrustAnchor<'_>> =
        anchors.iter().filter_map(|der| anchor_from_trusted_cert(der).ok()).collect();
    let end_entity = EndEntityCert::try_from(leaf).map_err(|_| PeerError::Malformed)?;
    let key_usage = match usage {
        Usage::Server => KeyUsage::server_auth(),
        Usage::Client => KeyUsage::client_auth(),
    };
    let algorithms = webpki::ALL_VERIFICATION_ALGS;
    end_entity
        .verify_for_usage(algorithms, &anchors, intermediates, now, key_usage, None, None)
        .map_err(|error| peer_error(&error, leaf, id))?;
    Ok(())
}

fn peer_error(error: &webpki::Error, leaf: &CertificateDer<'_>, id: &SpiffeId) -> PeerError {
    match error {
        webpki::Error::CertExpired { time, not_after } => {
            PeerError::Expired { ago_s: time.as_secs().saturating_sub(not_after.as_secs()) }
        }
        webpki::Error::CertNotValidYet { time, not_before } => {
            PeerError::NotYetValid { in_s: not_before.as_secs().saturating_sub(time.as_secs()) }
        }
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            let issuer = X509Certificate::from_der(leaf)
                .map_or_else(|_| String::new(), |(_, parsed)| parsed.issuer().to_string());
            PeerError::WrongIssuer { id: id.clone(), issuer: quote(&issuer) }
        }
        other => PeerError::Unfit(other.to_string()),
    }
}

/// Text from a peer, fit for a log line or a terminal.
fn quote(text: &str) -> String {
    let escaped: String = text.chars().take(QUOTE_LEN_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(QUOTE_LEN_MAX).is_some() { escaped + "…" } else { escaped }
}

fn duration(seconds: &u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
