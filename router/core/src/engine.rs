//! The routing engine: everything a router knows about the network, driven by events.
//!
//! Sans-IO: the driver passes events and the time in, then drains [`Engine::poll_output`] and, for every link it was told
//! about, [`Engine::poll_send`]; it calls [`Engine::handle_timeout`] when [`Engine::poll_timeout`] is due.

mod addresses;
mod flood;
mod membership;
mod originate;
mod snapshot;
mod view;

pub use view::{NetworkView, RouterView, SiteView};

use crate::{
    AddressEntry, AgedRecord, Fib, Handle, LinkId, Lsdb, Origin, Record, RecordDraft, RecordHeader,
    Role, RouterId, RouterLsa, SiteId, SiteStatement, TrustView,
    adjacency::{Adjacency, Audience, LinkFacts},
    labels::Labels,
};
use addresses::AddressIndex;
use originate::OwnRecords;
use snapshot::Snapshot;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Instant,
};

/// Most links of a router: its LSA has to fit into a record.
const LINKS_MAX: usize = 1_024;

/// Most links to one router: one for each pair of addresses a careful operator would configure, and then some.
const LINKS_PER_ROUTER_MAX: usize = 16;
/// Most links to one guest.
const LINKS_PER_GUEST_MAX: usize = 64;
/// Most links to one other site: some are left for others.
const LINKS_PER_MEMBER_MAX: usize = 896;
/// Most labels that mean routers of one guest, links of the last two hours included: a guest makes up routers as it likes.
const LABELS_PER_GUEST_MAX: usize = 256;
/// The same of a member.
const LABELS_PER_MEMBER_MAX: usize = 16_384;

/// Seals our records and checks those of others. Injected, because this crate knows neither encodings nor keys.
pub trait Notary {
    /// DER certificate under whose key our records are sealed; `None` while there is none, and then none are issued.
    fn certificate(&self) -> Option<Arc<[u8]>>;

    /// The handle to use in this boot after `attempt` handles were found taken.
    fn handle(&self, attempt: u32) -> Handle;

    /// Encodes and signs.
    ///
    /// # Errors
    /// [`SealError`] when there is no key to sign with, or the draft does not fit into a record.
    fn seal(&mut self, draft: RecordDraft) -> Result<Record, SealError>;

    /// Checks that the record was signed by its origin. Implementations memoise.
    ///
    /// # Errors
    /// [`Rejection::Missing`] when something else must be known first, [`Rejection::Forged`] only when the record alone tells
    /// that it is worthless, another one when it is by what is known here: that may differ from what a neighbour knows, and
    /// the origin can see to it that it does.
    fn verify(&mut self, record: &Record, known: &Known<'_>) -> Result<(), Rejection>;

    /// Whether two certificates are for the same key, so that what was sealed under one holds under the other.
    fn have_same_key(&self, a: &[u8], b: &[u8]) -> bool;
}

/// What has been accepted so far, for a [`Notary`] to verify against.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The database.
    pub lsdb: &'a Lsdb,
    /// Who is trusted.
    pub trust: &'a TrustView,
    /// Seconds since 1970.
    pub unix_s: i64,
}

impl<'a> Known<'a> {
    /// The site's statement: its identity key and anchors. Authentic, though the site need not be trusted.
    #[must_use]
    pub fn statement(&self, site: SiteId) -> Option<&'a Arc<SiteStatement>> {
        self.lsdb.statement(site)
    }

    /// The router's LSA: its certificate.
    #[must_use]
    pub fn lsa(&self, router: RouterId) -> Option<&'a Arc<RouterLsa>> {
        self.lsdb.lsa(router)
    }
}

/// Why a record of our own could not be issued.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SealError {
    /// No key or certificate yet.
    #[error("there is no certificate to sign under yet")]
    NoKey,
    /// It would be larger than a record may be.
    #[error("the record is too large")]
    TooLarge,
}

