//! The virtual socket under the end-to-end endpoint.
//!
//! A peer router is an IPv6 unique local address ([`skein_core::vaddr`]), the port its pin. Sending looks up the path,
//! writes the label stack and hands frames to the first link; receiving delivers what is for us and passes the rest on.

mod counters;
mod forwarding;
mod fragment;
mod inbox;
mod link;
mod pool;
mod receive;
mod send;

pub use counters::{Counter, Counters};
pub(crate) use link::{Attention, FrameLink, LinkKeys};

use forwarding::Forwarding;
use fragment::Reassembly;
use inbox::Inbox;
use parking_lot::{Mutex, RwLock};
use pool::Pool;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use send::Destinations;
use skein_core::{Fib, Handle, LinkId, Pin as PathPin, vaddr};
use std::{
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

/// Packets of one receive buffer told to the endpoint, which allocates 32 buffers of that many packets.
const RECEIVE_SEGMENTS_MAX: usize = 32;
/// Packets the endpoint may hand over at once before there is a link to ask.
const TRANSMIT_SEGMENTS_MAX: usize = 64;

/// Joins the links of this router and its end-to-end endpoint; see the module.
#[derive(Debug)]
pub struct Fabric {
    initial_handle: Handle,
    transit: AtomicBool,
    forwarding: RwLock<Arc<Forwarding>>,
    destinations: Mutex<Destinations>,
    inbox: Inbox,
    reassembly: Mutex<Reassembly>,
    pool: Pool,
    counters: Arc<Counters>,
}

impl Fabric {
    /// A fabric for this boot of the router. `handle` is the source in its frames until a [`Fib`] names one.
    ///
    /// Give it to [`quinn::Endpoint::new_with_abstract_socket`].
    #[must_use]
    pub fn new(handle: Handle) -> Arc<Self> {
        Arc::new(Self {
            initial_handle: handle,
            transit: AtomicBool::new(true),
            forwarding: RwLock::default(),
            destinations: Mutex::default(),
            inbox: Inbox::default(),
            reassembly: Mutex::default(),
            pool: Pool::default(),
            counters: Arc::default(),
        })
    }

    /// Takes a new view of the network into use; destinations whose path changed are kicked.
    pub fn publish(&self, fib: Arc<Fib>) {
        self.replace(|old| (fib, old.links.clone()));
    }

    /// Whether frames for others are passed on; an edge drops them. Initially true.
    pub fn set_transit(&self, transit: bool) {
        self.transit.store(transit, Ordering::Relaxed);
    }

    /// What the frame layer counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Frames may leave on `link` from now on.
    pub(crate) fn add_link(&self, link: Arc<FrameLink>) {
        self.replace(|old| {
            let mut links = old.links.clone();
            links.insert(link.id(), link);
            (Arc::clone(&old.fib), links)
        });
    }

    /// The link is dead: paths that begin with it are replaced at once, without waiting for a new view of the network.
    pub(crate) fn remove_link(&self, id: LinkId) {
        self.replace(|old| {
            let mut links = old.links.clone();
            if let Some(link) = links.remove(&id) {
                link.set_down();
            }
            (Arc::clone(&old.fib), links)
        });
    }

    /// What this router writes as source into frames.
    pub(crate) fn source(&self) -> Handle {
        self.forwarding.read().fib.local.map_or(self.initial_handle, |local| local.handle)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    fn is_transit(&self) -> bool {
        self.transit.load(Ordering::Relaxed)
    }

    fn forwarding(&self) -> Arc<Forwarding> {
        Arc::clone(&self.forwarding.read())
    }

    fn replace(
        &self,
        make: impl FnOnce(&Forwarding) -> (Arc<Fib>, std::collections::HashMap<LinkId, Arc<FrameLink>>),
    ) {
        {
            let mut current = self.forwarding.write();
            let (fib, links) = make(&current);
            *current = Arc::new(Forwarding::new(current.generation + 1, fib, links));
        }
        self.reroute();
    }
}

type Waits = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// Waits for the link that refused the connection's last batch, and for no other: a full link must not hold up connections
/// that go elsewhere.
#[derive(Default)]
struct Poller {
    waiting: Option<Waits>,
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(link) = send::take_blocked() {
            self.waiting = Some(Box::pin(async move { link.writable().await }));
        }
        if let Some(waiting) = &mut self.waiting {
            ready!(waiting.as_mut().poll(cx));
            self.waiting = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").field("waiting", &self.waiting.is_some()).finish()
    }
}

impl AsyncUdpSocket for Fabric {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller::default())
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.transmit(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inbox.poll(cx, bufs, metas, &self.pool).map(Ok)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(vaddr(self.source(), PathPin(0)))
    }

    fn max_transmit_segments(&self) -> usize {
        self.forwarding.read().segments_max.unwrap_or(TRANSMIT_SEGMENTS_MAX)
    }

    fn max_receive_segments(&self) -> usize {
        RECEIVE_SEGMENTS_MAX
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
