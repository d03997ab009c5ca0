//! What neighbours and the controller bring: checked, stored, passed on.

use super::{Engine, Known, Message, Notary, Rejection};
use crate::{
    AgedRecord, LinkId, Lsdb, Origin, Payload, Record, RecordHeader, RecordKey, RecordKind,
    RouterId, RouterLsa, SiteId, lsdb::Standing,
};
use std::{
    cmp::Ordering,
    sync::Arc,
    time::{Duration, Instant},
};

/// How much longer the statement of a site that ours endorses is kept at a time.
const LAST_WORD_LIFETIME: Duration = Duration::from_secs(86_400);

impl<N: Notary> Engine<N> {
    pub(super) fn message(&mut self, link: LinkId, message: Message, now: Instant, unix_s: i64) {
        // A link that was refused may still have had messages under way.
        if !self.adjacencies.contains_key(&link) {
            return;
        }
        match message {
            Message::Summary { headers, last } => self.take_summary(link, &headers, last),
            Message::Request { headers } => self.take_request(link, &headers),
            Message::Records { records } => {
                if let Some(adjacency) = self.adjacencies.get_mut(&link) {
                    adjacency.answered(now);
                }
                for aged in records {
                    self.take_record(aged, Some(link), now, unix_s);
                    if !self.adjacencies.contains_key(&link) {
                        return;
                    }
                }
            }
        }
    }

    /// Statements from the controller or a handshake; their lifetime begins here.
    pub(super) fn take_statements(
        &mut self,
        mut records: Vec<Record>,
        from: Option<LinkId>,
        now: Instant,
        unix_s: i64,
    ) {
        // Statements of sites before what their keys signed.
        records.sort_by_key(|record| record.key.kind);
        for record in records.into_iter().filter(|record| record.key.kind.is_statement()) {
            let remaining_s = record.lifetime_s;
            let aged = AgedRecord { record: Arc::new(record), remaining_s };
            self.take_record(aged, from, now, unix_s);
        }
    }

    /// Asks for what the neighbour has newer; what it has older it will ask for itself.
    fn take_summary(&mut self, link: LinkId, headers: &[RecordHeader], last: bool) {
        let Some(adjacency) = self.adjacencies.get_mut(&link) else { return };
        for &header in headers {
            // What is void by now would never come.
            if self.lsdb.compare(header) == Ordering::Greater && !is_void(&self.lsdb, header) {
                adjacency.want(header);
            }
        }
        if last {
            adjacency.peer_summary_done();
        }
    }

    fn take_request(&mut self, link: LinkId, headers: &[RecordHeader]) {
        let Some(adjacency) = self.adjacencies.get_mut(&link) else { return };
        for header in headers {
            if let Some(entry) = self.lsdb.get(&header.key)
                && entry.record.edition() >= header.edition
                && adjacency.may_see(
                    &entry.record,
                    self.lsdb.site_of(&entry.record),
                    self.identity.site,
                )
            {
                adjacency.enqueue(header.key, entry.serial);
            }
        }
    }

    /// Accepts a record if it is news, authentic and within bounds, and floods it.
    fn take_record(&mut self, aged: AgedRecord, from: Option<LinkId>, now: Instant, unix_s: i64) {
        let AgedRecord { record, remaining_s } = aged;
        let header = record.header();
        if let Some(adjacency) = from.and_then(|link| self.adjacencies.get_mut(&link)) {
            adjacency.arrived(header);
        }
        if !self.is_news(header, &record, remaining_s, from) {
            return;
        }
        if record.key.origin == Origin::Site(self.identity.site) && from.is_some() {
            tracing::debug!(kind = ?record.key.kind, "our own site's statement came from outside");
        }
        if !record.key.kind.is_statement() {
            self.refresh_trust(now, unix_s);
        }
        if let Err(rejection) = self.check(&record, unix_s) {
            self.reject(&record, rejection, from, now);
            return;
        }
        if record.key.origin == Origin::Router(self.identity.router) {
            self.own.outdo(header);
            return;
        }
        let remaining = Duration::from_secs(remaining_s.min(record.lifetime_s).into());
        self.accept(record, remaining, from, now);
    }

