//! The one object that holds a site's state: every change goes through it, is made durable, and then reaches the routers.
//!
//! One short lock around plain data; files are written under it, because two writers of one file would undo each other. Nothing waits for
//! the network while it is held.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aws_lc_rs::rand::SystemRandom;
use parking_lot::{Mutex, MutexGuard};
use skein_api::{Kind, Resource};
use skein_core::{Address, Port, Room, SiteId};
use skein_site_core::{
    AutoEndpoints, Draining, Due, Endorsed, Grant, Inputs, IssuedStatement, LeftOut, LocalPorts,
    Resources, Services, automatic_room, due, next_counter, plan,
};
use skein_trust::{EndorsementDraft, STATEMENT_VALIDITY_S, SiteCa, SiteIdentity, StatementDraft};
use skein_wire::proto::{
    control::{RouterConfig, RouterStatus},
    routing::Record,
    trust::{Membership, Scope},
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use crate::{
    attach::RouterEntry,
    claim::applied::Redeeming,
    clock::{self, SteadyClock},
    hosts,
    learned::LearnedRecords,
    platform::linux,
    record,
    served::Served,
    store::{Change, Loaded, SetAside, SiteState, Store, StoreError},
};

/// How often endpoints are looked at that nobody serves.
const UNUSED_CHECKED_S: u64 = 3600;
/// How long flows of a deleted connector may run on.
pub(crate) const DRAIN_S: i64 = 3600;

/// A version of what routers are told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Versioned {
    pub(crate) version: u64,
    pub(crate) config: Arc<RouterConfig>,
    pub(crate) sha256: [u8; 32],
}

/// A deleted connector and the time its flows are reset.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DrainingUntil {
    pub(crate) draining: Draining,
    pub(crate) until_unix_s: i64,
}

/// Everything that changes.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) site: SiteState,
    pub(crate) resources: Resources,
    pub(crate) grants: BTreeMap<String, Grant>,
    pub(crate) endorsed: BTreeMap<SiteId, Endorsed>,
    pub(crate) learned: LearnedRecords,
    pub(crate) epochs: BTreeMap<String, u64>,
    pub(crate) endpoints: AutoEndpoints,
    /// Damaged files that were set aside and are still there.
    pub(crate) problems: Vec<SetAside>,
    pub(crate) draining: Vec<DrainingUntil>,
    /// What of it is on disk.
    pub(crate) draining_kept: Vec<DrainingUntil>,
    pub(crate) routers: BTreeMap<String, RouterEntry>,
    pub(crate) served: Served,
    /// What of it has no automatic endpoint for want of room.
    pub(crate) left_out: LeftOut,
    pub(crate) host: LocalPorts,
    /// Addresses of this host under which others might reach it.
    pub(crate) interfaces: Vec<std::net::IpAddr>,
    config: Versioned,
    /// The version of the configuration in which routers were told of a resource as it is now. One that was not changed since the
    /// controller started is not here.
    told: BTreeMap<(Kind, String), u64>,
    /// Endpoints may have changed since `/etc/hosts` was written.
    hosts_due: bool,
    /// Whether `/etc/hosts` has a block of ours.
    hosts_managed: bool,
    /// What names that others chose mean on this host without us.
    names: hosts::elsewhere::Names,
    /// How far applied tokens are, by name.
    pub(crate) redeeming: BTreeMap<String, Redeeming>,
    /// Sites whose last word has expired: routers go on listing them until the record of it is over.
    pub(crate) departed: BTreeSet<SiteId>,
    /// The site has said its last word.
    pub(crate) leaving: bool,
    /// Whether the time is to be believed where something is dropped for good.
    clock: SteadyClock,
}

/// A running controller.
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) store: Store,
    pub(crate) identity: SiteIdentity,
    pub(crate) ca: SiteCa,
    pub(crate) site: SiteId,
    pub(crate) site_secret: Zeroizing<[u8; 32]>,
    pub(crate) random: SystemRandom,
    pub(crate) started_unix_s: i64,
    state: Mutex<State>,
    config: watch::Sender<Versioned>,
    changed: watch::Sender<u64>,
    /// The site is being stopped by this process.
    is_stopping: AtomicBool,
    /// Ends the process, in order.
    pub(crate) shutdown: CancellationToken,
    /// Owns every task.
    pub(crate) tasks: TaskTracker,
}

