//! The one object that holds a site's state: every change goes through it, is made durable, and then reaches the routers.
//!
//! One short lock around plain data; files are written under it, because two writers of one file would undo each other. Nothing waits for
//! the network while it is held.

mod naming;
mod signing;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aws_lc_rs::rand::SystemRandom;
use parking_lot::{Mutex, MutexGuard};
use skein_core::{Address, SiteId};
use skein_site_core::{Draining, Inputs, LeftOut, LocalPorts, plan};
use skein_trust::{SiteCa, SiteIdentity};
use skein_wire::proto::control::{RouterConfig, RouterStatus};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

pub(crate) use state::State;

use crate::{
    clock::{self, SteadyClock},
    hosts,
    learned::LearnedRecords,
    platform::linux,
    served::Served,
    store::{Loaded, Store, StoreError},
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
                changed |= self.forget_old_grants(&mut state, now);
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