    /// Whether an edition is worth looking at; if it is older than ours, the sender gets ours.
    fn is_news(
        &mut self,
        header: RecordHeader,
        record: &Record,
        remaining_s: u32,
        from: Option<LinkId>,
    ) -> bool {
        let adjacency = from.and_then(|link| self.adjacencies.get_mut(&link));
        match (self.lsdb.compare(header), self.lsdb.get(&header.key), adjacency) {
            // Purging what is not there would keep purges alive for ever, each reviving the other.
            (Ordering::Greater, entry, _) => {
                if record.is_purge() {
                    entry.is_some()
                } else {
                    remaining_s > 0
                }
            }
            (Ordering::Equal, Some(entry), Some(adjacency)) => {
                // The same under another signature may soon not hold any more where it came from.
                if entry.record.sealed.signature == record.sealed.signature {
                    adjacency.dequeue(header.key, entry.serial);
                }
                false
            }
            (Ordering::Less, Some(entry), Some(adjacency)) => {
                adjacency.enqueue(header.key, entry.serial);
                false
            }
            _ => false,
        }
    }

    /// Whether the database may take a record.
    fn check(&mut self, record: &Record, unix_s: i64) -> Result<(), Rejection> {
        if is_void(&self.lsdb, record.header()) {
            return Err(Rejection::Invalid("its router has restarted or left since"));
        }
        let known = Known { lsdb: &self.lsdb, trust: &self.trust, unix_s };
        self.notary.verify(record, &known).map_err(|rejection| self.or_early(record, rejection))?;
        self.lsdb.admit(record, self.standing(record))
    }

    /// What a router says besides its LSA may hold by an LSA that is not known here: it has started again or has another key
    /// there. That LSA may come later although it was issued before: it is asked for by the summary, while this was flooded.
    fn or_early(&self, record: &Record, rejection: Rejection) -> Rejection {
        match record.key.origin {
            Origin::Router(_) if record.key.kind != RecordKind::RouterLsa => {
                Rejection::Missing(record.key.origin)
            }
            _ => rejection,
        }
    }

    fn reject(
        &mut self,
        record: &Record,
        rejection: Rejection,
        from: Option<LinkId>,
        now: Instant,
    ) {
        tracing::debug!(key = ?record.key, sequence = record.sequence, %rejection, "record refused");
        let Some(adjacency) = from.and_then(|link| self.adjacencies.get_mut(&link)) else { return };
        match rejection {
            Rejection::Missing(origin) => adjacency.park(record.header(), origin),
            Rejection::Forged(_) if adjacency.forged(now) => {
                let link = adjacency.link;
                self.link_down(link, now);
                self.refuse(link, "its records are not signed by whom they name");
            }
            _ => {}
        }
    }

    /// Stores a record and passes it to every neighbour but the one it came from.
    pub(super) fn accept(
        &mut self,
        record: Arc<Record>,
        remaining: Duration,
        from: Option<LinkId>,
        now: Instant,
    ) {
        let key = record.key;
        let site = self.lsdb.site_of(&record);
        let standing = self.standing(&record);
        let (serial, old) = self.lsdb.insert(Arc::clone(&record), remaining, standing, now);
        for adjacency in self.adjacencies.values_mut() {
            adjacency.arrived(record.header());
            if let Some(old) = &old {
                adjacency.dequeue(key, old.serial);
            }
            if from != Some(adjacency.link) && adjacency.may_see(&record, site, self.identity.site)
            {
                adjacency.enqueue(key, serial);
            }
        }
        let old = old.as_ref().map(|old| &*old.record);
        self.index(key, old, Some(&record));
        self.follow(&record, old, from);
    }

    /// What follows from a new record.
    fn follow(&mut self, record: &Arc<Record>, old: Option<&Record>, from: Option<LinkId>) {
        let changed = old.is_none_or(|old| old.payload != record.payload);
        if record.key.kind.is_statement() {
            self.trust_stale |= changed;
            // What strangers say is not worth keeping; see `learn_from` for when they become trusted.
            if from.is_some() && self.standing(record) > Standing::Stranger {
                self.learned.push(Arc::clone(record));
            }
        } else if changed && record.key.kind == RecordKind::AddressPage {
            self.snapshot.mark_addresses();
        } else if changed {
            self.snapshot.mark();
        }
        if let Payload::RouterLsa(lsa) = &record.payload {
            self.drop_pages(lsa.router, void_below(record));
            if old.is_some_and(|old| !self.is_same_signer(old, lsa)) {
                self.drop_foreign_pages(lsa.router);
            }
        }
        let unparks = matches!(record.key.kind, RecordKind::SiteStatement | RecordKind::RouterLsa);
        if unparks && changed {
            for adjacency in self.adjacencies.values_mut() {
                adjacency.unpark(record.key.origin);
            }
        }
    }

