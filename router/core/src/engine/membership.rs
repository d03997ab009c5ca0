//! Who is trusted, and what follows for neighbours.

use super::{Engine, Notary, Output};
use crate::{
    Membership, TrustView, TrustedSite,
    adjacency::Audience,
    trust::{self, Evidence},
};
use std::{
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
        self.lsdb.retag(|site| trust.site(site).is_some());
        self.addresses.mark_all();
        self.snapshot.mark();
        self.outputs.push_back(Output::Trust(Arc::clone(&trust)));
        self.apply_trust_to_adjacencies(&trust, now);
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

/// What a neighbour of that site gets to see.
pub(super) fn audience(site: &TrustedSite) -> Audience {
    match site.membership {
        Membership::Member => Audience::Member,
        Membership::Guest => Audience::Guest,
    }
}