impl Controller {
    /// Takes over what was loaded. Nothing is planned before [`refresh`](Self::refresh).
    pub(crate) fn new(store: Store, loaded: Loaded) -> Arc<Self> {
        let now = clock::unix_s();
        let state = State {
            site: loaded.site,
            resources: loaded.resources,
            grants: loaded.grants,
            endorsed: loaded.endorsed,
            learned: LearnedRecords::new(loaded.identity.site_id(), loaded.learned),
            epochs: loaded.epochs,
            endpoints: loaded.endpoints,
            problems: loaded.problems,
            draining_kept: loaded.draining.clone(),
            draining: loaded.draining,
            routers: BTreeMap::new(),
            served: Served::default(),
            left_out: LeftOut::new(),
            host: LocalPorts::default(),
            interfaces: Vec::new(),
            config: Versioned::default(),
            told: BTreeMap::new(),
            hosts_due: true,
            hosts_managed: false,
            names: hosts::elsewhere::Names::default(),
            redeeming: BTreeMap::new(),
            departed: BTreeSet::new(),
            leaving: false,
            clock: SteadyClock::new(now, clock::instant()),
        };
        Arc::new(Self {
            store,
            site: loaded.identity.site_id(),
            identity: loaded.identity,
            ca: loaded.ca,
            site_secret: loaded.site_secret,
            random: SystemRandom::new(),
            started_unix_s: now,
            state: Mutex::new(state),
            config: watch::Sender::default(),
            changed: watch::Sender::new(0),
            is_stopping: AtomicBool::new(false),
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// The state, for reading or for a change that ends with [`refresh`](Self::refresh).
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// What routers are told, and every later version of it.
    pub(crate) fn config(&self) -> watch::Receiver<Versioned> {
        self.config.subscribe()
    }

    /// Changes whenever a document or a resource's status may have.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Says that documents may have changed.
    pub(crate) fn touch(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Signs what is due, plans anew, and tells the routers if anything differs.
    pub(crate) fn refresh(&self, state: &mut State) {
        let now = clock::unix_s();
        self.keep_draining(state);
        // The last word stands.
        if !state.leaving {
            self.renew(state, now);
        }
        let records = self.records(state);
        let network = state.network(self.site);
        let authorities: Vec<SiteId> = std::iter::once(network)
            .chain(state.site.authorities.iter().filter_map(|text| SiteId::parse(text)))
            .collect();
        let draining: Vec<Draining> =
            state.draining.iter().map(|gone| gone.draining.clone()).collect();
        let services = state.known_services(self.site);
        let advertise = state.advertise();
        let claim_socket = self.store.paths().claim_socket();
        let planned = plan(Inputs {
            site: self.site,
            resources: &state.resources,
            draining: &draining,
            services: &services,
            automatic: state.automatic_room(),
            endpoints: &state.endpoints,
            host: &state.host,
            advertise: &advertise,
            records,
            claim_socket: &claim_socket.to_string_lossy(),
            authorities: &authorities,
        });
        if planned.endpoints != state.endpoints {
            // Endpoints that cannot be kept are still used: they are the same after a restart unless they collided.
            if let Err(error) = self.store.save_endpoints(&planned.endpoints) {
                tracing::error!(%error, "automatic endpoints are not saved");
            }
            state.endpoints = planned.endpoints;
        }
        state.left_out = planned.left_out;
        if *state.config.config != planned.config || state.config.version == 0 {
            state.config = Versioned {
                version: state.config.version + 1,
                sha256: skein_wire::config::hash(&planned.config),
                config: Arc::new(planned.config),
            };
            tracing::debug!(version = state.config.version, "router configuration changed");
            self.config.send_replace(state.config.clone());
            state.hosts_due = true;
        }
        let manages_hosts =
            state.resources.site.as_ref().is_some_and(|site| site.spec.manage_hosts);
        state.hosts_due |= manages_hosts != state.hosts_managed;
        self.touch();
    }

    /// Counts on from above `version`: a router that outlived its controller must not see versions go back.
    pub(crate) fn count_from(&self, state: &mut State, version: u64) {
        if version >= state.config.version && version > 0 {
            state.config.version = version + 1;
            self.config.send_replace(state.config.clone());
        }
    }

    /// Statement and endorsements, signed anew where due. What cannot be saved is used all the same and signed again later.
    fn renew(&self, state: &mut State, now: i64) {
        let wanted = self.wanted_statement(state);
        for what in due(&state.site.statement, &wanted, &state.endorsed, now) {
            let saved = match what {
                Due::Statement { counter } => {
                    let signed = self.sign_statement(state, &wanted, counter, now);
                    state.site.statement = signed;
                    self.store.save_site(&state.site)
                }
                Due::Endorsement { site, sequence } => {
                    let Some(endorsed) = state.endorsed.get_mut(&site) else { continue };
                    self.sign_endorsement(site, endorsed, sequence, now);
                    self.store.save_endorsed(endorsed)
                }
            };
            if let Err(error) = saved {
                tracing::error!(%error, "a renewed statement is not saved");
            }
        }
    }

    /// Counts a statement that is about to be signed and shown to others. What comes after it must outrank it, also when this process
    /// ends in between: of two statements with one number the second would be ignored.
    ///
    /// # Errors
    /// It cannot be saved; nothing has changed.
    pub(crate) fn count_statement(&self, state: &mut State, now: i64) -> Result<u64, StoreError> {
        let mut site = state.site.clone();
        site.statement.counter = next_counter(site.statement.counter, now);
        self.store.save_site(&site)?;
        state.site = site;
        Ok(state.site.statement.counter)
    }

    fn wanted_statement(&self, state: &State) -> IssuedStatement {
        let digest =
            aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.ca.certificate().as_ref());
        IssuedStatement {
            name: state.site_name().to_owned(),
            endpoints: state.advertise(),
            network: state.site.network.clone(),
            cas: vec![data_encoding::HEXLOWER.encode(digest.as_ref())],
            ..IssuedStatement::default()
        }
    }

    fn sign_statement(
        &self,
        state: &State,
        wanted: &IssuedStatement,
        counter: u64,
        now: i64,
    ) -> IssuedStatement {
        let record = self.identity.statement(&StatementDraft {
            epoch: counter,
            name: wanted.name.clone(),
            ca_certificates: vec![self.ca.certificate().to_vec()],
            endpoints: wanted.endpoints.clone(),
            network_id: Some(state.network(self.site)),
            expires_unix_s: now + i64::from(STATEMENT_VALIDITY_S),
        });
        let record = record::to_text(&record);
        IssuedStatement { counter, signed_unix_s: now, record, ..wanted.clone() }
    }

    /// Signs `endorsed` anew.
    pub(crate) fn sign_endorsement(
        &self,
        subject: SiteId,
        endorsed: &mut Endorsed,
        sequence: u64,
        now: i64,
    ) {
        let scope = endorsed.guest.then(|| Scope {
            consume: endorsed.consume.clone(),
            provide: endorsed.provide.clone(),
            transit: endorsed.transit,
        });
        let membership = if endorsed.guest { Membership::Guest } else { Membership::Member };
        let draft = EndorsementDraft {
            subject,
            membership,
            scope,
            may_endorse: endorsed.may_endorse && !endorsed.guest,
            sequence,
            valid_until_unix_s: if endorsed.withdrawn {
                now
            } else {
                now + i64::from(STATEMENT_VALIDITY_S)
            },
        };
        let record = if endorsed.withdrawn {
            self.identity.withdrawal(&draft)
        } else {
            self.identity.endorsement(&draft)
        };
        endorsed.sequence = sequence;
        endorsed.signed_unix_s = now;
        endorsed.record = record::to_text(&record);
    }

    /// Everything the site stands on: its own words and what it heard.
    pub(crate) fn records(&self, state: &State) -> Vec<Record> {
        let own = record::from_text(&state.site.statement.record);
        let endorsements =
            state.endorsed.values().filter_map(|endorsed| record::from_text(&endorsed.record));
        own.into_iter().chain(endorsements).chain(state.learned.iter().cloned()).collect()
    }

    /// A router's view arrived: addresses it sees get endpoints.
    pub(crate) fn observe(&self, router: &str, mut status: RouterStatus) {
        let mut state = self.state();
        let departed = |id: &[u8]| {
            <[u8; 32]>::try_from(id).is_ok_and(|id| state.departed.contains(&SiteId(id)))
        };
        status.sites.retain(|site| !departed(&site.site_id));
        status.routers.retain(|router| !departed(&router.site_id));
        for address in &mut status.addresses {
            address.providers.retain(|provider| !departed(&provider.site_id));
        }
        status.addresses.retain(|address| !address.providers.is_empty());
        let now = clock::unix_s();
        let room = state.automatic_room();
        let mut changed = state.served.observe(&status, now);
        if let Some(entry) = state.routers.get_mut(router) {
            entry.observe(status);
        }
        changed |= state.automatic_room() != room;
        if changed {
            self.refresh(&mut state);
        } else {
            self.touch();
        }
    }

    /// What the passing of time brings: deadlines, renewals, things nobody tells us about. Called every second.
    pub(crate) fn tick(&self, seconds: u64) {
        let now = clock::unix_s();
        // Before the lock is taken: the kernel makes these tables while they are read.
        let host = seconds
            .is_multiple_of(10)
            .then(|| (crate::observed::local_ports(), crate::observed::interfaces()));
        let mut state = self.state();
        let is_steady = state.clock.observe(now, clock::instant());
        let mut changed = seconds.is_multiple_of(60);
        state.draining.retain(|gone| {
            let keep = now < gone.until_unix_s;
            changed |= !keep;
            keep
        });
        changed |= drop_drained(&mut state);
        changed |= state.served.forget(now);
        if let Some((host, interfaces)) = host {
            // A port that becomes free again changes nothing: endpoints handed out are kept.
            changed |= interfaces != state.interfaces;
            state.host = host;
            state.interfaces = interfaces;
            let known = std::mem::take(&mut state.problems);
            let aside = self.store.still_aside(known.clone());
            changed |= aside.as_ref().is_ok_and(|aside| *aside != known);
            state.problems = aside.unwrap_or(known);
            changed |= self.forget(&mut state, now);
            if is_steady {
                changed |= self.forget_expired(&mut state, now);
            }
        }
        // Not at the start, when no router has told yet who serves what.
        if seconds > 0 && seconds.is_multiple_of(UNUSED_CHECKED_S) {
            changed |= self.forget_endpoints(&mut state, now);
        }
        if let Err(error) = self.save_what_was_learned(&mut state) {
            tracing::error!(%error, "statements of other sites are not saved");
        }
        if changed {
            self.refresh(&mut state);
        }
        if std::mem::take(&mut state.hosts_due) {
            self.name_endpoints(&mut state);
        }
        drop(state);
        if seconds.is_multiple_of(60)
            && let Err(error) = linux::rotate_logs(&self.store.paths().logs_dir())
        {
            tracing::warn!(%error, "logs are not rotated");
        }
    }

    fn forget_endpoints(&self, state: &mut State, now: i64) -> bool {
        let services = state.known_services(self.site);
        let is_served = |address: &Address| services.contains_key(address);
        if !skein_site_core::forget_unused(&mut state.endpoints, is_served, now) {
            return false;
        }
        if let Err(error) = self.store.save_endpoints(&state.endpoints) {
            tracing::error!(%error, "automatic endpoints are not saved");
        }
        true
    }

    /// Names that others chose and that are to be looked up before they are written to `/etc/hosts`.
    pub(crate) fn names_due(&self, now: i64) -> Vec<Address> {
        let mut state = self.state();
        let mut wanted = BTreeMap::new();
        if state.hosts_managed {
            let own = state.own_addresses();
            for (name, ports) in state.known_services(self.site) {
                let by = ports.values().find_map(|sites| sites.first().copied());
                let is_theirs = state.endpoints.contains_key(&name)
                    && !own.contains(name.as_str())
                    && hosts::may_be_named(&name);
                wanted.extend(by.filter(|_| is_theirs).map(|site| (name, site)));
            }
        }
        state.names.due(&wanted, now)
    }

    /// Which of them mean nothing here.
    pub(crate) fn names_learned(&self, free: Vec<(Address, bool)>, now: i64) {
        let mut state = self.state();
        for (name, is_free) in free {
            let is_news = state.names.learn(name, is_free, now);
            state.hosts_due |= is_news;
        }
    }

    /// Keeps the block in `/etc/hosts`, if the site is to have one.
    fn name_endpoints(&self, state: &mut State) {
        let label = self.store.paths().label();
        let wanted = state.resources.site.as_ref().is_some_and(|site| site.spec.manage_hosts);
        let done = if wanted {
            let services = state.known_services(self.site);
            let mut named = state.endpoints.clone();
            let own = state.own_addresses();
            named.retain(|address, _| {
                services.contains_key(address)
                    && (own.contains(address.as_str())
                        || (hosts::may_be_named(address) && state.names.is_free(address)))
            });
            hosts::update(hosts::FILE.as_ref(), &label, &named)
        } else {
            // Also one that an earlier controller left.
            hosts::remove(hosts::FILE.as_ref(), &label)
        };
        match done {
            Ok(()) => state.hosts_managed = wanted,
            // Another site writes its block at this moment.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => state.hosts_due = true,
            Err(error) => {
                tracing::error!(%error, file = hosts::FILE, "local endpoints are not named")
            }
        }
    }

    /// Saves what was heard, at the end of the process.
    pub(crate) fn save_learned(&self) {
        if let Err(error) = self.save_what_was_learned(&mut self.state()) {
            tracing::error!(%error, "statements of other sites are not saved");
        }
    }

    /// Saves what was heard of other sites since the last time, if anything; what fails is tried again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn save_what_was_learned(&self, state: &mut State) -> Result<(), StoreError> {
        if !state.learned.take_dirty() {
            return Ok(());
        }
        let saved = self.store.save_learned(&state.learned.to_vec());
        if saved.is_err() {
            state.learned.set_dirty();
        }
        saved
    }

    /// From now on nobody restarts anybody, and no router attaches. A full disk does not keep a site from being stopped: what cannot be
    /// written is in the answer, for the user.
    pub(crate) fn mark_stopped(&self) -> Option<StoreError> {
        self.is_stopping.store(true, Ordering::Release);
        let error = self.store.mark_stopped().err()?;
        tracing::warn!(%error, "the mark of a stopped site is not kept");
        Some(error)
    }

    /// Whether the site is meant to be stopped.
    pub(crate) fn is_stopped(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire) || self.store.paths().stopped_file().exists()
    }

    /// Signs what this site says of another so that it outranks what it said before.
    pub(crate) fn sign_next(&self, state: &State, subject: SiteId, endorsed: &mut Endorsed) {
        let now = clock::unix_s();
        let last = state.endorsed.get(&subject).map_or(0, |known| known.sequence);
        endorsed.restored = false;
        self.sign_endorsement(subject, endorsed, next_counter(last, now), now);
    }
}

/// Forgets draining connectors whose last flow ended. Only a router that has been told that they drain, and reset what is to be reset, can
/// say so.
fn drop_drained(state: &mut State) -> bool {
    let told = state.config.version;
    if state.draining.is_empty() || !state.routers.values().all(|router| router.seen >= told) {
        return false;
    }
    let flows: BTreeMap<&str, u64> = state
        .routers
        .values()
        .filter_map(|router| router.status.as_ref())
        .flat_map(|status| &status.connectors)
        .map(|connector| (connector.name.as_str(), connector.flows_active))
        .fold(BTreeMap::new(), |mut sums, (name, flows)| {
            *sums.entry(name).or_default() += flows;
            sums
        });
    let is_over = |gone: &DrainingUntil| {
        flows.get(gone.draining.connector.metadata.name.as_str()) == Some(&0)
    };
    let over: Vec<bool> = state.draining.iter().map(is_over).collect();
    let mut over = over.into_iter();
    let before = state.draining.len();
    state.draining.retain(|_| !over.next().unwrap_or(false));
    before != state.draining.len()
}

impl State {
    /// Resources have changed, and routers are told in the configuration as it is now.
    pub(crate) fn told(&mut self, changes: &[Change]) {
        let Self { told, resources, config, .. } = self;
        for change in changes {
            if let Change::Put(resource) = change {
                told.insert((resource.kind(), resource.name().to_owned()), config.version);
            }
        }
        let there: BTreeSet<_> =
            resources.iter().map(|it| (it.kind(), it.name().to_owned())).collect();
        told.retain(|resource, _| there.contains(resource));
    }