    /// Everything a site that has just become trusted said before.
    pub(super) fn learn_from(&mut self, site: SiteId) {
        let kinds = [RecordKind::SiteStatement, RecordKind::Endorsement, RecordKind::Revocation];
        let records = kinds.into_iter().flat_map(|kind| self.lsdb.of_kind(kind));
        let said = records.filter(|record| record.key.origin == Origin::Site(site)).cloned();
        self.learned.extend(said);
    }

    /// Keeps the index of addresses in step with pages of others; what we serve ourselves is there already.
    fn index(&mut self, key: RecordKey, old: Option<&Record>, new: Option<&Record>) {
        if let (RecordKind::AddressPage, Origin::Router(router)) = (key.kind, key.origin)
            && router != self.identity.router
        {
            self.addresses.replace(router, old, new);
        }
    }

    /// Addresses of an earlier boot, or of a router that left, are void.
    fn drop_pages(&mut self, router: RouterId, below: u64) {
        for adjacency in self.adjacencies.values_mut() {
            adjacency.forget_pages(router, below);
        }
        for key in self.lsdb.pages_below(router, below) {
            self.forget(key);
            self.snapshot.mark_addresses();
        }
    }

    /// Whether what was sealed under the LSA `old` holds under `lsa`.
    fn is_same_signer(&self, old: &Record, lsa: &RouterLsa) -> bool {
        let Payload::RouterLsa(old) = &old.payload else { return false };
        old.certificate == lsa.certificate
            || self.notary.have_same_key(&old.certificate, &lsa.certificate)
    }

    /// Whoever hears of the new key first takes no pages sealed with the old one; nor must anybody pass them on.
    fn drop_foreign_pages(&mut self, router: RouterId) {
        for key in self.lsdb.pages_below(router, u64::MAX) {
            self.forget(key);
            self.snapshot.mark_addresses();
        }
    }

    /// Drops a record before its time.
    pub(super) fn forget(&mut self, key: RecordKey) {
        let Some(entry) = self.lsdb.remove(&key) else { return };
        for adjacency in self.adjacencies.values_mut() {
            adjacency.dequeue(key, entry.serial);
        }
        self.index(key, Some(&entry.record), None);
    }

    /// Drops records whose lifetime is over. Pages may outlive their LSA, to no effect: were they dropped with it, a router
    /// that comes back just then would have to repeat them to those who were a moment ahead of the others.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some(entry) = self.lsdb.expire(now) {
            let record = entry.record;
            for adjacency in self.adjacencies.values_mut() {
                adjacency.dequeue(record.key, entry.serial);
            }
            if self.is_last_word(&record) {
                let standing = self.standing(&record);
                self.lsdb.insert(record, LAST_WORD_LIFETIME, standing, now);
                continue;
            }
            tracing::debug!(key = ?record.key, sequence = record.sequence, "record expired");
            self.trust_stale |= record.key.kind.is_statement();
            self.index(record.key, Some(&record), None);
            self.snapshot.mark();
        }
    }

    /// Whether this is the statement of a site that ours has endorsed. It is kept however old it is: by what it says of keys and CAs the site
    /// is known again after years.
    fn is_last_word(&self, record: &Record) -> bool {
        let Origin::Site(site) = record.key.origin else { return false };
        let endorsement = RecordKey::endorsement(self.identity.site, site);
        record.key.kind == RecordKind::SiteStatement && self.has(&endorsement)
    }

    /// Whether a record of ours is in the database.
    pub(super) fn has(&self, key: &RecordKey) -> bool {
        self.lsdb.get(key).is_some_and(|entry| !entry.record.is_purge())
    }
}

/// Whether a page is void by the LSA of its router.
fn is_void(lsdb: &Lsdb, header: RecordHeader) -> bool {
    let (RecordKind::AddressPage, Origin::Router(router)) = (header.key.kind, header.key.origin)
    else {
        return false;
    };
    let lsa = lsdb.get(&RecordKey::lsa(router));
    lsa.is_some_and(|lsa| header.edition.sequence < void_below(&lsa.record))
}

/// Pages below this sequence number are void by an LSA of their router: those of earlier boots, and all that came before a
/// farewell.
fn void_below(lsa: &Record) -> u64 {
    match &lsa.payload {
        Payload::RouterLsa(farewell) if farewell.leaving => lsa.sequence,
        Payload::RouterLsa(lsa) => lsa.pages_since,
        _ => 0,
    }
}
