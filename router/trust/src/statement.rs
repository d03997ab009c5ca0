//! What sites sign with their identity keys: statements about themselves, endorsements and revocations of others.
//!
//! All travel as [`Record`]s. What is signed is the exact body; it is never re-encoded.

use crate::{
    hash::sha256,
    identity::{ChainError, KeyChain, PublicKey, SiteIdentity, verify},
};
use prost::Message;
use skein_core::SiteId;
use skein_wire::{
    convert::{RECORD_BODY_LEN_MAX, RECORD_DOMAIN},
    proto::{
        routing::{Record, RecordBody, RecordKind},
        trust::{Endorsement, Membership, Revocation, Scope, SiteStatement},
    },
};

/// Statements and endorsements are valid this long and renewed daily.
pub const STATEMENT_VALIDITY_S: u32 = 7 * 24 * 3600;
/// Revocations are kept for as long as a record can be: ten years outlive whatever they revoke.
pub const REVOCATION_LIFETIME_S: u32 = 10 * 365 * 24 * 3600;
/// Certificate authorities a site may have at once; rotation needs two.
pub const CAS_MAX: usize = 8;
/// Longest certificate accepted, in bytes.
pub const CERTIFICATE_LEN_MAX: usize = 8 * 1024;
/// Endpoints a statement may list.
pub const ENDPOINTS_MAX: usize = 32;
/// Longest endpoint: a DNS name, a colon and a port.
pub const ENDPOINT_LEN_MAX: usize = 253 + 6;
/// Longest name of a site, in bytes.
pub const SITE_NAME_LEN_MAX: usize = 63;
/// Patterns in each list of a scope.
pub const SCOPE_PATTERNS_MAX: usize = 256;
/// Longest text that explains a revocation, in bytes.
pub const REASON_LEN_MAX: usize = 256;

/// The low bits of a record's sequence are the site's own counter, the bits above them count the rotations before it:
/// whoever stole a retired key cannot outrun the present one by a large counter.
const COUNTER_BITS: u32 = 48;
const COUNTER_MAX: u64 = (1 << COUNTER_BITS) - 1;

