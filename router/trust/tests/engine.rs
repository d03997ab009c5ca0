//! The routing engine with real keys, certificates and signatures: a network of 50 sites, and what forgers get.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod common;

use aws_lc_rs::rand::SystemRandom;
use common::{NOW, Site};
use prost::Message as _;
use skein_core::{
    AddressEntry, AgedRecord, Engine, Identity, Input, Known, LinkId, LinkUp, Message, Notary as _,
    Origin, Output, Payload, Port, Protocol, Record, RecordDraft, RecordKey, Rejection, Role,
    RouterId, Settings, SiteId, Strategy,
};
use skein_trust::{EndorsementDraft, IdentityCell, RouterNotary, StatementDraft, router_id};
use skein_wire::{
    convert::parse_message,
    proto::{self, trust::Membership},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

const ROUTERS: usize = 50;
const EXPIRY: i64 = NOW + 7 * 86_400;

struct Router {
    site: Site,
    id: RouterId,
    cell: Arc<IdentityCell>,
    engine: Engine<RouterNotary>,
    refused: Vec<LinkId>,
    learned: Vec<Arc<Record>>,
}

impl Router {
    fn new() -> Self {
        let site = Site::new();
        let id = router_id(site.id(), "r1");
        let cell = IdentityCell::new(site.router("r1").identity());
        let notary = RouterNotary::new(Arc::clone(&cell), id, 1);
        let identity = Identity {
            router: id,
            site: site.id(),
            name: "r1".into(),
            boot_epoch: 1,
            version: "test".into(),
            protocol: (1, 1),
        };
        Self {
            engine: Engine::new(identity, notary),
            site,
            id,
            cell,
            refused: Vec::new(),
            learned: Vec::new(),
        }
    }

    fn statement(&self, network: SiteId) -> Record {
        parsed(&self.site.identity.statement(&StatementDraft {
            epoch: 1,
            name: "site".to_owned(),
            ca_certificates: vec![self.site.ca.certificate().to_vec()],
            network_id: Some(network),
            expires_unix_s: EXPIRY,
            ..StatementDraft::default()
        }))
    }

    fn endorsement(&self, subject: SiteId) -> Record {
        parsed(&self.site.identity.endorsement(&EndorsementDraft {
            subject,
            membership: Membership::Member,
            scope: None,
            may_endorse: true,
            sequence: 1,
            valid_until_unix_s: EXPIRY,
        }))
    }

    fn known(&self) -> Known<'_> {
        Known { lsdb: self.engine.lsdb(), trust: self.engine.trust(), unix_s: NOW }
    }

    /// What a notary that has checked nothing yet says.
    fn verdict(&self, record: &Record) -> Result<(), Rejection> {
        RouterNotary::new(Arc::clone(&self.cell), self.id, 1).verify(record, &self.known())
    }

    fn record(&self, key: RecordKey) -> Record {
        Record::clone(&self.engine.lsdb().get(&key).unwrap().record)
    }
}

fn parsed(record: &proto::routing::Record) -> Record {
    skein_wire::convert::parse_record(&record.body, &record.signature).unwrap()
}

fn entry(address: &str) -> AddressEntry {
    AddressEntry {
        address: address.parse().unwrap(),
        ports: vec![Port { port: 80, protocol: Protocol::Tcp }],
        strategy: Strategy::Closest,
        cost: 0,
        priority: 0,
        weight: 1,
        at_least_once: false,
    }
}

/// Routers and the links between them, in virtual time; messages cross a link at once and in order, as bytes.
struct Network {
    routers: Vec<Router>,
    links: BTreeMap<LinkId, [usize; 2]>,
    start: Instant,
    now: Duration,
}

