//! Statements, endorsements, revocations and key histories: what holds, and every way in which it must not.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod common;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use common::{DAY, NOW, Site};
use proptest::prelude::*;
use prost::Message as _;
use skein_core::SiteId;
use skein_trust::{
    ChainError, EndorsementDraft, IdentityError, Issuer, KeyChain, SiteIdentity, StatementDraft,
    StatementError, verify_endorsement, verify_revocation, verify_statement,
};
use skein_wire::proto::{
    routing::{Record, RecordBody, RecordKind},
    trust::{Endorsement, Inception, KeyRotation, Membership, SiteStatement},
};

fn statement(site: &Site, epoch: u64) -> Record {
    site.identity.statement(&StatementDraft {
        epoch,
        name: "amsterdam".to_owned(),
        ca_certificates: vec![site.ca.certificate().to_vec()],
        endpoints: vec!["amsterdam.example:7443".to_owned()],
        network_id: None,
        expires_unix_s: NOW + 7 * DAY,
    })
}

fn endorsement(issuer: &Site, subject: SiteId) -> Record {
    issuer.identity.endorsement(&EndorsementDraft {
        subject,
        membership: Membership::Member,
        scope: None,
        may_endorse: true,
        sequence: 7,
        valid_until_unix_s: NOW + 7 * DAY,
    })
}

/// Changes the content of a record and signs it again with the same identity.
fn resign<P: prost::Message + Default>(
    signer: &ForgedKey,
    record: &Record,
    edit: impl FnOnce(&mut RecordBody, &mut P),
) -> Record {
    let mut body = RecordBody::decode(&record.body[..]).unwrap();
    let mut payload = P::decode(&body.payload[..]).unwrap();
    edit(&mut body, &mut payload);
    body.payload = payload.encode_to_vec();
    let body = body.encode_to_vec();
    let signature = signer.sign(&[b"skein-record/1", &body]);
    Record { body: body.into(), signature: signature.into() }
}

/// A key made by hand, so that tests can sign what the API would not.
struct ForgedKey(Ed25519KeyPair);

impl ForgedKey {
    fn new(seed: u8) -> Self {
        Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
    }

    fn public(&self) -> [u8; 32] {
        self.0.public_key().as_ref().try_into().unwrap()
    }

    fn commitment(&self) -> [u8; 32] {
        sha256(&self.public())
    }

    fn sign(&self, parts: &[&[u8]]) -> Vec<u8> {
        self.0.sign(&parts.concat()).as_ref().to_vec()
    }

