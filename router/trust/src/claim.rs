//! Redemption of a token: what redeemer and issuer say to each other, without the I/O.
//!
//! Both talk over TLS 1.3 that authenticates the issuer by the CA pin in the token. The redeemer proves its identity
//! by a signature over the connection's exporter, so a claim cannot be replayed or relayed.

use crate::{
    hash::sha256,
    identity::{SiteIdentity, verify},
    statement::{
        Issuer, StatementError, VerifiedStatement, verify_endorsement, verify_revocation,
        verify_statement,
    },
};
use aws_lc_rs::rand::SecureRandom;
use prost::Message as _;
use skein_core::SiteId;
use skein_wire::proto::{
    claim::{
        ClaimAccepted, ClaimRefused, ClaimRequest, ClaimResponse, claim_refused,
        claim_response::Outcome,
    },
    routing::{Record, RecordBody},
    trust::Endorsement,
};
use std::{collections::BTreeMap, fmt};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroize;

/// ALPN protocol of claims, on TCP with TLS and on QUIC.
pub const ALPN_CLAIM: &[u8] = b"skein-claim/1";
/// Exporter label under which both ends derive the [`Exporter`], without context.
pub const CLAIM_EXPORTER_LABEL: &[u8] = b"EXPORTER-skein-claim/1";
/// Longest request, in bytes: read before anything is known of the redeemer.
pub const CLAIM_REQUEST_LEN_MAX: usize = 64 * 1024;
/// Longest response, in bytes: carries the records of the network.
pub const CLAIM_RESPONSE_LEN_MAX: usize = 1024 * 1024;
/// The protocol version spoken here.
pub const CLAIM_PROTOCOL: u32 = 1;
/// Records a response may carry.
pub const CLAIM_RECORDS_MAX: usize = 4096;
/// A redeemer whose clock is further from ours is told so instead of being let in with certificates it cannot use.
pub const CLOCK_DIFFERENCE_MAX_S: i64 = 15 * 60;

const CLAIM_CONTEXT: &[u8] = b"skein-claim/1";
const CODE_LEN: usize = 16;
/// A later version may draw longer codes.
const CODE_LEN_MAX: usize = 64;

/// Key material of the TLS connection a claim is made on.
pub type Exporter = [u8; 32];

/// The secret of a token. Never shown, never stored by the issuer; wiped from memory when dropped.
#[derive(Clone, PartialEq, Eq, Zeroize)]
#[zeroize(drop)]
pub struct Code(Vec<u8>);

/// What the issuer keeps of a [`Code`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CodeHash(pub [u8; 32]);

impl Code {
    /// Draws 128 bits.
    ///
    /// # Errors
    /// When the source of randomness fails.
    pub fn generate(random: &dyn SecureRandom) -> Result<Self, ClaimError> {
        let mut code = vec![0; CODE_LEN];
        random.fill(&mut code).map_err(|_| ClaimError::Randomness)?;
        Ok(Self(code))
    }

    /// Reads the form in a token or a request; `None` if it is too short to be secret, or beyond any use.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (CODE_LEN..=CODE_LEN_MAX).contains(&bytes.len()).then(|| Self(bytes.to_vec()))
    }

    /// For writing into a token.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What is stored. The code has 128 random bits or more, so a plain hash cannot be searched.
    #[must_use]
    pub fn hash(&self) -> CodeHash {
        CodeHash(sha256(&[&self.0]))
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code")
    }
}

impl CodeHash {
    /// Compares without telling by its duration where the two differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for CodeHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CodeHash({})", data_encoding::HEXLOWER.encode(&self.0[..4]))
    }
}

/// Why a claim or its answer is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// No randomness for a code.
    #[error("the system has no randomness")]
    Randomness,
    /// Not a claim message, or beyond a bound.
    #[error("the message is malformed: {0}")]
    Malformed(&'static str),
    /// No protocol version in common.
    #[error("the other side speaks claim protocol {min} to {max}, this one {CLAIM_PROTOCOL}")]
    Version {
        /// Lowest version the other side speaks.
        min: u32,
        /// Highest version the other side speaks.
        max: u32,
    },
    /// The site statement does not hold.
    #[error("the site statement does not hold: {0}")]
    Statement(StatementError),
    /// The endorsement does not hold.
    #[error("the endorsement does not hold: {0}")]
    Endorsement(StatementError),
    /// The endorsement is about another site.
    #[error("the endorsement is about another site")]
    WrongSubject,
    /// The redeemer could not prove its identity on this connection.
    #[error("the redeemer did not prove its identity")]
    Proof,
    /// A site redeems its own token.
    #[error("this token was made by this very site")]
    OwnToken,
    /// Someone other than the token's issuer answered.
    #[error("the answer is from site {0}, not from the one the token names")]
    WrongIssuer(SiteId),
    /// The clocks differ.
    #[error("the clocks of the two sites differ by {0} s")]
    Clock(i64),
}