/// Why a signed statement is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// Longer than [`RECORD_BODY_LEN_MAX`].
    #[error("the statement is longer than {RECORD_BODY_LEN_MAX} bytes")]
    TooLong,
    /// Not protobuf, or a field is missing, of the wrong length or beyond its bound.
    #[error("the statement is malformed: {0}")]
    Malformed(&'static str),
    /// A record of another kind was given.
    #[error("expected another kind of statement")]
    Kind,
    /// Key, subkey or sequence of the record disagree with its content.
    #[error("the statement's envelope disagrees with its content")]
    Envelope,
    /// The history of identity keys does not hold.
    #[error("the site's key history does not hold: {0}")]
    Chain(#[from] ChainError),
    /// The sequence does not count the issuer's rotations.
    #[error("the statement's sequence does not fit the key history of its issuer")]
    Epoch,
    /// Not signed by the identity key in use.
    #[error("the signature is not by the issuer's identity key")]
    Signature,
    /// No longer valid.
    #[error("the statement expired at {0} (Unix time)")]
    Expired(i64),
}

/// What a site says of itself; see [`SiteIdentity::statement`].
#[derive(Clone, Debug, Default)]
pub struct StatementDraft {
    /// Counts the site's statements, at most 48 bits; the higher one wins. Persisted by the controller.
    pub epoch: u64,
    /// For people.
    pub name: String,
    /// DER; during a rotation the old CA and the new one.
    pub ca_certificates: Vec<Vec<u8>>,
    /// `host:port` on which routers of the site accept links.
    pub endpoints: Vec<String>,
    /// The network it belongs to: its founder's site id.
    pub network_id: Option<SiteId>,
    /// Unix time; usually now + [`STATEMENT_VALIDITY_S`].
    pub expires_unix_s: i64,
}

/// What a site says of another; see [`SiteIdentity::endorsement`].
#[derive(Clone, Debug)]
pub struct EndorsementDraft {
    /// Whom it endorses.
    pub subject: SiteId,
    /// Same owner, or a foreign site within `scope`.
    pub membership: Membership,
    /// For guests.
    pub scope: Option<Scope>,
    /// Whether the subject's endorsements of others count too.
    pub may_endorse: bool,
    /// Counts what this site says of the subject, at most 48 bits; the higher one wins.
    pub sequence: u64,
    /// Unix time; usually now + [`STATEMENT_VALIDITY_S`].
    pub valid_until_unix_s: i64,
}

impl SiteIdentity {
    /// Signs a statement of this site about itself.
    #[must_use]
    pub fn statement(&self, draft: &StatementDraft) -> Record {
        self.seal_statement(draft, false)
    }

    /// Signs the last statement of this site: once it has expired the site is gone for good, and others forget it.
    #[must_use]
    pub fn farewell(&self, draft: &StatementDraft) -> Record {
        self.seal_statement(draft, true)
    }

    fn seal_statement(&self, draft: &StatementDraft, leaving: bool) -> Record {
        let (inception, rotations) = self.chain();
        let epoch = ranked(self.rotations(), draft.epoch);
        let site = self.site_id();
        let payload = SiteStatement {
            site_id: site.0.to_vec(),
            inception: Some(inception),
            rotations,
            epoch,
            name: draft.name.clone(),
            ca_certificates: draft.ca_certificates.clone(),
            endpoints: draft.endpoints.clone(),
            expires_unix_s: draft.expires_unix_s,
            network_id: draft.network_id.unwrap_or(site).0.to_vec(),
            leaving,
        };
        self.seal(RecordKind::SiteStatement, None, epoch, STATEMENT_VALIDITY_S, &payload)
    }

    /// Signs an endorsement of another site.
    #[must_use]
    pub fn endorsement(&self, draft: &EndorsementDraft) -> Record {
        self.seal_endorsement(draft, false)
    }

    /// Signs that an endorsement is taken back. It is void at once, also where the clock is behind `valid_until_unix_s`, which is
    /// to be the time of signing: by it others know when nothing older can be valid any more.
    #[must_use]
    pub fn withdrawal(&self, draft: &EndorsementDraft) -> Record {
        self.seal_endorsement(draft, true)
    }

    fn seal_endorsement(&self, draft: &EndorsementDraft, withdrawn: bool) -> Record {
        let sequence = ranked(self.rotations(), draft.sequence);
        let payload = Endorsement {
            issuer: self.site_id().0.to_vec(),
            subject: draft.subject.0.to_vec(),
            membership: draft.membership.into(),
            scope: draft.scope.clone(),
            may_endorse: draft.may_endorse,
            sequence,
            valid_until_unix_s: draft.valid_until_unix_s,
            withdrawn,
        };
        let subject = Some(draft.subject);
        let lifetime_s = STATEMENT_VALIDITY_S;
        self.seal(RecordKind::Endorsement, subject, sequence, lifetime_s, &payload)
    }

    /// Signs that another site is no longer trusted.
    #[must_use]
    pub fn revocation(
        &self,
        subject: SiteId,
        sequence: u64,
        issued_unix_s: i64,
        reason: &str,
    ) -> Record {
        let sequence = ranked(self.rotations(), sequence);
        let payload = Revocation {
            issuer: self.site_id().0.to_vec(),
            subject: subject.0.to_vec(),
            sequence,
            issued_unix_s,
            reason: reason.chars().take(REASON_LEN_MAX / 4).collect(),
        };
        let lifetime_s = REVOCATION_LIFETIME_S;
        self.seal(RecordKind::Revocation, Some(subject), sequence, lifetime_s, &payload)
    }

    fn seal(
        &self,
        kind: RecordKind,
        subkey: Option<SiteId>,
        sequence: u64,
        lifetime_s: u32,
        payload: &impl Message,
    ) -> Record {
        let body = RecordBody {
            kind: kind.into(),
            origin: self.site_id().0.to_vec(),
            subkey: subkey.map_or_else(Vec::new, |subject| subject.0.to_vec()),
            sequence,
            lifetime_s,
            payload: payload.encode_to_vec(),
        }
        .encode_to_vec();
        let signature = self.sign(&[RECORD_DOMAIN, &body]).to_vec();
        Record { body: body.into(), signature: signature.into() }
    }
}

/// A site statement whose key history and signature hold.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifiedStatement {
    /// Whose it is.
    pub site: SiteId,
    /// Its key history; `chain.key` checks its endorsements and revocations.
    pub chain: KeyChain,
    /// The network it says it belongs to.
    pub network_id: SiteId,
    /// The content.
    pub statement: SiteStatement,
}

