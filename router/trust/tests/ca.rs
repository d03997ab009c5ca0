//! What the CA issues, and what it does not let a request decide.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod common;

use aws_lc_rs::rand::SystemRandom;
use common::{NOW, Site, uri};
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair};
use skein_core::SiteId;
use skein_trust::{
    CaError, CertificateRole, KeyRequest, LEAF_VALIDITY_S, SiteCa, SpiffeId, peer_identity,
    router_name_is_valid,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

#[test]
fn the_issuer_decides_name_use_and_time() {
    let site = Site::new();
    let key = KeyPair::generate().unwrap();
    let mut wishes = CertificateParams::default();
    wishes.subject_alt_names = vec![uri(&format!("spiffe://{}/controller", site.id()))];
    wishes.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let csr = wishes.serialize_request(&key).unwrap();
    let issued = site.ca.issue_router(csr.der(), "r1", &SystemRandom::new(), NOW).unwrap();

    let identity = peer_identity(&issued.chain).unwrap();
    assert_eq!(identity.role, CertificateRole::Router("r1".to_owned()));
    assert_eq!(identity.site, site.id());
    assert_eq!(issued.chain[1], *site.ca.certificate());
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert!(!leaf.is_ca());
    assert_eq!(leaf.validity().not_before.timestamp(), NOW - 3600);
    assert_eq!(leaf.validity().not_after.timestamp(), NOW + LEAF_VALIDITY_S);
    assert_eq!(issued.not_after_unix_s, NOW + LEAF_VALIDITY_S);
    let again = site.ca.issue_router(csr.der(), "r1", &SystemRandom::new(), NOW).unwrap();
    let (_, again) = X509Certificate::from_der(&again.chain[0]).unwrap();
    assert_ne!(leaf.raw_serial(), again.raw_serial());
}

#[test]
fn a_request_must_be_signed_by_the_key_it_names() {
    let site = Site::new();
    let (honest, other) = (KeyRequest::generate().unwrap(), KeyRequest::generate().unwrap());
    let issue = |csr: &[u8]| site.ca.issue_router(csr, "r1", &SystemRandom::new(), NOW);
    assert!(issue(honest.csr()).is_ok());

    let key_of = |csr: &[u8]| {
        let (_, csr) =
            x509_parser::certification_request::X509CertificationRequest::from_der(csr).unwrap();
        csr.certification_request_info.subject_pki.subject_public_key.data.to_vec()
    };
    let (from, to) = (key_of(honest.csr()), key_of(other.csr()));
    let at = honest.csr().windows(from.len()).position(|window| window == from).unwrap();
    let mut swapped = honest.csr().to_vec();
    swapped[at..at + to.len()].copy_from_slice(&to);
    assert!(matches!(issue(&swapped), Err(CaError::NoProofOfPossession)));
    assert!(matches!(issue(&[]), Err(CaError::MalformedRequest)));
    assert!(matches!(issue(&[0x30; 5000]), Err(CaError::MalformedRequest)));
}

#[test]
fn a_stored_ca_goes_on_and_a_mixed_up_one_is_noticed() {
    let (one, other) = (Site::new(), Site::new());
    let key = one.ca.key_pkcs8();
    let read = SiteCa::load(one.id(), key, one.ca.certificate()).unwrap();
    let request = KeyRequest::generate().unwrap();
    let stored = request.to_pkcs8();
    let request = KeyRequest::from_pkcs8(&stored).unwrap();
    assert!(read.issue_router(request.csr(), "r1", &SystemRandom::new(), NOW).is_ok());
    let mixed = SiteCa::load(one.id(), key, other.ca.certificate());
    assert!(matches!(mixed, Err(CaError::Damaged(_))));
    let leaf = one.router("r1");
    let not_a_ca = SiteCa::load(one.id(), leaf.key.secret_der(), &leaf.chain[0]);
    assert!(matches!(not_a_ca, Err(CaError::Damaged(_))));
    assert!(matches!(SiteCa::load(one.id(), &key[1..], &[]), Err(CaError::Damaged(_))));
    assert!(matches!(KeyRequest::from_pkcs8(&stored[1..]), Err(CaError::Damaged(_))));
}

#[test]
fn router_names_are_labels() {
    for good in ["r1", "router", "a-b", &"x".repeat(63)] {
        assert!(router_name_is_valid(good), "{good}");
    }
    for bad in ["", "R1", "a/b", "a.b", "-a", "a-", "../x", "ä", "a b", &"x".repeat(64)] {
        assert!(!router_name_is_valid(bad), "{bad}");
        let site = Site::new();
        let request = KeyRequest::generate().unwrap();
        let refused = site.ca.issue_router(request.csr(), bad, &SystemRandom::new(), NOW);
        assert!(matches!(refused, Err(CaError::RouterName(_))));
    }
}

proptest! {
    #[test]
    fn spiffe_ids_are_parsed_in_one_form_only(text in "(spiffe://)?.{0,80}") {
        if let Some(id) = SpiffeId::parse(&text) {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn spiffe_ids_round_trip(site: [u8; 32], name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
        let roles = [CertificateRole::Router(name), CertificateRole::Controller];
        for role in roles {
            let id = SpiffeId { site: SiteId(site), role };
            prop_assert_eq!(SpiffeId::parse(&id.to_string()), Some(id.clone()));
            for tail in ["/", "?", "#", "/x"] {
                let longer = format!("{id}{tail}");
                prop_assert_eq!(SpiffeId::parse(&longer), None);
            }
        }
    }

    #[test]
    fn random_requests_are_refused_without_panic(bytes: Vec<u8>) {
        let ca = Site::new().ca;
        prop_assert!(ca.issue_controller(&bytes, &SystemRandom::new(), NOW).is_err());
    }
}