impl Network {
    fn new(size: usize) -> Self {
        #[allow(clippy::disallowed_methods, reason = "an origin for virtual time")]
        let start = Instant::now();
        let routers: Vec<Router> = (0..size).map(|_| Router::new()).collect();
        let mut network = Self { routers, links: BTreeMap::new(), start, now: Duration::ZERO };
        let founder = network.routers[0].site.id();
        for i in 0..size {
            let own = network.routers[i].statement(founder);
            network.input(
                i,
                Input::Settings(Settings { role: Role::Interior, ..Settings::default() }),
            );
            network.input(i, Input::Statements(vec![own]));
            network.input(i, Input::Addresses(vec![entry(&format!("service-{i}"))]));
        }
        network
    }

    fn time(&self) -> (Instant, i64) {
        (self.start + self.now, NOW + i64::try_from(self.now.as_secs()).unwrap())
    }

    fn input(&mut self, router: usize, input: Input) {
        let (now, unix_s) = self.time();
        self.routers[router].engine.handle_input(input, now, unix_s);
    }

    /// Links two routers whose sites endorse each other, as a redeemed token leaves them.
    fn link(&mut self, a: usize, b: usize) {
        let link = LinkId(self.links.len() as u64 + 1);
        self.links.insert(link, [a, b]);
        let founder = self.routers[0].site.id();
        for (own, peer) in [(a, b), (b, a)] {
            let (own_router, peer_router) = (&self.routers[own], &self.routers[peer]);
            let statements = vec![
                own_router.endorsement(peer_router.site.id()),
                peer_router.statement(founder),
                peer_router.endorsement(own_router.site.id()),
            ];
            let up = LinkUp {
                link,
                peer: peer_router.id,
                peer_site: peer_router.site.id(),
                cost: 1,
                rtt_us: 1_000,
                mtu: 1_400,
                statements: Vec::new(),
            };
            self.input(own, Input::Statements(statements));
            self.input(own, Input::LinkUp(up));
        }
    }

    /// Delivers messages and lets time pass until `until`.
    fn run(&mut self, until: Duration) {
        loop {
            self.deliver();
            let due = self.routers.iter().filter_map(|r| r.engine.poll_timeout()).map(|(at, _)| at);
            let Some(due) = due.min().filter(|&at| at <= self.start + until) else { break };
            self.now = self.now.max(due.saturating_duration_since(self.start));
            let (now, unix_s) = self.time();
            for router in &mut self.routers {
                if router.engine.poll_timeout().is_some_and(|(at, _)| at <= now) {
                    router.engine.handle_timeout(now, unix_s);
                }
            }
        }
        self.now = until;
    }

    fn deliver(&mut self) {
        let (now, _) = self.time();
        let mut ready: VecDeque<(usize, LinkId)> = VecDeque::new();
        loop {
            for (i, router) in self.routers.iter_mut().enumerate() {
                while let Some(output) = router.engine.poll_output() {
                    match output {
                        Output::SendReady(link) => ready.push_back((i, link)),
                        Output::LinkRefused { link, .. } => router.refused.push(link),
                        Output::Learned(records) => router.learned.extend(records),
                        Output::Publish(_) | Output::Trust(_) => {}
                    }
                }
            }
            let Some((from, link)) = ready.pop_front() else { return };
            while let Some(message) = self.routers[from].engine.poll_send(link, now) {
                let bytes = proto::routing::LinkMessage::from(&message).encode_to_vec();
                let decoded = proto::routing::LinkMessage::decode(&bytes[..]).unwrap();
                let message = parse_message(&decoded).unwrap().unwrap();
                let ends = self.links[&link];
                let to = ends[usize::from(ends[0] == from)];
                self.input(to, Input::Message { link, message });
            }
        }
    }

    fn tell(&mut self, from: usize, to: usize, record: Record) {
        let link = *self
            .links
            .iter()
            .find(|(_, ends)| ends.contains(&from) && ends.contains(&to))
            .unwrap()
            .0;
        let record = AgedRecord { remaining_s: record.lifetime_s, record: Arc::new(record) };
        self.input(
            to,
            Input::Message { link, message: Message::Records { records: vec![record] } },
        );
    }
}

