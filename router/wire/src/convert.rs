//! Conversions between messages on the wire and the core's types: parse, don't validate.
//!
//! Everything that comes in is bounded here, in length and in number; what comes out of here needs no further checks but that
//! of its signature.

mod routing;
mod trust;

use crate::proto;
use aws_lc_rs::digest;
use bytes::Bytes;
use prost::Message as _;
use skein_core::{
    AgedRecord, Digest, Edition, Message, Origin, Payload, Record, RecordDraft, RecordHeader,
    RecordKey, RecordKind, RouterId, Sealed, SiteId, Subkey,
};
use std::sync::Arc;

/// What is signed is this, then the body.
pub const RECORD_DOMAIN: &[u8] = b"skein-record/1";
/// Longest record body in bytes: several batches of records must fit into a message.
pub const RECORD_BODY_LEN_MAX: usize = 64 * 1024;
/// Longest signature in bytes; ECDSA over P-256 needs 72, post-quantum ones will need their own limit.
const SIGNATURE_LEN_MAX: usize = 512;
/// Most headers in one summary or request.
pub const HEADERS_MAX: usize = 1_024;
/// Most records in one message.
pub const RECORDS_MAX: usize = 1_024;

/// Why a message is not what it claims to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConvertError {
    /// Not the protobuf message it should be.
    #[error("malformed protobuf message")]
    Encoding,
    /// A field is missing, too long, out of range, or contradicts another.
    #[error("malformed {0}")]
    Field(&'static str),
    /// A bound on numbers.
    #[error("too many {0}")]
    TooMany(&'static str),
}

/// The bytes a record's signature covers.
#[must_use]
pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
    [RECORD_DOMAIN, body].concat()
}

/// Encodes what is to be signed.
///
/// # Errors
/// [`ConvertError::TooMany`] when it exceeds [`RECORD_BODY_LEN_MAX`].
pub fn encode_body(draft: &RecordDraft) -> Result<Vec<u8>, ConvertError> {
    let body = proto::routing::RecordBody {
        kind: kind_number(draft.key.kind),
        origin: origin_bytes(draft.key.origin).to_vec(),
        subkey: draft.key.subkey.as_bytes().to_vec(),
        sequence: draft.sequence,
        lifetime_s: draft.lifetime_s,
        payload: if draft.lifetime_s == 0 {
            Vec::new()
        } else {
            encode_payload(&draft.payload, draft.sequence)
        },
    }
    .encode_to_vec();
    if body.len() > RECORD_BODY_LEN_MAX {
        return Err(ConvertError::TooMany("bytes in a record"));
    }
    Ok(body)
}

fn encode_payload(payload: &Payload, sequence: u64) -> Vec<u8> {
    match payload {
        Payload::SiteStatement(statement) => {
            proto::trust::SiteStatement::from(&**statement).encode_to_vec()
        }
        Payload::Endorsement(endorsement) => {
            trust::endorsement_to_proto(endorsement, sequence).encode_to_vec()
        }
        Payload::Revocation(revocation) => {
            trust::revocation_to_proto(revocation, sequence).encode_to_vec()
        }
        Payload::RouterLsa(lsa) => proto::routing::RouterLsa::from(&**lsa).encode_to_vec(),
        Payload::AddressPage(page) => proto::routing::AddressPage::from(page).encode_to_vec(),
        Payload::Unknown => Vec::new(),
    }
}

/// Parses a record from its signed bytes; whether the signature holds is for a notary to say.
///
/// # Errors
/// [`ConvertError`] when anything in it is malformed, out of bounds or contradictory.
pub fn parse_record(body: &[u8], signature: &[u8]) -> Result<Record, ConvertError> {
    if body.len() > RECORD_BODY_LEN_MAX {
        return Err(ConvertError::TooMany("bytes in a record"));
    }
    if signature.len() > SIGNATURE_LEN_MAX {
        return Err(ConvertError::Field("signature"));
    }
    let decoded = proto::routing::RecordBody::decode(body).map_err(|_| ConvertError::Encoding)?;
    let key = parse_key(decoded.kind, &decoded.origin, &decoded.subkey)?;
    if decoded.lifetime_s > key.kind.lifetime_s_max() {
        return Err(ConvertError::Field("lifetime"));
    }
    let payload = if decoded.lifetime_s == 0 {
        purge_payload(key.kind, &decoded.payload)?
    } else {
        parse_payload(key, decoded.sequence, &decoded.payload)?
    };
    Ok(Record {
        key,
        sequence: decoded.sequence,
        lifetime_s: decoded.lifetime_s,
        payload,
        sealed: sealed(body, signature),
    })
}

/// A body and the signature over it.
#[must_use]
pub fn sealed(body: &[u8], signature: &[u8]) -> Sealed {
    Sealed { body: body.into(), signature: signature.into(), digest: body_digest(body) }
}

