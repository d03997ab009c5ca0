//! One neighbour: how far the exchange of databases has come, and what is still to be sent.

use crate::{
    AgedRecord, Edition, Label, LinkAdvert, LinkId, Lsdb, Message, Origin, Record, RecordHeader,
    RecordKey, RouterId, SiteId,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// Headers in one summary or request: a message stays below 64 KiB.
const HEADERS_PER_MESSAGE: usize = 512;
/// Records in one message, as long as they fit.
const RECORDS_PER_MESSAGE: usize = 256;
/// Bytes of records after which a message is full; one more record of at most 64 KiB may be in it.
const RECORD_BYTES_PER_MESSAGE: usize = 64 * 1024;
/// Most records wanted of one neighbour that have not arrived: its whole database.
const WANTED_MAX: usize = 200_000;
/// The same of a guest, which has little to tell.
const GUEST_WANTED_MAX: usize = 8_192;
/// A neighbour that has sent no record for so long sends nothing more of what was asked: it had lost it by then.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Most records of one neighbour remembered as not verifiable yet.
const PARKED_MAX: usize = 4_096;
/// The LSA of a neighbour arrives within this after the link came up, or was missed.
const LSA_MISSING_MAX: Duration = Duration::from_secs(300);
/// Forged records of one neighbour within a while: each costs us as much as a good one, and an honest neighbour has none.
const FORGED_MAX: u32 = 32;
const FORGED_WITHIN: Duration = Duration::from_secs(60);
/// RTT is advertised in these steps, so that links of one LAN are equally good.
const RTT_STEP_US: u32 = 500;
/// Smallest change of RTT worth telling the network.
const RTT_CHANGE_MIN_US: u32 = 1_000;
/// A changed RTT is told at most this often.
const RTT_REPUBLISH: Duration = Duration::from_secs(10);

/// How far the exchange of databases with a neighbour has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AdjacencyState {
    /// Summaries and missing records are on their way.
    Exchange,
    /// Everything it had has arrived; changes are flooded.
    Full,
}

/// What a neighbour gets to see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Audience {
    /// A member of the network: everything.
    Member,
    /// A guest: our own site and its own.
    Guest,
}

#[derive(Debug)]
pub(crate) struct Adjacency {
    pub(crate) link: LinkId,
    pub(crate) peer: RouterId,
    pub(crate) peer_site: SiteId,
    pub(crate) audience: Audience,
    label: Label,
    cost: u16,
    mtu: u16,
    rtt_us: u32,
    advertised_rtt_us: u32,
    rtt_republished: Option<Instant>,
    summary: Summary,
    /// Records to send by (kind, serial): each can be verified with what comes before it. Bounded by the database.
    pending: BTreeSet<(u32, u64)>,
    wanted: BTreeMap<RecordKey, Edition>,
    requested: BTreeMap<RecordKey, Edition>,
    /// When something was last asked, or a record last came.
    answered: Option<Instant>,
    peer_summary_done: bool,
    /// Records that wait for another one, whose origin is remembered.
    parked: BTreeMap<RecordKey, (Edition, Origin)>,
    announced: bool,
    /// Records that nobody can have found signed by whom they name, and since when they are counted.
    forged: (u32, Option<Instant>),
    /// Since when no LSA of the peer is known.
    without_lsa: Option<Instant>,
}

/// What of our own summary was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Summary {
    SentUpTo(Option<RecordKey>),
    Done,
}

/// Facts about a link that came up.
pub(crate) struct LinkFacts {
    pub(crate) link: LinkId,
    pub(crate) peer: RouterId,
    pub(crate) peer_site: SiteId,
    pub(crate) label: Label,
    pub(crate) cost: u16,
    pub(crate) rtt_us: u32,
    pub(crate) mtu: u16,
}

impl Adjacency {
    pub(crate) fn new(facts: LinkFacts, audience: Audience) -> Self {
        Self {
            link: facts.link,
            peer: facts.peer,
            peer_site: facts.peer_site,
            audience,
            label: facts.label,
            cost: facts.cost.max(1),
            mtu: facts.mtu,
            rtt_us: facts.rtt_us,
            advertised_rtt_us: quantise(facts.rtt_us),
            rtt_republished: None,
            summary: Summary::SentUpTo(None),
            pending: BTreeSet::new(),
            wanted: BTreeMap::new(),
            requested: BTreeMap::new(),
            answered: None,
            peer_summary_done: false,
            parked: BTreeMap::new(),
            announced: false,
            forged: (0, None),
            without_lsa: None,
        }
    }

