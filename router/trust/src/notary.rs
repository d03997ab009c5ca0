//! Seals this router's records and checks those of others: the engine's [`Notary`] with real signatures.
//!
//! | record | must be signed by |
//! |---|---|
//! | site statement | the identity key at the end of the chain that begins with the site's id |
//! | endorsement, revocation | the issuer's identity key, by the issuer's statement in the database |
//! | router LSA | the leaf it carries, which must name this very router and be issued by a CA its site states |
//! | address page | the leaf in the LSA of its origin |
//!
//! Records of kinds unknown here are held to the rule of their origin: the identity key of a site, or the leaf in the
//! LSA of a router.
//!
//! [`Rejection::Forged`] is for what nobody can ever have found right, whatever else was known there. Whose keys or CAs have
//! changed, or who says different things to different neighbours, must not turn those neighbours against one another.

use crate::{
    ca::{CertificateRole, SpiffeId},
    certificate::{PeerError, Usage, leaf_id, verify_chain},
    hash::sha256,
    identity::{self, PublicKey, handle},
    memo::Memo,
    statement::{
        Issuer, StatementError, rotations_before, verify_endorsement, verify_revocation,
        verify_statement,
    },
    tls::IdentityCell,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use skein_core::{
    Handle, Known, Notary, Origin, Payload, Record, RecordDraft, Rejection, RouterId, RouterLsa,
    SealError, Sealed, SiteId,
};
use skein_wire::{
    convert::{encode_body, sealed, signed_bytes},
    proto,
};
use std::{sync::Arc, time::Duration};
use webpki::EndEntityCert;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Checks remembered: every record of 1,000 routers with 10 pages each, at about 60 bytes an entry.
const MEMO_LEN_MAX: usize = 16 * 1024;

/// Handles a router may draw in one boot; two thousand routers make it draw a second one once in a million boots.
const HANDLE_ATTEMPTS_MAX: u32 = 1024;

/// See the module.
#[derive(Debug)]
pub struct RouterNotary {
    identity: Arc<IdentityCell>,
    router: RouterId,
    boot_epoch: u64,
    memo: Memo,
}

impl RouterNotary {
    /// The notary of `router` in its boot `boot_epoch`; it seals with the identity in force.
    #[must_use]
    pub fn new(identity: Arc<IdentityCell>, router: RouterId, boot_epoch: u64) -> Self {
        Self { identity, router, boot_epoch, memo: Memo::new(MEMO_LEN_MAX) }
    }

    fn verify_site_statement(
        &mut self,
        record: &Record,
        known: &Known<'_>,
    ) -> Result<(), Rejection> {
        let memo_key = sha256(&[b"statement", &digest(record)]);
        if self.memo.contains(&memo_key, known.unix_s) {
            return Ok(());
        }
        let verified = verify_statement(&envelope(record)).map_err(rejection)?;
        if let Some(known) = known.statement(verified.site)
            && !verified.continues(known)
        {
            return Err(Rejection::Invalid("it contradicts the key history known of this site"));
        }
        self.memo.insert(memo_key, i64::MAX);
        Ok(())
    }

    /// Checks a record signed by the identity key of a site that is known already.
    fn verify_by_site(
        &mut self,
        record: &Record,
        site: SiteId,
        known: &Known<'_>,
    ) -> Result<(), Rejection> {
        let missing = Rejection::Missing(Origin::Site(site));
        let Some(statement) = known.statement(site) else { return Err(missing) };
        let issuer = Issuer::from(&**statement);
        let rotations = rotations_before(record.sequence);
        let counts_rotations = record.key.kind.is_statement();
        if counts_rotations && rotations > issuer.rotations as u64 {
            return Err(missing);
        }
        let memo_key = sha256(&[b"site", &issuer.key, &digest(record)]);
        if self.memo.contains(&memo_key, known.unix_s) {
            return Ok(());
        }
        let verdict = match &record.payload {
            Payload::Endorsement(_) => verify_endorsement(&envelope(record), &issuer).map(drop),
            Payload::Revocation(_) => verify_revocation(&envelope(record), &issuer).map(drop),
            _ => verify_unknown(record, &issuer.key),
        };
        // The site's id commits to its first two keys; of later ones it may tell some this and others that.
        let is_certain = counts_rotations && rotations <= 1 && rotations == issuer.rotations as u64;
        verdict.map_err(|error| match error {
            StatementError::Signature if !is_certain => {
                Rejection::Invalid("it is not signed by the identity key known of its site")
            }
            _ => rejection(error),
        })?;
        self.memo.insert(memo_key, i64::MAX);
        Ok(())
    }

    /// Checks a record signed by the key of a router, under the LSA that is to be believed for it.
    fn verify_by_router(
        &mut self,
        record: &Record,
        lsa: &RouterLsa,
        known: &Known<'_>,
    ) -> Result<(), Rejection> {
        let until_unix_s = self.verify_leaf(lsa, known)?;
        let memo_key = sha256(&[b"router", &sha256(&[&lsa.certificate]), &digest(record)]);
        if self.memo.contains(&memo_key, known.unix_s) {
            return Ok(());
        }
        let leaf = CertificateDer::from(&lsa.certificate[..]);
        let leaf = EndEntityCert::try_from(&leaf)
            .map_err(|_| Rejection::Invalid("its certificate cannot be read"))?;
        let message = signed_bytes(&record.sealed.body);
        let signed = [webpki::aws_lc_rs::ED25519, webpki::aws_lc_rs::ECDSA_P256_SHA256]
            .iter()
            .any(|&alg| leaf.verify_signature(alg, &message, &record.sealed.signature).is_ok());
        if !signed {
            return Err(match record.payload {
                Payload::RouterLsa(_) => Rejection::Forged("it is not signed by the key in it"),
                _ => Rejection::Invalid("it is not signed by the key known of its router"),
            });
        }
        self.memo.insert(memo_key, until_unix_s);
        Ok(())
    }

    /// Checks that the certificate in an LSA is that router's, by a CA its site states; returns when it expires.
    fn verify_leaf(&mut self, lsa: &RouterLsa, known: &Known<'_>) -> Result<i64, Rejection> {
        let leaf = CertificateDer::from(&lsa.certificate[..]);
        let id = leaf_id(&leaf).map_err(|_| Rejection::Forged("its certificate is no router's"))?;
        let expected =
            SpiffeId { site: lsa.site, role: CertificateRole::Router(lsa.name.to_string()) };
        if id != expected || id.router_id() != Some(lsa.router) {
            return Err(Rejection::Forged("its certificate is another router's"));
        }
        let site = Origin::Site(lsa.site);
        let statement = known.statement(lsa.site).ok_or(Rejection::Missing(site))?;
        if statement.expires_unix_s <= known.unix_s {
            return Err(Rejection::Expired);
        }
        let anchors: Vec<&[u8]> = statement.ca_certificates.iter().map(|ca| &ca[..]).collect();
        let hashes: Vec<[u8; 32]> = anchors.iter().map(|ca| sha256(&[ca])).collect();
        let anchors_sha256 = sha256(&hashes.iter().map(<[u8; 32]>::as_slice).collect::<Vec<_>>());
        let memo_key = sha256(&[b"leaf", &anchors_sha256, &lsa.certificate]);
        if let Some(until_unix_s) = self.memo.until(&memo_key, known.unix_s) {
            return Ok(until_unix_s);
        }
        let now = u64::try_from(known.unix_s).map_err(|_| Rejection::Expired)?;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
        verify_chain(&leaf, &[], Usage::Server, &anchors, &id, now).map_err(
            |error| match error {
                PeerError::Expired { .. } | PeerError::NotYetValid { .. } => Rejection::Expired,
                _ => Rejection::Invalid("its certificate was not issued by a CA known of its site"),
            },
        )?;
        let (_, parsed) = X509Certificate::from_der(&leaf)
            .map_err(|_| Rejection::Invalid("its certificate cannot be read"))?;
        let until_unix_s = parsed.validity().not_after.timestamp();
        self.memo.insert(memo_key, until_unix_s);
        Ok(until_unix_s)
    }
}

impl Notary for RouterNotary {
    fn certificate(&self) -> Option<Arc<[u8]>> {
        self.identity.current().map(|identity| identity.certificate().as_ref().into())
    }

    fn handle(&self, attempt: u32) -> Handle {
        handle(self.router, self.boot_epoch, attempt)
    }

    fn seal(&mut self, draft: RecordDraft) -> Result<Record, SealError> {
        let identity = self.identity.current().ok_or(SealError::NoKey)?;
        let body = encode_body(&draft).map_err(|_| SealError::TooLarge)?;
        let signature = identity.sign(&signed_bytes(&body)).map_err(|_| SealError::NoKey)?;
        let sealed = sealed(&body, &signature);
        let RecordDraft { key, sequence, lifetime_s, payload } = draft;
        Ok(Record { key, sequence, lifetime_s, payload, sealed })
    }

    fn have_same_key(&self, a: &[u8], b: &[u8]) -> bool {
        let key = |certificate: &[u8]| {
            let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
            Some(parsed.public_key().raw.to_vec())
        };
        key(a).is_some_and(|a| Some(a) == key(b))
    }

    fn verify(&mut self, record: &Record, known: &Known<'_>) -> Result<(), Rejection> {
        match (&record.payload, record.key.origin) {
            (Payload::SiteStatement(_), Origin::Site(_)) => {
                self.verify_site_statement(record, known)
            }
            (Payload::RouterLsa(lsa), Origin::Router(router)) if lsa.router == router => {
                // Signatures first: looking for the handle costs more, and is for those that are of the network.
                self.verify_by_router(record, lsa, known)?;
                if !handle_is_own(lsa) {
                    return Err(Rejection::Forged("its handle is not one of its own"));
                }
                Ok(())
            }
            (
                Payload::Endorsement(_) | Payload::Revocation(_) | Payload::Unknown,
                Origin::Site(site),
            ) => self.verify_by_site(record, site, known),
            (Payload::AddressPage(_) | Payload::Unknown, Origin::Router(router)) => {
                let missing = Rejection::Missing(Origin::Router(router));
                let lsa = known.lsa(router).ok_or(missing)?;
                self.verify_by_router(record, lsa, known)
            }
            _ => Err(Rejection::Invalid("its origin cannot say such a thing")),
        }
    }
}

/// A handle follows from router and boot. One that may be chosen could be another router's, which would have to yield
/// again and again.
fn handle_is_own(lsa: &RouterLsa) -> bool {
    (0..HANDLE_ATTEMPTS_MAX)
        .any(|attempt| handle(lsa.router, lsa.boot_epoch, attempt) == lsa.handle)
}

fn verify_unknown(record: &Record, key: &PublicKey) -> Result<(), StatementError> {
    let signed =
        identity::verify(key, &[&signed_bytes(&record.sealed.body)], &record.sealed.signature);
    signed.then_some(()).ok_or(StatementError::Signature)
}

fn digest(record: &Record) -> [u8; 32] {
    let Sealed { body, signature, .. } = &record.sealed;
    // The body's length keeps bytes from moving between the two.
    sha256(&[&(body.len() as u64).to_be_bytes(), body, signature])
}

fn envelope(record: &Record) -> proto::routing::Record {
    proto::routing::Record {
        body: record.sealed.body.to_vec().into(),
        signature: record.sealed.signature.to_vec().into(),
    }
}

fn rejection(error: StatementError) -> Rejection {
    match error {
        StatementError::Expired(_) => Rejection::Expired,
        StatementError::Signature => {
            Rejection::Forged("it is not signed by its site's identity key")
        }
        StatementError::Chain(_) => Rejection::Forged("its key history does not hold"),
        StatementError::TooLong
        | StatementError::Malformed(_)
        | StatementError::Kind
        | StatementError::Envelope
        | StatementError::Epoch => Rejection::Invalid("the statement is malformed"),
    }
}
