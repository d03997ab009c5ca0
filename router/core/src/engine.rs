//! The routing engine: everything a router knows about the network, driven by events.
//!
//! Sans-IO: the driver passes events and the time in, then drains [`Engine::poll_output`] and, for every link it was told
//! about, [`Engine::poll_send`]; it calls [`Engine::handle_timeout`] when [`Engine::poll_timeout`] is due.

use crate::{
    AddressEntry, AgedRecord, Fib, Handle, LinkId, Lsdb, Origin, Record, RecordDraft, RecordHeader,
    Role, RouterId, RouterLsa, SiteId, SiteStatement, TrustView,
};
use std::{collections::VecDeque, sync::Arc, time::Instant};

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
    /// [`Rejection::Missing`] when something else must be known first, otherwise the record is worthless.
    fn verify(&mut self, record: &Record, known: &Known<'_>) -> Result<(), Rejection>;
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
    /// The key or certificate our records are sealed with is new.
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
    notary: N,
    lsdb: Lsdb,
    outputs: VecDeque<Output>,
}

impl<N: Notary> Engine<N> {
    /// An engine that knows nobody yet.
    #[must_use]
    pub fn new(identity: Identity, notary: N) -> Self {
        Self { identity, notary, lsdb: Lsdb::default(), outputs: VecDeque::new() }
    }

    /// Takes an event in.
    pub fn handle_input(&mut self, input: Input, now: Instant, unix_s: i64) {
        tracing::trace!(router = %self.identity.router, ?input, ?now, unix_s, "routing input");
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, unix_s: i64) {
        tracing::trace!(?now, unix_s, "routing timeout");
    }

    /// When to call [`Self::handle_timeout`] next, and for what.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        None
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The next message for a link; call it only when the link has room.
    pub fn poll_send(&mut self, link: LinkId, now: Instant) -> Option<Message> {
        tracing::trace!(%link, ?now, "nothing to send");
        None
    }

    /// What this router writes as source into frame headers.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.notary.handle(0)
    }

    /// The database, for status.
    #[must_use]
    pub fn lsdb(&self) -> &Lsdb {
        &self.lsdb
    }
}
