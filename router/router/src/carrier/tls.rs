//! TLS over TCP: the datagrams of one neighbour, each behind its length.
//!
//! QUIC packets and frames are the same as over UDP and are sealed on their own: whoever ends the TLS connection on the way reads
//! nothing. A connection that has ended is not revived; its link has ended with it.

mod queue;

use super::{Port, Through, hop::HopQueue};
use crate::{
    clock,
    fabric::{Counters, Fabric, FrameLink},
};
use bytes::BytesMut;
use parking_lot::{Mutex, RwLock};
use queue::{CHUNK_BYTES, SendQueue};
use quinn::udp::{RecvMeta, Transmit};
use skein_wire::datagram::Decoder;
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf},
    sync::Notify,
    time,
};
use tokio_util::sync::CancellationToken;

/// QUIC packets waiting for the one hop connection: two flights of a handshake, or twice what the other end has room for at a time.
const HOP_PACKETS_MAX: usize = 128;
/// Read from the connection at a time: a TLS record.
const READ_BYTES: usize = 16 << 10;
/// Frames that a sender hands over at once; as many as the kernel takes over UDP.
const SEGMENTS_MAX: usize = 64;
/// For the last datagrams, such as the reason for the end, to leave when a connection is given up.
const CLOSE_GRACE: Duration = Duration::from_millis(300);

/// A TLS connection with the link whose datagrams it carries.
#[derive(Debug)]
pub(crate) struct TlsPort {
    local: SocketAddr,
    remote: SocketAddr,
    through: Option<Through>,
    counters: Arc<Counters>,
    hop: HopQueue,
    link: RwLock<Weak<FrameLink>>,
    queue: Mutex<SendQueue>,
    /// There is something to write.
    queued: Notify,
    /// There is room again.
    room: Notify,
    /// Why the connection has ended.
    reason: OnceLock<String>,
    ended: CancellationToken,
}