    /// The step number `step` of `site`'s history, to this key, committing to `next`.
    fn rotation(&self, site: SiteId, step: u32, next: &Self) -> KeyRotation {
        let next_key_sha256 = next.commitment().to_vec();
        let parts: [&[u8]; 4] =
            [b"skein-rotation/1", &site.0, &step.to_be_bytes(), &next_key_sha256];
        KeyRotation {
            identity_key: self.public().to_vec(),
            signature: self.sign(&parts),
            next_key_sha256,
        }
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref().try_into().unwrap()
}

/// A site whose keys tests hold: born with 1, 2 committed.
fn forged_site() -> (SiteId, Inception, [ForgedKey; 5]) {
    let keys = [1, 2, 3, 4, 5].map(ForgedKey::new);
    let inception = Inception {
        identity_key: keys[0].public().to_vec(),
        next_key_sha256: keys[1].commitment().to_vec(),
    };
    let site = skein_trust::site_id(&keys[0].public(), &keys[1].commitment());
    (site, inception, keys)
}

#[test]
fn a_statement_certifies_itself() {
    let site = Site::new();
    let record = statement(&site, 3);
    let verified = verify_statement(&record).unwrap();
    assert_eq!(verified.site, site.id());
    assert_eq!(verified.network_id, site.id());
    assert_eq!(verified.chain.key, site.identity.public_key());
    assert_eq!(verified.statement.name, "amsterdam");
    assert_eq!(verified.current_at(NOW), Ok(()));
    let expiry = NOW + 7 * DAY;
    assert_eq!(verified.current_at(expiry), Err(StatementError::Expired(expiry)));
}

#[test]
fn rotation_keeps_the_id_and_outranks_whatever_was_said_before() {
    let mut site = Site::new();
    let id = site.id();
    let before = verify_statement(&statement(&site, u64::MAX)).unwrap();
    let sequence_before = body(&statement(&site, u64::MAX)).sequence;
    for _ in 0..3 {
        site.identity.rotate(&SystemRandom::new()).unwrap();
    }
    let after = verify_statement(&statement(&site, 1)).unwrap();
    assert_eq!(after.site, id);
    assert!(after.chain.continues(&before.chain) && !before.chain.continues(&after.chain));
    assert!(body(&statement(&site, 1)).sequence > sequence_before);

    let stored = site.identity.to_secret_bytes();
    let read = SiteIdentity::from_secret_bytes(&stored).unwrap();
    assert_eq!(read.site_id(), id);
    assert_eq!(read.public_key(), site.identity.public_key());
    for cut in [0, 10, stored.len() - 1] {
        assert!(SiteIdentity::from_secret_bytes(&stored[..cut]).is_err());
    }
    let mut damaged = stored.to_vec();
    damaged[20] ^= 1;
    assert_eq!(SiteIdentity::from_secret_bytes(&damaged).unwrap_err(), IdentityError::Damaged);
}

fn body(record: &Record) -> RecordBody {
    RecordBody::decode(&record.body[..]).unwrap()
}

#[test]
fn secrets_do_not_show() {
    let site = Site::new();
    let shown = format!("{:?} {:?}", site.identity, site.ca);
    let stored = site.identity.to_secret_bytes();
    let seed = &stored[b"skein-identity/1\n".len()..][..32];
    let listed = format!("{seed:?}");
    assert!(!shown.contains(listed.trim_matches(['[', ']'])), "{shown}");
}

#[test]
fn a_history_must_follow_its_commitments_and_be_signed_at_every_step() {
    let (site, inception, keys) = forged_site();
    let check = |rotations: &[KeyRotation]| KeyChain::verify(Some(site), &inception, rotations);
    let first = keys[1].rotation(site, 0, &keys[2]);
    let second = keys[2].rotation(site, 1, &keys[3]);
    let good = check(&[first.clone(), second.clone()]).unwrap();
    assert_eq!((good.key, good.rotations()), (keys[2].public(), 2));

    assert_eq!(check(&[keys[4].rotation(site, 0, &keys[2])]), Err(ChainError::NotCommitted(0)));
    assert_eq!(check(&[second.clone(), first.clone()]), Err(ChainError::NotCommitted(0)));
    // The key of a step is public once it is used; only its owner can say what comes next.
    let stolen = KeyRotation { next_key_sha256: keys[4].commitment().to_vec(), ..first.clone() };
    assert_eq!(check(&[stolen]), Err(ChainError::Signature(0)));
    let of_another_step = KeyRotation { signature: second.signature.clone(), ..first.clone() };
    assert_eq!(check(&[of_another_step]), Err(ChainError::Signature(0)));
    let short = KeyRotation { identity_key: vec![0; 31], ..first.clone() };
    assert_eq!(check(&[first, short]), Err(ChainError::Malformed(1)));
    assert_eq!(check(&vec![second; 65]), Err(ChainError::TooLong));

    let other = SiteId([9; 32]);
    assert_eq!(KeyChain::verify(Some(other), &inception, &[]), Err(ChainError::WrongSite));
}

#[test]
fn a_fork_is_not_a_continuation() {
    let (site, inception, keys) = forged_site();
    let first = keys[1].rotation(site, 0, &keys[2]);
    let known =
        KeyChain::verify(None, &inception, &[first, keys[2].rotation(site, 1, &keys[3])]).unwrap();
    // Key 2 was retired by key 3 and then stolen: it can sign another future, but not this one.
    let fork = [keys[1].rotation(site, 0, &keys[4]), keys[4].rotation(site, 1, &keys[0])];
    let fork = KeyChain::verify(None, &inception, &fork).unwrap();
    assert!(!fork.continues(&known));
}

#[test]
fn forged_statements_are_refused() {
    let site = Site::new();
    let (forged, inception, keys) = forged_site();
    let record = statement(&site, 1);
    let attacker = &keys[0];
    let refused = |record: &Record| verify_statement(record).unwrap_err();

    let unchanged = resign::<SiteStatement>(attacker, &record, |_, _| {});
    assert_eq!(refused(&unchanged), StatementError::Signature);
    let own_inception = resign::<SiteStatement>(attacker, &record, |_, s| {
        s.inception = Some(inception.clone());
    });
    assert_eq!(refused(&own_inception), StatementError::Chain(ChainError::WrongSite));

    let own = |edit: fn(&mut RecordBody, &mut SiteStatement)| {
        resign::<SiteStatement>(attacker, &record, |body, s| {
            s.inception = Some(inception.clone());
            (s.site_id, body.origin) = (forged.0.to_vec(), forged.0.to_vec());
            edit(body, s);
        })
    };
    assert_eq!(verify_statement(&own(|_, _| {})).unwrap().site, forged, "the frame is good");
    assert_eq!(refused(&own(|body, _| body.sequence += 1)), StatementError::Envelope);
    assert_eq!(refused(&own(|body, _| body.origin = vec![1; 32])), StatementError::Envelope);
    assert_eq!(refused(&own(|body, _| body.subkey = vec![1])), StatementError::Envelope);
    assert_eq!(refused(&own(|_, s| s.epoch = 1 << 48)), StatementError::Epoch);
    let other_kind = own(|body, _| body.kind = RecordKind::Endorsement.into());
    assert_eq!(refused(&other_kind), StatementError::Kind);
    let malformed = |edit| assert!(matches!(refused(&own(edit)), StatementError::Malformed(_)));
    malformed(|_, s| s.name = "x".repeat(64));
    malformed(|_, s| s.ca_certificates = vec![Vec::new(); 9]);
    malformed(|_, s| s.ca_certificates = vec![vec![0; 9 * 1024]]);
    malformed(|_, s| s.endpoints = vec!["x".to_owned(); 33]);
    malformed(|_, s| s.endpoints = vec!["x".repeat(260)]);
    malformed(|_, s| s.network_id.clear());
    assert_eq!(refused(&own(|_, s| s.name = "x".repeat(70_000))), StatementError::TooLong);
}

#[test]
fn endorsements_and_revocations_are_their_issuers() {
    let (issuer, subject, other) = (Site::new(), Site::new(), Site::new());
    let by = |site: &Site| Issuer {
        site: site.id(),
        key: site.identity.public_key(),
        rotations: site.identity.rotations(),
    };
    let record = endorsement(&issuer, subject.id());
    let verified = verify_endorsement(&record, &by(&issuer)).unwrap();
    assert_eq!(verified.subject, subject.id().0);

    assert_eq!(verify_endorsement(&record, &by(&other)), Err(StatementError::Signature));
    let wrong_key = Issuer { key: other.identity.public_key(), ..by(&issuer) };
    assert_eq!(verify_endorsement(&record, &wrong_key), Err(StatementError::Signature));
    let (id, _, keys) = forged_site();
    let forger = Issuer { site: id, key: keys[0].public(), rotations: 0 };
    let forge = |edit: fn(&mut RecordBody, &mut Endorsement)| {
        let record = resign::<Endorsement>(&keys[0], &record, |body, e| {
            (body.origin, e.issuer) = (id.0.to_vec(), id.0.to_vec());
            edit(body, e);
        });
        verify_endorsement(&record, &forger)
    };
    assert!(forge(|_, _| {}).is_ok(), "the frame is good");
    assert_eq!(forge(|body, _| body.subkey = vec![1; 32]), Err(StatementError::Envelope));
    assert_eq!(forge(|_, e| e.subject = vec![1; 32]), Err(StatementError::Envelope));
    assert_eq!(forge(|_, e| e.sequence += 1), Err(StatementError::Envelope));
    let malformed = |edit| assert!(matches!(forge(edit), Err(StatementError::Malformed(_))));
    malformed(|_, e| e.membership = 0);
    malformed(|_, e| e.membership = 9);
    malformed(|_, e| e.membership = Membership::Guest.into());

    let revocation = issuer.identity.revocation(subject.id(), 1, NOW, "laptop stolen");
    assert_eq!(verify_revocation(&revocation, &by(&issuer)).unwrap().reason, "laptop stolen");
    assert_eq!(verify_endorsement(&revocation, &by(&issuer)), Err(StatementError::Kind));
    assert_eq!(verify_revocation(&revocation, &wrong_key), Err(StatementError::Signature));
}

#[test]
fn a_thief_of_a_retired_key_cannot_outrank_its_owner() {
    let (mut issuer, subject) = (Site::new(), Site::new());
    let say = |issuer: &Site, sequence| {
        let draft = EndorsementDraft {
            subject: subject.id(),
            membership: Membership::Member,
            scope: None,
            may_endorse: true,
            sequence,
            valid_until_unix_s: NOW + DAY,
        };
        issuer.identity.endorsement(&draft)
    };
    let stolen = say(&issuer, u64::MAX);
    issuer.identity.rotate(&SystemRandom::new()).unwrap();
    let owners = say(&issuer, 1);
    assert!(body(&owners).sequence > body(&stolen).sequence);
    let chain = verify_statement(&statement(&issuer, 1)).unwrap().chain;
    assert!(verify_endorsement(&owners, &Issuer::from(&chain)).is_ok());
    let refused = verify_endorsement(&stolen, &Issuer::from(&chain));
    assert_eq!(refused, Err(StatementError::Signature));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_bytes_are_refused_without_panic(body: Vec<u8>, signature: Vec<u8>) {
        let record = Record { body: body.into(), signature: signature.into() };
        prop_assert!(verify_statement(&record).is_err());
        let issuer = Issuer { site: SiteId([0; 32]), key: [0; 32], rotations: 0 };
        prop_assert!(verify_endorsement(&record, &issuer).is_err());
        prop_assert!(verify_revocation(&record, &issuer).is_err());
    }

    #[test]
    fn any_changed_bit_is_noticed(position: prop::sample::Index, bit in 0_u8..8) {
        let site = Site::new();
        let record = statement(&site, 1);
        let mut bytes = record.body.to_vec();
        let at = position.index(bytes.len() + record.signature.len());
        let mut signature = record.signature.to_vec();
        if at < bytes.len() { bytes[at] ^= 1 << bit } else { signature[at - bytes.len()] ^= 1 << bit }
        let changed = Record { body: bytes.into(), signature: signature.into() };
        prop_assert!(verify_statement(&changed).is_err());
    }

    #[test]
    fn stored_identities_are_read_without_panic(tail: Vec<u8>) {
        let bytes = [b"skein-identity/1\n".as_slice(), &tail].concat();
        prop_assert!(SiteIdentity::from_secret_bytes(&bytes).is_err());
    }
}