impl VerifiedStatement {
    /// # Errors
    /// [`StatementError::Expired`] at `unix_s` and later than its expiry.
    pub fn current_at(&self, unix_s: i64) -> Result<(), StatementError> {
        not_expired(self.statement.expires_unix_s, unix_s)
    }

    /// Whether its key history and that of another statement of the site are one, so that neither is a fork. A shorter one is merely old: its
    /// record's sequence is below that of the longer.
    #[must_use]
    pub fn continues(&self, known: &skein_core::SiteStatement) -> bool {
        let rotations = &self.statement.rotations;
        rotations.iter().zip(&known.rotations).all(|(ours, theirs)| {
            ours.identity_key == theirs.identity_key
                && ours.next_key_sha256 == theirs.next_key_sha256
        })
    }
}

/// Checks a site statement: self-certifying, so nothing else is needed. Says nothing of trust, nor of expiry.
///
/// # Errors
/// See [`StatementError`].
pub fn verify_statement(record: &Record) -> Result<VerifiedStatement, StatementError> {
    let body = open(record, RecordKind::SiteStatement)?;
    let statement: SiteStatement = payload(&body)?;
    check_statement_bounds(&statement)?;
    let site = id(&statement.site_id, "site id")?;
    let network_id = id(&statement.network_id, "network id")?;
    let inception =
        statement.inception.as_ref().ok_or(StatementError::Chain(ChainError::Inception))?;
    let chain = KeyChain::verify(Some(site), inception, &statement.rotations)?;
    if rotations_before(statement.epoch) != chain.rotations() as u64 {
        return Err(StatementError::Epoch);
    }
    if body.origin != site.0 || !body.subkey.is_empty() || body.sequence != statement.epoch {
        return Err(StatementError::Envelope);
    }
    check_signature(record, &chain.key)?;
    Ok(VerifiedStatement { site, chain, network_id, statement })
}

/// Who must have signed an endorsement or a revocation, from a statement that was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Issuer {
    /// The site.
    pub site: SiteId,
    /// Its identity key in use.
    pub key: PublicKey,
    /// How often the key was rotated.
    pub rotations: usize,
}

impl From<&KeyChain> for Issuer {
    fn from(chain: &KeyChain) -> Self {
        Self { site: chain.site, key: chain.key, rotations: chain.rotations() }
    }
}

impl From<&skein_core::SiteStatement> for Issuer {
    fn from(statement: &skein_core::SiteStatement) -> Self {
        let (site, rotations) = (statement.site, statement.rotations.len());
        Self { site, key: *statement.identity_key(), rotations }
    }
}

/// Checks an endorsement against the key its issuer uses now. Says nothing of expiry.
///
/// # Errors
/// See [`StatementError`].
pub fn verify_endorsement(record: &Record, issuer: &Issuer) -> Result<Endorsement, StatementError> {
    let body = open(record, RecordKind::Endorsement)?;
    let endorsement: Endorsement = payload(&body)?;
    check_envelope(&body, &endorsement.issuer, &endorsement.subject, endorsement.sequence)?;
    let scope = endorsement.scope.as_ref();
    if scope.is_some_and(|s| s.consume.len().max(s.provide.len()) > SCOPE_PATTERNS_MAX) {
        return Err(StatementError::Malformed("scope has too many patterns"));
    }
    match Membership::try_from(endorsement.membership) {
        Ok(Membership::Member) => {}
        Ok(Membership::Guest) if !endorsement.may_endorse => {}
        Ok(Membership::Guest) => return Err(StatementError::Malformed("a guest cannot endorse")),
        Ok(Membership::Unspecified) | Err(_) => {
            return Err(StatementError::Malformed("unknown membership"));
        }
    }
    check_issuer(record, &body, issuer)?;
    Ok(endorsement)
}

