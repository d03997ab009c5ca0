//! The link-state database: the newest edition of every record, aged and bounded.

mod quota;

pub(crate) use quota::Standing;

use crate::{
    Endorsement, Origin, Payload, ROUTER_RECORD_LIFETIME, Record, RecordHeader, RecordKey,
    RecordKind, Rejection, Revocation, RouterId, RouterLsa, SiteId, SiteStatement, Subkey,
};
use quota::Quota;
use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

/// Most records: 1,000 routers with an LSA and 64 pages each, three times over.
const RECORDS_MAX: usize = 200_000;
/// Most records of one origin: a router has 65; a site has one per site it endorses or revokes.
const ORIGIN_RECORDS_MAX: usize = 4_096;
/// Most routers of one site.
const SITE_ROUTERS_MAX: usize = 1_024;
/// Most records of kinds this version does not know.
const UNKNOWN_RECORDS_MAX: usize = 4_096;
/// How long a purge is remembered: as long as a copy of what it purged may live anywhere.
const PURGE_LIFETIME: Duration = ROUTER_RECORD_LIFETIME;

/// Every record accepted, the newest edition of each.
#[derive(Clone, Debug, Default)]
pub struct Lsdb {
    entries: BTreeMap<RecordKey, Entry>,
    /// In the order of acceptance.
    by_serial: BTreeMap<u64, RecordKey>,
    expiry: BTreeSet<(Instant, RecordKey)>,
    statements: BTreeMap<SiteId, Arc<SiteStatement>>,
    lsas: BTreeMap<RouterId, Arc<RouterLsa>>,
    records_by_origin: BTreeMap<Origin, usize>,
    routers_by_site: BTreeMap<SiteId, usize>,
    quota: Quota,
    unknown: usize,
    last_serial: u64,
}

/// A record in the database.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The record.
    pub record: Arc<Record>,
    /// Grows with every acceptance.
    pub serial: u64,
    /// When it is dropped unless replaced.
    pub expires: Instant,
    /// Of whom it is, as known when it was accepted: what it takes is counted there until it goes.
    site: Option<SiteId>,
    standing: Standing,
}

impl Entry {
    /// What is left of its lifetime in whole seconds, rounded down so that it shrinks at every hop.
    #[must_use]
    pub fn remaining_s(&self, now: Instant) -> u32 {
        let left = self.expires.saturating_duration_since(now).as_secs();
        u32::try_from(left).unwrap_or(u32::MAX).min(self.record.lifetime_s)
    }
}

impl Lsdb {
    /// The record of this name.
    #[must_use]
    pub fn get(&self, key: &RecordKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// A site's statement about itself.
    #[must_use]
    pub fn statement(&self, site: SiteId) -> Option<&Arc<SiteStatement>> {
        self.statements.get(&site)
    }

    /// Every site's statement about itself.
    #[must_use]
    pub fn statements(&self) -> &BTreeMap<SiteId, Arc<SiteStatement>> {
        &self.statements
    }

    /// A router's LSA.
    #[must_use]
    pub fn lsa(&self, router: RouterId) -> Option<&Arc<RouterLsa>> {
        self.lsas.get(&router)
    }

    /// Every router's LSA, trusted or not, farewells included, by router.
    pub fn lsas(&self) -> impl Iterator<Item = &Arc<RouterLsa>> {
        self.lsas.values()
    }

    /// Records of one kind, by origin and subkey.
    pub fn of_kind(&self, kind: RecordKind) -> impl Iterator<Item = &Arc<Record>> {
        let first =
            RecordKey { kind, origin: Origin::Site(SiteId([0; 32])), subkey: Subkey::EMPTY };
        let entries = self.entries.range(first..).take_while(move |(key, _)| key.kind == kind);
        entries.map(|(_, entry)| &entry.record)
    }

    /// Every endorsement.
    pub fn endorsements(&self) -> impl Iterator<Item = &Endorsement> {
        self.of_kind(RecordKind::Endorsement).filter_map(|record| match &record.payload {
            Payload::Endorsement(endorsement) => Some(endorsement),
            _ => None,
        })
    }

    /// Every revocation.
    pub fn revocations(&self) -> impl Iterator<Item = &Revocation> {
        self.of_kind(RecordKind::Revocation).filter_map(|record| match &record.payload {
            Payload::Revocation(revocation) => Some(revocation),
            _ => None,
        })
    }

    /// Number of records, remembered purges included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no records.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Memory held by records, roughly, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.quota.total
    }

    /// Key and edition of every record that is not a purge.
    pub fn headers(&self) -> impl Iterator<Item = RecordHeader> {
        let records = self.entries.values().map(|entry| &entry.record);
        records.filter(|record| !record.is_purge()).map(|record| record.header())
    }

    /// The site behind a record: its origin's, as far as known.
    #[must_use]
    pub fn site_of(&self, record: &Record) -> Option<SiteId> {
        match (&record.payload, record.key.origin) {
            (Payload::RouterLsa(lsa), _) => Some(lsa.site),
            (_, Origin::Site(site)) => Some(site),
            (_, Origin::Router(router)) => self.lsa(router).map(|lsa| lsa.site),
        }
    }

    /// How an edition compares with the one in the database; `Greater` when there is none.
    pub(crate) fn compare(&self, header: RecordHeader) -> Ordering {
        match self.entries.get(&header.key) {
            Some(entry) => header.edition.cmp(&entry.record.edition()),
            None => Ordering::Greater,
        }
    }

    /// What differs whenever the database has changed.
    #[must_use]
    pub fn edition(&self) -> (u64, usize) {
        (self.last_serial, self.entries.len())
    }