/// Why a record was not accepted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Rejection {
    /// It can be checked once the record of this origin is there: a site's statement, or a router's LSA.
    #[error("what it is verified with is not known yet: {0:?}")]
    Missing(Origin),
    /// The signature or what it stands on does not hold.
    #[error("{0}")]
    Invalid(&'static str),
    /// Its signature does not hold, whatever anybody may know: no honest router has ever taken it or passed it on, and whoever
    /// brings many such records makes them up.
    #[error("{0}")]
    Forged(&'static str),
    /// It or what it stands on has expired, or is not valid yet.
    #[error("expired or not valid yet")]
    Expired,
    /// Its origin is not trusted and there is no room for its records.
    #[error("its origin is not trusted")]
    Untrusted,
    /// A bound of the database is reached.
    #[error("the database has no room for it: {0}")]
    Full(&'static str),
}

/// What a router tells its neighbour about the database, on the link's control stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// What the sender has, in pieces.
    Summary {
        /// A piece.
        headers: Vec<RecordHeader>,
        /// No more pieces follow.
        last: bool,
    },
    /// What the sender lacks.
    Request {
        /// At least these editions.
        headers: Vec<RecordHeader>,
    },
    /// Records asked for or flooded.
    Records {
        /// In an order in which each can be verified with what came before.
        records: Vec<AgedRecord>,
    },
}

/// Who this router is; fixed for a boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The router.
    pub router: RouterId,
    /// Its site.
    pub site: SiteId,
    /// Its name within the site.
    pub name: Arc<str>,
    /// Grows with every start: the high half of sequence numbers.
    pub boot_epoch: u64,
    /// Software version.
    pub version: Arc<str>,
    /// Protocol versions spoken, lowest and highest.
    pub protocol: (u32, u32),
}

/// What can change while the router runs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// Whether this router may be transit.
    pub role: Role,
    /// The site's name, for people.
    pub site_name: Arc<str>,
    /// `host:port` on which it accepts links.
    pub endpoints: Vec<String>,
    /// Sites whose revocations count besides our own and the founder's, in order of precedence.
    pub authorities: Vec<SiteId>,
}

/// A link that came up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LinkUp {
    /// The link.
    pub link: LinkId,
    /// The router at the other end, from its certificate.
    pub peer: RouterId,
    /// Its site, from its certificate.
    pub peer_site: SiteId,
    /// Cost as agreed in the handshake.
    pub cost: u16,
    /// Smoothed RTT in microseconds.
    pub rtt_us: u32,
    /// Largest end-to-end packet, frame header excluded, in bytes.
    pub mtu: u16,
    /// Statements the peer introduced itself with.
    pub statements: Vec<Record>,
}

/// Something that happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// Settings from the controller.
    Settings(Settings),
    /// Statements, endorsements and revocations from the controller.
    Statements(Vec<Record>),
    /// Every address this router serves now.
    Addresses(Vec<AddressEntry>),
    /// The certificate our records are sealed under is new. The key stays the same for a boot: what it sealed must hold by
    /// every LSA of the boot.
    IdentityRenewed,
    /// A link came up.
    LinkUp(LinkUp),
    /// A measurement or agreement about a link changed.
    LinkChanged {
        /// The link.
        link: LinkId,
        /// Cost as agreed.
        cost: u16,
        /// Smoothed RTT in microseconds.
        rtt_us: u32,
        /// Largest end-to-end packet, frame header excluded, in bytes.
        mtu: u16,
    },
    /// A link is gone.
    LinkDown {
        /// The link.
        link: LinkId,
    },
    /// The neighbour said something.
    Message {
        /// Over this link.
        link: LinkId,
        /// What it said.
        message: Message,
    },
    /// The router is about to stop for good: say farewell.
    Leave,
}