/// Checks a revocation against the key its issuer uses now. Says nothing of the issuer's authority.
///
/// # Errors
/// See [`StatementError`].
pub fn verify_revocation(record: &Record, issuer: &Issuer) -> Result<Revocation, StatementError> {
    let body = open(record, RecordKind::Revocation)?;
    let revocation: Revocation = payload(&body)?;
    check_envelope(&body, &revocation.issuer, &revocation.subject, revocation.sequence)?;
    if revocation.reason.len() > REASON_LEN_MAX {
        return Err(StatementError::Malformed("reason too long"));
    }
    check_issuer(record, &body, issuer)?;
    Ok(revocation)
}

/// Names a record: SHA-256 over body and signature.
#[must_use]
pub fn record_digest(record: &Record) -> [u8; 32] {
    // The body's length keeps bytes from moving between the two.
    sha256(&[&(record.body.len() as u64).to_be_bytes(), &record.body, &record.signature])
}

pub(crate) fn not_expired(until_unix_s: i64, unix_s: i64) -> Result<(), StatementError> {
    if unix_s < until_unix_s { Ok(()) } else { Err(StatementError::Expired(until_unix_s)) }
}

/// How often the issuer of a record with this sequence had rotated its key.
pub(crate) fn rotations_before(sequence: u64) -> u64 {
    sequence >> COUNTER_BITS
}

/// Of two records the one after more rotations wins, whatever their counters.
fn ranked(rotations: usize, counter: u64) -> u64 {
    (rotations as u64) << COUNTER_BITS | counter.min(COUNTER_MAX)
}

fn open(record: &Record, kind: RecordKind) -> Result<RecordBody, StatementError> {
    if record.body.len() > RECORD_BODY_LEN_MAX {
        return Err(StatementError::TooLong);
    }
    let body = RecordBody::decode(&record.body[..])
        .map_err(|_| StatementError::Malformed("not a record body"))?;
    if body.kind != i32::from(kind) {
        return Err(StatementError::Kind);
    }
    Ok(body)
}

fn payload<T: Message + Default>(body: &RecordBody) -> Result<T, StatementError> {
    T::decode(&body.payload[..]).map_err(|_| StatementError::Malformed("not a statement"))
}

fn id(bytes: &[u8], what: &'static str) -> Result<SiteId, StatementError> {
    bytes.try_into().map(SiteId).map_err(|_| StatementError::Malformed(what))
}

fn check_statement_bounds(statement: &SiteStatement) -> Result<(), StatementError> {
    let within = |ok: bool, what| if ok { Ok(()) } else { Err(StatementError::Malformed(what)) };
    within(statement.name.len() <= SITE_NAME_LEN_MAX, "name too long")?;
    within(statement.ca_certificates.len() <= CAS_MAX, "too many CA certificates")?;
    within(
        statement.ca_certificates.iter().all(|ca| ca.len() <= CERTIFICATE_LEN_MAX),
        "CA certificate too long",
    )?;
    within(statement.endpoints.len() <= ENDPOINTS_MAX, "too many endpoints")?;
    within(statement.endpoints.iter().all(|e| e.len() <= ENDPOINT_LEN_MAX), "endpoint too long")
}

fn check_envelope(
    body: &RecordBody,
    issuer: &[u8],
    subject: &[u8],
    sequence: u64,
) -> Result<(), StatementError> {
    id(issuer, "issuer")?;
    id(subject, "subject")?;
    if body.origin != issuer || body.subkey != subject || body.sequence != sequence {
        return Err(StatementError::Envelope);
    }
    Ok(())
}

fn check_issuer(record: &Record, body: &RecordBody, issuer: &Issuer) -> Result<(), StatementError> {
    if body.origin != issuer.site.0 {
        return Err(StatementError::Signature);
    }
    check_signature(record, &issuer.key)?;
    if rotations_before(body.sequence) != issuer.rotations as u64 {
        return Err(StatementError::Epoch);
    }
    Ok(())
}

fn check_signature(record: &Record, key: &PublicKey) -> Result<(), StatementError> {
    if verify(key, &[RECORD_DOMAIN, &record.body], &record.signature) {
        Ok(())
    } else {
        Err(StatementError::Signature)
    }
}
