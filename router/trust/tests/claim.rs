//! Redeeming a token: proof of identity bound to one connection, nothing that could be replayed, relayed or forged.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod common;

use aws_lc_rs::rand::SystemRandom;
use common::{Clock, DAY, NOW, Site, handshake};
use proptest::prelude::*;
use prost::Message as _;
use skein_core::SiteId;
use skein_trust::{
    CLAIM_EXPORTER_LABEL, CaPin, ClaimDraft, ClaimError, Code, EndorsementDraft, Exporter,
    StatementDraft, StatementError, VerifiedAnswer, claim_client, claim_request, claim_server,
    verify_answer, verify_claim,
};
use skein_wire::proto::{
    claim::{
        ClaimAccepted, ClaimRefused, ClaimRequest, ClaimResponse, claim_refused::Reason,
        claim_response::Outcome,
    },
    routing::Record,
    trust::Membership,
};

const EXPORTER: Exporter = [7; 32];

fn statement(site: &Site) -> Record {
    site.identity.statement(&StatementDraft {
        epoch: 1,
        name: "site".to_owned(),
        ca_certificates: vec![site.ca.certificate().to_vec()],
        expires_unix_s: NOW + DAY,
        ..StatementDraft::default()
    })
}

fn endorsement(issuer: &Site, subject: SiteId) -> Record {
    issuer.identity.endorsement(&EndorsementDraft {
        subject,
        membership: Membership::Member,
        scope: None,
        may_endorse: true,
        sequence: 1,
        valid_until_unix_s: NOW + DAY,
    })
}

fn code() -> Code {
    Code::generate(&SystemRandom::new()).unwrap()
}

fn request(redeemer: &Site, issuer: SiteId, code: &Code, exporter: &Exporter) -> ClaimRequest {
    let draft = ClaimDraft {
        code,
        issuer,
        statement: statement(redeemer),
        endorsement: endorsement(redeemer, issuer),
        merge: false,
        unix_s: NOW,
    };
    claim_request(&redeemer.identity, draft, exporter)
}

#[test]
fn both_ends_of_a_connection_derive_the_same_exporter_and_no_other_does() {
    let (issuer, redeemer) = (Site::new(), Site::new());
    let controller = issuer.controller();
    let server =
        claim_server(controller.chain.clone(), controller.key.clone_key(), Clock::at(NOW)).unwrap();
    let pin = CaPin::of(issuer.ca.certificate());
    let exporters = || {
        let dial = claim_client(issuer.id(), pin, Clock::at(NOW));
        let connected = handshake(dial.config, server.clone()).unwrap();
        let label = CLAIM_EXPORTER_LABEL;
        let ours = connected.client.export_keying_material([0; 32], label, None).unwrap();
        let theirs = connected.server.export_keying_material([0; 32], label, None).unwrap();
        assert_eq!(ours, theirs);
        ours
    };
    let (one, other) = (exporters(), exporters());
    let request = request(&redeemer, issuer.id(), &code(), &one).encode_to_vec();
    let verified = verify_claim(&request, issuer.id(), &one, NOW).unwrap();
    assert_eq!(verified.redeemer.site, redeemer.id());
    // Whoever records a request cannot make it on a connection of his own.
    let replayed = verify_claim(&request, issuer.id(), &other, NOW);
    assert_eq!(replayed.unwrap_err(), ClaimError::Proof);
}

#[test]
fn a_claim_proves_who_redeems_what_where() {
    let (issuer, redeemer, other) = (Site::new(), Site::new(), Site::new());
    let code = code();
    let good = request(&redeemer, issuer.id(), &code, &EXPORTER);
    let verify = |request: &ClaimRequest| {
        verify_claim(&request.encode_to_vec(), issuer.id(), &EXPORTER, NOW).map(|_| ())
    };
    assert_eq!(verify(&good), Ok(()));
    let verified = verify_claim(&good.encode_to_vec(), issuer.id(), &EXPORTER, NOW).unwrap();
    assert!(verified.code.matches(&code.hash()));
    assert!(!verified.code.matches(&self::code().hash()));

    let changed = |edit: &dyn Fn(&mut ClaimRequest)| {
        let mut request = good.clone();
        edit(&mut request);
        verify(&request)
    };
    assert_eq!(changed(&|r| r.code[0] ^= 1), Err(ClaimError::Proof));
    assert_eq!(changed(&|r| r.signature[0] ^= 1), Err(ClaimError::Proof));
    assert_eq!(changed(&|r| r.statement = Some(statement(&other))), Err(ClaimError::Proof));
    assert_eq!(changed(&|r| r.code.truncate(15)), Err(ClaimError::Malformed("code")));
    assert_eq!(changed(&|r| r.statement = None), Err(ClaimError::Malformed("no statement")));
    let forged = endorsement(&other, issuer.id());
    assert_eq!(
        changed(&|r| r.endorsement = Some(forged.clone())),
        Err(ClaimError::Endorsement(StatementError::Signature))
    );
    let of_other = endorsement(&redeemer, other.id());
    assert_eq!(changed(&|r| r.endorsement = Some(of_other.clone())), Err(ClaimError::WrongSubject));
    assert_eq!(
        changed(&|r| (r.protocol_min, r.protocol_max) = (2, 3)),
        Err(ClaimError::Version { min: 2, max: 3 })
    );
    assert_eq!(changed(&|r| r.unix_s += 3600), Err(ClaimError::Clock(3600)));
    assert_eq!(changed(&|r| r.unix_s = i64::MIN), Err(ClaimError::Clock(i64::MIN)));

    // Made for one issuer, it is worth nothing at another.
    let relayed = verify_claim(&good.encode_to_vec(), other.id(), &EXPORTER, NOW);
    assert_eq!(relayed.unwrap_err(), ClaimError::Proof);
    let own = request(&issuer, issuer.id(), &code, &EXPORTER);
    assert_eq!(verify(&own), Err(ClaimError::OwnToken));
    let late = verify_claim(&good.encode_to_vec(), issuer.id(), &EXPORTER, NOW + 2 * DAY);
    assert!(matches!(late, Err(ClaimError::Clock(_))));
    let huge = vec![0; 65 * 1024];
    let huge = verify_claim(&huge, issuer.id(), &EXPORTER, NOW);
    assert_eq!(huge.unwrap_err(), ClaimError::Malformed("too long"));
}