    /// The record accepted as number `serial`, if it is still the newest of its name.
    pub(crate) fn by_serial(&self, serial: u64) -> Option<&Entry> {
        self.entries.get(self.by_serial.get(&serial)?)
    }

    /// Up to `count` entries after `key` in the order of names: the order in which they can be verified.
    pub(crate) fn entries_after(
        &self,
        key: Option<RecordKey>,
        count: usize,
    ) -> impl Iterator<Item = &Entry> {
        let lower = key.map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range((lower, Bound::Unbounded)).take(count).map(|(_, entry)| entry)
    }

    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.expiry.first().map(|(at, _)| *at)
    }

    /// Says whether the bounds leave room for a record of an origin of that standing.
    pub(crate) fn admit(&self, record: &Record, standing: Standing) -> Result<(), Rejection> {
        let key = record.key;
        if !standing.may_have(key.kind) {
            return Err(Rejection::Untrusted);
        }
        let old = self.entries.get(&key);
        let is_essential = standing.is_essential(key.kind);
        if !is_essential {
            self.quota.admit(record, self.site_of(record), standing, old)?;
        }
        if old.is_some() {
            return Ok(());
        }
        if self.entries.len() >= RECORDS_MAX && !is_essential {
            return Err(Rejection::Full("records"));
        }
        if self.records_by_origin.get(&key.origin).is_some_and(|&n| n >= ORIGIN_RECORDS_MAX) {
            return Err(Rejection::Full("records of this origin"));
        }
        if matches!(key.kind, RecordKind::Unknown(_)) && self.unknown >= UNKNOWN_RECORDS_MAX {
            return Err(Rejection::Full("records of unknown kinds"));
        }
        if let Payload::RouterLsa(lsa) = &record.payload
            && self.routers_by_site.get(&lsa.site).is_some_and(|&n| n >= SITE_ROUTERS_MAX)
        {
            return Err(Rejection::Full("routers of this site"));
        }
        Ok(())
    }

    /// Stores a record, replacing its predecessor, and returns its serial number and the predecessor.
    pub(crate) fn insert(
        &mut self,
        record: Arc<Record>,
        remaining: Duration,
        standing: Standing,
        now: Instant,
    ) -> (u64, Option<Entry>) {
        let key = record.key;
        let site = self.site_of(&record);
        let old = self.remove(&key);
        let site = site.or_else(|| old.as_ref()?.site);
        let lifetime = if record.is_purge() { PURGE_LIFETIME } else { remaining };
        self.last_serial += 1;
        let expires = now + lifetime;
        let entry = Entry { record, serial: self.last_serial, expires, site, standing };
        match &entry.record.payload {
            Payload::SiteStatement(statement) => {
                self.statements.insert(statement.site, Arc::clone(statement));
            }
            Payload::RouterLsa(lsa) => {
                *self.routers_by_site.entry(lsa.site).or_default() += 1;
                self.lsas.insert(lsa.router, Arc::clone(lsa));
            }
            Payload::Unknown => self.unknown += 1,
            Payload::Endorsement(_) | Payload::Revocation(_) | Payload::AddressPage(_) => {}
        }
        self.quota.add(&entry);
        *self.records_by_origin.entry(key.origin).or_default() += 1;
        self.by_serial.insert(entry.serial, key);
        self.expiry.insert((entry.expires, key));
        self.entries.insert(key, entry);
        (self.last_serial, old)
    }

    pub(crate) fn remove(&mut self, key: &RecordKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        match &entry.record.payload {
            Payload::SiteStatement(statement) => {
                self.statements.remove(&statement.site);
            }
            Payload::RouterLsa(lsa) => {
                self.lsas.remove(&lsa.router);
                decrement(&mut self.routers_by_site, lsa.site);
            }
            Payload::Unknown => self.unknown -= 1,
            Payload::Endorsement(_) | Payload::Revocation(_) | Payload::AddressPage(_) => {}
        }
        self.quota.remove(&entry);
        decrement(&mut self.records_by_origin, key.origin);
        self.by_serial.remove(&entry.serial);
        self.expiry.remove(&(entry.expires, *key));
        Some(entry)
    }

    /// Removes the oldest record whose time is up.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Entry> {
        let (_, key) = *self.expiry.first().filter(|(at, _)| *at <= now)?;
        self.remove(&key)
    }

    /// Keys of a router's pages with a sequence below `sequence`.
    pub(crate) fn pages_below(&self, router: RouterId, sequence: u64) -> Vec<RecordKey> {
        let pages = RecordKey::page(router, 0)..=RecordKey::page(router, u8::MAX);
        let old = self.entries.range(pages).filter(|(_, e)| e.record.sequence < sequence);
        old.map(|(key, _)| *key).collect()
    }

    /// Says anew of every record how far its origin is relied on, and returns the keys of those that have no place any more.
    pub(crate) fn retag(
        &mut self,
        standing: impl Fn(&Record, Option<SiteId>) -> Standing,
    ) -> Vec<RecordKey> {
        let mut quota = Quota::default();
        for entry in self.entries.values_mut() {
            entry.standing = standing(&entry.record, entry.site);
            quota.add(entry);
        }
        self.quota = quota.clone();
        // From the end: what others are verified with goes last.
        let surplus = self.entries.iter().rev().filter(|(key, entry)| {
            let is_over =
                !entry.standing.is_essential(key.kind) && quota.is_over(entry.site, entry.standing);
            let goes = is_over || !entry.standing.may_have(key.kind);
            if goes {
                quota.remove(entry);
            }
            goes
        });
        surplus.map(|(key, _)| *key).collect()
    }
}

fn decrement<K: Ord + Copy>(counts: &mut BTreeMap<K, usize>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}