/// A ring with chords, from a fixed recipe.
fn network(size: usize) -> Network {
    let mut network = Network::new(size);
    for i in 0..size {
        network.link(i, (i + 1) % size);
    }
    for i in (0..size).step_by(5) {
        network.link(i, (i + size / 2 + 1) % size);
    }
    network.run(Duration::from_secs(10));
    network
}

#[test]
fn fifty_sites_converge_revoke_and_renew_with_real_signatures() {
    let mut network = network(ROUTERS);
    let headers = |router: &Router| router.engine.lsdb().headers().collect::<Vec<_>>();
    let first = headers(&network.routers[0]);
    for router in &network.routers {
        assert_eq!(router.refused, []);
        assert_eq!(router.engine.fib().routes.len(), ROUTERS - 1);
        assert_eq!(router.engine.fib().addresses.len(), ROUTERS);
        assert_eq!(headers(router), first, "one database everywhere");
    }

    // A renewed certificate: records are sealed anew and accepted everywhere.
    let fresh = network.routers[7].site.router("r1");
    network.routers[7].cell.replace(fresh.identity());
    network.input(7, Input::IdentityRenewed);
    network.run(Duration::from_secs(20));
    let id = network.routers[7].id;
    for router in &network.routers {
        let lsa = router.engine.lsdb().lsa(id).unwrap();
        assert_eq!(&lsa.certificate[..], &fresh.chain[0][..]);
        assert_eq!(router.engine.fib().routes.len(), ROUTERS - 1);
    }

    // The founder revokes a site: five seconds later nobody knows a way to it, nor its addresses.
    let evil = network.routers[20].site.id();
    let revocation = parsed(&network.routers[0].site.identity.revocation(evil, 1, NOW, "stolen"));
    network.input(0, Input::Statements(vec![revocation]));
    network.run(Duration::from_secs(25));
    for (i, router) in network.routers.iter().enumerate().filter(|(i, _)| *i != 20) {
        assert!(router.engine.trust().site(evil).is_none(), "router {i}");
        assert!(!router.engine.fib().routes.contains_key(&network.routers[20].id));
        assert!(!router.engine.fib().addresses.contains_key("service-20"));
        assert_eq!(router.engine.fib().routes.len(), ROUTERS - 2);
    }
    assert!(!network.routers[19].refused.is_empty(), "its neighbours drop their links to it");
}