#[test]
fn an_answer_comes_from_the_issuer_and_endorses_the_redeemer() {
    let (issuer, redeemer, other) = (Site::new(), Site::new(), Site::new());
    let accepted = ClaimAccepted {
        statement: Some(statement(&issuer)),
        endorsement: Some(endorsement(&issuer, redeemer.id())),
        records: vec![statement(&other)],
        endpoints: vec!["hub.example:7443".to_owned()],
        network_id: issuer.id().0.to_vec(),
        version: String::new(),
        authorities: vec![issuer.id().0.to_vec()],
    };
    let verify = |accepted: ClaimAccepted| {
        let response = ClaimResponse { outcome: Some(Outcome::Accepted(accepted)) };
        verify_answer(&response.encode_to_vec(), issuer.id(), redeemer.id(), NOW)
    };
    let Ok(VerifiedAnswer::Accepted(answer)) = verify(accepted.clone()) else {
        panic!("a good answer")
    };
    assert_eq!((answer.issuer.site, answer.network_id), (issuer.id(), issuer.id()));
    assert_eq!(answer.records.len(), 3);
    let mut forged = statement(&other);
    forged.signature = statement(&issuer).signature;
    let unknown = endorsement(&Site::new(), issuer.id());
    let known = endorsement(&other, issuer.id());
    let mut mixed = accepted.clone();
    mixed.records = vec![forged, known.clone(), statement(&other), unknown, Record::default()];
    let Ok(VerifiedAnswer::Accepted(sifted)) = verify(mixed) else { panic!("a good answer") };
    assert_eq!(sifted.records[2..], [known, statement(&other)], "only what is authentic is kept");

    let changed = |edit: &dyn Fn(&mut ClaimAccepted)| {
        let mut accepted = accepted.clone();
        edit(&mut accepted);
        verify(accepted).unwrap_err()
    };
    let of_other = statement(&other);
    assert_eq!(
        changed(&|a| a.statement = Some(of_other.clone())),
        ClaimError::WrongIssuer(other.id())
    );
    let for_other = endorsement(&issuer, other.id());
    assert_eq!(changed(&|a| a.endorsement = Some(for_other.clone())), ClaimError::WrongSubject);
    assert_eq!(changed(&|a| a.network_id.clear()), ClaimError::Malformed("site id"));
    assert_eq!(
        changed(&|a| a.records = vec![Record::default(); 4097]),
        ClaimError::Malformed("too many records")
    );
    let refused = ClaimRefused { reason: Reason::UsedUp.into(), ..ClaimRefused::default() };
    let response = ClaimResponse { outcome: Some(Outcome::Refused(refused.clone())) };
    let answer = verify_answer(&response.encode_to_vec(), issuer.id(), redeemer.id(), NOW).unwrap();
    assert!(matches!(answer, VerifiedAnswer::Refused(reason) if reason == refused));
    let nothing = verify_answer(&[], issuer.id(), redeemer.id(), NOW).unwrap_err();
    assert_eq!(nothing, ClaimError::Malformed("no outcome"));
}

#[test]
fn codes_do_not_show() {
    let code = Code::from_bytes(&[0xab; 16]).unwrap();
    assert_eq!(format!("{code:?}"), "Code");
    assert!(Code::from_bytes(&[0; 15]).is_none());
    let hash = format!("{:?}", code.hash());
    assert_eq!(hash.len(), "CodeHash()".len() + 8, "{hash}");
}

proptest! {
    #[test]
    fn random_bytes_are_refused_without_panic(bytes: Vec<u8>) {
        let site = SiteId([1; 32]);
        prop_assert!(verify_claim(&bytes, site, &EXPORTER, NOW).is_err());
        let answer = verify_answer(&bytes, site, site, NOW);
        prop_assert!(!matches!(answer, Ok(VerifiedAnswer::Accepted(_))));
    }
}