/// That by which editions of one sequence are told apart.
#[must_use]
pub fn body_digest(body: &[u8]) -> Digest {
    let sha256 = digest::digest(&digest::SHA256, body);
    let mut half = [0; 16];
    half.copy_from_slice(&sha256.as_ref()[..16]);
    Digest(half)
}

/// Only pages, and kinds we know nothing about, can be purged: a router leaves with a farewell, an endorsement is withdrawn by
/// one that is no longer valid, and a revocation stands.
fn purge_payload(kind: RecordKind, payload: &[u8]) -> Result<Payload, ConvertError> {
    match kind {
        _ if !payload.is_empty() => Err(ConvertError::Field("purge")),
        RecordKind::AddressPage => Ok(Payload::AddressPage(skein_core::AddressPage::default())),
        RecordKind::Unknown(_) => Ok(Payload::Unknown),
        RecordKind::SiteStatement
        | RecordKind::Endorsement
        | RecordKind::Revocation
        | RecordKind::RouterLsa => Err(ConvertError::Field("purge")),
    }
}

fn parse_payload(key: RecordKey, sequence: u64, bytes: &[u8]) -> Result<Payload, ConvertError> {
    let payload = match key.kind {
        RecordKind::SiteStatement => {
            let statement = trust::parse_statement(&decode(bytes)?)?;
            let same = key == RecordKey::statement(statement.site)
                && statement.sequence() == Some(sequence);
            check(same, "site statement")?;
            Payload::SiteStatement(Arc::new(statement))
        }
        RecordKind::Endorsement => {
            let endorsement = trust::parse_endorsement(&decode(bytes)?, sequence)?;
            let same = key == RecordKey::endorsement(endorsement.issuer, endorsement.subject);
            check(same, "endorsement")?;
            Payload::Endorsement(endorsement)
        }
        RecordKind::Revocation => {
            let revocation = trust::parse_revocation(&decode(bytes)?, sequence)?;
            let same = key == RecordKey::revocation(revocation.issuer, revocation.subject);
            check(same, "revocation")?;
            Payload::Revocation(revocation)
        }
        RecordKind::RouterLsa => {
            let lsa = routing::parse_lsa(&decode(bytes)?)?;
            check(key == RecordKey::lsa(lsa.router), "router LSA")?;
            Payload::RouterLsa(Arc::new(lsa))
        }
        RecordKind::AddressPage => {
            check(matches!(key.origin, Origin::Router(_)), "address page")?;
            Payload::AddressPage(routing::parse_page(&decode(bytes)?, key.subkey)?)
        }
        RecordKind::Unknown(_) => Payload::Unknown,
    };
    Ok(payload)
}

fn decode<M: prost::Message + Default>(bytes: &[u8]) -> Result<M, ConvertError> {
    M::decode(bytes).map_err(|_| ConvertError::Encoding)
}

fn check(holds: bool, what: &'static str) -> Result<(), ConvertError> {
    if holds { Ok(()) } else { Err(ConvertError::Field(what)) }
}

/// At most `max` items.
fn at_most<T>(items: &[T], max: usize, what: &'static str) -> Result<(), ConvertError> {
    if items.len() <= max { Ok(()) } else { Err(ConvertError::TooMany(what)) }
}

impl TryFrom<&proto::routing::Record> for Record {
    type Error = ConvertError;

    fn try_from(record: &proto::routing::Record) -> Result<Self, ConvertError> {
        parse_record(&record.body, &record.signature)
    }
}

impl From<&Record> for proto::routing::Record {
    fn from(record: &Record) -> Self {
        Self {
            body: Bytes::from_owner(Arc::clone(&record.sealed.body)),
            signature: Bytes::from_owner(Arc::clone(&record.sealed.signature)),
        }
    }
}

/// A message about the database, taken from a link's control stream; `None` for those that are not.
///
/// # Errors
/// [`ConvertError`] when anything in it is malformed: the neighbour breaks the protocol.
pub fn parse_message(
    message: &proto::routing::LinkMessage,
) -> Result<Option<Message>, ConvertError> {
    use proto::routing::link_message::Message as Wire;
    Ok(Some(match &message.message {
        Some(Wire::Summary(summary)) => {
            Message::Summary { headers: parse_headers(&summary.headers)?, last: summary.last }
        }
        Some(Wire::Request(request)) => {
            Message::Request { headers: parse_headers(&request.headers)? }
        }
        Some(Wire::Records(records)) => {
            at_most(&records.records, RECORDS_MAX, "records")?;
            let records = records.records.iter().map(parse_aged).collect::<Result<_, _>>()?;
            Message::Records { records }
        }
        _ => return Ok(None),
    }))
}

fn parse_headers(
    headers: &[proto::routing::RecordHeader],
) -> Result<Vec<RecordHeader>, ConvertError> {
    at_most(headers, HEADERS_MAX, "record headers")?;
    let parse = |header: &proto::routing::RecordHeader| {
        let key = parse_key(header.kind, &header.origin, &header.subkey)?;
        let digest = header.digest.as_slice().try_into();
        let digest = Digest(digest.map_err(|_| ConvertError::Field("record digest"))?);
        Ok(RecordHeader { key, edition: Edition { sequence: header.sequence, digest } })
    };
    headers.iter().map(parse).collect()
}

