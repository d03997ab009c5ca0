//! Who is trusted: reachability in the graph of endorsements, within scope.

use crate::{Address, SiteId};
use petgraph::{graphmap::DiGraphMap, visit::Dfs};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The birth of a site.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inception {
    /// Ed25519 public key.
    pub identity_key: [u8; 32],
    /// SHA-256 of the public key that may replace it.
    pub next_key_sha256: [u8; 32],
}

/// One step of a site's key chain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRotation {
    /// Ed25519 public key that the step before committed to.
    pub identity_key: [u8; 32],
    /// SHA-256 of the public key that may replace it.
    pub next_key_sha256: [u8; 32],
    /// By this step's key, over the step.
    pub signature: Arc<[u8]>,
}

/// What a site says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SiteStatement {
    /// The site.
    pub site: SiteId,
    /// Its first key; the id is its hash.
    pub inception: Inception,
    /// Key changes since, oldest first.
    pub rotations: Vec<KeyRotation>,
    /// Grows with every statement; see [`Self::sequence`].
    pub epoch: u64,
    /// For people; not unique.
    pub name: Arc<str>,
    /// DER certificates: the anchors of the site's trust domain.
    pub ca_certificates: Vec<Arc<[u8]>>,
    /// `host:port` on which the site's routers accept links.
    pub endpoints: Vec<String>,
    /// End of validity.
    pub expires_unix_s: i64,
    /// The network the site belongs to: the site id of its founder.
    pub network: SiteId,
}

/// Bits of a statement's epoch that count statements; the number of key rotations is above.
const COUNTER_BITS: u32 = 48;

impl SiteStatement {
    /// Sequence number of the record that carries this statement: its epoch.
    ///
    /// The number of rotations is the epoch's high part, so that whoever stole a retired key cannot outrun the present one.
    /// `None` when an epoch claims otherwise.
    #[must_use]
    pub fn sequence(&self) -> Option<u64> {
        let rotations = u64::try_from(self.rotations.len()).ok()?;
        (self.epoch >> COUNTER_BITS == rotations).then_some(self.epoch)
    }

    /// The identity key in force.
    #[must_use]
    pub fn identity_key(&self) -> &[u8; 32] {
        self.rotations.last().map_or(&self.inception.identity_key, |step| &step.identity_key)
    }
}

/// How a site belongs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Membership {
    /// Foreign: may do what its scope says.
    Guest,
    /// Of the same owner.
    Member,
}

/// An address, or a prefix followed by `*`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Pattern(pub Arc<str>);

impl Pattern {
    /// Whether `address` is meant.
    #[must_use]
    pub fn matches(&self, address: &Address) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => address.as_str().starts_with(prefix),
            None => address.as_str() == &*self.0,
        }
    }
}

/// What a guest may do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Scope {
    /// Addresses it may reach.
    pub consume: BTreeSet<Pattern>,
    /// Addresses it may serve.
    pub provide: BTreeSet<Pattern>,
    /// Whether its routers may be transit.
    pub transit: bool,
}

/// A site vouches for another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endorsement {
    /// Who vouches, also the record's origin.
    pub issuer: SiteId,
    /// For whom, also the record's subkey.
    pub subject: SiteId,
    /// As what.
    pub membership: Membership,
    /// Limits, for guests.
    pub scope: Scope,
    /// Whether the subject may in turn vouch for others; void for guests.
    pub may_endorse: bool,
    /// End of validity; one in the past withdraws an earlier endorsement.
    pub valid_until_unix_s: i64,
}

/// A site withdraws all trust from another, for good.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Revocation {
    /// Who, also the record's origin.
    pub issuer: SiteId,
    /// From whom, also the record's subkey.
    pub subject: SiteId,
    /// When.
    pub issued_unix_s: i64,
    /// For people.
    pub reason: Arc<str>,
}

/// A site that is trusted now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustedSite {
    /// The site.
    pub site: SiteId,
    /// For people.
    pub name: Arc<str>,
    /// How it belongs.
    pub membership: Membership,
    /// Limits, for guests; the union of what its endorsers granted.
    pub scope: Scope,
    /// DER certificates: the only anchors for certificates that name this site.
    pub anchors: Vec<Arc<[u8]>>,
    /// The network it says it belongs to.
    pub network: SiteId,
    /// `host:port` on which its routers accept links.
    pub endpoints: Vec<String>,
}

impl TrustedSite {
    /// Whether it may serve `address`.
    #[must_use]
    pub fn may_provide(&self, address: &Address) -> bool {
        self.membership == Membership::Member
            || self.scope.provide.iter().any(|pattern| pattern.matches(address))
    }

    /// Whether it may reach `address`.
    #[must_use]
    pub fn may_consume(&self, address: &Address) -> bool {
        self.membership == Membership::Member
            || self.scope.consume.iter().any(|pattern| pattern.matches(address))
    }

    /// Whether its routers may carry frames for others.
    #[must_use]
    pub fn may_transit(&self) -> bool {
        self.membership == Membership::Member || self.scope.transit
    }
}

/// Everybody the local site trusts, itself included once its own statement is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustView {
    /// Whose view this is.
    pub local: SiteId,
    /// Trusted sites.
    pub sites: BTreeMap<SiteId, Arc<TrustedSite>>,
    /// Sites under a revocation that counts.
    pub revoked: BTreeSet<SiteId>,
    /// What sites last said that the local site itself endorses, and that are not trusted because it has expired. Whoever brings newer
    /// word of one is let back in.
    pub lapsed: BTreeMap<SiteId, Arc<SiteStatement>>,
}

