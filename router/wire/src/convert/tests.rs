use super::*;
use proptest::prelude::*;
use skein_core::{
    AddressEntry, AddressPage, Endorsement, Handle, Inception, KeyRotation, Label, LinkAdvert,
    LinkId, Membership, Pattern, Port, Protocol, Revocation, Role, RouterLsa, Scope, SiteStatement,
    Strategy as Choice, page_of,
};

fn draft() -> impl Strategy<Value = RecordDraft> {
    prop_oneof![statement(), endorsement(), revocation(), lsa(), page(), purge()]
}

fn of(key: RecordKey, sequence: u64, payload: Payload) -> RecordDraft {
    RecordDraft { key, sequence, lifetime_s: 3_600, payload }
}

fn statement() -> impl Strategy<Value = RecordDraft> {
    let rotations = prop::collection::vec(any::<([u8; 32], [u8; 32])>(), 0..3);
    (any::<[[u8; 32]; 4]>(), rotations, 0..(1_u64 << 48), "\\PC{0,40}", any::<i64>()).prop_map(
        |(keys, rotations, epoch, name, expires_unix_s)| {
            let step = |(identity_key, next_key_sha256)| KeyRotation {
                identity_key,
                next_key_sha256,
                signature: Arc::from(&identity_key[..]),
            };
            let statement = SiteStatement {
                site: SiteId(keys[0]),
                inception: Inception { identity_key: keys[1], next_key_sha256: keys[2] },
                epoch: ((rotations.len() as u64) << 48) | epoch,
                rotations: rotations.into_iter().map(step).collect(),
                name: name.into(),
                ca_certificates: vec![Arc::from(&keys[3][..])],
                endpoints: vec!["[2001:db8::1]:7443".into()],
                expires_unix_s,
                network: SiteId(keys[3]),
            };
            let sequence = statement.sequence().unwrap();
            let key = RecordKey::statement(statement.site);
            of(key, sequence, Payload::SiteStatement(Arc::new(statement)))
        },
    )
}

fn endorsement() -> impl Strategy<Value = RecordDraft> {
    (any::<[[u8; 32]; 2]>(), any::<bool>(), any::<bool>(), any::<u64>(), "[a-z]{1,9}\\*?").prop_map(
        |(sites, guest, flag, sequence, pattern)| {
            let scope = Scope {
                consume: [Pattern(pattern.into())].into(),
                transit: flag,
                ..Scope::default()
            };
            let endorsement = Endorsement {
                issuer: SiteId(sites[0]),
                subject: SiteId(sites[1]),
                membership: if guest { Membership::Guest } else { Membership::Member },
                scope: if guest { scope } else { Scope::default() },
                may_endorse: flag,
                valid_until_unix_s: -1,
            };
            let key = RecordKey::endorsement(endorsement.issuer, endorsement.subject);
            of(key, sequence, Payload::Endorsement(endorsement))
        },
    )
}

fn revocation() -> impl Strategy<Value = RecordDraft> {
    (any::<[[u8; 32]; 2]>(), any::<u64>(), any::<i64>()).prop_map(|(sites, sequence, at)| {
        let revocation = Revocation {
            issuer: SiteId(sites[0]),
            subject: SiteId(sites[1]),
            issued_unix_s: at,
            reason: "stolen".into(),
        };
        let key = RecordKey::revocation(revocation.issuer, revocation.subject);
        of(key, sequence, Payload::Revocation(revocation))
    })
}

fn lsa() -> impl Strategy<Value = RecordDraft> {
    let links = prop::collection::btree_map(1_u16.., any::<([u8; 16], u64, u32, u16)>(), 0..9);
    (any::<[u8; 16]>(), any::<[u8; 32]>(), 1_u32.., any::<u32>(), links).prop_map(
        |(router, site, handle, boot_epoch, links)| {
            let lsa = RouterLsa {
                router: RouterId(router),
                site: SiteId(site),
                name: "router".into(),
                site_name: "höhle".into(),
                role: if handle % 2 == 0 { Role::Interior } else { Role::Edge },
                handle: Handle(handle),
                boot_epoch: boot_epoch.into(),
                pages_since: u64::from(boot_epoch) << 32,
                certificate: vec![7; 300].into(),
                leaving: links.is_empty(),
                links: links
                    .into_iter()
                    .map(|(label, (neighbor, link, rtt_us, mtu))| LinkAdvert {
                        neighbor: RouterId(neighbor),
                        link: LinkId(link),
                        label: Label(label),
                        cost: mtu.max(1),
                        rtt_us,
                        mtu,
                    })
                    .collect(),
                protocol_min: 1,
                protocol_max: 2,
                endpoints: vec!["hub.example:7443".into()],
                version: "0.1.0".into(),
            };
            let key = RecordKey::lsa(lsa.router);
            of(key, u64::from(boot_epoch) << 32, Payload::RouterLsa(Arc::new(lsa)))
        },
    )
}

