//! Links: authenticated relations with neighbouring routers.
//!
//! A link is one mTLS QUIC connection (ALPN `skein-link/1`) that carries control messages and from which the keys of the
//! frames derive, and the carrier that moves those frames.

mod accept;
mod dial;
mod established;
mod event;
mod hello;
mod liveness;
mod mtu;
mod port;
mod preference;
mod prompt;
mod race;
mod status;
mod stream;
mod tcp;
mod tls;
mod transport;

pub use event::{Claim, LinkEvent, LinkEvents, LinkUp, Peer, Turn};
pub use hello::{PROTOCOL_MAX, PROTOCOL_MIN};
pub(crate) use liveness::{Due, Liveness};
pub(crate) use mtu::FrameSize;

use crate::fabric::{Fabric, FrameLink};
use accept::{Acceptor, Bound};
use dial::{Dialler, Progress};
use parking_lot::Mutex;
use preference::Preference;
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use rustls::time_provider::TimeProvider;
use skein_core::{LinkId, RouterId, SiteId};
use skein_proxy::Proxy;
use skein_trust::RouterTls;
use skein_wire::proto::{
    control::LinkConfig,
    routing::{LinkHello, LinkMessage},
};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Unhandled events until link tasks wait for their consumer, and messages beside them, of which each link has one.
const EVENTS_MAX: usize = 256;
/// How often UDP is tried while a link is up over TLS: it is found within a quarter of a minute, and costs a few packets.
pub const UDP_INTERVAL: Duration = Duration::from_secs(10);

/// Writes our side of the hello for a neighbour of the given site. Protocol range, cost, name and nonce are filled in by
/// the link.
pub type HelloFor = dyn Fn(SiteId) -> LinkHello + Send + Sync;

/// What [`Links::start`] needs.
#[allow(missing_debug_implementations, reason = "holds closures and key material")]
pub struct LinksConfig {
    /// Where frames go to and come from.
    pub fabric: Arc<Fabric>,
    /// This router.
    pub router: RouterId,
    /// Certificates and whom to trust.
    pub tls: RouterTls,
    /// The time certificates are judged by.
    pub time: Arc<dyn TimeProvider>,
    /// Our side of each hello.
    pub hello: Arc<HelloFor>,
    /// The same at every boot: with it a router resets what its earlier boots had connected.
    pub site_secret: [u8; 32],
    /// Between attempts to move a link from TLS to UDP: [`UDP_INTERVAL`], except in tests.
    pub udp_interval: Duration,
    /// Of the generator of nonces and jitter; from the operating system, except in tests.
    pub seed: [u8; 32],
}

/// All links of this router, dialled and accepted. Cheap to clone; may be used from any thread.
#[derive(Clone, Debug)]
pub struct Links(Arc<Inner>);

/// The link is gone; its `Down` event has been or is being delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the link is down")]
pub struct LinkGone;

/// What all tasks of links share.
struct Inner {
    fabric: Arc<Fabric>,
    router: RouterId,
    tls: RouterTls,
    time: Arc<dyn TimeProvider>,
    hello: Arc<HelloFor>,
    site_secret: [u8; 32],
    udp_interval: Duration,
    proxy: Mutex<Option<Arc<Proxy>>>,
    random: Mutex<StdRng>,
    runtime: Handle,
    tasks: TaskTracker,
    stop: CancellationToken,
    events: mpsc::Sender<LinkEvent>,
    messages: mpsc::Sender<LinkEvent>,
    links: Mutex<HashMap<LinkId, Registered>>,
    dialled: Mutex<BTreeMap<String, Dialled>>,
    listening: Mutex<BTreeMap<SocketAddr, Listening>>,
}

/// A link in service.
struct Registered {
    queue: mpsc::Sender<LinkMessage>,
    frames: Arc<FrameLink>,
    close: CancellationToken,
    close_reason: Arc<Mutex<String>>,
    up: LinkUp,
    since_unix_ms: i64,
    /// The same on the monotonic clock: a clock that was set since shows in the difference.
    since: std::time::Instant,
}

/// A link that is configured.
struct Dialled {
    config: LinkConfig,
    endpoints: watch::Sender<Vec<String>>,
    progress: Arc<Mutex<Progress>>,
    stop: CancellationToken,
}

/// An address that is configured.
struct Listening {
    bound: Arc<Mutex<Bound>>,
    stop: CancellationToken,
}