    pub(crate) fn state(&self) -> AdjacencyState {
        if self.peer_summary_done && self.wanted.is_empty() && self.requested.is_empty() {
            AdjacencyState::Full
        } else {
            AdjacencyState::Exchange
        }
    }

    pub(crate) fn label(&self) -> Label {
        self.label
    }

    /// Our end of the link, for our LSA.
    pub(crate) fn advert(&self) -> LinkAdvert {
        LinkAdvert {
            neighbor: self.peer,
            link: self.link,
            label: self.label,
            cost: self.cost,
            rtt_us: self.advertised_rtt_us,
            mtu: self.mtu,
        }
    }

    /// Takes measurements; says whether the network should know at once.
    pub(crate) fn measure(&mut self, cost: u16, rtt_us: u32, mtu: u16, now: Instant) -> bool {
        let changed = (self.cost, self.mtu) != (cost.max(1), mtu);
        (self.cost, self.mtu, self.rtt_us) = (cost.max(1), mtu, rtt_us);
        let republished = self.republish_rtt(now);
        changed || republished
    }

    /// When a changed RTT may be told; `None` when there is nothing to tell.
    pub(crate) fn rtt_due(&self) -> Option<Instant> {
        let wait = self.rtt_republished.map(|at| at + RTT_REPUBLISH)?;
        self.rtt_differs().then_some(wait)
    }

    /// Advertises the RTT as it is now if it changed enough and the last time is long enough ago.
    pub(crate) fn republish_rtt(&mut self, now: Instant) -> bool {
        let is_time = self.rtt_republished.is_none_or(|at| now >= at + RTT_REPUBLISH);
        if !is_time || !self.rtt_differs() {
            return false;
        }
        self.rtt_republished = Some(now);
        self.advertised_rtt_us = quantise(self.rtt_us);
        true
    }

    /// By a quarter or more, and not just by noise.
    fn rtt_differs(&self) -> bool {
        let difference = quantise(self.rtt_us).abs_diff(self.advertised_rtt_us);
        difference >= RTT_CHANGE_MIN_US && difference >= self.advertised_rtt_us / 4
    }

    /// Starts the exchange anew, e.g. because the neighbour may see more now.
    pub(crate) fn restart(&mut self, audience: Audience) {
        self.audience = audience;
        self.summary = Summary::SentUpTo(None);
    }

    /// Whether the neighbour gets to see a record of `site`.
    pub(crate) fn may_see(&self, record: &Record, site: Option<SiteId>, local: SiteId) -> bool {
        match self.audience {
            Audience::Member => true,
            Audience::Guest => {
                let about_others = record.key.kind == crate::RecordKind::Endorsement
                    && record.key.subkey != crate::Subkey::site(self.peer_site);
                site == Some(self.peer_site) || (site == Some(local) && !about_others)
            }
        }
    }

    pub(crate) fn enqueue(&mut self, key: RecordKey, serial: u64) {
        self.pending.insert((key.kind.number(), serial));
    }

    /// The record was replaced or need not be sent.
    pub(crate) fn dequeue(&mut self, key: RecordKey, serial: u64) {
        self.pending.remove(&(key.kind.number(), serial));
    }

    /// The neighbour has an edition that we lack, or says so: what it made up never comes.
    pub(crate) fn want(&mut self, header: RecordHeader) {
        let wanted_max = match self.audience {
            Audience::Member => WANTED_MAX,
            Audience::Guest => GUEST_WANTED_MAX,
        };
        if self.wanted.len() + self.requested.len() < wanted_max {
            self.wanted.insert(header.key, header.edition);
        }
    }

