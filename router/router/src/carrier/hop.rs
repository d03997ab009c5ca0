//! The socket of a hop connection: QUIC packets that the shared port's reader sorted out.

use super::Port;
use parking_lot::Mutex;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{EcnCodepoint, RecvMeta, Transmit},
};
use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

/// Longest packet a hop endpoint takes: the default of `max_udp_payload_size`, which it announces to its peers.
const PACKET_LEN_MAX: usize = 1_472;

#[derive(Debug)]
struct Packet {
    addr: SocketAddr,
    dst_ip: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    bytes: Box<[u8]>,
}

/// QUIC packets between the reader of a port and its hop endpoint.
#[derive(Debug)]
pub(super) struct HopQueue {
    waiting: Mutex<Waiting>,
    packets_max: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    packets: VecDeque<Packet>,
    waker: Option<Waker>,
}

impl HopQueue {
    /// A queue that drops what comes when it holds `packets_max`.
    pub(super) fn new(packets_max: usize) -> Self {
        Self { waiting: Mutex::default(), packets_max }
    }

    /// Queues a packet; `false` when it was dropped because the queue is full or the packet longer than any of ours.
    pub(super) fn push(&self, bytes: &[u8], meta: &RecvMeta) -> bool {
        if bytes.len() > PACKET_LEN_MAX {
            return false;
        }
        let mut waiting = self.waiting.lock();
        if waiting.packets.len() >= self.packets_max {
            return false;
        }
        waiting.packets.push_back(Packet {
            addr: meta.addr,
            dst_ip: meta.dst_ip,
            ecn: meta.ecn,
            bytes: bytes.into(),
        });
        if let Some(waker) = waiting.waker.take() {
            waker.wake();
        }
        true
    }

    fn poll_pop(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<usize> {
        let mut waiting = self.waiting.lock();
        let mut filled = 0;
        while filled < bufs.len().min(metas.len()) {
            let Some(packet) = waiting.packets.pop_front() else { break };
            let len = packet.bytes.len();
            // It would be cut; the endpoint's buffers are as long as the longest packet.
            let Some(buf) = bufs[filled].get_mut(..len) else { continue };
            buf.copy_from_slice(&packet.bytes);
            metas[filled] = RecvMeta {
                addr: packet.addr,
                len,
                stride: len,
                ecn: packet.ecn,
                dst_ip: packet.dst_ip,
            };
            filled += 1;
        }
        if filled == 0 {
            waiting.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(filled)
    }
}

/// What a hop endpoint sees of a port.
#[derive(Debug)]
pub(crate) struct HopSocket(pub(crate) Port);

impl AsyncUdpSocket for HopSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(PortPoller { port: self.0.clone(), waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.hop_queue().poll_pop(cx, bufs, metas).map(Ok)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.segments_max()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

type Waits = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

struct PortPoller {
    port: Port,
    waiting: Option<Waits>,
}

impl UdpPoller for PortPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let port = self.port.clone();
        let waiting =
            self.waiting.get_or_insert_with(|| Box::pin(async move { port.writable().await }));
        ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for PortPoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortPoller").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_strangers_send_is_bounded() {
        let (queue, meta) = (HopQueue::new(100), RecvMeta::default());
        assert!(!queue.push(&[0x40; PACKET_LEN_MAX + 1], &meta));
        let taken = (0..200).filter(|_| queue.push(&[0x40; PACKET_LEN_MAX], &meta));
        assert_eq!(taken.count(), 100);
        let mut buffers = [[0; PACKET_LEN_MAX]; 4];
        let mut slices = buffers.each_mut().map(|buffer| IoSliceMut::new(buffer));
        let mut cx = Context::from_waker(Waker::noop());
        let polled = queue.poll_pop(&mut cx, &mut slices, &mut [RecvMeta::default(); 4]);
        assert!(matches!(polled, Poll::Ready(4)));
    }
}