fn page() -> impl Strategy<Value = RecordDraft> {
    let ports = prop::collection::btree_set((1_u16.., any::<bool>()), 0..5);
    (any::<[u8; 16]>(), "[a-z0-9]{1,20}(\\.[a-z]{1,9}){0,3}", ports, any::<[u32; 3]>()).prop_map(
        |(router, address, ports, numbers)| {
            let protocol = |udp| if udp { Protocol::Udp } else { Protocol::Tcp };
            let port = |(port, udp)| Port { port, protocol: protocol(udp) };
            let strategies =
                [Choice::Closest, Choice::Balanced, Choice::Priority, Choice::Weighted];
            let entry = AddressEntry {
                address: address.parse().unwrap(),
                ports: ports.into_iter().map(port).collect(),
                strategy: strategies[numbers[0] as usize % 4],
                cost: numbers[0],
                priority: numbers[1],
                weight: numbers[2],
                at_least_once: numbers[1] % 2 == 0,
            };
            let key = RecordKey::page(RouterId(router), page_of(&entry.address));
            of(key, 9, Payload::AddressPage(AddressPage { entries: vec![Arc::new(entry)] }))
        },
    )
}

fn purge() -> impl Strategy<Value = RecordDraft> {
    (any::<[u8; 16]>(), 0..64_u8, any::<u64>()).prop_map(|(router, page, sequence)| RecordDraft {
        key: RecordKey::page(RouterId(router), page),
        sequence,
        lifetime_s: 0,
        payload: Payload::AddressPage(AddressPage::default()),
    })
}

proptest! {
    #[test]
    fn records_round_trip(draft in draft(), signature: [u8; 16]) {
        let body = encode_body(&draft).unwrap();
        let record = parse_record(&body, &signature).unwrap();
        prop_assert_eq!(record.key, draft.key);
        prop_assert_eq!(record.sequence, draft.sequence);
        prop_assert_eq!(record.lifetime_s, draft.lifetime_s);
        prop_assert_eq!(&record.payload, &draft.payload);
        let wire = proto::routing::Record::from(&record);
        prop_assert_eq!(Record::try_from(&wire), Ok(record));
    }

    #[test]
    fn messages_round_trip(drafts in prop::collection::vec(draft(), 0..5), last: bool) {
        let aged = |draft: &RecordDraft| {
            let record = parse_record(&encode_body(draft).unwrap(), b"signature").unwrap();
            AgedRecord { remaining_s: record.lifetime_s, record: Arc::new(record) }
        };
        let records: Vec<_> = drafts.iter().map(aged).collect();
        let headers: Vec<_> = records.iter().map(|aged| aged.record.header()).collect();
        for message in [
            Message::Records { records },
            Message::Request { headers: headers.clone() },
            Message::Summary { headers, last },
        ] {
            let wire = proto::routing::LinkMessage::from(&message);
            prop_assert_eq!(parse_message(&wire), Ok(Some(message)));
        }
    }

    /// A flipped bit yields an error or another record, never a panic, and never the same parsed fields from other bytes
    /// under the same sealed body.
    #[test]
    fn damage_never_panics(draft in draft(), at: prop::sample::Index, bit in 0..8_u32) {
        let mut body = encode_body(&draft).unwrap();
        let at = at.index(body.len());
        body[at] ^= 1 << bit;
        if let Ok(record) = parse_record(&body, b"") {
            prop_assert_eq!(&*record.sealed.body, &body[..]);
        }
    }

    #[test]
    fn noise_never_panics(noise: Vec<u8>) {
        let parsed = parse_record(&noise, &noise);
        prop_assert!(parsed.is_err() || !noise.is_empty());
    }
}

#[test]
fn contradictions_are_refused() {
    let site = |byte| SiteId([byte; 32]);
    let endorsement = Endorsement {
        issuer: site(1),
        subject: site(2),
        membership: Membership::Member,
        scope: Scope::default(),
        may_endorse: true,
        valid_until_unix_s: 1,
    };
    let sealed = |key| {
        let draft = of(key, 7, Payload::Endorsement(endorsement.clone()));
        parse_record(&encode_body(&draft).unwrap(), b"")
    };
    assert!(sealed(RecordKey::endorsement(site(1), site(2))).is_ok());
    assert!(sealed(RecordKey::endorsement(site(1), site(3))).is_err(), "another subject");
    assert!(sealed(RecordKey::endorsement(site(3), site(2))).is_err(), "another issuer");
}

#[test]
fn statements_cannot_be_purged() {
    for key in [
        RecordKey::statement(SiteId([1; 32])),
        RecordKey::endorsement(SiteId([1; 32]), SiteId([2; 32])),
        RecordKey::revocation(SiteId([1; 32]), SiteId([2; 32])),
        RecordKey::lsa(RouterId([1; 16])),
    ] {
        let draft = RecordDraft { key, sequence: 1, lifetime_s: 0, payload: Payload::Unknown };
        assert!(parse_record(&encode_body(&draft).unwrap(), b"").is_err(), "{key:?}");
    }
}

#[test]
fn kinds_of_a_later_version_pass_through() {
    let key = RecordKey {
        kind: RecordKind::Unknown(77),
        origin: Origin::Site(SiteId([1; 32])),
        subkey: Subkey::EMPTY,
    };
    let draft = of(key, 3, Payload::Unknown);
    let record = parse_record(&encode_body(&draft).unwrap(), b"s").unwrap();
    assert_eq!((record.key, record.payload), (key, Payload::Unknown));
}
