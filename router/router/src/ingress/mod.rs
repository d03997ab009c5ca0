//! Where flows enter: local listeners for addresses of the network.

mod attempt;
mod datagrams;
mod flow;
mod held;
mod holder;
mod listener;

use crate::{
    egress::Egress,
    flows::{Edge, FlowCounters, FlowRecord, Outcome, Surroundings},
    net::TcpStream,
    session::{Account, Class, Sessions},
    splice,
};
use attempt::Opening;
use listener::{Endpoint, Listener};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use skein_core::{Address, Protocol, RouterId};
use skein_wire::proto::control::{ListenerConfig, ListenerStatus};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};
use tokio::time::timeout_at;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

/// Flows of one address that may wait for an egress. At 16 KiB of credit each, a dead address takes a quarter of the default budget at most;
/// what associations hold meanwhile comes out of what there is for those.
const OPENING_MAX: usize = 4_096;

/// What [`Ingress::start`] needs.
#[derive(Debug)]
pub struct IngressConfig {
    /// For flows that leave elsewhere.
    pub sessions: Sessions,
    /// For flows that leave here.
    pub egress: Egress,
    /// The rest of the router.
    pub surroundings: Surroundings,
    /// Seeds flow ids and says with which of equal candidates a listener begins.
    pub seed: [u8; 32],
}

/// The listeners of this router. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ingress(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: IngressConfig,
    rng: Mutex<StdRng>,
    first_turn: u64,
    /// By name.
    listeners: Mutex<BTreeMap<String, Configured>>,
    /// Pays for what clients say while an egress is sought for their associations.
    held: Arc<Account>,
    /// Flows that enter here and leave at each router.
    outstanding: Mutex<HashMap<RouterId, u64>>,
    /// Flows that wait for an egress, by address.
    opening: Mutex<HashMap<Address, usize>>,
    flows: TaskTracker,
    tasks: TaskTracker,
    /// Closes the listeners.
    stop: CancellationToken,
    /// Resets the flows.
    abort: CancellationToken,
}

#[derive(Debug)]
struct Configured {
    address: String,
    ports: Vec<(Arc<Listener>, CancellationToken)>,
}

impl Ingress {
    /// An ingress without listeners.
    #[must_use]
    pub fn start(config: IngressConfig) -> Self {
        let mut rng = StdRng::from_seed(config.seed);
        Self(Arc::new(Inner {
            first_turn: rng.random(),
            rng: Mutex::new(rng),
            held: Account::new(Arc::clone(&config.surroundings.budget), Class::Datagrams),
            config,
            listeners: Mutex::default(),
            outstanding: Mutex::default(),
            opening: Mutex::default(),
            flows: TaskTracker::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            abort: CancellationToken::new(),
        }))
    }

    /// Makes the listeners these; what stays the same is not touched. Streams that run are never touched; associations end with their
    /// listener, whose socket they share.
    pub fn configure(&self, configs: Vec<ListenerConfig>) {
        let mut listeners = self.0.listeners.lock();
        let mut before: Vec<(Arc<Listener>, CancellationToken)> =
            std::mem::take(&mut *listeners).into_values().flat_map(|c| c.ports).collect();
        // Sockets are matched by what they are, not by the listener's name: a renamed listener keeps its socket.
        let mut added = Vec::new();
        for config in configs {
            let mut ports = Vec::new();
            for port in config.ports {
                let (address, host) = (config.address.clone(), config.host.clone());
                let endpoint = Endpoint { address, host, port };
                let kept = before.iter().position(|(listener, _)| listener.endpoint == endpoint);
                ports.push(kept.map_or_else(
                    || {
                        let port = (Listener::new(endpoint), self.0.stop.child_token());
                        added.push(port.clone());
                        port
                    },
                    |at| before.swap_remove(at),
                ));
            }
            listeners.insert(config.name, Configured { address: config.address, ports });
        }
        for (_, gone) in before {
            gone.cancel();
        }
        for (listener, stop) in added {
            let ingress = self.clone();
            let run = async move {
                tokio::select! {
                    () = listener.run(&ingress) => {}
                    () = stop.cancelled() => {}
                }
            };
            self.0.tasks.spawn_on(run, &self.0.config.surroundings.runtime);
        }
    }

