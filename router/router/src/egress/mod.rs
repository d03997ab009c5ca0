//! Where flows leave: connectors, which serve an address with local targets.

mod connector;
mod datagrams;
mod flow;
mod health;
mod name;
mod proxy_protocol;
mod target;

pub(crate) use datagrams::Served as LocalAssociation;
pub(crate) use flow::{Local, LocalFlow, Refusal};

use crate::{flows::Surroundings, session::IncomingFlow};
use connector::{Connector, Flows};
use parking_lot::Mutex;
use skein_core::{Address, AddressEntry, Port};
use skein_wire::proto::control::{ConnectorConfig, ConnectorStatus};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::{sync::watch, time::timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The connectors of this router. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Egress(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    surroundings: Surroundings,
    /// By name.
    connectors: Mutex<BTreeMap<String, Arc<Connector>>>,
    entries: watch::Sender<Vec<AddressEntry>>,
    draining: AtomicBool,
    /// Ends associations when it drains.
    withdrawn: CancellationToken,
    /// Spreads flows over connectors of the same address.
    next: AtomicUsize,
    /// Flows, apart from the tasks of connectors, because a drain waits for them.
    flows: TaskTracker,
    tasks: TaskTracker,
    abort: CancellationToken,
}

impl Egress {
    /// An egress without connectors.
    #[must_use]
    pub fn start(surroundings: Surroundings) -> Self {
        Self(Arc::new(Inner {
            surroundings,
            connectors: Mutex::default(),
            entries: watch::Sender::new(Vec::new()),
            draining: AtomicBool::new(false),
            withdrawn: CancellationToken::new(),
            next: AtomicUsize::new(0),
            flows: TaskTracker::new(),
            tasks: TaskTracker::new(),
            abort: CancellationToken::new(),
        }))
    }

    /// Makes the connectors these. What runs is touched only by the end of its service: flows of an address or port that is gone or draining
    /// go on for an hour, unless the connector says `reset`.
    pub fn configure(&self, configs: Vec<ConnectorConfig>) {
        let mut connectors = self.0.connectors.lock();
        let mut before = std::mem::take(&mut *connectors);
        for mut config in configs {
            let draining = std::mem::take(&mut config.draining);
            let reset = std::mem::take(&mut config.reset);
            let connector = match before.remove(&config.name) {
                Some(kept) if kept.config == config && (draining || !kept.is_draining()) => kept,
                changed => {
                    let connector = Connector::new(config, changed.as_deref());
                    if let Some(changed) = changed {
                        changed.withdrawn.cancel();
                        self.end(changed.flows_without(Some(&connector)), false);
                    }
                    if !draining {
                        self.check_targets(&connector);
                    }
                    connector
                }
            };
            if draining {
                connector.withdrawn.cancel();
                self.end(connector.flows_without(None), reset);
            }
            connectors.insert(connector.config.name.clone(), connector);
        }
        for gone in before.into_values() {
            gone.withdrawn.cancel();
            self.end(gone.flows_without(None), false);
        }
        drop(connectors);
        self.advertise();
    }

    /// What this router serves now: the addresses of connectors with a target that answers, for the engine to advertise.
    #[must_use]
    pub fn entries(&self) -> watch::Receiver<Vec<AddressEntry>> {
        self.0.entries.subscribe()
    }

    /// Every connector as it is now, in the order of names.
    #[must_use]
    pub fn status(&self) -> Vec<ConnectorStatus> {
        self.0.connectors.lock().values().map(|connector| connector.status()).collect()
    }

    /// Withdraws every address and refuses new flows; flows that run are not touched.
    pub fn withdraw(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
        self.advertise();
    }

    /// Withdraws, ends associations, lets other flows end until `deadline`, resets the rest, joins the tasks and returns how many flows were reset.
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub async fn drain(&self, deadline: Instant) -> u64 {
        self.withdraw();
        self.0.withdrawn.cancel();
        self.0.flows.close();
        let mut reset = 0;
        if timeout_at(deadline.into(), self.0.flows.wait()).await.is_err() {
            reset = self.0.flows.len() as u64;
        }
        self.0.abort.cancel();
        self.0.flows.wait().await;
        self.0.tasks.close();
        self.0.tasks.wait().await;
        reset
    }

    /// Takes a flow that a peer has just opened.
    pub(crate) fn serve(&self, incoming: IncomingFlow) {
        let served = flow::serve(self.clone(), incoming);
        self.0.flows.spawn_on(served, &self.0.surroundings.runtime);
    }

    fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Relaxed)
    }

    /// The connectors that serve `port` of `address`, in turn.
    fn connectors_for(&self, address: &Address, port: Port) -> Vec<Arc<Connector>> {
        let connectors = self.0.connectors.lock();
        let mut serving: Vec<_> = connectors
            .values()
            .filter(|connector| !connector.is_draining() && connector.serves(address, port))
            .cloned()
            .collect();
        if !serving.is_empty() {
            let first = self.0.next.fetch_add(1, Ordering::Relaxed) % serving.len();
            serving.rotate_left(first);
        }
        serving
    }

    fn advertise(&self) {
        let entries = if self.is_draining() {
            Vec::new()
        } else {
            connector::entries(self.0.connectors.lock().values())
        };
        self.0.entries.send_if_modified(|current| {
            let changed = *current != entries;
            *current = entries;
            changed
        });
    }

    fn check_targets(&self, connector: &Arc<Connector>) {
        for target in connector.targets() {
            let (egress, target) = (self.clone(), Arc::clone(target));
            let (withdrawn, stop) = (connector.withdrawn.clone(), self.0.abort.clone());
            let check = async move {
                tokio::select! {
                    () = target.check(|| egress.advertise()) => {}
                    () = withdrawn.cancelled() => {}
                    () = stop.cancelled() => {}
                }
            };
            self.0.tasks.spawn_on(check, &self.0.surroundings.runtime);
        }
    }

    /// These flows get an hour, or nothing.
    fn end<'a>(&self, flows: impl Iterator<Item = &'a Arc<Flows>>, reset: bool) {
        for flows in flows {
            if reset {
                flows.reset();
            } else if let Some(ending) = flows.end() {
                let stop = self.0.abort.clone();
                let ending = async move {
                    tokio::select! {
                        () = ending => {}
                        () = stop.cancelled() => {}
                    }
                };
                self.0.tasks.spawn_on(ending, &self.0.surroundings.runtime);
            }
        }
    }
}
