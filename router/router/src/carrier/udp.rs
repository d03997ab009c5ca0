//! UDP: one socket for QUIC and frames, told apart by the first byte.

mod carrier;

pub(crate) use carrier::UdpCarrier;

use super::{Port, hop::HopQueue};
use crate::{
    clock,
    fabric::{Fabric, FrameLink},
    net::{BatchSocket, UdpSocket},
};
use parking_lot::{Mutex, RwLock};
use quinn::udp::{RecvMeta, Transmit};
use skein_core::LinkId;
use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    net::SocketAddr,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

/// Received buffers handled until other tasks of the thread get their turn.
const BUFFERS_PER_TURN: usize = 64;
/// Buffers one system call may fill.
pub(crate) const BATCH: usize = 8;
/// QUIC packets waiting for the hop endpoint: a burst of handshakes, for hop connections carry little else.
const HOP_PACKETS_MAX: usize = 1024;
/// Authentication codes computed for frames from unknown addresses, per [`TRIAL_PERIOD`]: about a millisecond of work.
const TRIALS_MAX: usize = 4_096;
const TRIAL_PERIOD: Duration = Duration::from_millis(100);

/// A UDP socket with the links whose frames it carries.
#[derive(Debug)]
pub(crate) struct UdpPort {
    socket: BatchSocket,
    hop: HopQueue,
    links: RwLock<PortLinks>,
    trials: Mutex<Trials>,
}

/// The links of a port. Not owned: links own their port.
#[derive(Debug, Default)]
struct PortLinks {
    /// All of them: whom a frame from an unexpected address may be from.
    by_id: HashMap<LinkId, Weak<FrameLink>>,
    /// Whom a frame from an address is from, most likely. Only a hint: whoever loses an address, to a neighbour that forges it
    /// or to one that its NAT has given it to, is still found by its key.
    by_addr: HashMap<SocketAddr, Weak<FrameLink>>,
}

impl PortLinks {
    /// Whether `addr` leads to a link whose neighbour is there as far as is known.
    fn is_held(&self, addr: &SocketAddr) -> bool {
        let holder = self.by_addr.get(addr).and_then(Weak::upgrade);
        holder.is_some_and(|link| link.is_up() && link.carrier().remote() == *addr)
    }
}