impl ClaimError {
    /// How the issuer reports it to the redeemer.
    #[must_use]
    pub fn reason(&self) -> claim_refused::Reason {
        use claim_refused::Reason;
        match self {
            Self::Randomness => Reason::Unavailable,
            Self::Version { .. } => Reason::Version,
            Self::OwnToken => Reason::OwnToken,
            Self::Clock(_) => Reason::Clock,
            Self::Malformed(_)
            | Self::Statement(_)
            | Self::Endorsement(_)
            | Self::WrongSubject
            | Self::Proof
            | Self::WrongIssuer(_) => Reason::BadProof,
        }
    }
}

/// What the redeemer sends.
#[derive(Debug)]
pub struct ClaimDraft<'a> {
    /// From the token.
    pub code: &'a Code,
    /// The token's issuer.
    pub issuer: SiteId,
    /// The redeemer's own statement.
    pub statement: Record,
    /// The redeemer's endorsement of the issuer.
    pub endorsement: Record,
    /// Whether joining two grown networks is wanted.
    pub merge: bool,
    /// The redeemer's clock, in Unix time.
    pub unix_s: i64,
}

/// Builds the request for one connection; a retry on another connection needs another one.
#[must_use]
pub fn claim_request(
    identity: &SiteIdentity,
    draft: ClaimDraft<'_>,
    exporter: &Exporter,
) -> ClaimRequest {
    let hash = draft.code.hash();
    let parts = proof_parts(exporter, &draft.issuer, &identity.site_id(), &hash).concat();
    ClaimRequest {
        protocol_min: CLAIM_PROTOCOL,
        protocol_max: CLAIM_PROTOCOL,
        code: draft.code.as_bytes().to_vec(),
        statement: Some(draft.statement),
        endorsement: Some(draft.endorsement),
        signature: identity.sign(&[&parts]).to_vec(),
        merge: draft.merge,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        unix_s: draft.unix_s,
    }
}

/// A request whose redeemer is proven to be who it says, on this connection. Whether the code is good is for the
/// grants to say.
#[derive(Clone, Debug)]
pub struct VerifiedClaim {
    /// Hash of the code presented.
    pub code: CodeHash,
    /// The redeemer.
    pub redeemer: VerifiedStatement,
    /// What it says of the issuer.
    pub endorsement: Endorsement,
    /// The redeemer's statement and endorsement, to be kept and flooded.
    pub records: [Record; 2],
    /// Whether the redeemer agrees to join two grown networks.
    pub merge: bool,
}

/// Checks an encoded request that arrived at `issuer` on the connection of `exporter`.
///
/// # Errors
/// See [`ClaimError`].
pub fn verify_claim(
    bytes: &[u8],
    issuer: SiteId,
    exporter: &Exporter,
    unix_s: i64,
) -> Result<VerifiedClaim, ClaimError> {
    if bytes.len() > CLAIM_REQUEST_LEN_MAX {
        return Err(ClaimError::Malformed("too long"));
    }
    let request =
        ClaimRequest::decode(bytes).map_err(|_| ClaimError::Malformed("not a claim request"))?;
    if !(request.protocol_min..=request.protocol_max).contains(&CLAIM_PROTOCOL) {
        return Err(ClaimError::Version { min: request.protocol_min, max: request.protocol_max });
    }
    let code = Code::from_bytes(&request.code).ok_or(ClaimError::Malformed("code"))?.hash();
    let statement = request.statement.ok_or(ClaimError::Malformed("no statement"))?;
    let endorsement = request.endorsement.ok_or(ClaimError::Malformed("no endorsement"))?;
    let redeemer = verify_statement(&statement).map_err(ClaimError::Statement)?;
    if redeemer.site == issuer {
        return Err(ClaimError::OwnToken);
    }
    let parts = proof_parts(exporter, &issuer, &redeemer.site, &code);
    if !verify(&redeemer.chain.key, &parts, &request.signature) {
        return Err(ClaimError::Proof);
    }
    // Named before expiry is looked at: a wrong clock makes everything look expired.
    let difference = request.unix_s.saturating_sub(unix_s);
    if difference.saturating_abs() > CLOCK_DIFFERENCE_MAX_S {
        return Err(ClaimError::Clock(difference));
    }
    redeemer.current_at(unix_s).map_err(ClaimError::Statement)?;
    let verified = check_endorsement(&endorsement, &redeemer, issuer, unix_s)?;
    Ok(VerifiedClaim {
        code,
        redeemer,
        endorsement: verified,
        records: [statement, endorsement],
        merge: request.merge,
    })
}

/// What became of a claim, as the redeemer may rely on it.
#[derive(Clone, Debug)]
pub enum VerifiedAnswer {
    /// The token is redeemed.
    Accepted(Box<AcceptedClaim>),
    /// The issuer said no.
    Refused(ClaimRefused),
}