    /// The version of the configuration in which routers heard of a resource as it is.
    pub(crate) fn told_in(&self, resource: &Resource) -> u64 {
        let resource = (resource.kind(), resource.name().to_owned());
        self.told.get(&resource).copied().unwrap_or_default()
    }

    /// Names of applied tokens that the site of this id issued.
    pub(crate) fn tokens_of(&self, issuer: &str) -> Vec<String> {
        let of = |token: &skein_api::AccessTokenSpec| {
            token
                .token
                .parse()
                .is_ok_and(|token: skein_api::Token| token.issuer.to_string() == issuer)
        };
        let tokens = self.resources.tokens.values().filter(|token| of(&token.spec));
        tokens.map(|token| token.metadata.name.clone()).collect()
    }

    /// What this site says of another, unless it was withdrawn.
    pub(crate) fn endorses(&self, subject: SiteId) -> Option<&Endorsed> {
        self.endorsed.get(&subject).filter(|endorsed| !endorsed.withdrawn)
    }

    /// Whether this site vouches for a member, so that it is not alone.
    pub(crate) fn vouches_for_members(&self) -> bool {
        self.endorsed.values().any(|peer| !peer.guest && !peer.withdrawn)
    }

    /// Whether `subject` is out for good: the founder, an authority or this site says so.
    pub(crate) fn is_revoked(&self, site: SiteId, subject: SiteId) -> bool {
        let authority = |issuer: SiteId| {
            issuer == site
                || issuer == self.network(site)
                || self.site.authorities.contains(&issuer.to_string())
        };
        self.learned.revokers(subject).any(authority)
    }

