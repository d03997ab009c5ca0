//! A network of engines without I/O: links are queues, time is a number, signatures are taken on trust.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "helpers of tests; each test file uses its own part"
)]

use rand::{Rng, SeedableRng, rngs::StdRng};
use skein_core::{
    AddressEntry, AgedRecord, Digest, Endorsement, Engine, Fib, Handle, Identity, Inception, Input,
    Known, LinkId, LinkUp, Membership, Message, Notary, Origin, Output, Payload, Port, Protocol,
    Record, RecordDraft, RecordKey, RecordKind, Rejection, Role, RouterId, RouterLsa, Scope,
    SealError, Sealed, Settings, SiteId, SiteStatement, Strategy, TrustView,
};
use std::{
    collections::{BTreeMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

pub const EPOCH_UNIX_S: i64 = 1_800_000_000;
const DAY_S: u32 = 24 * 60 * 60;

/// Signs with the name of its key, with which its certificates begin; what routers signed is verified with the LSA known of
/// them.
#[derive(Debug)]
pub struct StubNotary {
    router: RouterId,
    boot_epoch: u64,
    /// Another one for each process.
    key: String,
    renewals: Arc<AtomicU64>,
    /// Fewer than 32 bits provoke collisions.
    handle_bits: u32,
    pub verified: u64,
}

impl Notary for StubNotary {
    fn certificate(&self) -> Option<Arc<[u8]>> {
        let renewals = self.renewals.load(Ordering::Relaxed);
        Some(format!("{}renewal {renewals}", self.key).into_bytes().into())
    }

    fn handle(&self, attempt: u32) -> Handle {
        let seed = u64::from_be_bytes(self.router.0[..8].try_into().unwrap());
        let mut rng = StdRng::seed_from_u64(seed ^ (self.boot_epoch << 20) ^ u64::from(attempt));
        Handle((rng.random::<u32>() >> (32 - self.handle_bits)).max(1))
    }

    fn seal(&mut self, draft: RecordDraft) -> Result<Record, SealError> {
        Ok(seal_as(draft, self.key.as_bytes().into()))
    }

    fn verify(&mut self, record: &Record, known: &Known<'_>) -> Result<(), Rejection> {
        self.verified += 1;
        let missing = |site| Rejection::Missing(Origin::Site(site));
        match (&record.payload, record.key.origin) {
            (Payload::SiteStatement(_), _) => Ok(()),
            (Payload::RouterLsa(lsa), _) => {
                known.statement(lsa.site).ok_or_else(|| missing(lsa.site))?;
                let forged = Rejection::Forged("not signed with the key in it");
                signed_by(record, &lsa.certificate).then_some(()).ok_or(forged)
            }
            (_, Origin::Site(site)) => {
                known.statement(site).map(|_| ()).ok_or_else(|| missing(site))
            }
            (_, Origin::Router(router)) => {
                let lsa = known.lsa(router).ok_or(Rejection::Missing(record.key.origin))?;
                let invalid = Rejection::Invalid("not signed with the key of its router");
                signed_by(record, &lsa.certificate).then_some(()).ok_or(invalid)
            }
        }
    }

    fn have_same_key(&self, a: &[u8], b: &[u8]) -> bool {
        let key =
            |certificate: &[u8]| certificate.split(|byte| *byte == b'/').next().map(<[u8]>::to_vec);
        key(a) == key(b)
    }
}

fn signed_by(record: &Record, certificate: &[u8]) -> bool {
    certificate.starts_with(&record.sealed.signature)
}

/// As if signed by a site.
pub fn seal(draft: RecordDraft) -> Record {
    seal_as(draft, Arc::from(&b"identity key"[..]))
}

pub fn seal_as(draft: RecordDraft, signature: Arc<[u8]>) -> Record {
    let RecordDraft { key, sequence, lifetime_s, payload } = draft;
    let sealed = sealed(format!("{key:?}/{sequence}/{lifetime_s}"), signature);
    Record { key, sequence, lifetime_s, payload, sealed }
}

fn sealed(body: String, signature: Arc<[u8]>) -> Sealed {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    let digest = Digest((u128::from(hasher.finish()) << 64).to_be_bytes());
    Sealed { body: body.into_bytes().into(), signature, digest }
}

/// Another edition of a record with the same sequence, as only its origin can make one: it says the same, but for a router
/// under another key.
pub fn twin(record: &Record, n: u8, other_key: bool) -> Record {
    let mut twin = record.clone();
    let mut signature = Arc::clone(&record.sealed.signature);
    if let (Payload::RouterLsa(lsa), true) = (&record.payload, other_key) {
        signature = Arc::from(&b"twin/"[..]);
        let lsa = RouterLsa { certificate: Arc::clone(&signature), ..RouterLsa::clone(lsa) };
        twin.payload = Payload::RouterLsa(Arc::new(lsa));
    }
    let body = String::from_utf8_lossy(&record.sealed.body);
    twin.sealed = sealed(format!("{body} twin {n} {other_key}"), signature);
    twin
}

pub fn site_id(n: usize) -> SiteId {
    let mut id = [0x51; 32];
    id[..8].copy_from_slice(&(n as u64).to_be_bytes());
    SiteId(id)
}

/// Scattered like a hash.
pub fn router_id(n: usize) -> RouterId {
    RouterId(StdRng::seed_from_u64(n as u64 ^ 0x0dd5).random())
}

pub fn statement(site: SiteId, network: SiteId, epoch: u64) -> Record {
    let statement = SiteStatement {
        site,
        inception: Inception { identity_key: site.0, next_key_sha256: [0; 32] },
        rotations: Vec::new(),
        epoch,
        name: "site".into(),
        ca_certificates: vec![Arc::from(&b"ca"[..])],
        endpoints: Vec::new(),
        expires_unix_s: EPOCH_UNIX_S + i64::from(30 * DAY_S),
        network,
    };
    seal(RecordDraft {
        key: RecordKey::statement(site),
        sequence: epoch,
        lifetime_s: 7 * DAY_S,
        payload: Payload::SiteStatement(Arc::new(statement)),
    })
}

pub fn endorsement(
    issuer: SiteId,
    subject: SiteId,
    membership: Membership,
    scope: Scope,
) -> Record {
    let endorsement = Endorsement {
        issuer,
        subject,
        membership,
        scope,
        may_endorse: membership == Membership::Member,
        valid_until_unix_s: EPOCH_UNIX_S + i64::from(7 * DAY_S),
    };
    seal(RecordDraft {
        key: RecordKey::endorsement(issuer, subject),
        sequence: 1,
        lifetime_s: 7 * DAY_S,
        payload: Payload::Endorsement(endorsement),
    })
}

pub fn entry(address: &str) -> AddressEntry {
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

pub struct Router {
    pub engine: Engine<StubNotary>,
    pub fib: Arc<Fib>,
    pub trust: Arc<TrustView>,
    pub learned: Vec<Arc<Record>>,
    pub refused: Vec<LinkId>,
    pub role: Role,
    pub boot_epoch: u64,
    /// Of its certificate, in whatever boot.
    renewals: Arc<AtomicU64>,
    pub addresses: Vec<AddressEntry>,
    /// What the controller knows.
    pub statements: Vec<Record>,
    pub left: bool,
}

pub struct Link {
    pub ends: [usize; 2],
    pub cost: u16,
    /// What `ends[0]` and `ends[1]` know of the link.
    pub ups: [Up; 2],
    /// Messages to `ends[0]` and to `ends[1]`.
    pub queues: [VecDeque<Message>; 2],
}

/// Neither end learns of a link's beginning and end at the same time as the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Up {
    /// Messages wait.
    NotYet,
    Now,
    /// Messages are lost.
    NoMore,
}

impl Link {
    pub fn is_up(&self) -> bool {
        self.ups == [Up::Now; 2]
    }
}

/// Several routers, the time, and what is under way between them.
pub struct Network {
    pub routers: Vec<Router>,
    pub links: BTreeMap<LinkId, Link>,
    pub start: Instant,
    pub now: Instant,
    pub rng: StdRng,
    last_link: u64,
    handle_bits: u32,
    /// Messages that a link has room for, each way.
    pub room: usize,
    pub messages: u64,
}

impl Network {
    /// Every router is a site of its own; site 0 is the founder.
    #[allow(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
    pub fn new(routers: usize, seed: u64) -> Self {
        let start = Instant::now();
        let mut network = Self {
            routers: Vec::new(),
            links: BTreeMap::new(),
            start,
            now: start,
            rng: StdRng::seed_from_u64(seed),
            last_link: 0,
            handle_bits: 32,
            room: usize::MAX,
            messages: 0,
        };
        for n in 0..routers {
            network.add(n, Role::Interior);
        }
        network
    }

    pub fn with_handle_bits(routers: usize, seed: u64, handle_bits: u32) -> Self {
        let mut network = Self::new(0, seed);
        network.handle_bits = handle_bits;
        for n in 0..routers {
            network.add(n, Role::Interior);
        }
        network
    }

    fn add(&mut self, n: usize, role: Role) {
        let statements = vec![statement(site_id(n), site_id(0), 1)];
        let renewals = Arc::new(AtomicU64::new(0));
        let router = Router {
            engine: new_engine(n, 1, self.handle_bits, &renewals),
            renewals,
            fib: Arc::default(),
            trust: Arc::new(TrustView::empty(site_id(n))),
            learned: Vec::new(),
            refused: Vec::new(),
            role,
            boot_epoch: 1,
            addresses: Vec::new(),
            statements,
            left: false,
        };
        self.routers.push(router);
        self.boot(n);
    }

    fn boot(&mut self, n: usize) {
        let router = &self.routers[n];
        let (role, statements) = (router.role, router.statements.clone());
        let addresses = router.addresses.clone();
        let settings = Settings { role, site_name: "site".into(), ..Settings::default() };
        self.input(n, Input::Settings(settings));
        self.input(n, Input::Statements(statements));
        self.input(n, Input::Addresses(addresses));
    }

    pub fn unix_s(&self) -> i64 {
        EPOCH_UNIX_S + i64::try_from((self.now - self.start).as_secs()).unwrap()
    }

    pub fn input(&mut self, n: usize, input: Input) {
        let unix_s = self.unix_s();
        self.routers[n].engine.handle_input(input, self.now, unix_s);
        self.drain(n);
    }

    fn drain(&mut self, n: usize) {
        while let Some(output) = self.routers[n].engine.poll_output() {
            match output {
                Output::SendReady(link) => self.send(n, link),
                Output::Publish(fib) => self.routers[n].fib = fib,
                Output::Trust(trust) => self.routers[n].trust = trust,
                Output::Learned(records) => self.learn(n, records),
                Output::LinkRefused { link, .. } => {
                    self.routers[n].refused.push(link);
                    // The router closes it, and the other end notices.
                    self.disconnect(link);
                }
            }
        }
    }

    /// Sends while the link has room.
    fn send(&mut self, n: usize, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let to = usize::from(link.ends[0] == n);
        while link.queues[to].len() < self.room
            && let Some(message) = self.routers[n].engine.poll_send(id, self.now)
        {
            if link.ups[to] != Up::NoMore {
                link.queues[to].push_back(message);
            }
        }
    }

    /// The controller keeps the newest of each.
    fn learn(&mut self, n: usize, records: Vec<Arc<Record>>) {
        let router = &mut self.routers[n];
        for record in records {
            router.statements.retain(|kept| kept.key != record.key);
            router.statements.push(Record::clone(&record));
            router.learned.push(record);
        }
    }

    /// Two sites become members of one network, as by a token.
    pub fn endorse(&mut self, a: usize, b: usize) {
        let both = [
            statement(site_id(a), site_id(0), 1),
            statement(site_id(b), site_id(0), 1),
            endorsement(site_id(a), site_id(b), Membership::Member, Scope::default()),
            endorsement(site_id(b), site_id(a), Membership::Member, Scope::default()),
        ];
        for n in [a, b] {
            self.give(n, both.to_vec());
        }
    }

    pub fn give(&mut self, n: usize, records: Vec<Record>) {
        for record in &records {
            self.routers[n]
                .statements
                .retain(|kept| kept.key != record.key || kept.sequence > record.sequence);
            if !self.routers[n].statements.iter().any(|kept| kept.key == record.key) {
                self.routers[n].statements.push(record.clone());
            }
        }
        self.input(n, Input::Statements(records));
    }

    pub fn connect(&mut self, a: usize, b: usize, cost: u16) -> LinkId {
        let link = self.begin(a, b, cost);
        self.tell_up(link, 0);
        self.tell_up(link, 1);
        link
    }

    /// A link of which neither end knows yet.
    pub fn begin(&mut self, a: usize, b: usize, cost: u16) -> LinkId {
        self.last_link += 1;
        let link = LinkId(self.last_link);
        let ups = [Up::NotYet; 2];
        self.links.insert(link, Link { ends: [a, b], cost, ups, queues: Default::default() });
        link
    }

    /// One end learns that the link is up.
    pub fn tell_up(&mut self, id: LinkId, end: usize) {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.ups[end] == Up::NotYet) else {
            return;
        };
        link.ups[end] = Up::Now;
        let (near, far) = (link.ends[end], link.ends[1 - end]);
        let up = LinkUp {
            link: id,
            peer: router_id(far),
            peer_site: site_id(far),
            cost: link.cost,
            rtt_us: 0,
            mtu: 1_400,
            statements: Vec::new(),
        };
        self.input(near, Input::LinkUp(up));
    }

    pub fn disconnect(&mut self, link: LinkId) {
        self.tell_down(link, 0);
        self.tell_down(link, 1);
    }

    /// One end learns that the link is down; once both know it is gone.
    pub fn tell_down(&mut self, id: LinkId, end: usize) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let was = std::mem::replace(&mut link.ups[end], Up::NoMore);
        link.queues[end].clear();
        let n = link.ends[end];
        if link.ups == [Up::NoMore; 2] {
            self.links.remove(&id);
        }
        if was == Up::Now {
            self.input(n, Input::LinkDown { link: id });
        }
    }

    /// Links of which only one end knows come up or go down.
    pub fn finish_links(&mut self) {
        let ids: Vec<LinkId> = self.links.keys().copied().collect();
        for id in ids {
            if self.links[&id].ups.contains(&Up::NoMore) {
                self.disconnect(id);
            } else {
                self.tell_up(id, 0);
                self.tell_up(id, 1);
            }
        }
    }

    /// The process dies, as its neighbours will notice; another one starts with the next boot epoch and what the controller
    /// kept.
    pub fn crash(&mut self, n: usize) {
        for id in self.links_of(n) {
            let Some(link) = self.links.get(&id) else { continue };
            let end = usize::from(link.ends[1] == n);
            self.tell_down(id, end);
        }
        self.start(n);
    }

    /// The process ends, and neighbours know at once.
    pub fn restart(&mut self, n: usize) {
        for link in self.links_of(n) {
            self.disconnect(link);
        }
        self.start(n);
    }

    fn start(&mut self, n: usize) {
        let router = &mut self.routers[n];
        router.boot_epoch += 1;
        router.left = false;
        router.engine = new_engine(n, router.boot_epoch, self.handle_bits, &router.renewals);
        router.fib = Arc::default();
        self.boot(n);
    }

    /// A router has another certificate.
    pub fn renew(&mut self, n: usize) {
        self.routers[n].renewals.fetch_add(1, Ordering::Relaxed);
        self.input(n, Input::IdentityRenewed);
    }

    pub fn links_of(&self, n: usize) -> Vec<LinkId> {
        self.links.iter().filter(|(_, link)| link.ends.contains(&n)).map(|(id, _)| *id).collect()
    }

    pub fn set_addresses(&mut self, n: usize, addresses: Vec<AddressEntry>) {
        self.routers[n].addresses = addresses.clone();
        self.input(n, Input::Addresses(addresses));
    }

    /// Delivers one message of a random queue; `false` when there is none.
    pub fn deliver_one(&mut self) -> bool {
        let busy: Vec<(LinkId, usize)> = self
            .links
            .iter()
            .flat_map(|(id, link)| (0..2).map(move |to| (*id, to, link)))
            .filter(|(_, to, link)| !link.queues[*to].is_empty() && link.ups[*to] == Up::Now)
            .map(|(id, to, _)| (id, to))
            .collect();
        if busy.is_empty() {
            return false;
        }
        let (id, to) = busy[self.rng.random_range(0..busy.len())];
        let link = self.links.get_mut(&id).unwrap();
        let (n, sender) = (link.ends[to], link.ends[1 - to]);
        let message = link.queues[to].pop_front().unwrap();
        self.messages += 1;
        self.input(n, Input::Message { link: id, message });
        self.send(sender, id);
        true
    }

    pub fn deliver_all(&mut self) {
        while self.deliver_one() {}
    }

    /// `liar` tells `n` a record of which it says nothing to anybody else, over a link that ends at once.
    pub fn whisper(&mut self, liar: usize, n: usize, record: Record) {
        let link = self.begin(n, liar, 1);
        self.tell_up(link, 0);
        let aged = AgedRecord { remaining_s: record.lifetime_s, record: Arc::new(record) };
        self.input(n, Input::Message { link, message: Message::Records { records: vec![aged] } });
        self.disconnect(link);
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.routers.iter().filter_map(|r| Some(r.engine.poll_timeout()?.0)).min()
    }

    /// Moves time on, with messages arriving at once.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        let mut steps = 0_u64;
        loop {
            self.deliver_all();
            let Some(next) = self.next_timeout().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            let unix_s = self.unix_s();
            for n in 0..self.routers.len() {
                let due = self.routers[n].engine.poll_timeout();
                if due.is_some_and(|(at, _)| at <= self.now) {
                    self.routers[n].engine.handle_timeout(self.now, unix_s);
                    self.drain(n);
                }
            }
            steps += 1;
            assert!(steps < 200_000, "a timer does not get done: {:?}", self.timeouts());
        }
        self.now = end;
    }

    fn timeouts(&self) -> Vec<&'static str> {
        let due = self.routers.iter().filter_map(|r| r.engine.poll_timeout());
        due.filter(|(at, _)| *at <= self.now).map(|(_, why)| why).collect()
    }

    /// Routers that hang together over links, edges included.
    pub fn component(&self, n: usize) -> Vec<usize> {
        let mut found = vec![n];
        let mut i = 0;
        while i < found.len() {
            for link in self.links.values().filter(|link| link.is_up()) {
                for (near, far) in [(0, 1), (1, 0)] {
                    if link.ends[near] == found[i] && !found.contains(&link.ends[far]) {
                        found.push(link.ends[far]);
                    }
                }
            }
            i += 1;
        }
        found.sort_unstable();
        found
    }

    /// Least metric from `n` to everywhere by brute force (Bellman-Ford); edges and routers that left carry nothing.
    pub fn oracle(&self, n: usize) -> Vec<Option<u64>> {
        let mut best = vec![None; self.routers.len()];
        best[n] = Some(0);
        if self.routers[n].left {
            return best;
        }
        for _ in 0..self.routers.len() {
            for link in self.links.values().filter(|link| link.is_up()) {
                for (near, far) in [(0, 1), (1, 0)] {
                    let (near, far) = (link.ends[near], link.ends[far]);
                    let transit = near == n || self.routers[near].role == Role::Interior;
                    let alive = !self.routers[near].left && !self.routers[far].left;
                    if let (true, true, Some(at)) = (transit, alive, best[near]) {
                        let metric = at + u64::from(link.cost) * 1_000;
                        best[far] = Some(best[far].map_or(metric, |old: u64| old.min(metric)));
                    }
                }
            }
        }
        best
    }

    /// Follows a path as frames do: labels, looked up router by router. Returns routers passed.
    pub fn forward(&self, from: usize, path: &skein_core::Path) -> Vec<usize> {
        let mut at = self.across(from, path.first_link).expect("the first link exists");
        let mut passed = vec![at];
        for label in &path.labels {
            let link = self.routers[at].fib.labels.get(label).expect("the label is known");
            at = self.across(at, *link).expect("the link exists");
            passed.push(at);
        }
        passed
    }

    fn across(&self, near: usize, link: LinkId) -> Option<usize> {
        let link = self.links.get(&link)?;
        link.ends.contains(&near).then(|| link.ends[usize::from(link.ends[0] == near)])
    }

    pub fn is_quiet(&self) -> bool {
        self.links.values().all(|link| link.queues.iter().all(VecDeque::is_empty))
    }

    pub fn live_headers(&self, n: usize) -> Vec<(RecordKind, Origin, u64)> {
        let headers = self.routers[n].engine.lsdb().headers();
        headers.map(|h| (h.key.kind, h.key.origin, h.edition.sequence)).collect()
    }
}

fn new_engine(
    n: usize,
    boot_epoch: u64,
    handle_bits: u32,
    renewals: &Arc<AtomicU64>,
) -> Engine<StubNotary> {
    let identity = Identity {
        router: router_id(n),
        site: site_id(n),
        name: format!("router-{n}").into(),
        boot_epoch,
        version: "test".into(),
        protocol: (1, 1),
    };
    let key = format!("key {}/", renewals.fetch_add(1, Ordering::Relaxed));
    let renewals = Arc::clone(renewals);
    let router = router_id(n);
    let notary = StubNotary { router, boot_epoch, key, renewals, handle_bits, verified: 0 };
    Engine::new(identity, notary)
}