/// The issuer's answer, checked.
#[derive(Clone, Debug)]
pub struct AcceptedClaim {
    /// The issuer.
    pub issuer: VerifiedStatement,
    /// What it says of the redeemer.
    pub endorsement: Endorsement,
    /// The issuer's statement and endorsement first, then what it knows of the network as far as its signatures hold.
    pub records: Vec<Record>,
    /// Where the issuer accepts links now.
    pub endpoints: Vec<String>,
    /// The network joined.
    pub network_id: SiteId,
    /// Sites whose revocations count besides the founder's.
    pub authorities: Vec<SiteId>,
}

/// Checks the encoded answer to `redeemer` of the token that `issuer` made.
///
/// # Errors
/// See [`ClaimError`].
pub fn verify_answer(
    bytes: &[u8],
    issuer: SiteId,
    redeemer: SiteId,
    unix_s: i64,
) -> Result<VerifiedAnswer, ClaimError> {
    if bytes.len() > CLAIM_RESPONSE_LEN_MAX {
        return Err(ClaimError::Malformed("too long"));
    }
    let response =
        ClaimResponse::decode(bytes).map_err(|_| ClaimError::Malformed("not a claim response"))?;
    match response.outcome {
        Some(Outcome::Accepted(accepted)) => {
            let accepted = check_accepted(accepted, issuer, redeemer, unix_s)?;
            Ok(VerifiedAnswer::Accepted(Box::new(accepted)))
        }
        Some(Outcome::Refused(refused)) => Ok(VerifiedAnswer::Refused(refused)),
        None => Err(ClaimError::Malformed("no outcome")),
    }
}

fn check_accepted(
    accepted: ClaimAccepted,
    issuer: SiteId,
    redeemer: SiteId,
    unix_s: i64,
) -> Result<AcceptedClaim, ClaimError> {
    if accepted.records.len() > CLAIM_RECORDS_MAX {
        return Err(ClaimError::Malformed("too many records"));
    }
    let statement = accepted.statement.ok_or(ClaimError::Malformed("no statement"))?;
    let endorsement = accepted.endorsement.ok_or(ClaimError::Malformed("no endorsement"))?;
    let verified = verify_statement(&statement).map_err(ClaimError::Statement)?;
    if verified.site != issuer {
        return Err(ClaimError::WrongIssuer(verified.site));
    }
    verified.current_at(unix_s).map_err(ClaimError::Statement)?;
    let endorsed = check_endorsement(&endorsement, &verified, redeemer, unix_s)?;
    let id = |bytes: &Vec<u8>| {
        <[u8; 32]>::try_from(&bytes[..]).map(SiteId).map_err(|_| ClaimError::Malformed("site id"))
    };
    let mut records = vec![statement, endorsement];
    records.extend(authentic(accepted.records));
    Ok(AcceptedClaim {
        issuer: verified,
        endorsement: endorsed,
        records,
        endpoints: accepted.endpoints,
        network_id: id(&accepted.network_id)?,
        authorities: accepted.authorities.iter().map(id).collect::<Result<_, _>>()?,
    })
}

/// The records whose signatures hold: what is kept must not displace by a forged sequence what is true.
fn authentic(records: Vec<Record>) -> impl Iterator<Item = Record> {
    let issuers: BTreeMap<SiteId, Issuer> = records
        .iter()
        .filter_map(|record| verify_statement(record).ok())
        .map(|statement| (statement.site, Issuer::from(&statement.chain)))
        .collect();
    records.into_iter().filter(move |record| {
        let origin = RecordBody::decode(&record.body[..]).map(|body| body.origin);
        let site = origin.ok().and_then(|origin| <[u8; 32]>::try_from(origin).ok()).map(SiteId);
        site.and_then(|site| issuers.get(&site)).is_some_and(|issuer| {
            verify_endorsement(record, issuer).is_ok()
                || verify_revocation(record, issuer).is_ok()
                || verify_statement(record).is_ok()
        })
    })
}

fn check_endorsement(
    record: &Record,
    issuer: &VerifiedStatement,
    subject: SiteId,
    unix_s: i64,
) -> Result<Endorsement, ClaimError> {
    let endorsement = verify_endorsement(record, &Issuer::from(&issuer.chain))
        .map_err(ClaimError::Endorsement)?;
    if endorsement.subject != subject.0 {
        return Err(ClaimError::WrongSubject);
    }
    let until_unix_s = if endorsement.withdrawn { 0 } else { endorsement.valid_until_unix_s };
    crate::statement::not_expired(until_unix_s, unix_s).map_err(ClaimError::Endorsement)?;
    Ok(endorsement)
}

fn proof_parts<'a>(
    exporter: &'a Exporter,
    issuer: &'a SiteId,
    redeemer: &'a SiteId,
    code: &'a CodeHash,
) -> [&'a [u8]; 5] {
    [CLAIM_CONTEXT, exporter, &issuer.0, &redeemer.0, &code.0]
}