    /// Records came.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.answered = Some(now);
    }

    /// When what was asked for and has not come counts as gone.
    pub(crate) fn answer_due(&self) -> Option<Instant> {
        self.answered.map(|at| at + ANSWER_MAX).filter(|_| !self.requested.is_empty())
    }

    /// Gives up what the neighbour has left out of its answers.
    pub(crate) fn give_up(&mut self, now: Instant) {
        if self.answer_due().is_some_and(|due| due <= now) {
            tracing::debug!(link = %self.link, records = self.requested.len(), "records asked for are gone");
            self.requested.clear();
        }
    }

    /// Counts a record that nobody can have found signed by whom it names; says whether there were too many.
    pub(crate) fn forged(&mut self, now: Instant) -> bool {
        let (count, since) = self.forged;
        self.forged = match since {
            Some(since) if now < since + FORGED_WITHIN => (count + 1, Some(since)),
            _ => (1, Some(now)),
        };
        self.forged.0 > FORGED_MAX
    }

    /// Whether there has been no LSA of the peer for longer than it may take to arrive.
    pub(crate) fn is_unvouched(&mut self, has_lsa: bool, now: Instant) -> bool {
        if has_lsa {
            self.without_lsa = None;
            return false;
        }
        now >= *self.without_lsa.get_or_insert(now) + LSA_MISSING_MAX
    }

    pub(crate) fn peer_summary_done(&mut self) {
        self.peer_summary_done = true;
    }

    /// An edition arrived, from whomever.
    pub(crate) fn arrived(&mut self, header: RecordHeader) {
        for awaited in [&mut self.wanted, &mut self.requested] {
            if awaited.get(&header.key).is_some_and(|&edition| edition <= header.edition) {
                awaited.remove(&header.key);
            }
        }
    }

    /// Pages of a router with a sequence below `sequence` became void: the neighbour will not send them any more.
    pub(crate) fn forget_pages(&mut self, router: RouterId, sequence: u64) {
        let of_router = RecordKey::page(router, 0)..=RecordKey::page(router, u8::MAX);
        for awaited in [&mut self.wanted, &mut self.requested] {
            let void =
                awaited.range(of_router.clone()).filter(|(_, edition)| edition.sequence < sequence);
            let void: Vec<RecordKey> = void.map(|(key, _)| *key).collect();
            for key in void {
                awaited.remove(&key);
            }
        }
    }

    /// Remembers to ask again for a record once `origin` has told what it is verified with.
    pub(crate) fn park(&mut self, header: RecordHeader, origin: Origin) {
        if self.parked.len() < PARKED_MAX {
            self.parked.insert(header.key, (header.edition, origin));
        }
    }

    /// Asks again for what waited for `origin`.
    pub(crate) fn unpark(&mut self, origin: Origin) {
        let Self { parked, wanted, .. } = self;
        parked.retain(|key, &mut (edition, waits_for)| {
            if waits_for == origin {
                wanted.insert(*key, edition);
            }
            waits_for != origin
        });
    }

    /// Whether the driver has to be told that there is something to send; it is told once until the queue ran empty.
    pub(crate) fn announce(&mut self) -> bool {
        let has_work =
            !self.wanted.is_empty() || !self.pending.is_empty() || self.summary != Summary::Done;
        let news = has_work && !self.announced;
        self.announced |= has_work;
        news
    }

    /// The next message, if any. What was flooded goes before the rest of the summary.
    pub(crate) fn poll_send(
        &mut self,
        lsdb: &Lsdb,
        local: SiteId,
        now: Instant,
    ) -> Option<Message> {
        let message = self
            .next_request(now)
            .or_else(|| self.next_records(lsdb, now))
            .or_else(|| self.next_summary(lsdb, local));
        self.announced = message.is_some();
        message
    }

    fn next_request(&mut self, now: Instant) -> Option<Message> {
        let mut headers = Vec::new();
        while headers.len() < HEADERS_PER_MESSAGE
            && let Some((key, edition)) = self.wanted.pop_first()
        {
            self.requested.insert(key, edition);
            headers.push(RecordHeader { key, edition });
            self.answered = Some(now);
        }
        (!headers.is_empty()).then_some(Message::Request { headers })
    }

    fn next_records(&mut self, lsdb: &Lsdb, now: Instant) -> Option<Message> {
        let (mut records, mut bytes) = (Vec::new(), 0);
        while records.len() < RECORDS_PER_MESSAGE
            && bytes < RECORD_BYTES_PER_MESSAGE
            && let Some((_, serial)) = self.pending.pop_first()
        {
            let Some(entry) = lsdb.by_serial(serial) else { continue };
            bytes += entry.record.sealed.body.len();
            let remaining_s = entry.remaining_s(now);
            records.push(AgedRecord { record: Arc::clone(&entry.record), remaining_s });
        }
        (!records.is_empty()).then_some(Message::Records { records })
    }

    fn next_summary(&mut self, lsdb: &Lsdb, local: SiteId) -> Option<Message> {
        let Summary::SentUpTo(cursor) = self.summary else { return None };
        let (mut headers, mut seen, mut last_key) = (Vec::new(), 0, cursor);
        for entry in lsdb.entries_after(cursor, HEADERS_PER_MESSAGE) {
            seen += 1;
            last_key = Some(entry.record.key);
            if self.may_see(&entry.record, lsdb.site_of(&entry.record), local) {
                headers.push(entry.record.header());
            }
        }
        let last = seen < HEADERS_PER_MESSAGE;
        self.summary = if last { Summary::Done } else { Summary::SentUpTo(last_key) };
        Some(Message::Summary { headers, last })
    }
}

fn quantise(rtt_us: u32) -> u32 {
    rtt_us.saturating_add(RTT_STEP_US / 2) / RTT_STEP_US * RTT_STEP_US
}
