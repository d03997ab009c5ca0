//! What one site may take in the databases of others.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Network, endorsement, entry, router_id, seal, site_id, statement};
use skein_core::{
    AdjacencyState, AgedRecord, Digest, Edition, Input, LinkId, LinkUp, Membership, Message,
    Origin, Payload, Record, RecordDraft, RecordHeader, RecordKey, RecordKind, Revocation, Scope,
    Sealed, Subkey,
};
use std::{sync::Arc, time::Duration};

const SECOND: Duration = Duration::from_secs(1);
const BODY_BYTES: usize = 64 << 10;

/// 0 and 1 are members, 2 is a guest of 1; returns the link between 1 and 2.
fn with_guest() -> (Network, LinkId) {
    let mut network = Network::new(3, 1);
    network.endorse(0, 1);
    network.connect(0, 1, 1);
    let scope =
        Scope { provide: ["*"].map(|p| skein_core::Pattern(p.into())).into(), ..Scope::default() };
    for n in [1, 2] {
        let both = vec![
            statement(site_id(1), site_id(0), 1),
            statement(site_id(2), site_id(2), 1),
            endorsement(site_id(1), site_id(2), Membership::Guest, scope.clone()),
            endorsement(site_id(2), site_id(1), Membership::Guest, scope.clone()),
        ];
        network.give(n, both);
    }
    let link = network.connect(1, 2, 1);
    network.set_addresses(2, vec![entry("shop")]);
    network.run_for(SECOND);
    (network, link)
}

fn large(key: RecordKey, payload: Payload, body: &Arc<[u8]>) -> Record {
    let record = seal(RecordDraft { key, sequence: 1, lifetime_s: 8 * 86_400, payload });
    let sealed = Sealed { body: Arc::clone(body), ..record.sealed };
    Record { sealed, ..record }
}

fn unknown(site: usize, n: u16, body: &Arc<[u8]>) -> Record {
    let subkey = Subkey::new(&n.to_be_bytes()).unwrap();
    let origin = Origin::Site(site_id(site));
    large(RecordKey { kind: RecordKind::Unknown(77), origin, subkey }, Payload::Unknown, body)
}

fn revocation(subject: usize) -> Record {
    let payload = Payload::Revocation(Revocation {
        issuer: site_id(0),
        subject: site_id(subject),
        issued_unix_s: 0,
        reason: "stolen".into(),
    });
    let key = RecordKey::revocation(site_id(0), site_id(subject));
    seal(RecordDraft { key, sequence: 1, lifetime_s: u32::MAX, payload })
}

fn flood(network: &mut Network, to: usize, link: LinkId, records: impl Iterator<Item = Record>) {
    let records = records.map(|record| {
        let remaining_s = record.lifetime_s;
        AgedRecord { record: Arc::new(record), remaining_s }
    });
    let message = Message::Records { records: records.collect() };
    network.input(to, Input::Message { link, message });
}

#[test]
fn a_guest_has_a_share_and_leaves_nothing_behind_when_revoked() {
    let (mut network, link) = with_guest();
    let body: Arc<[u8]> = vec![0; BODY_BYTES].into();
    flood(&mut network, 1, link, (0..64).map(|n| unknown(2, n, &body)));
    let lsdb = network.routers[1].engine.lsdb();
    assert_eq!(lsdb.of_kind(RecordKind::Unknown(77)).count(), 0, "nobody knows what they are");

    let before = lsdb.bytes();
    let vouch = |n: usize| {
        let (key, payload) = {
            let r = endorsement(site_id(2), site_id(n), Membership::Guest, Scope::default());
            (r.key, r.payload)
        };
        large(key, payload, &body)
    };
    flood(&mut network, 1, link, (100..400).map(vouch));
    let taken = network.routers[1].engine.lsdb().bytes() - before;
    assert!(taken > 1 << 20, "{taken}");
    assert!(taken <= 4 << 20, "{taken}");
    // Others go on: a new address of a member arrives.
    network.set_addresses(0, vec![entry("backend")]);
    network.run_for(SECOND);
    assert!(network.routers[1].fib.addresses.contains_key("backend"));

    network.give(0, vec![revocation(2)]);
    network.run_for(SECOND);
    for n in 0..2 {
        let lsdb = network.routers[n].engine.lsdb();
        assert!(lsdb.lsa(router_id(2)).is_none(), "at {n}");
        let pages = lsdb.of_kind(RecordKind::AddressPage);
        assert_eq!(pages.filter(|p| p.key.origin == Origin::Router(router_id(2))).count(), 0);
    }
}