impl TlsPort {
    /// A port for a connection between these addresses, to be [run](Self::run).
    pub(crate) fn new(
        local: SocketAddr,
        remote: SocketAddr,
        through: Option<Through>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            local,
            remote,
            through,
            counters,
            hop: HopQueue::new(HOP_PACKETS_MAX),
            link: RwLock::default(),
            queue: Mutex::default(),
            queued: Notify::new(),
            room: Notify::new(),
            reason: OnceLock::new(),
            ended: CancellationToken::new(),
        })
    }

    /// Moves datagrams until the connection ends or, a moment after, `closing` is cancelled.
    ///
    /// # Cancel safety
    /// Cancelled, the connection is closed, and nobody is told; end it through `closing`.
    pub(crate) async fn run<S: AsyncRead + AsyncWrite>(
        self: Arc<Self>,
        stream: S,
        fabric: Arc<Fabric>,
        closing: CancellationToken,
    ) {
        let (read, write) = tokio::io::split(stream);
        let grace = async {
            closing.cancelled().await;
            time::sleep(CLOSE_GRACE).await;
        };
        // The branches are futures made here and dropped together: none is resumed after another has ended.
        let reason = tokio::select! {
            reason = self.read(read, &fabric) => reason,
            error = self.write(write) => error.to_string(),
            () = grace => "closed here".to_owned(),
        };
        tracing::debug!(reason, "TLS connection ended");
        self.reason.get_or_init(|| reason);
        self.ended.cancel();
        self.room.notify_waiters();
    }

    async fn read<S: AsyncRead>(
        self: &Arc<Self>,
        mut half: ReadHalf<S>,
        fabric: &Fabric,
    ) -> String {
        let (port, mut decoder) = (Port::Tls(Arc::clone(self)), Decoder::default());
        let mut buffer = fabric.pool().take_one();
        loop {
            decoder.buffer_mut().reserve(READ_BYTES);
            match half.read_buf(decoder.buffer_mut()).await {
                Ok(0) => return "the peer closed the connection".to_owned(),
                Ok(_) => {}
                // Connections that end without a farewell, as those of a killed process do, are nothing special.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return "the peer closed the connection".to_owned();
                }
                Err(error) => return error.to_string(),
            }
            let now = clock::now();
            loop {
                let batch = match decoder.next_batch(&mut buffer) {
                    Ok(Some(batch)) => batch,
                    Ok(None) => break,
                    Err(error) => return error.to_string(),
                };
                let meta = RecvMeta {
                    addr: self.remote,
                    len: batch.len,
                    stride: batch.stride,
                    ecn: None,
                    dst_ip: None,
                };
                fabric.receive(&port, &mut buffer, &meta, now);
            }
        }
    }

    async fn write<S: AsyncWrite>(&self, mut half: WriteHalf<S>) -> io::Error {
        let mut chunk = BytesMut::with_capacity(2 * CHUNK_BYTES);
        loop {
            let wake = self.queue.lock().take(&mut chunk, clock::now());
            if wake {
                self.room.notify_waiters();
            }
            let written =
                if chunk.is_empty() { half.flush().await } else { half.write_all(&chunk).await };
            if let Err(error) = written {
                return error;
            }
            if chunk.is_empty() {
                self.queued.notified().await;
            }
        }
    }

    /// Waits until the connection has ended; returns why.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn ended(&self) -> String {
        self.ended.cancelled().await;
        self.reason.get().cloned().unwrap_or_default()
    }

    pub(super) fn link(&self) -> Option<Arc<FrameLink>> {
        self.link.read().upgrade()
    }

    /// There is one link on a connection: who comes first, stays.
    pub(super) fn attach(&self, link: &Arc<FrameLink>) {
        let mut attached = self.link.write();
        if attached.upgrade().is_none() {
            *attached = Arc::downgrade(link);
        }
    }

    pub(super) fn detach(&self) {
        *self.link.write() = Weak::new();
    }

    pub(super) fn hop_queue(&self) -> &HopQueue {
        &self.hop
    }

    pub(super) fn send_data(&self, frames: &[u8], stride: usize) -> io::Result<usize> {
        if self.ended.is_cancelled() {
            return Ok(frames.len());
        }
        let taken = self.queue.lock().push_data(frames, stride);
        if taken == 0 && !frames.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.queued.notify_one();
        Ok(taken)
    }

    pub(super) fn send_control(&self, frame: &[u8]) -> io::Result<usize> {
        self.push(frame, SendQueue::push_control)
    }

    /// Sends the packets of a hop connection, whatever address they are for: there is one neighbour. Once one has been taken,
    /// those that find no room are lost.
    pub(super) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let stride = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        let mut packets = transmit.contents.chunks(stride);
        packets.next().map_or(Ok(0), |first| self.push(first, SendQueue::push_packet))?;
        let lost = packets.filter(|packet| self.push(packet, SendQueue::push_packet).is_err());
        self.counters.dropped_handshake.add(lost.count() as u64);
        Ok(())
    }

    fn push(
        &self,
        datagram: &[u8],
        push: impl FnOnce(&mut SendQueue, &[u8]) -> bool,
    ) -> io::Result<usize> {
        if !self.ended.is_cancelled() {
            if !push(&mut self.queue.lock(), datagram) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.queued.notify_one();
        }
        Ok(datagram.len())
    }

    /// Waits until sending QUIC packets may work again or never will.
    pub(super) async fn writable(&self) {
        self.until_not(SendQueue::is_refusing_packets).await;
    }

    /// Waits until sending data may work again or never will.
    pub(super) async fn writable_data(&self) {
        self.until_not(SendQueue::is_refusing_data).await;
    }

    async fn until_not(&self, is_refusing: fn(&SendQueue) -> bool) {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.ended.is_cancelled() || !is_refusing(&self.queue.lock()) {
                return;
            }
            room.await;
        }
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub(super) fn remote(&self) -> SocketAddr {
        self.remote
    }

    pub(super) fn through(&self) -> Option<&Through> {
        self.through.as_ref()
    }

    pub(super) fn segments_max(&self) -> usize {
        SEGMENTS_MAX
    }
}
