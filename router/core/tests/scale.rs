//! A thousand routers of a hundred addresses each, signatures stubbed: the database fits, and paths come quickly.
//!
//! `SKEIN_SCALE_ROUTERS=1000 cargo test --release -p skein-core --test scale -- --nocapture` prints the figures.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Network, endorsement, entry, router_id, seal_as, site_id, statement};
use skein_core::{
    AddressEntry, AddressPage, AgedRecord, Handle, Input, Label, LinkAdvert, LinkId, LinkUp,
    Membership, Message, Payload, Record, RecordDraft, RecordKey, Role, RouterLsa, Scope, page_of,
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// As large as a real one.
const CERTIFICATE: &[u8] = &[0; 600];
const ADDRESSES_PER_ROUTER: usize = 100;
/// Between router 1, an engine, and router 2, the first of those that exist as records only.
const SEAM: LinkId = LinkId(1 << 40);

fn routers() -> usize {
    std::env::var("SKEIN_SCALE_ROUTERS").ok().and_then(|text| text.parse().ok()).unwrap_or(100)
}

/// A ring with chords: every router has about eight links.
fn links(routers: usize) -> Vec<(usize, usize)> {
    let count = routers - 2;
    let chord = |n: usize, step: usize| (2 + n, 2 + (n + step) % count);
    let all = (0..count).flat_map(|n| [1, 7, 31, 83].map(|step| chord(n, step)));
    all.filter(|(a, b)| a != b).collect()
}

fn router_record(key: RecordKey, payload: Payload) -> Record {
    let draft = RecordDraft { key, sequence: (1 << 32) + 1, lifetime_s: 3_600, payload };
    seal_as(draft, CERTIFICATE.into())
}

fn lsa(n: usize, links: Vec<LinkAdvert>) -> Record {
    let lsa = RouterLsa {
        router: router_id(n),
        site: site_id(n),
        name: format!("router-{n}").into(),
        site_name: format!("site-{n}").into(),
        role: Role::Interior,
        handle: Handle(u32::try_from(n).unwrap()),
        boot_epoch: 1,
        pages_since: 0,
        certificate: CERTIFICATE.into(),
        links,
        protocol_min: 1,
        protocol_max: 1,
        endpoints: vec!["192.0.2.1:7443".into()],
        version: "0.1.0".into(),
        leaving: false,
    };
    router_record(RecordKey::lsa(lsa.router), Payload::RouterLsa(Arc::new(lsa)))
}

fn pages(n: usize) -> Vec<Record> {
    let mut pages = BTreeMap::<u8, Vec<Arc<AddressEntry>>>::new();
    for i in 0..ADDRESSES_PER_ROUTER {
        let entry = entry(&format!("service-{i}.site-{n}"));
        pages.entry(page_of(&entry.address)).or_default().push(Arc::new(entry));
    }
    let record = |(page, entries)| {
        let payload = Payload::AddressPage(AddressPage { entries });
        router_record(RecordKey::page(router_id(n), page), payload)
    };
    pages.into_iter().map(record).collect()
}

/// LSAs and pages of routers 2 and up.
fn records(routers: usize) -> Vec<Record> {
    let mut adverts: BTreeMap<usize, Vec<LinkAdvert>> = BTreeMap::new();
    let mut advertise = |near: usize, far: usize, link| {
        let adverts = adverts.entry(near).or_default();
        adverts.push(LinkAdvert {
            neighbor: router_id(far),
            link,
            label: Label(u16::try_from(adverts.len() + 1).unwrap()),
            cost: u16::try_from(1 + (near + far) % 7).unwrap(),
            rtt_us: 0,
            mtu: 1_400,
        });
    };
    advertise(2, 1, SEAM);
    for (i, (a, b)) in links(routers).into_iter().enumerate() {
        advertise(a, b, LinkId(1_000_000 + i as u64));
        advertise(b, a, LinkId(1_000_000 + i as u64));
    }
    let lsas = adverts.into_iter().map(|(n, links)| lsa(n, links));
    lsas.chain((2..routers).flat_map(pages)).collect()
}

fn feed(network: &mut Network, records: Vec<Record>) {
    let up = LinkUp {
        link: SEAM,
        peer: router_id(2),
        peer_site: site_id(2),
        cost: 1,
        rtt_us: 0,
        mtu: 1_400,
        statements: Vec::new(),
    };
    network.input(1, Input::LinkUp(up));
    let aged = |record| AgedRecord { record: Arc::new(record), remaining_s: 3_600 };
    let aged: Vec<AgedRecord> = records.into_iter().map(aged).collect();
    for records in aged.chunks(200) {
        let message = Message::Records { records: records.to_vec() };
        network.input(1, Input::Message { link: SEAM, message });
    }
    network.run_for(Duration::from_secs(2));
}

/// A router learns the whole network over one link, as after a restart.
#[test]
#[allow(clippy::disallowed_methods, reason = "real time is what is printed")]
fn one_router_learns_a_large_network() {
    let routers = routers();
    let mut network = Network::new(2, 7);
    network.endorse(0, 1);
    let sites = (2..routers).map(|n| statement(site_id(n), site_id(0), 1));
    let endorsed = (2..routers)
        .map(|n| endorsement(site_id(0), site_id(n), Membership::Member, Scope::default()));
    network.give(0, sites.chain(endorsed).collect());
    network.connect(0, 1, 1);
    network.run_for(Duration::from_secs(1));

    let began = Instant::now();
    feed(&mut network, records(routers));
    println!("{routers} routers fed in and flooded in {:?}", began.elapsed());
    let fib = &network.routers[0].fib;
    assert_eq!(fib.routes.len(), routers - 1);
    assert_eq!(fib.addresses.len(), (routers - 2) * ADDRESSES_PER_ROUTER);
    let paths: usize = fib.routes.values().map(|route| route.paths.len()).sum();
    println!("{paths} paths");

    let began = Instant::now();
    network.restart(0);
    network.connect(0, 1, 1);
    network.run_for(Duration::from_secs(5));
    println!("learnt over one link after a restart in {:?}", began.elapsed());
    assert_eq!(network.routers[0].fib.addresses.len(), (routers - 2) * ADDRESSES_PER_ROUTER);
    let lsdb = network.routers[0].engine.lsdb();
    println!("{} records, {} MiB in the database", lsdb.len(), lsdb.bytes() >> 20);

    let began = Instant::now();
    let link = network.connect(0, 1, 1);
    println!("one more link, first snapshot at both ends, in {:?}", began.elapsed());
    network.run_for(Duration::from_secs(5));
    println!("and all alternatives in {:?}", began.elapsed());
    network.disconnect(link);

    network.run_for(Duration::from_secs(5));
    let began = Instant::now();
    network.set_addresses(0, vec![entry("new.service")]);
    network.deliver_all();
    println!("one address more, published at both ends in {:?}", began.elapsed());
    network.run_for(Duration::from_secs(1));
    assert!(network.routers[1].fib.addresses.contains_key("new.service"));
}
