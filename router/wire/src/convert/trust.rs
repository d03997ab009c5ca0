//! Statements of sites.

use super::{
    ConvertError, SIGNATURE_LEN_MAX, at_most, check, parse_certificate, parse_endpoints,
    parse_name, parse_site_id,
};
use crate::proto::trust as wire;
use skein_core::{
    ADDRESS_LEN_MAX, Address, Endorsement, Inception, KeyRotation, Membership, Pattern, Revocation,
    Scope, SiteStatement,
};
use std::{collections::BTreeSet, sync::Arc};

/// Most identity key changes in the life of a site.
const ROTATIONS_MAX: usize = 64;
/// Most certificate authorities of a site at a time: own, external, and their successors.
const AUTHORITIES_MAX: usize = 8;
/// Most patterns in one direction of a scope.
const PATTERNS_MAX: usize = 256;
/// Longest reason of a revocation in bytes.
const REASON_LEN_MAX: usize = 512;

pub(super) fn parse_statement(
    statement: &wire::SiteStatement,
) -> Result<SiteStatement, ConvertError> {
    at_most(&statement.rotations, ROTATIONS_MAX, "key rotations")?;
    at_most(&statement.ca_certificates, AUTHORITIES_MAX, "certificate authorities")?;
    let inception = statement.inception.as_ref().ok_or(ConvertError::Field("inception"))?;
    let rotation = |step: &wire::KeyRotation| {
        Ok(KeyRotation {
            identity_key: bytes32(&step.identity_key, "identity key")?,
            next_key_sha256: bytes32(&step.next_key_sha256, "next key hash")?,
            signature: {
                check(step.signature.len() <= SIGNATURE_LEN_MAX, "rotation signature")?;
                step.signature.as_slice().into()
            },
        })
    };
    let certificates = statement.ca_certificates.iter().map(|der| parse_certificate(der));
    Ok(SiteStatement {
        site: parse_site_id(&statement.site_id)?,
        inception: Inception {
            identity_key: bytes32(&inception.identity_key, "identity key")?,
            next_key_sha256: bytes32(&inception.next_key_sha256, "next key hash")?,
        },
        rotations: statement.rotations.iter().map(rotation).collect::<Result<_, _>>()?,
        epoch: statement.epoch,
        name: parse_name(&statement.name, "site name")?,
        ca_certificates: certificates.collect::<Result<_, _>>()?,
        endpoints: parse_endpoints(&statement.endpoints)?,
        expires_unix_s: statement.expires_unix_s,
        network: parse_site_id(&statement.network_id)?,
    })
}

impl From<&SiteStatement> for wire::SiteStatement {
    fn from(statement: &SiteStatement) -> Self {
        let rotation = |step: &KeyRotation| wire::KeyRotation {
            identity_key: step.identity_key.to_vec(),
            next_key_sha256: step.next_key_sha256.to_vec(),
            signature: step.signature.to_vec(),
        };
        Self {
            site_id: statement.site.0.to_vec(),
            inception: Some(wire::Inception {
                identity_key: statement.inception.identity_key.to_vec(),
                next_key_sha256: statement.inception.next_key_sha256.to_vec(),
            }),
            rotations: statement.rotations.iter().map(rotation).collect(),
            epoch: statement.epoch,
            name: statement.name.to_string(),
            ca_certificates: statement.ca_certificates.iter().map(|der| der.to_vec()).collect(),
            endpoints: statement.endpoints.clone(),
            expires_unix_s: statement.expires_unix_s,
            network_id: statement.network.0.to_vec(),
            // Routers go by the expiry; only controllers, which read the signed bytes, ask why.
            leaving: false,
        }
    }
}

pub(super) fn parse_endorsement(
    endorsement: &wire::Endorsement,
    sequence: u64,
) -> Result<Endorsement, ConvertError> {
    check(endorsement.sequence == sequence, "endorsement sequence")?;
    let scope = endorsement.scope.clone().unwrap_or_default();
    Ok(Endorsement {
        issuer: parse_site_id(&endorsement.issuer)?,
        subject: parse_site_id(&endorsement.subject)?,
        membership: match endorsement.membership() {
            wire::Membership::Member => Membership::Member,
            wire::Membership::Guest => Membership::Guest,
            wire::Membership::Unspecified => return Err(ConvertError::Field("membership")),
        },
        scope: Scope {
            consume: parse_patterns(&scope.consume)?,
            provide: parse_patterns(&scope.provide)?,
            transit: scope.transit,
        },
        may_endorse: endorsement.may_endorse,
        valid_until_unix_s: if endorsement.withdrawn {
            i64::MIN
        } else {
            endorsement.valid_until_unix_s
        },
    })
}

pub(super) fn endorsement_to_proto(endorsement: &Endorsement, sequence: u64) -> wire::Endorsement {
    let membership = match endorsement.membership {
        Membership::Member => wire::Membership::Member,
        Membership::Guest => wire::Membership::Guest,
    };
    let patterns = |patterns: &BTreeSet<Pattern>| {
        patterns.iter().map(|pattern| pattern.0.to_string()).collect()
    };
    wire::Endorsement {
        issuer: endorsement.issuer.0.to_vec(),
        subject: endorsement.subject.0.to_vec(),
        membership: membership.into(),
        scope: (endorsement.membership == Membership::Guest).then(|| wire::Scope {
            consume: patterns(&endorsement.scope.consume),
            provide: patterns(&endorsement.scope.provide),
            transit: endorsement.scope.transit,
        }),
        may_endorse: endorsement.may_endorse,
        sequence,
        valid_until_unix_s: endorsement.valid_until_unix_s,
        // Routers go by the expiry; only controllers, which read the signed bytes, ask why.
        withdrawn: false,
    }
}

pub(super) fn parse_revocation(
    revocation: &wire::Revocation,
    sequence: u64,
) -> Result<Revocation, ConvertError> {
    check(revocation.sequence == sequence, "revocation sequence")?;
    check(revocation.reason.len() <= REASON_LEN_MAX, "revocation reason")?;
    check(!revocation.reason.chars().any(char::is_control), "revocation reason")?;
    Ok(Revocation {
        issuer: parse_site_id(&revocation.issuer)?,
        subject: parse_site_id(&revocation.subject)?,
        issued_unix_s: revocation.issued_unix_s,
        reason: Arc::from(revocation.reason.as_str()),
    })
}

pub(super) fn revocation_to_proto(revocation: &Revocation, sequence: u64) -> wire::Revocation {
    wire::Revocation {
        issuer: revocation.issuer.0.to_vec(),
        subject: revocation.subject.0.to_vec(),
        sequence,
        issued_unix_s: revocation.issued_unix_s,
        reason: revocation.reason.to_string(),
    }
}

/// A pattern is an address, or the beginning of one and `*`.
fn parse_patterns(patterns: &[String]) -> Result<BTreeSet<Pattern>, ConvertError> {
    at_most(patterns, PATTERNS_MAX, "patterns")?;
    let parse = |text: &String| {
        let legal = match text.strip_suffix('*') {
            Some(prefix) => {
                let of_address =
                    |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
                prefix.len() <= ADDRESS_LEN_MAX && prefix.bytes().all(of_address)
            }
            None => text.parse::<Address>().is_ok(),
        };
        check(legal, "pattern")?;
        Ok(Pattern(text.as_str().into()))
    };
    patterns.iter().map(parse).collect()
}

fn bytes32(bytes: &[u8], what: &'static str) -> Result<[u8; 32], ConvertError> {
    bytes.try_into().map_err(|_| ConvertError::Field(what))
}