/// Router 1 is trusted, a neighbour of 0, and evil. It knows every public byte and has its own site's CA.
#[test]
fn a_trusted_neighbour_cannot_speak_for_others() {
    let mut network = network(4);
    let before: Vec<_> = network.routers[0].engine.lsdb().headers().collect();
    let (victim, evil) = (&network.routers[2], &network.routers[1]);
    let lsa_key = RecordKey::lsa(victim.id);
    let lsa = victim.record(lsa_key);
    let Payload::RouterLsa(content) = lsa.payload.clone() else { panic!("an LSA") };
    let mut forger = RouterNotary::new(Arc::clone(&evil.cell), evil.id, 1);
    let mut forge = |key: RecordKey, payload: Payload| {
        let draft = RecordDraft { key, sequence: u64::MAX, lifetime_s: 3600, payload };
        forger.seal(draft).unwrap()
    };
    let with_certificate = |certificate: &[u8]| {
        let mut content = (*content).clone();
        content.certificate = certificate.into();
        Payload::RouterLsa(Arc::new(content))
    };
    let victim_name = format!("spiffe://{}/router/r1", victim.site.id());
    let minted = evil.site.mint(vec![common::uri(&victim_name)], common::both_usages());
    let minted_cell = IdentityCell::new(minted.identity());
    let mut minter = RouterNotary::new(minted_cell, evil.id, 1);
    let by_minted = RecordDraft {
        key: lsa_key,
        sequence: u64::MAX,
        lifetime_s: 3600,
        payload: with_certificate(&minted.chain[0]),
    };
    let Payload::RouterLsa(own) = evil.record(RecordKey::lsa(evil.id)).payload else {
        panic!("an LSA")
    };
    let mut own = (*own).clone();
    own.handle = content.handle;
    let page = Payload::AddressPage(skein_core::AddressPage {
        entries: vec![Arc::new(entry("payments"))],
    });
    let mut tampered = lsa.clone();
    let mut body = tampered.sealed.body.to_vec();
    *body.last_mut().unwrap() ^= 1;
    tampered.sealed.body = body.into();
    let mut cut = lsa.clone();
    cut.sealed.signature = [].into();
    let own_certificate = evil.cell.current().unwrap().certificate().to_vec();

    let forgeries = [
        ("its LSA under its certificate", forge(lsa_key, lsa.payload.clone())),
        ("its LSA under ours", forge(lsa_key, with_certificate(&own_certificate))),
        ("its LSA under one our CA minted for it", minter.seal(by_minted).unwrap()),
        ("a page of its", forge(RecordKey::page(victim.id, 3), page)),
        ("its LSA, one bit changed", tampered),
        ("its LSA without signature", cut),
        ("our LSA with its handle", forge(RecordKey::lsa(evil.id), Payload::RouterLsa(own.into()))),
        ("an LSA under another origin", forge(RecordKey::lsa(evil.id), lsa.payload)),
    ];
    for (what, record) in &forgeries {
        let verdict = network.routers[0].verdict(record);
        assert!(
            matches!(verdict, Err(Rejection::Invalid(_) | Rejection::Forged(_))),
            "{what}: {verdict:?}"
        );
    }
    for (_, record) in forgeries {
        network.tell(1, 0, record);
    }
    network.run(Duration::from_secs(20));
    let after: Vec<_> = network.routers[0].engine.lsdb().headers().collect();
    assert_eq!(after, before, "nothing of it was taken");
    assert_eq!(network.routers[0].engine.fib().routes.len(), 3);
}

#[test]
fn made_up_sites_take_no_room_from_invited_ones() {
    let mut network = network(3);
    network.routers[0].learned.clear();
    for _ in 0..1_100 {
        let site = skein_trust::SiteIdentity::generate(&SystemRandom::new()).unwrap();
        let draft = StatementDraft { expires_unix_s: EXPIRY, ..StatementDraft::default() };
        network.tell(1, 0, parsed(&site.statement(&draft)));
    }
    network.run(Duration::from_secs(15));
    let strangers = network.routers[0].engine.lsdb().statements().len() - 3;
    assert!((1..1_100).contains(&strangers), "a bound holds: {strangers}");
    assert_eq!(network.routers[0].learned, [], "nobody keeps what they say");

    let newcomer = Router::new();
    let id = newcomer.site.id();
    network.tell(1, 0, network.routers[2].endorsement(id));
    network.tell(1, 0, newcomer.statement(network.routers[0].site.id()));
    network.run(Duration::from_secs(20));
    let router = &network.routers[0];
    assert!(router.engine.trust().site(id).is_some());
    let kept = |key| router.learned.iter().any(|record| record.key == key);
    assert!(kept(RecordKey::statement(id)));
    assert!(kept(RecordKey::endorsement(network.routers[2].site.id(), id)));
}

#[test]
fn statements_are_held_to_identity_keys_and_histories() {
    let network = network(3);
    let (us, evil, victim) = (&network.routers[0], &network.routers[1], &network.routers[2]);
    // An endorsement that evil signed in the victim's name.
    let mut forged = victim.endorsement(SiteId([9; 32]));
    let theirs = evil.endorsement(SiteId([9; 32]));
    forged.sealed.signature = theirs.sealed.signature.clone();
    assert!(matches!(us.verdict(&forged), Err(Rejection::Invalid(_) | Rejection::Forged(_))));
    assert_eq!(
        us.verdict(&theirs),
        Ok(()),
        "its own it may make; what it is worth is for trust to say"
    );

    let stranger = Router::new();
    let unknown = Origin::Site(stranger.site.id());
    assert_eq!(us.verdict(&stranger.endorsement(us.site.id())), Err(Rejection::Missing(unknown)));
    assert_eq!(us.verdict(&stranger.statement(us.site.id())), Ok(()), "it certifies itself");
    let no_lsa = RecordKey::page(stranger.id, 1);
    let mut notary = RouterNotary::new(Arc::clone(&stranger.cell), stranger.id, 1);
    let payload =
        Payload::AddressPage(skein_core::AddressPage { entries: vec![Arc::new(entry("x"))] });
    let page =
        notary.seal(RecordDraft { key: no_lsa, sequence: 1, lifetime_s: 60, payload }).unwrap();
    assert_eq!(us.verdict(&page), Err(Rejection::Missing(Origin::Router(stranger.id))));
}

