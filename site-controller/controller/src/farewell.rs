//! Parting: the last word of a site, forgetting sites that said theirs, and trust withdrawn.

use skein_api::Kind;
use skein_core::SiteId;
use skein_site_core::{Grant, next_counter};
use skein_trust::{STATEMENT_VALIDITY_S, StatementDraft};

use crate::{
    clock,
    controller::{Controller, State},
    record,
    store::{Change, StoreError},
};

/// The last statement of a site ends this long after it was signed: time for it to reach everybody while the site is still believed, and
/// for running flows to end.
const FAREWELL_VALIDITY_S: i64 = 10;

impl Controller {
    /// Says the last word, which routers flood: once it has expired nobody trusts this site any more, and everybody forgets it. Returns
    /// the version of the configuration that carries it.
    ///
    /// # Errors
    /// It cannot be saved; nothing was said.
    pub(crate) fn say_farewell(&self) -> Result<u64, StoreError> {
        let mut state = self.state();
        let now = clock::unix_s();
        let last = state.site.statement.clone();
        let counter = next_counter(last.counter, now);
        let record = self.identity.farewell(&StatementDraft {
            epoch: counter,
            name: last.name,
            ca_certificates: vec![self.ca.certificate().to_vec()],
            endpoints: last.endpoints,
            network_id: Some(state.network(self.site)),
            expires_unix_s: now + FAREWELL_VALIDITY_S,
        });
        let mut site = state.site.clone();
        site.statement.counter = counter;
        site.statement.signed_unix_s = now;
        site.statement.record = record::to_text(&record);
        self.store.save_site(&site)?;
        state.site = site;
        state.leaving = true;
        self.refresh(&mut state);
        drop(state);
        Ok(self.config().borrow().version)
    }

    /// Drops what this site said of sites that are gone for good, and its links to them. Returns whether there was anything; what cannot be
    /// removed is tried again.
    pub(crate) fn forget(&self, state: &mut State, now: i64) -> bool {
        state.departed = state.learned.departed(now);
        let is_known = |site: &&SiteId| {
            let peer = site.to_string();
            state.endorsed.contains_key(*site)
                || state.resources.links.values().any(|link| link.spec.peer == peer)
        };
        let gone: Vec<SiteId> = state.departed.iter().filter(is_known).copied().collect();
        self.forget_sites(state, &gone)
    }

    /// Drops what others said that is long over, and withdrawals that have done their work. Returns as [`forget`](Self::forget).
    pub(crate) fn forget_expired(&self, state: &mut State, now: i64) -> bool {
        let State { learned, endorsed, resources, .. } = state;
        let is_known = |site: SiteId| {
            let peer = site.to_string();
            endorsed.contains_key(&site)
                || resources.links.values().any(|link| link.spec.peer == peer)
        };
        let expired = learned.expire(now, is_known);
        let over = |signed: i64| signed.saturating_add(i64::from(STATEMENT_VALIDITY_S)) <= now;
        let withdrawn = state.endorsed.iter();
        let withdrawn = withdrawn.filter(|(_, said)| said.withdrawn && over(said.signed_unix_s));
        let withdrawn: Vec<SiteId> = withdrawn.map(|(site, _)| *site).collect();
        self.forget_sites(state, &withdrawn) || expired
    }

    fn forget_sites(&self, state: &mut State, sites: &[SiteId]) -> bool {
        for site in sites {
            if let Err(error) = self.forget_site(state, *site) {
                tracing::error!(%error, %site, "a site that left is not forgotten");
            }
        }
        !sites.is_empty()
    }

    fn forget_site(&self, state: &mut State, site: SiteId) -> Result<(), StoreError> {
        let peer = site.to_string();
        let links = state.resources.links.values().filter(|link| link.spec.peer == peer);
        let links: Vec<String> = links.map(|link| link.metadata.name.clone()).collect();
        let remove = |name: &String| Change::Remove(Kind::Link, name.clone());
        let mut changes: Vec<Change> = links.iter().map(remove).collect();
        let tokens = state.tokens_of(&peer);
        changes.extend(tokens.iter().map(|name| Change::Remove(Kind::AccessToken, name.clone())));
        changes.push(Change::RemoveEndorsed(peer));
        let is_put_out = state.endorsed.get(&site).is_some_and(|said| said.withdrawn);
        let grants = if is_put_out { grants_without(state, site) } else { Vec::new() };
        changes.extend(grants.iter().map(|grant| Change::PutGrant(Box::new(grant.clone()))));
        self.store.commit(&changes)?;
        state.grants.extend(grants.into_iter().map(|grant| (grant.name.clone(), grant)));
        for name in &links {
            state.resources.remove(Kind::Link, name);
        }
        for name in &tokens {
            state.resources.remove(Kind::AccessToken, name);
        }
        state.endorsed.remove(&site);
        tracing::info!(%site, ?links, "a site that left is forgotten");
        Ok(())
    }

    /// Withdraws what this site said of `peer`, if anything. The tokens by which it came do not let it in again, also when the withdrawal
    /// itself has been forgotten.
    ///
    /// # Errors
    /// It cannot be saved; the endorsement stands.
    pub(crate) fn withdraw(&self, state: &mut State, peer: SiteId) -> Result<bool, StoreError> {
        let Some(mut endorsed) = state.endorses(peer).cloned() else { return Ok(false) };
        endorsed.withdrawn = true;
        self.sign_next(state, peer, &mut endorsed);
        let grants = grants_without(state, peer);
        let put_grants = grants.iter().map(|grant| Change::PutGrant(Box::new(grant.clone())));
        let put_endorsed = Change::PutEndorsed(Box::new(endorsed.clone()));
        self.store.commit(&put_grants.chain([put_endorsed]).collect::<Vec<_>>())?;
        state.grants.extend(grants.into_iter().map(|grant| (grant.name.clone(), grant)));
        state.endorsed.insert(peer, endorsed);
        tracing::info!(%peer, "endorsement withdrawn");
        Ok(true)
    }
}

/// The grants by which `site` came, as they are when it is put out.
fn grants_without(state: &State, site: SiteId) -> Vec<Grant> {
    state.grants.values().filter_map(|grant| grant.without(site)).collect()
}