impl TrustView {
    /// A view that trusts nobody.
    #[must_use]
    pub fn empty(local: SiteId) -> Self {
        Self { local, sites: BTreeMap::new(), revoked: BTreeSet::new(), lapsed: BTreeMap::new() }
    }

    /// The site, if it is trusted.
    #[must_use]
    pub fn site(&self, site: SiteId) -> Option<&Arc<TrustedSite>> {
        self.sites.get(&site)
    }
}

/// What [`evaluate`] goes by.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Authentic statements by site.
    pub statements: &'a BTreeMap<SiteId, Arc<SiteStatement>>,
    /// Authentic endorsements.
    pub endorsements: &'a [&'a Endorsement],
    /// Authentic revocations.
    pub revocations: &'a [&'a Revocation],
    /// Sites whose revocations count besides the local site's and the founder's, in order of precedence.
    pub authorities: &'a [SiteId],
}

/// Who is trusted at `unix_s`, and until when this answer holds at most.
#[must_use]
pub fn evaluate(local: SiteId, evidence: Evidence<'_>, unix_s: i64) -> (TrustView, Option<i64>) {
    let revoked = revoked(local, evidence);
    let counts = |e: &&&Endorsement| {
        e.valid_until_unix_s > unix_s
            && e.subject != local
            && !revoked.contains(&e.subject)
            && !revoked.contains(&e.issuer)
            && statement_in_force(evidence, e.issuer, unix_s).is_some()
    };
    let valid: Vec<&Endorsement> = evidence.endorsements.iter().filter(counts).copied().collect();

    // Only members that may endorse extend trust; guests never do.
    let mut extends = DiGraphMap::<SiteId, ()>::new();
    extends.add_node(local);
    for e in valid.iter().filter(|e| e.membership == Membership::Member && e.may_endorse) {
        extends.add_edge(e.issuer, e.subject, ());
    }
    let mut issuers = BTreeSet::new();
    let mut walk = Dfs::new(&extends, local);
    while let Some(site) = walk.next(&extends) {
        issuers.insert(site);
    }

    let mut granted: BTreeMap<SiteId, (Membership, Scope)> = BTreeMap::new();
    granted.insert(local, (Membership::Member, Scope::default()));
    for e in valid.iter().filter(|e| issuers.contains(&e.issuer)) {
        let (membership, scope) =
            granted.entry(e.subject).or_insert_with(|| (Membership::Guest, Scope::default()));
        *membership = (*membership).max(e.membership);
        if e.membership == Membership::Guest {
            scope.consume.extend(e.scope.consume.iter().cloned());
            scope.provide.extend(e.scope.provide.iter().cloned());
            scope.transit |= e.scope.transit;
        }
    }
    let sites = granted
        .into_iter()
        .filter_map(|(site, (membership, scope))| {
            let statement = statement_in_force(evidence, site, unix_s)?;
            Some((site, Arc::new(trusted_site(statement, membership, scope))))
        })
        .collect();
    let lapsed = valid
        .iter()
        .filter(|e| e.issuer == local)
        .filter_map(|e| evidence.statements.get(&e.subject))
        .filter(|statement| statement.expires_unix_s <= unix_s)
        .map(|statement| (statement.site, Arc::clone(statement)))
        .collect();
    (TrustView { local, sites, revoked, lapsed }, next_expiry(evidence, unix_s))
}

fn trusted_site(statement: &SiteStatement, membership: Membership, scope: Scope) -> TrustedSite {
    TrustedSite {
        site: statement.site,
        name: Arc::clone(&statement.name),
        membership,
        scope: if membership == Membership::Member { Scope::default() } else { scope },
        anchors: statement.ca_certificates.clone(),
        network: statement.network,
        endpoints: statement.endpoints.clone(),
    }
}

fn statement_in_force(evidence: Evidence<'_>, site: SiteId, unix_s: i64) -> Option<&SiteStatement> {
    evidence.statements.get(&site).filter(|s| s.expires_unix_s > unix_s).map(Arc::as_ref)
}

/// Sites under a revocation by the local site or an authority. An authority that was itself revoked by a higher one has no
/// say; nobody revokes the local site in its own eyes.
fn revoked(local: SiteId, evidence: Evidence<'_>) -> BTreeSet<SiteId> {
    let founder = evidence.statements.get(&local).map(|statement| statement.network);
    let mut revoked = BTreeSet::new();
    let judges = [local].into_iter().chain(founder).chain(evidence.authorities.iter().copied());
    for judge in judges {
        if revoked.contains(&judge) {
            continue;
        }
        let by_judge = evidence.revocations.iter().filter(|r| r.issuer == judge);
        revoked.extend(by_judge.map(|r| r.subject).filter(|&subject| subject != local));
    }
    revoked
}

/// The next moment at which something valid now expires.
fn next_expiry(evidence: Evidence<'_>, unix_s: i64) -> Option<i64> {
    let statements = evidence.statements.values().map(|s| s.expires_unix_s);
    let endorsements = evidence.endorsements.iter().map(|e| e.valid_until_unix_s);
    statements.chain(endorsements).filter(|&expires| expires > unix_s).min()
}

#[cfg(test)]
mod tests;