    /// Every listener as it is now, in the order of names.
    #[must_use]
    pub fn status(&self) -> Vec<ListenerStatus> {
        let fib = Arc::clone(&self.0.config.surroundings.fib.borrow());
        let listeners = self.0.listeners.lock();
        let status = listeners.iter().map(|(name, configured)| ListenerStatus {
            name: name.clone(),
            address: configured.address.clone(),
            ports: configured.ports.iter().map(|(port, _)| port.status()).collect(),
            reachable: fib.addresses.contains_key(configured.address.as_str()),
        });
        status.collect()
    }

    /// Closes the listeners and ends associations, lets other flows end until `deadline`, resets the rest, joins the tasks and returns how many flows were reset.
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub async fn drain(&self, deadline: Instant) -> u64 {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
        self.0.flows.close();
        let mut reset = 0;
        if timeout_at(deadline.into(), self.0.flows.wait()).await.is_err() {
            reset = self.0.flows.len() as u64;
        }
        self.0.abort.cancel();
        self.0.flows.wait().await;
        reset
    }

    fn start_flow(&self, opening: Opening, client: TcpStream) {
        let surroundings = &self.0.config.surroundings;
        let turn = self.turn(&opening);
        let mut record = self.record(&opening, &surroundings.counters);
        let Some(slot) =
            surroundings.limit.enter(Edge::Ingress, Protocol::Tcp, surroundings.local.site)
        else {
            record.outcome = Outcome::Overloaded;
            splice::reset(client);
            return;
        };
        let span = record.span();
        let flow = flow::serve(self.clone(), opening, client, record, turn);
        let counted = async move {
            flow.await;
            drop(slot);
        };
        self.0.flows.spawn_on(counted.instrument(span), &surroundings.runtime);
    }

    /// Begins the record of a flow.
    fn record(&self, opening: &Opening, counters: &Arc<FlowCounters>) -> FlowRecord {
        let flow_id = self.0.rng.lock().random::<[u8; 16]>();
        let site = self.0.config.surroundings.local.site;
        let mut record = FlowRecord::start(Arc::clone(counters), Edge::Ingress, site, flow_id);
        record.address = Some(opening.address.clone());
        if opening.service.protocol == Protocol::Udp {
            record.set_association();
        }
        record
    }

    /// With which of equal candidates a flow begins. Routers that start together do not all begin with the same.
    fn turn(&self, opening: &Opening) -> u64 {
        self.0.first_turn.wrapping_add(opening.turn)
    }

    /// Counts a flow that waits for an egress until the guard is dropped; `None` when too many do.
    fn count_opening(&self, address: &Address) -> Option<Waiting> {
        let mut opening = self.0.opening.lock();
        let count = opening.entry(address.clone()).or_default();
        if *count >= OPENING_MAX {
            return None;
        }
        *count += 1;
        Some(Waiting { ingress: self.clone(), address: address.clone() })
    }

    fn outstanding(&self, router: RouterId) -> u64 {
        self.0.outstanding.lock().get(&router).copied().unwrap_or(0)
    }

    /// Counts a flow to `router` until the guard is dropped.
    fn count_towards(&self, router: RouterId) -> Outstanding {
        *self.0.outstanding.lock().entry(router).or_default() += 1;
        Outstanding { ingress: self.clone(), router }
    }
}

#[derive(Debug)]
struct Outstanding {
    ingress: Ingress,
    router: RouterId,
}

impl Outstanding {
    fn router(&self) -> RouterId {
        self.router
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        let mut outstanding = self.ingress.0.outstanding.lock();
        if let Some(count) = outstanding.get_mut(&self.router) {
            *count -= 1;
            if *count == 0 {
                outstanding.remove(&self.router);
            }
        }
    }
}

#[derive(Debug)]
struct Waiting {
    ingress: Ingress,
    address: Address,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut opening = self.ingress.0.opening.lock();
        if let Some(count) = opening.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                opening.remove(&self.address);
            }
        }
    }
}
