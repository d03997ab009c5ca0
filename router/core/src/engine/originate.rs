//! Our own records: the LSA and the address pages, issued when they change and refreshed while they live.

use super::{Engine, Notary, SealError};
use crate::{
    AddressEntry, AddressPage, Payload, ROUTER_RECORD_LIFETIME, ROUTER_RECORD_REFRESH, RecordDraft,
    RecordHeader, RecordKey, RouterLsa,
    adjacency::Adjacency,
    pages::{Pages, changed_pages, paginate},
    throttle::Throttle,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// A link that flaps must not make every router of the network compute; yet a failure must be told at once.
const LSA_HOLD_MIN: Duration = Duration::from_millis(50);
const LSA_HOLD_MAX: Duration = Duration::from_millis(200);
/// Many services applied one after the other travel together.
const PAGES_HOLD_MIN: Duration = Duration::from_millis(50);
const PAGES_HOLD_MAX: Duration = Duration::from_millis(500);

/// What this router says of itself, and what of it the network has not heard yet.
#[derive(Debug)]
pub(super) struct OwnRecords {
    /// Last sequence number used or seen.
    sequence: u64,
    /// Pages below are of earlier boots; 0 before the first event.
    pages_since: u64,
    lsa_dirty: bool,
    lsa_throttle: Throttle,
    lsa_refresh: Option<Instant>,
    pages: Pages,
    pages_dirty: BTreeSet<u8>,
    pages_throttle: Throttle,
    pages_refresh: BTreeMap<u8, Instant>,
    leaving: bool,
    handle_attempt: u32,
}

impl OwnRecords {
    pub(super) fn new(boot_epoch: u64) -> Self {
        Self {
            sequence: boot_epoch << 32,
            pages_since: 0,
            lsa_dirty: true,
            lsa_throttle: Throttle::new(LSA_HOLD_MIN, LSA_HOLD_MAX),
            lsa_refresh: None,
            pages: Pages::new(),
            pages_dirty: BTreeSet::new(),
            pages_throttle: Throttle::new(PAGES_HOLD_MIN, PAGES_HOLD_MAX),
            pages_refresh: BTreeMap::new(),
            leaving: false,
            handle_attempt: 0,
        }
    }

    pub(super) fn mark_lsa(&mut self) {
        self.lsa_dirty = true;
    }

    pub(super) fn set_addresses(&mut self, entries: Vec<AddressEntry>) {
        if self.leaving {
            return;
        }
        let pages = paginate(entries);
        self.pages_dirty.extend(changed_pages(&self.pages, &pages));
        self.pages = pages;
    }

    /// Issues everything anew.
    pub(super) fn reissue(&mut self) {
        self.lsa_dirty = true;
        self.pages_dirty.extend(self.pages.keys());
    }

    /// A farewell; it voids the pages as well.
    pub(super) fn leave(&mut self) {
        self.leaving = true;
        self.lsa_dirty = true;
        self.pages.clear();
    }

    /// A record of ours that counts and that we do not know: whoever counts boots has forgotten one. Everything of it is
    /// declared void.
    pub(super) fn outdo(&mut self, header: RecordHeader) {
        let sequence = header.edition.sequence;
        if sequence >= self.pages_since {
            tracing::warn!(kind = ?header.key.kind, sequence, "outdoing records of a forgotten boot");
            // That boot may have issued more than this record, but not as many as the lower half counts.
            self.sequence = self.sequence.max(sequence) | u64::from(u32::MAX);
            self.pages_since = self.next_sequence();
            self.reissue();
        }
    }

    /// What this router serves, by page.
    pub(super) fn pages(&self) -> &Pages {
        &self.pages
    }

    pub(super) fn handle_attempt(&self) -> u32 {
        self.handle_attempt
    }

    /// Another router was first to use our handle.
    pub(super) fn redraw_handle(&mut self) {
        self.handle_attempt += 1;
        self.lsa_dirty = true;
    }

    /// When something has to be issued; the past for at once.
    pub(super) fn due(&self, lsa_is_out: bool) -> Option<(Instant, &'static str)> {
        let lsa = self.lsa_throttle.not_before().filter(|_| self.lsa_dirty);
        let has_pages = lsa_is_out && !self.leaving && !self.pages_dirty.is_empty();
        let pages = self.pages_throttle.not_before().filter(|_| has_pages);
        let refresh = self.pages_refresh.values().copied().chain(self.lsa_refresh).min();
        [
            lsa.map(|at| (at, "own LSA changed")),
            pages.map(|at| (at, "own addresses changed")),
            refresh.filter(|_| !self.leaving).map(|at| (at, "own records need a refresh")),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    fn refresh(&mut self, now: Instant) {
        self.lsa_dirty |= self.lsa_refresh.take_if(|at| *at <= now).is_some();
        let Self { pages_refresh, pages_dirty, .. } = self;
        pages_refresh.retain(|page, at| {
            if *at <= now {
                pages_dirty.insert(*page);
            }
            *at > now
        });
    }

    /// Begins to count at the time of day, in seconds: if this boot has the number of an earlier one, which its controller
    /// has forgotten, no two records have the same sequence for all that.
    pub(super) fn begin(&mut self, unix_s: i64) {
        if self.pages_since == 0 {
            self.sequence += u64::try_from(unix_s).unwrap_or(0) & u64::from(u32::MAX);
            self.pages_since = self.next_sequence();
        }
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence = self.sequence.saturating_add(1);
        self.sequence
    }
}

impl<N: Notary> Engine<N> {
    /// Issues what changed or needs a refresh, as far as the throttles allow.
    pub(super) fn issue(&mut self, now: Instant) {
        if !self.own.leaving {
            self.own.refresh(now);
        }
        // A farewell waits for nothing.
        if self.own.lsa_dirty && (self.own.leaving || self.own.lsa_throttle.is_open(now)) {
            self.issue_lsa(now);
        }
        if self.lsa_is_out()
            && !self.own.leaving
            && !self.own.pages_dirty.is_empty()
            && self.own.pages_throttle.is_open(now)
        {
            self.own.pages_throttle.ran(now);
            for page in std::mem::take(&mut self.own.pages_dirty) {
                self.issue_page(page, now);
            }
        }
    }

    /// Whether the LSA by which pages issued from now on hold is out: they come after it. If this process died between them,
    /// the next one would count on from that LSA; of the pages alone it could not tell that they are its own.
    pub(super) fn lsa_is_out(&self) -> bool {
        let lsa = self.lsdb.get(&RecordKey::lsa(self.identity.router));
        lsa.is_some_and(|lsa| lsa.record.sequence >= self.own.pages_since)
    }

    fn issue_lsa(&mut self, now: Instant) {
        let Some(certificate) = self.notary.certificate() else { return };
        let mut links: Vec<_> = self.adjacencies.values().map(Adjacency::advert).collect();
        links.sort_by_key(|link| link.label);
        if self.own.leaving {
            links.clear();
        }
        let (protocol_min, protocol_max) = self.identity.protocol;
        let lsa = RouterLsa {
            router: self.identity.router,
            site: self.identity.site,
            name: Arc::clone(&self.identity.name),
            site_name: Arc::clone(&self.settings.site_name),
            role: self.settings.role,
            handle: self.handle(),
            boot_epoch: self.identity.boot_epoch,
            pages_since: self.own.pages_since,
            certificate,
            links,
            protocol_min,
            protocol_max,
            endpoints: self.settings.endpoints.clone(),
            version: Arc::clone(&self.identity.version),
            leaving: self.own.leaving,
        };
        self.own.lsa_dirty = false;
        self.own.lsa_throttle.ran(now);
        self.own.lsa_refresh = Some(now + ROUTER_RECORD_REFRESH);
        let key = RecordKey::lsa(lsa.router);
        self.issue_record(key, Payload::RouterLsa(Arc::new(lsa)), now);
    }

    fn issue_page(&mut self, page: u8, now: Instant) {
        let key = RecordKey::page(self.identity.router, page);
        match self.own.pages.get(&page) {
            Some(entries) => {
                self.own.pages_refresh.insert(page, now + ROUTER_RECORD_REFRESH);
                let payload = Payload::AddressPage(AddressPage { entries: entries.clone() });
                self.issue_record(key, payload, now);
            }
            // An empty page is purged; one nobody has heard of in this boot is void by its sequence number.
            None => {
                self.own.pages_refresh.remove(&page);
                if self.has(&key) {
                    self.seal(key, 0, Payload::AddressPage(AddressPage::default()), now);
                }
            }
        }
    }

    fn issue_record(&mut self, key: RecordKey, payload: Payload, now: Instant) {
        let lifetime_s = u32::try_from(ROUTER_RECORD_LIFETIME.as_secs())
            .expect("invariant: an hour in seconds fits");
        self.seal(key, lifetime_s, payload, now);
    }

    fn seal(&mut self, key: RecordKey, lifetime_s: u32, payload: Payload, now: Instant) {
        let draft = RecordDraft { key, sequence: self.own.next_sequence(), lifetime_s, payload };
        match self.notary.seal(draft) {
            Ok(record) => {
                let remaining = Duration::from_secs(lifetime_s.into());
                self.accept(Arc::new(record), remaining, None, now);
            }
            // The next identity renews everything.
            Err(SealError::NoKey) => tracing::debug!(?key, "no key to issue a record with"),
            Err(error @ SealError::TooLarge) => {
                tracing::error!(?key, %error, "a record of ours cannot be issued");
            }
        }
    }
}