/// Something to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// The link has something to send: call [`Engine::poll_send`] until it returns `None` or the link has no room; then
    /// again when it has.
    SendReady(LinkId),
    /// The network looks different.
    Publish(Arc<Fib>),
    /// Trust looks different.
    Trust(Arc<TrustView>),
    /// Statements accepted from the network, for the controller to keep.
    Learned(Vec<Arc<Record>>),
    /// This link may not exist: close it.
    LinkRefused {
        /// The link.
        link: LinkId,
        /// For people.
        why: String,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Engine<N> {
    identity: Identity,
    settings: Settings,
    notary: N,
    lsdb: Lsdb,
    trust: Arc<TrustView>,
    trust_stale: bool,
    /// When what trust stands on expires, or the wall clock may have been set.
    trust_due: Option<Instant>,
    adjacencies: BTreeMap<LinkId, Adjacency>,
    labels: Labels,
    own: OwnRecords,
    addresses: AddressIndex,
    snapshot: Snapshot,
    learned: Vec<Arc<Record>>,
    outputs: VecDeque<Output>,
}

impl<N: Notary> Engine<N> {
    /// An engine that knows nobody yet.
    #[must_use]
    pub fn new(identity: Identity, notary: N) -> Self {
        let trust = Arc::new(TrustView::empty(identity.site));
        let identity_boot_epoch = identity.boot_epoch;
        let own = OwnRecords::new(identity_boot_epoch);
        Self {
            identity,
            settings: Settings::default(),
            notary,
            lsdb: Lsdb::default(),
            trust,
            trust_stale: true,
            trust_due: None,
            adjacencies: BTreeMap::new(),
            labels: Labels::new(identity_boot_epoch),
            own,
            addresses: AddressIndex::default(),
            snapshot: Snapshot::default(),
            learned: Vec::new(),
            outputs: VecDeque::new(),
        }
    }

    /// Takes an event in.
    pub fn handle_input(&mut self, input: Input, now: Instant, unix_s: i64) {
        self.own.begin(unix_s);
        match input {
            Input::Settings(settings) => self.set(settings),
            Input::Statements(records) => self.take_statements(records, None, now, unix_s),
            Input::Addresses(entries) => {
                self.own.set_addresses(entries);
                self.addresses.replace_local(self.identity.router, self.own.pages());
                self.snapshot.mark_addresses();
            }
            Input::IdentityRenewed => self.own.reissue(),
            Input::LinkUp(up) => self.link_up(up, now, unix_s),
            Input::LinkChanged { link, cost, rtt_us, mtu } => {
                if let Some(adjacency) = self.adjacencies.get_mut(&link)
                    && adjacency.measure(cost, rtt_us, mtu, now)
                {
                    self.own.mark_lsa();
                }
            }
            Input::LinkDown { link } => self.link_down(link, now),
            Input::Message { link, message } => self.message(link, message, now, unix_s),
            Input::Leave => {
                self.own.leave();
                self.addresses.replace_local(self.identity.router, self.own.pages());
                self.snapshot.mark_addresses();
            }
        }
        self.settle(now, unix_s);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, unix_s: i64) {
        self.expire(now);
        if self.trust_due.is_some_and(|due| due <= now) {
            self.trust_stale = true;
        }
        self.judge_neighbours(now);
        for adjacency in self.adjacencies.values_mut() {
            adjacency.give_up(now);
            if adjacency.republish_rtt(now) {
                self.own.mark_lsa();
            }
        }
        self.settle(now, unix_s);
    }

    /// When to call [`Self::handle_timeout`] next, and for what.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let rtt = self.adjacencies.values().filter_map(Adjacency::rtt_due).min();
        let answer = self.adjacencies.values().filter_map(Adjacency::answer_due).min();
        let can_issue = self.notary.certificate().is_some();
        [
            self.lsdb.next_expiry().map(|at| (at, "record expires")),
            self.trust_due.map(|at| (at, "trust expires")),
            rtt.map(|at| (at, "changed RTT may be told")),
            answer.map(|at| (at, "records asked for are gone")),
            self.own.due(self.lsa_is_out()).filter(|_| can_issue),
            self.snapshot.due(),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The next message for a link; call it only when the link has room.
    pub fn poll_send(&mut self, link: LinkId, now: Instant) -> Option<Message> {
        self.adjacencies.get_mut(&link)?.poll_send(&self.lsdb, self.identity.site, now)
    }

    /// What this router writes as source into frame headers.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.notary.handle(self.own.handle_attempt())
    }

    /// The database.
    #[must_use]
    pub fn lsdb(&self) -> &Lsdb {
        &self.lsdb
    }

    /// Who is trusted.
    #[must_use]
    pub fn trust(&self) -> &Arc<TrustView> {
        &self.trust
    }

    /// The last snapshot published.
    #[must_use]
    pub fn fib(&self) -> &Arc<Fib> {
        self.snapshot.fib()
    }

    fn set(&mut self, settings: Settings) {
        if settings != self.settings {
            self.settings = settings;
            self.trust_stale = true;
            self.own.mark_lsa();
        }
    }

    fn link_up(&mut self, up: LinkUp, now: Instant, unix_s: i64) {
        let LinkUp { link, peer, peer_site, cost, rtt_us, mtu, statements } = up;
        self.take_statements(statements, Some(link), now, unix_s);
        self.refresh_trust(now, unix_s);
        if peer == self.identity.router {
            return self.refuse(link, "it leads back to this router");
        }
        let Some(site) = self.trust.site(peer_site) else {
            return self.refuse(link, "the site at the other end is not trusted");
        };
        let audience = membership::audience(site);
        self.link_down(link, now);
        if let Some(why) = self.crowded(peer, peer_site, audience) {
            return self.refuse(link, why);
        }
        let labels_max = match audience {
            Audience::Member => LABELS_PER_MEMBER_MAX,
            Audience::Guest => LABELS_PER_GUEST_MAX,
        };
        let Some(label) = self.labels.assign((peer, peer_site), link, labels_max, now) else {
            return self.refuse(link, "this router has no number left for another link");
        };
        tracing::info!(%link, %peer, peer_site = %peer_site.short(), label = label.0, "adjacency up");
        let facts = LinkFacts { link, peer, peer_site, label, cost, rtt_us, mtu };
        self.adjacencies.insert(link, Adjacency::new(facts, audience));
        self.own.mark_lsa();
        self.snapshot.mark();
    }

    /// Why there may not be another link to that router, if so.
    fn crowded(&self, peer: RouterId, site: SiteId, audience: Audience) -> Option<&'static str> {
        let to_peer = self.adjacencies.values().filter(|a| a.peer == peer).count();
        let to_site = self.adjacencies.values().filter(|a| a.peer_site == site).count();
        let to_site_max = match audience {
            Audience::Member => LINKS_PER_MEMBER_MAX,
            Audience::Guest => LINKS_PER_GUEST_MAX,
        };
        if self.adjacencies.len() >= LINKS_MAX {
            Some("this router has as many links as it can advertise")
        } else if to_peer >= LINKS_PER_ROUTER_MAX {
            Some("there are as many links between the two routers as there may be")
        } else if to_site >= to_site_max {
            Some("there are as many links to the site as there may be")
        } else {
            None
        }
    }

    fn link_down(&mut self, link: LinkId, now: Instant) {
        if let Some(adjacency) = self.adjacencies.remove(&link) {
            tracing::info!(%link, peer = %adjacency.peer, "adjacency down");
            self.labels.release(link, now);
            self.own.mark_lsa();
            self.snapshot.mark();
        }
    }

    fn refuse(&mut self, link: LinkId, why: &str) {
        tracing::warn!(%link, why, "link refused");
        self.outputs.push_back(Output::LinkRefused { link, why: why.to_owned() });
    }

    /// Brings everything that follows from the database up to date.
    fn settle(&mut self, now: Instant, unix_s: i64) {
        self.refresh_trust(now, unix_s);
        self.issue(now);
        self.publish(now);
        if !self.learned.is_empty() {
            let learned = std::mem::take(&mut self.learned);
            self.outputs.push_back(Output::Learned(learned));
        }
        for adjacency in self.adjacencies.values_mut() {
            if adjacency.announce() {
                self.outputs.push_back(Output::SendReady(adjacency.link));
            }
        }
    }
}
