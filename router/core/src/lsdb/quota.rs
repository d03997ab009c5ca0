//! How much room each site may take in the database: nobody may crowd out the rest, least of all what revokes them.

use super::Entry;
use crate::{Record, RecordKind, Rejection, SiteId};
use std::collections::BTreeMap;

/// Most memory for records, in bytes; a router of 100,000 addresses needs about a tenth.
const BYTES_MAX: usize = 256 << 20;
/// Most for the records of one site, in bytes.
const SITE_BYTES_MAX: usize = 64 << 20;
/// Most for the records of one guest, in bytes: its routers and some ten thousand addresses.
const GUEST_BYTES_MAX: usize = 4 << 20;
/// Most for all guests together, in bytes.
const GUESTS_BYTES_MAX: usize = 64 << 20;
/// Most for records whose origin is not trusted (yet), in bytes: anybody can make sites up.
const STRANGERS_BYTES_MAX: usize = 8 << 20;
/// Most records whose origin is not trusted (yet).
const STRANGERS_RECORDS_MAX: usize = 1_024;

/// How far the origin of a record is relied on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Standing {
    /// Its site is under a revocation that counts.
    Revoked,
    /// Its site is not trusted.
    Stranger,
    /// Of a guest, or the statement that an endorsed site still lacks.
    Guest,
    /// Of a member.
    Member,
    /// Of a site whose revocations count.
    Judge,
}

impl Standing {
    /// Whether such an origin may have records of that kind here at all. What this version does not understand it keeps for
    /// members only: nobody could say what it is good for.
    pub(super) fn may_have(self, kind: RecordKind) -> bool {
        match kind {
            RecordKind::Unknown(_) => self >= Self::Member,
            _ => self > Self::Revoked || kind.is_statement(),
        }
    }

    /// Whether such a record has a place however full the database is.
    pub(super) fn is_essential(self, kind: RecordKind) -> bool {
        self == Self::Judge && kind.is_statement()
    }
}

/// What is taken, in bytes unless the name says otherwise.
#[derive(Clone, Debug, Default)]
pub(super) struct Quota {
    pub(super) total: usize,
    by_site: BTreeMap<SiteId, usize>,
    guests: usize,
    strangers: usize,
    stranger_records: usize,
}

impl Quota {
    pub(super) fn add(&mut self, entry: &Entry) {
        let bytes = entry.record.size_bytes();
        self.total += bytes;
        if let Some(site) = entry.site {
            *self.by_site.entry(site).or_default() += bytes;
        }
        match entry.standing {
            Standing::Revoked | Standing::Stranger => {
                self.strangers += bytes;
                self.stranger_records += 1;
            }
            Standing::Guest => self.guests += bytes,
            Standing::Member | Standing::Judge => {}
        }
    }

    pub(super) fn remove(&mut self, entry: &Entry) {
        let bytes = entry.record.size_bytes();
        self.total -= bytes;
        if let Some(site) = entry.site
            && let Some(taken) = self.by_site.get_mut(&site)
        {
            *taken -= bytes;
            if *taken == 0 {
                self.by_site.remove(&site);
            }
        }
        match entry.standing {
            Standing::Revoked | Standing::Stranger => {
                self.strangers -= bytes;
                self.stranger_records -= 1;
            }
            Standing::Guest => self.guests -= bytes,
            Standing::Member | Standing::Judge => {}
        }
    }

    /// Whether there is room for `record` of `site` in place of `old`.
    pub(super) fn admit(
        &self,
        record: &Record,
        site: Option<SiteId>,
        standing: Standing,
        old: Option<&Entry>,
    ) -> Result<(), Rejection> {
        let bytes = record.size_bytes();
        let freed = old.map_or(0, |old| old.record.size_bytes());
        if self.total - freed + bytes > BYTES_MAX {
            return Err(Rejection::Full("bytes"));
        }
        let is_same = old.is_some_and(|old| old.standing == standing);
        let added = if is_same { bytes.saturating_sub(freed) } else { bytes };
        let records = usize::from(!is_same);
        let of_site = site.and_then(|site| self.by_site.get(&site)).copied().unwrap_or(0);
        let of_site = of_site.saturating_sub(freed) + bytes;
        self.over(of_site, standing, added, records).map_or(Ok(()), Err)
    }

    /// Whether the site of such a record takes more than it may.
    pub(super) fn is_over(&self, site: Option<SiteId>, standing: Standing) -> bool {
        let of_site = site.and_then(|site| self.by_site.get(&site)).copied().unwrap_or(0);
        self.over(of_site, standing, 0, 0).is_some()
    }

    fn over(
        &self,
        of_site: usize,
        standing: Standing,
        added: usize,
        records: usize,
    ) -> Option<Rejection> {
        match standing {
            Standing::Revoked | Standing::Stranger => (self.strangers + added
                > STRANGERS_BYTES_MAX
                || self.stranger_records + records > STRANGERS_RECORDS_MAX)
                .then_some(Rejection::Untrusted),
            Standing::Guest if of_site > GUEST_BYTES_MAX => {
                Some(Rejection::Full("bytes of this guest"))
            }
            Standing::Guest => (self.guests + added > GUESTS_BYTES_MAX)
                .then_some(Rejection::Full("bytes of guests")),
            Standing::Member | Standing::Judge => {
                (of_site > SITE_BYTES_MAX).then_some(Rejection::Full("bytes of this site"))
            }
        }
    }
}