#[test]
fn a_forked_history_is_refused_and_a_continued_one_accepted() {
    let mut network = network(2);
    let founder = network.routers[0].site.id();
    let stored = network.routers[1].site.identity.to_secret_bytes();
    let rotate = |times: usize| {
        let mut router = Router::new();
        router.site.identity = skein_trust::SiteIdentity::from_secret_bytes(&stored).unwrap();
        for _ in 0..times {
            router.site.identity.rotate(&SystemRandom::new()).unwrap();
        }
        router.statement(founder)
    };
    let rotated = rotate(1);
    assert_eq!(network.routers[0].verdict(&rotated), Ok(()));
    network.input(0, Input::Statements(vec![rotated]));
    // Key 1 is the same in both, what it commits to is not.
    let fork = rotate(2);
    assert!(matches!(
        network.routers[0].verdict(&fork),
        Err(Rejection::Invalid(_) | Rejection::Forged(_))
    ));
}

/// More than a neighbour may bring of forged records.
const MANY: u8 = 40;

/// 0 and 1 are honest, 2 is linked to both and says different things to them; they come to know each of its `records` once
/// they have taken it.
fn told_apart(records: impl FnOnce(&mut Site) -> [Vec<Record>; 2]) -> Network {
    let mut network = Network::new(3);
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        network.link(a, b);
    }
    network.run(Duration::from_secs(10));
    let told = records(&mut network.routers[2].site);
    for (to, records) in told.into_iter().enumerate() {
        for record in records {
            let key = record.key;
            network.tell(2, to, record);
            assert!(network.routers[to].engine.lsdb().get(&key).is_some(), "{to} takes {key:?}");
        }
    }
    network.run(Duration::from_secs(30));
    for (honest, link) in [(0, LinkId(1)), (1, LinkId(1))] {
        let router = &network.routers[honest];
        assert!(!router.refused.contains(&link), "{honest} keeps its link to the other");
        assert!(router.engine.view().links.contains_key(&link));
    }
    network
}

fn editions(network: &Network, key: RecordKey) -> [skein_core::Edition; 2] {
    [0, 1].map(|n| network.routers[n].record(key).edition())
}

fn statement_of(site: &Site, ca: &skein_trust::SiteCa) -> Record {
    parsed(&site.identity.statement(&StatementDraft {
        epoch: 2,
        ca_certificates: vec![ca.certificate().to_vec()],
        expires_unix_s: EXPIRY,
        ..StatementDraft::default()
    }))
}