fn parse_aged(aged: &proto::routing::AgedRecord) -> Result<AgedRecord, ConvertError> {
    let record = aged.record.as_ref().ok_or(ConvertError::Field("record"))?;
    let record = Record::try_from(record)?;
    let remaining_s = aged.remaining_s.min(record.lifetime_s);
    Ok(AgedRecord { record: Arc::new(record), remaining_s })
}

impl From<&Message> for proto::routing::LinkMessage {
    fn from(message: &Message) -> Self {
        use proto::routing::{self, link_message::Message as Wire};
        let headers =
            |headers: &[RecordHeader]| headers.iter().map(header_to_proto).collect::<Vec<_>>();
        let message = match message {
            Message::Summary { headers: h, last } => {
                Wire::Summary(routing::DatabaseSummary { headers: headers(h), last: *last })
            }
            Message::Request { headers: h } => {
                Wire::Request(routing::DatabaseRequest { headers: headers(h) })
            }
            Message::Records { records } => {
                let aged = |aged: &AgedRecord| routing::AgedRecord {
                    record: Some((&*aged.record).into()),
                    remaining_s: aged.remaining_s,
                };
                Wire::Records(routing::Records { records: records.iter().map(aged).collect() })
            }
        };
        Self { message: Some(message) }
    }
}

fn header_to_proto(header: &RecordHeader) -> proto::routing::RecordHeader {
    proto::routing::RecordHeader {
        kind: kind_number(header.key.kind),
        origin: origin_bytes(header.key.origin).to_vec(),
        subkey: header.key.subkey.as_bytes().to_vec(),
        sequence: header.edition.sequence,
        digest: header.edition.digest.0.to_vec(),
    }
}

fn parse_key(kind: i32, origin: &[u8], subkey: &[u8]) -> Result<RecordKey, ConvertError> {
    let number = u32::try_from(kind).map_err(|_| ConvertError::Field("record kind"))?;
    Ok(RecordKey {
        kind: RecordKind::from_number(number).ok_or(ConvertError::Field("record kind"))?,
        origin: match origin.len() {
            32 => Origin::Site(parse_site_id(origin)?),
            16 => Origin::Router(parse_router_id(origin)?),
            _ => return Err(ConvertError::Field("record origin")),
        },
        subkey: Subkey::new(subkey).ok_or(ConvertError::Field("record subkey"))?,
    })
}

/// Numbers beyond `i32` are refused when parsed, so none is ever made.
fn kind_number(kind: RecordKind) -> i32 {
    i32::try_from(kind.number()).unwrap_or(i32::MAX)
}

fn origin_bytes(origin: Origin) -> Box<[u8]> {
    match origin {
        Origin::Site(site) => Box::new(site.0),
        Origin::Router(router) => Box::new(router.0),
    }
}

/// A site id from the wire.
///
/// # Errors
/// [`ConvertError::Field`] unless it has 32 bytes.
pub fn parse_site_id(bytes: &[u8]) -> Result<SiteId, ConvertError> {
    bytes.try_into().map(SiteId).map_err(|_| ConvertError::Field("site id"))
}

/// A router id from the wire.
///
/// # Errors
/// [`ConvertError::Field`] unless it has 16 bytes.
pub fn parse_router_id(bytes: &[u8]) -> Result<RouterId, ConvertError> {
    bytes.try_into().map(RouterId).map_err(|_| ConvertError::Field("router id"))
}

/// Longest name of a site or router in bytes.
const NAME_LEN_MAX: usize = 253;
/// Longest `host:port` in bytes.
const ENDPOINT_LEN_MAX: usize = 270;
/// Most endpoints of a site or router.
const ENDPOINTS_MAX: usize = 64;
/// Longest certificate in bytes.
const CERTIFICATE_LEN_MAX: usize = 8 * 1024;

/// Names come from other sites and end up in logs and on terminals: no control characters.
fn parse_name(name: &str, what: &'static str) -> Result<Arc<str>, ConvertError> {
    check(name.len() <= NAME_LEN_MAX && !name.chars().any(char::is_control), what)?;
    Ok(name.into())
}

fn parse_endpoints(endpoints: &[String]) -> Result<Vec<String>, ConvertError> {
    at_most(endpoints, ENDPOINTS_MAX, "endpoints")?;
    for endpoint in endpoints {
        let legal = endpoint.bytes().all(|byte| byte.is_ascii_graphic());
        check(legal && (1..=ENDPOINT_LEN_MAX).contains(&endpoint.len()), "endpoint")?;
    }
    Ok(endpoints.to_vec())
}

fn parse_certificate(der: &[u8]) -> Result<Arc<[u8]>, ConvertError> {
    check((1..=CERTIFICATE_LEN_MAX).contains(&der.len()), "certificate")?;
    Ok(der.into())
}

#[cfg(test)]
mod tests;