impl Links {
    /// Starts without any link or socket.
    ///
    /// # Panics
    /// Outside of the runtime that shall carry the data path.
    #[must_use]
    pub fn start(config: LinksConfig) -> (Self, LinkEvents) {
        let LinksConfig { fabric, router, tls, time, hello, site_secret, udp_interval, seed } =
            config;
        let (events, states) = mpsc::channel(EVENTS_MAX);
        let (messages, said) = mpsc::channel(EVENTS_MAX);
        let inner = Inner {
            fabric,
            router,
            tls,
            time,
            hello,
            site_secret,
            udp_interval,
            proxy: Mutex::default(),
            random: Mutex::new(StdRng::from_seed(seed)),
            runtime: Handle::current(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            events,
            messages,
            links: Mutex::default(),
            dialled: Mutex::default(),
            listening: Mutex::default(),
        };
        (Self(Arc::new(inner)), LinkEvents { states, messages: said })
    }

    /// Attempts over TCP go through `proxy` from now on, or directly; links that are up stay as they are.
    pub fn set_proxy(&self, proxy: Option<Proxy>) {
        *self.0.proxy.lock() = proxy.map(Arc::new);
    }

    /// Takes the complete list of links to dial: new ones are dialled, changed ones dialled anew, missing ones closed.
    /// New endpoints alone do not disturb a link that is up.
    pub fn configure(&self, links: Vec<LinkConfig>) {
        let mut dialled = self.0.dialled.lock();
        dialled.retain(|name, old| {
            let keep = links.iter().any(|new| new.name == *name && is_same_link(new, &old.config));
            if !keep {
                old.stop.cancel();
            }
            keep
        });
        for config in links {
            match dialled.get_mut(&config.name) {
                Some(old) => {
                    old.endpoints.send_if_modified(|endpoints| {
                        let changed = *endpoints != config.endpoints;
                        endpoints.clone_from(&config.endpoints);
                        changed
                    });
                    old.config = config;
                }
                None => {
                    let Some(new) = self.dial(config) else { continue };
                    dialled.insert(new.config.name.clone(), new);
                }
            }
        }
    }

    fn dial(&self, config: LinkConfig) -> Option<Dialled> {
        let Ok(site) = config.peer_site_id.as_slice().try_into().map(SiteId) else {
            tracing::error!(name = config.name, "a configured link names no site; not dialled");
            return None;
        };
        let (endpoints, receiver) = watch::channel(config.endpoints.clone());
        let progress = Arc::<Mutex<Progress>>::default();
        let stop = self.0.stop.child_token();
        let dialler = Dialler {
            inner: Arc::clone(&self.0),
            name: config.name.clone(),
            site,
            cost: config.cost.max(1),
            endpoints: receiver,
            progress: Arc::clone(&progress),
            preference: Preference::new(self.0.udp_interval),
            lost: None,
            stop: stop.clone(),
        };
        self.0.spawn(dialler.run());
        Some(Dialled { config, endpoints, progress, stop })
    }

    /// Takes the complete list of addresses to accept on, UDP and TCP. What cannot be bound is tried again; links accepted
    /// on an address no longer listed are closed.
    pub fn listen(&self, addresses: &[SocketAddr]) {
        let mut listening = self.0.listening.lock();
        listening.retain(|addr, old| {
            let keep = addresses.contains(addr);
            if !keep {
                old.stop.cancel();
            }
            keep
        });
        for addr in addresses {
            listening.entry(*addr).or_insert_with(|| {
                let listening =
                    Listening { bound: Arc::default(), stop: self.0.stop.child_token() };
                let acceptor = Acceptor {
                    inner: Arc::clone(&self.0),
                    addr: *addr,
                    bound: Arc::clone(&listening.bound),
                    stop: listening.stop.clone(),
                };
                self.0.spawn(acceptor.run());
                listening
            });
        }
    }

    /// Queues a message to the neighbour; waits while the queue is full.
    ///
    /// # Errors
    /// When the link is down.
    ///
    /// # Cancel safety
    /// Cancelled, the message is not sent.
    pub async fn send(&self, id: LinkId, message: LinkMessage) -> Result<(), LinkGone> {
        let queue = self.0.links.lock().get(&id).map(|link| link.queue.clone());
        queue.ok_or(LinkGone)?.send(message).await.map_err(|_| LinkGone)
    }

    /// Closes a link for a reason the neighbour is told; a dialled one is dialled again.
    pub fn close(&self, id: LinkId, reason: &str) {
        if let Some(link) = self.0.links.lock().get(&id) {
            reason.clone_into(&mut link.close_reason.lock());
            link.close.cancel();
        }
    }

    /// Closes every link and socket and waits for every task.
    ///
    /// # Cancel safety
    /// Cancelled, tasks end on their own time.
    pub async fn shutdown(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

/// Whether a link goes on under a new configuration.
fn is_same_link(new: &LinkConfig, old: &LinkConfig) -> bool {
    new.peer_site_id == old.peer_site_id && new.cost.max(1) == old.cost.max(1)
}

impl Inner {
    /// Runs a task that ends before [`Links::shutdown`] returns.
    fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.tasks.spawn_on(task, &self.runtime)
    }

    /// Reports an event; waits while the consumer is behind, but not when it has no use for events any more.
    async fn report(&self, event: LinkEvent) {
        let queue = match &event {
            // Anybody may claim: that delays what neighbours say, not what becomes of links.
            LinkEvent::Message(..) | LinkEvent::Claim(_) => &self.messages,
            _ => &self.events,
        };
        // What cannot be sent right away must wait; what cannot be sent at all has no consumer.
        let Err(mpsc::error::TrySendError::Full(event)) = queue.try_send(event) else {
            return;
        };
        tokio::select! {
            sent = queue.send(event) => drop(sent), // dropped, the event is lost with the router
            () = self.stop.cancelled() => {} // cancel-safe
        }
    }

    /// `false` if there is a link of that id already.
    fn register(&self, link: Registered) -> bool {
        match self.links.lock().entry(link.up.id) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(slot) => {
                slot.insert(link);
                true
            }
        }
    }

    fn unregister(&self, id: LinkId) {
        self.links.lock().remove(&id);
    }

    /// Up to a quarter more or less, so that the routers of a site that lost its uplink do not return in step.
    fn jittered(&self, delay: Duration) -> Duration {
        let [byte] = self.random_bytes();
        delay * (192 + u32::from(byte) / 2) / 256
    }

    /// The proxy that leads to an endpoint, if one does.
    fn proxy_for(&self, endpoint: &str) -> Option<Arc<Proxy>> {
        self.proxy.lock().clone().filter(|proxy| proxy.is_for(endpoint))
    }

    fn link_nonce(&self) -> Vec<u8> {
        self.random_bytes::<{ hello::NONCE_LEN }>().to_vec()
    }

    fn random_bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.random.lock().fill_bytes(&mut bytes);
        bytes
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").field("router", &self.router).finish_non_exhaustive()
    }
}