#[test]
fn a_full_database_still_takes_a_revocation_which_makes_room() {
    let mut network = Network::new(6, 1);
    for n in 1..6 {
        network.endorse(0, n);
    }
    let link = network.connect(0, 1, 1);
    network.run_for(SECOND);
    let body: Arc<[u8]> = vec![0; BODY_BYTES].into();
    for site in 1..6 {
        flood(&mut network, 0, link, (0..1_000).map(|n| unknown(site, n, &body)));
    }
    let bytes = |network: &Network| network.routers[0].engine.lsdb().bytes();
    let full = bytes(&network);
    assert!(full > 255 << 20, "{full}");
    let kept = |network: &Network, site| {
        let records = network.routers[0].engine.lsdb().of_kind(RecordKind::Unknown(77));
        records.filter(|r| r.key.origin == Origin::Site(site_id(site))).count()
    };
    assert!(kept(&network, 1) < 520, "no site has it all");
    // The database has no room for the least of records, but for this one.
    let small: Arc<[u8]> = vec![0; BODY_BYTES / 2].into();
    flood(&mut network, 0, link, (2_000..2_100).map(|n| unknown(4, n, &small)));
    network.give(0, vec![revocation(1)]);
    assert!(network.routers[0].trust.revoked.contains(&site_id(1)));
    assert_eq!(kept(&network, 1), 0);
    assert!(bytes(&network) < full - (60 << 20));
}

#[test]
fn records_that_do_not_exist_are_not_waited_for() {
    let (mut network, link) = with_guest();
    let state = |network: &Network| network.routers[1].engine.view().links[&link].1;
    assert_eq!(state(&network), AdjacencyState::Full);
    for page in 0..40_u16 {
        let headers = (0..1_000_u16).map(|n| {
            let subkey = Subkey::new(&(page * 1_000 + n).to_be_bytes()).unwrap();
            let key = RecordKey {
                kind: RecordKind::Unknown(77),
                origin: Origin::Site(site_id(2)),
                subkey,
            };
            RecordHeader { key, edition: Edition { sequence: 1, digest: Digest([0; 16]) } }
        });
        let message = Message::Summary { headers: headers.collect(), last: false };
        network.input(1, Input::Message { link, message });
    }
    let asked: usize = network.links[&link].queues.iter().flatten().map(headers_asked).sum();
    assert!((1_000..=8_192).contains(&asked), "{asked}");
    assert_eq!(state(&network), AdjacencyState::Exchange);
    network.run_for(11 * SECOND);
    assert_eq!(state(&network), AdjacencyState::Full, "what was left out is gone");
}

fn headers_asked(message: &Message) -> usize {
    match message {
        Message::Request { headers } => headers.len(),
        _ => 0,
    }
}

#[test]
fn one_router_and_one_guest_have_so_many_links_and_no_more() {
    let (mut network, _) = with_guest();
    let mut up = |n: u64, peer: usize, site: usize| {
        let before = network.routers[1].refused.len();
        let up = LinkUp {
            link: LinkId(1_000 + n),
            peer: router_id(peer),
            peer_site: site_id(site),
            cost: 1,
            rtt_us: 0,
            mtu: 1_400,
            statements: Vec::new(),
        };
        network.input(1, Input::LinkUp(up));
        network.routers[1].refused.len() == before
    };
    let accepted = (0..100).filter(|&n| up(n, 2, 2)).count();
    assert_eq!(accepted, 15, "one was there");
    let accepted = (100_u16..1_200).filter(|&n| up(n.into(), 1_000 + usize::from(n), 2)).count();
    assert_eq!(accepted, 64 - 16);
    assert!(up(5_000, 3_000, 0), "others have room");
}
