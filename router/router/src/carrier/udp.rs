//! UDP: one socket for QUIC and frames, told apart by the first byte.

use super::hop::HopQueue;
use crate::{
    clock,
    fabric::{Fabric, FrameLink},
};
use parking_lot::{Mutex, RwLock};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use skein_core::LinkId;
use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};
use tokio::{io::Interest, net::UdpSocket};

/// Received buffers handled until other tasks of the thread get their turn.
const BUFFERS_PER_TURN: usize = 64;
/// Buffers one system call may fill.
pub(crate) const BATCH: usize = 8;
/// Largest batch of a UDP socket: an IPv4 datagram's payload.
const BATCH_BYTES_MAX: usize = 65_507;
/// Authentication codes computed for frames from unknown addresses, per [`TRIAL_PERIOD`]: about a millisecond of work.
const TRIALS_MAX: usize = 4_096;
const TRIAL_PERIOD: Duration = Duration::from_millis(100);

/// A UDP socket with the links whose frames it carries.
#[derive(Debug)]
pub(crate) struct UdpPort {
    socket: UdpSocket,
    state: UdpSocketState,
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
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Arc::new(Self {
            socket,
            state,
            hop: HopQueue::default(),
            links: RwLock::default(),
            trials: Mutex::new(Trials { since: clock::now(), left: TRIALS_MAX }),
        }))
    }

    /// Reads the socket for ever and hands what arrives to the fabric and the hop endpoint.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing that was read.
    pub(crate) async fn run(self: Arc<Self>, fabric: Arc<Fabric>) {
        loop {
            if let Err(error) = self.socket.readable().await {
                // Only a runtime that shuts down refuses to wait.
                tracing::debug!(%error, "UDP socket is no longer polled");
                return;
            }
            if self.read_turn(&fabric) {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Reads until the socket is empty or the turn is over, which is when it returns `true`.
    fn read_turn(self: &Arc<Self>, fabric: &Fabric) -> bool {
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
                fabric.receive(self, buffer, meta, now);
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
        self.socket.try_io(Interest::READABLE, || {
            self.state.recv((&self.socket).into(), &mut slices, metas)
        })
    }

    pub(crate) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_io(Interest::WRITABLE, || self.state.send((&self.socket).into(), transmit))
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
        self.state.max_gso_segments()
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    pub(super) fn hop_queue(&self) -> &HopQueue {
        &self.hop
    }

    /// Passes a QUIC packet to the hop endpoint; `false` when it had to be dropped.
    pub(crate) fn push_hop(&self, packet: &[u8], meta: &RecvMeta) -> bool {
        self.hop.push(packet, meta)
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

/// Sends batch after batch and returns how many bytes were taken. Once something was, what finds the socket full is lost:
/// told to wait, the caller would send everything again.
fn send_batches<'a>(
    batches: impl Iterator<Item = &'a [u8]>,
    mut send: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<usize> {
    let mut taken = 0;
    for batch in batches {
        match send(batch) {
            Ok(()) => taken += batch.len(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
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

/// Frames to one neighbour through a port.
#[derive(Debug)]
pub(crate) struct UdpCarrier {
    port: Arc<UdpPort>,
    remote: Mutex<Remote>,
}

/// Where a neighbour is.
#[derive(Clone, Copy, Debug)]
struct Remote {
    addr: SocketAddr,
    /// The address of ours it talks to: on a host with several, replies must come from that one.
    local_ip: Option<IpAddr>,
}

impl UdpCarrier {
    pub(crate) fn new(port: Arc<UdpPort>, addr: SocketAddr, local_ip: Option<IpAddr>) -> Self {
        Self { port, remote: Mutex::new(Remote { addr, local_ip }) }
    }

    pub(crate) fn port(&self) -> &Arc<UdpPort> {
        &self.port
    }

    pub(crate) fn remote(&self) -> SocketAddr {
        self.remote.lock().addr
    }

    /// Moves the destination of frames.
    pub(crate) fn set_remote(&self, addr: SocketAddr, local_ip: Option<IpAddr>) {
        *self.remote.lock() = Remote { addr, local_ip };
    }

    pub(super) fn send(
        &self,
        frames: &[u8],
        stride: usize,
        ecn: Option<EcnCodepoint>,
    ) -> io::Result<usize> {
        let Remote { addr, local_ip } = *self.remote.lock();
        let per_batch = self.port.segments_max().min(BATCH_BYTES_MAX / stride.max(1)).max(1);
        send_batches(frames.chunks(per_batch * stride), |batch| {
            self.port.try_send(&Transmit {
                destination: addr,
                ecn,
                contents: batch,
                segment_size: (batch.len() > stride).then_some(stride),
                src_ip: local_ip,
            })
        })
    }

    /// Sends one frame to an address that is not (yet) the neighbour's.
    pub(crate) fn send_to(&self, frame: &[u8], addr: SocketAddr, local_ip: Option<IpAddr>) {
        let transmit = Transmit {
            destination: addr,
            ecn: None,
            contents: frame,
            segment_size: None,
            src_ip: local_ip,
        };
        if let Err(error) = self.port.try_send(&transmit) {
            tracing::trace!(%error, "challenge not sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_taken_in_part_is_not_sent_again() {
        let frames = [7; 10];
        let mut room = 2;
        let mut send = |batch: &[u8]| {
            assert!(batch.len() <= 4);
            if room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            room -= 1;
            Ok(())
        };
        assert_eq!(send_batches(frames.chunks(4), &mut send).unwrap(), 8);
        let error = send_batches(frames.chunks(4), &mut send).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "nothing was taken: wait");
    }
}