    /// The network's id.
    pub(crate) fn network(&self, site: SiteId) -> SiteId {
        SiteId::parse(&self.site.network).unwrap_or(site)
    }

    /// Puts a resource that was checked and saved in its place.
    pub(crate) fn put(&mut self, resource: Resource) {
        let inserted = self.resources.insert(resource);
        inserted.expect("invariant: only a second site conflicts, and that was checked");
    }

    /// The site's name.
    pub(crate) fn site_name(&self) -> &str {
        self.resources.site.as_ref().map_or("site", |site| &site.metadata.name)
    }

    /// `host:port` under which others reach this site; empty if it does not listen.
    pub(crate) fn advertise(&self) -> Vec<String> {
        let Some(site) = &self.resources.site else { return Vec::new() };
        crate::observed::advertised(&site.spec, &self.interfaces)
    }

    /// Addresses that this site's owner has named.
    fn own_addresses(&self) -> BTreeSet<&str> {
        let connectors = self.resources.connectors.values().map(|one| one.spec.address.as_str());
        let listeners = self.resources.listeners.values().map(|one| one.spec.address.as_str());
        connectors.chain(listeners).collect()
    }

    /// Addresses of the network, those served from here included.
    pub(crate) fn known_services(&self, site: SiteId) -> Services {
        let mut out = self.served.by_address();
        for connector in self.resources.connectors.values() {
            let Ok(address) = connector.spec.address.parse::<Address>() else { continue };
            let ports = out.entry(address).or_default();
            for port in &connector.spec.ports {
                let Ok(number) = u16::try_from(port.port) else { continue };
                let port = Port { port: number, protocol: port.protocol.into() };
                Arc::make_mut(ports.entry(port).or_default()).insert(site);
            }
        }
        out
    }

    /// How many automatic endpoints the routers here can have.
    pub(crate) fn automatic_room(&self) -> Room {
        let statuses = self.routers.values().filter_map(|router| router.status.as_ref());
        let limits = statuses.map(|status| status.open_files_max).filter(|files| *files > 0);
        automatic_room(limits.min())
    }
}