/// An LSA of the router `name` under a certificate of its own by `ca`, and so many pages of addresses of that cost.
fn router_of(
    site: &Site,
    ca: &skein_trust::SiteCa,
    name: &str,
    (pages, cost): (u8, u16),
) -> Vec<Record> {
    let request = skein_trust::KeyRequest::generate().unwrap();
    let issued = ca.issue_router(request.csr(), name, &SystemRandom::new(), NOW).unwrap();
    let presented = common::Presented { chain: issued.chain, key: request.private_key() };
    let cell = IdentityCell::new(presented.identity());
    let id = router_id(site.id(), name);
    let mut notary = RouterNotary::new(cell, id, 1);
    let lsa = skein_core::RouterLsa {
        router: id,
        site: site.id(),
        name: name.into(),
        site_name: "site".into(),
        role: Role::Edge,
        handle: notary.handle(0),
        boot_epoch: 1,
        pages_since: 0,
        certificate: notary.certificate().unwrap(),
        links: Vec::new(),
        protocol_min: 1,
        protocol_max: 1,
        endpoints: Vec::new(),
        version: "test".into(),
        leaving: false,
    };
    let page = |n| {
        let entries = (0..).map(|i| entry(&format!("s{i}")));
        let entry = entries.into_iter().find(|e| skein_core::page_of(&e.address) == n).unwrap();
        let entries = vec![Arc::new(AddressEntry { cost: cost.into(), ..entry })];
        Payload::AddressPage(skein_core::AddressPage { entries })
    };
    let drafts = [(RecordKey::lsa(id), Payload::RouterLsa(Arc::new(lsa)))]
        .into_iter()
        .chain((0..pages).map(|n| (RecordKey::page(id, n), page(n))));
    // Pages have the lower numbers: nobody can take them for later than the LSA.
    let sequence = |key: RecordKey| if key == RecordKey::lsa(id) { 100 } else { 50 };
    drafts
        .map(|(key, payload)| {
            let sequence = sequence(key);
            notary.seal(RecordDraft { key, sequence, lifetime_s: 3600, payload }).unwrap()
        })
        .collect()
}

#[test]
fn a_site_with_two_statements_of_one_epoch_does_not_part_its_neighbours() {
    let mut key = None;
    let network = told_apart(|site| {
        let other = skein_trust::SiteCa::generate(site.id(), &SystemRandom::new(), NOW).unwrap();
        key = Some(RecordKey::statement(site.id()));
        [&site.ca, &other].map(|ca| {
            let routers = (0..MANY).flat_map(|n| router_of(site, ca, &format!("x{n}"), (0, 0)));
            [statement_of(site, ca)].into_iter().chain(routers).collect()
        })
    });
    let [one, other] = editions(&network, key.unwrap());
    assert_eq!(one, other, "both choose the same");
}

#[test]
fn a_router_with_two_keys_does_not_part_its_neighbours() {
    let mut key = None;
    let network = told_apart(|site| {
        key = Some(RecordKey::lsa(router_id(site.id(), "x")));
        [1, 2].map(|cost| router_of(site, &site.ca, "x", (MANY, cost)))
    });
    let [one, other] = editions(&network, key.unwrap());
    assert_eq!(one, other, "both choose the same");
    let pages = |n: usize| {
        let headers = network.routers[n].engine.lsdb().headers();
        headers.filter(|h| h.key.origin == key.unwrap().origin).collect::<Vec<_>>()
    };
    assert_eq!((pages(0).len(), pages(0)), (1 + usize::from(MANY), pages(1)));
}

#[test]
fn endorsements_of_before_a_rotation_do_not_part_neighbours() {
    told_apart(|site| {
        let endorse = |n| {
            parsed(&site.identity.endorsement(&EndorsementDraft {
                subject: SiteId([n; 32]),
                membership: Membership::Member,
                scope: None,
                may_endorse: true,
                sequence: 1,
                valid_until_unix_s: EXPIRY,
            }))
        };
        let mut early: Vec<_> = (0..MANY).map(endorse).collect();
        site.identity.rotate(&SystemRandom::new()).unwrap();
        let rotated = statement_of(site, &site.ca);
        early.push(rotated.clone());
        [early, vec![rotated]]
    });
}

#[test]
fn an_expired_leaf_makes_its_records_expired() {
    let network = network(2);
    let (us, peer) = (&network.routers[0], &network.routers[1]);
    let lsa = peer.record(RecordKey::lsa(peer.id));
    let later = Known { unix_s: NOW + 4 * 86_400, ..us.known() };
    let mut notary = RouterNotary::new(Arc::clone(&us.cell), us.id, 1);
    assert_eq!(notary.verify(&lsa, &us.known()), Ok(()));
    assert_eq!(
        notary.verify(&lsa, &later),
        Err(Rejection::Expired),
        "remembered, but no longer good"
    );
}