impl UdpPort {
    /// Takes over a socket.
    ///
    /// # Errors
    /// When the operating system refuses an option it must have.
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            socket: BatchSocket::new(socket)?,
            hop: HopQueue::new(HOP_PACKETS_MAX),
            links: RwLock::default(),
            trials: Mutex::new(Trials { since: clock::now(), left: TRIALS_MAX }),
        }))
    }

    /// Reads the socket for ever and hands what arrives to the fabric and the hop endpoint.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing that was read.
    pub(crate) async fn run(self: Arc<Self>, fabric: Arc<Fabric>) {
        let port = Port::Udp(Arc::clone(&self));
        loop {
            if let Err(error) = self.socket.readable().await {
                // Only a runtime that shuts down refuses to wait.
                tracing::debug!(%error, "UDP socket is no longer polled");
                return;
            }
            if self.read_turn(&port, &fabric) {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Reads until the socket is empty or the turn is over, which is when it returns `true`.
    fn read_turn(&self, port: &Port, fabric: &Fabric) -> bool {
        let mut buffers = fabric.pool().take(BATCH);
        let mut handled = 0;
        let more = loop {
            let mut metas = [RecvMeta::default(); BATCH];
            let n = match self.recv(&mut buffers, &mut metas) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break false,
                // Of a single neighbour, or passing: give others their turn and look again.
                Err(error) => {
                    tracing::debug!(%error, "UDP socket reports an error");
                    break true;
                }
            };
            let now = clock::now();
            for (buffer, meta) in buffers.iter_mut().zip(&metas[..n]) {
                fabric.receive(port, buffer, meta, now);
            }
            handled += n;
            if handled >= BUFFERS_PER_TURN {
                break true;
            }
        };
        fabric.pool().give(buffers);
        more
    }

    fn recv(&self, buffers: &mut [Box<[u8]>], metas: &mut [RecvMeta]) -> io::Result<usize> {
        let mut slices = buffers.iter_mut();
        let mut slices: [IoSliceMut<'_>; BATCH] = std::array::from_fn(|_| {
            IoSliceMut::new(slices.next().expect("invariant: the pool gives BATCH buffers"))
        });
        self.socket.recv(&mut slices, metas)
    }

    pub(super) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    pub(crate) async fn writable(&self) {
        if let Err(error) = self.socket.writable().await {
            tracing::debug!(%error, "UDP socket is no longer polled");
        }
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(crate) fn segments_max(&self) -> usize {
        self.socket.segments_max()
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }

    pub(super) fn hop_queue(&self) -> &HopQueue {
        &self.hop
    }

    /// The link whose frames come from `addr`.
    pub(crate) fn link_from(&self, addr: &SocketAddr) -> Option<Arc<FrameLink>> {
        self.links.read().by_addr.get(addr)?.upgrade()
    }

    /// The neighbour of `link` has proven that it is at `addr`.
    pub(crate) fn attach(&self, addr: SocketAddr, link: &Arc<FrameLink>) {
        let mut links = self.links.write();
        links.by_id.insert(link.id(), Arc::downgrade(link));
        links.by_addr.insert(addr, Arc::downgrade(link));
    }

    /// Frames of `link` come from `addr`, which proves nothing: nobody who is there is displaced.
    pub(crate) fn suggest(&self, addr: SocketAddr, link: &Arc<FrameLink>) {
        let mut links = self.links.write();
        if !links.is_held(&addr) {
            links.by_addr.insert(addr, Arc::downgrade(link));
        }
    }

    /// Forgets every link. Links hold their port, so without this the two would keep each other, and the socket, alive.
    pub(crate) fn detach_all(&self) {
        *self.links.write() = PortLinks::default();
    }

    /// Forgets `addr` if it still leads to `link`.
    pub(crate) fn detach(&self, addr: &SocketAddr, link: &FrameLink) {
        let mut links = self.links.write();
        if links.by_addr.get(addr).is_some_and(|attached| std::ptr::eq(attached.as_ptr(), link)) {
            links.by_addr.remove(addr);
        }
    }

    /// Forgets a link that has ended; addresses are [detached](Self::detach).
    pub(crate) fn remove(&self, link: &FrameLink) {
        let mut links = self.links.write();
        let known = links.by_id.get(&link.id());
        if known.is_some_and(|known| std::ptr::eq(known.as_ptr(), link)) {
            links.by_id.remove(&link.id());
        }
    }

    /// Whether there are links whose frames could come here.
    pub(crate) fn has_links(&self) -> bool {
        !self.links.read().by_id.is_empty()
    }

    /// The link for which `opens` holds, tried on each: a neighbour whose address has changed is known by its key only.
    pub(crate) fn find_link(
        &self,
        now: Instant,
        opens: impl Fn(&FrameLink) -> bool,
    ) -> Option<Arc<FrameLink>> {
        let links = self.links.read();
        if !self.trials.lock().allow(now, links.by_id.len()) {
            return None;
        }
        #[allow(clippy::iter_over_hash_type, reason = "at most one link opens the frame")]
        for link in links.by_id.values() {
            let link = link.upgrade();
            if link.as_deref().is_some_and(&opens) {
                return link;
            }
        }
        None
    }
}

/// What strangers may cost us.
#[derive(Debug)]
struct Trials {
    since: Instant,
    left: usize,
}

impl Trials {
    fn allow(&mut self, now: Instant, links: usize) -> bool {
        if now.saturating_duration_since(self.since) >= TRIAL_PERIOD {
            *self = Self { since: now, left: TRIALS_MAX };
        }
        let allowed = self.left > 0 && links > 0;
        self.left = self.left.saturating_sub(links);
        allowed
    }
}
