//! Who is trusted, and what follows for neighbours.

use super::{Engine, Notary, Output};
use crate::{
    Membership, Record, RecordKind, SiteId, TrustView, TrustedSite,
    adjacency::Audience,
    lsdb::Standing,
    trust::{self, Evidence},
};
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

/// Expiry goes by the wall clock, which may be set: look at it this often.
const TRUST_RECHECK: Duration = Duration::from_secs(60);

impl<N: Notary> Engine<N> {
    /// Evaluates trust anew if something it stands on changed.
    pub(super) fn refresh_trust(&mut self, now: Instant, unix_s: i64) {
        if !std::mem::take(&mut self.trust_stale) {
            return;
        }
        let endorsements: Vec<_> = self.lsdb.endorsements().collect();
        let revocations: Vec<_> = self.lsdb.revocations().collect();
        let evidence = Evidence {
            statements: self.lsdb.statements(),
            endorsements: &endorsements,
            revocations: &revocations,
            authorities: &self.settings.authorities,
        };
        let (trust, expires_unix_s) = trust::evaluate(self.identity.site, evidence, unix_s);
        let expires_s = expires_unix_s.and_then(|at| u64::try_from(at - unix_s).ok());
        let expires = expires_s.map_or(TRUST_RECHECK, Duration::from_secs);
        self.trust_due = Some(now + expires.min(TRUST_RECHECK));
        if trust == *self.trust {
            return;
        }
        tracing::info!(sites = trust.sites.len(), revoked = trust.revoked.len(), "trust changed");
        let known = std::mem::replace(&mut self.trust, Arc::new(trust));
        let trust = Arc::clone(&self.trust);
        for &site in trust.sites.keys().filter(|&&site| known.site(site).is_none()) {
            self.learn_from(site);
        }
        self.judge_records();
        self.addresses.mark_all();
        self.snapshot.mark();
        self.outputs.push_back(Output::Trust(Arc::clone(&trust)));
        self.apply_trust_to_adjacencies(&trust, now);
    }

    /// How far the origin of a record is relied on. Whoever is endorsed and lacks only a statement is not a stranger: those who
    /// make sites up must not be able to take the room from those who are invited.
    pub(super) fn standing(&self, record: &Record) -> Standing {
        let is_endorsed = |site| {
            let mut endorsements = self.lsdb.endorsements();
            endorsements.any(|e| e.subject == site && self.trust.site(e.issuer).is_some())
        };
        let site = self.lsdb.site_of(record);
        standing(&self.trust, record.key.kind, site, |site| self.is_judge(site), is_endorsed)
    }

    /// Whether revocations of this site count, unless it is revoked itself.
    fn is_judge(&self, site: SiteId) -> bool {
        let local = self.identity.site;
        site == local
            || self.lsdb.statement(local).is_some_and(|statement| statement.network == site)
            || self.settings.authorities.contains(&site)
    }

    /// Drops what has no place any more now that its site is relied on less.
    fn judge_records(&mut self) {
        let by_trusted = self.lsdb.endorsements().filter(|e| self.trust.site(e.issuer).is_some());
        let endorsed: BTreeSet<SiteId> = by_trusted.map(|e| e.subject).collect();
        let sites = self.trust.sites.keys().chain([&self.identity.site]);
        let judges: BTreeSet<SiteId> = sites.copied().filter(|&s| self.is_judge(s)).collect();
        let surplus = self.lsdb.retag(|record, site| {
            let (is_judge, is_endorsed) = (|s| judges.contains(&s), |s| endorsed.contains(&s));
            standing(&self.trust, record.key.kind, site, is_judge, is_endorsed)
        });
        if !surplus.is_empty() {
            tracing::info!(records = surplus.len(), "records of sites less trusted dropped");
        }
        for key in surplus {
            self.forget(key);
        }
    }

    /// Ends links to routers of which there is no LSA: a router issues them for as long as it has a valid certificate, and no longer.
    pub(super) fn judge_neighbours(&mut self, now: Instant) {
        let mut lapsed = Vec::new();
        for adjacency in self.adjacencies.values_mut() {
            let has_lsa = self.lsdb.lsa(adjacency.peer).is_some();
            if adjacency.is_unvouched(has_lsa, now) {
                lapsed.push(adjacency.link);
            }
        }
        for link in lapsed {
            self.link_down(link, now);
            self.refuse(
                link,
                "the router at the other end has said nothing under a valid certificate",
            );
        }
    }

    fn apply_trust_to_adjacencies(&mut self, trust: &TrustView, now: Instant) {
        let mut refused = Vec::new();
        for adjacency in self.adjacencies.values_mut() {
            match trust.site(adjacency.peer_site).map(|site| audience(site)) {
                None => refused.push(adjacency.link),
                Some(audience) if audience != adjacency.audience => adjacency.restart(audience),
                Some(_) => {}
            }
        }
        for link in refused {
            self.link_down(link, now);
            self.refuse(link, "the site at the other end is not trusted any more");
        }
    }
}

fn standing(
    trust: &TrustView,
    kind: RecordKind,
    site: Option<SiteId>,
    is_judge: impl Fn(SiteId) -> bool,
    is_endorsed: impl Fn(SiteId) -> bool,
) -> Standing {
    let Some(site) = site else { return Standing::Stranger };
    if trust.revoked.contains(&site) {
        return Standing::Revoked;
    }
    if is_judge(site) {
        return Standing::Judge;
    }
    match trust.site(site).map(|site| site.membership) {
        Some(Membership::Member) => Standing::Member,
        Some(Membership::Guest) => Standing::Guest,
        None if kind == RecordKind::SiteStatement && is_endorsed(site) => Standing::Guest,
        None => Standing::Stranger,
    }
}

/// What a neighbour of that site gets to see.
pub(super) fn audience(site: &TrustedSite) -> Audience {
    match site.membership {
        Membership::Member => Audience::Member,
        Membership::Guest => Audience::Guest,
    }
}
