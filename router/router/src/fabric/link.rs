//! The data-plane half of a link: keys, counters, liveness, and where the neighbour is.

use super::Counters;
use crate::{
    carrier::Carrier,
    link::{Due, FrameSize, Liveness},
};
use parking_lot::Mutex;
use quinn::udp::{EcnCodepoint, RecvMeta};
use skein_core::{Handle, LinkId};
use skein_wire::frame::{self, CONTROL_LEN, Control, HEADER_LEN, Header, Key, OpenError, Opener};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Key material of one link, from its handshake.
#[derive(Debug)]
pub(crate) struct LinkKeys {
    /// Seals what we send.
    pub(crate) send: Key,
    /// Opens what the neighbour sends.
    pub(crate) receive: Key,
    /// Which handshake these keys are from, modulo 4.
    pub(crate) epoch: u8,
}

/// One link as the data path sees it.
#[derive(Debug)]
pub(crate) struct FrameLink {
    id: LinkId,
    source: Handle,
    carrier: Carrier,
    send_key: Key,
    epoch: u8,
    counter: AtomicU64,
    opener: Mutex<Opener>,
    up: AtomicBool,
    too_small: AtomicBool,
    silent: AtomicBool,
    down: CancellationToken,
    liveness: Mutex<Liveness>,
    frame_size: Mutex<FrameSize>,
    /// Copy of what `frame_size` has found, for the data path.
    frame_len_max: AtomicU16,
    rearm: Notify,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
}

/// What a link's task has to do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Attention {
    /// Nothing until then.
    Sleep(Instant),
    /// A probe was not answered in time.
    Missed,
    /// Silent for so long that it counts as dead.
    Dead(Duration),
    /// It does not carry frames of the smallest size.
    TooSmall,
}

impl FrameLink {
    /// A link whose handshake, done at `now`, took `rtt` for a round trip.
    pub(crate) fn new(
        (id, source): (LinkId, Handle),
        carrier: Carrier,
        keys: LinkKeys,
        (now, rtt): (Instant, Duration),
    ) -> Arc<Self> {
        let frame_size = carrier.frame_size(now);
        let liveness = Liveness::new(now, rtt, carrier.silence_min());
        Arc::new(Self {
            id,
            source,
            carrier,
            send_key: keys.send,
            epoch: keys.epoch,
            counter: AtomicU64::new(0),
            opener: Mutex::new(Opener::new(keys.receive)),
            up: AtomicBool::new(true),
            too_small: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            down: CancellationToken::new(),
            liveness: Mutex::new(liveness),
            frame_len_max: AtomicU16::new(frame_size.current()),
            frame_size: Mutex::new(frame_size),
            rearm: Notify::new(),
            bytes_sent: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
        })
    }

    pub(crate) fn id(&self) -> LinkId {
        self.id
    }

    pub(crate) fn carrier(&self) -> &Carrier {
        &self.carrier
    }

    /// Whether frames may be sent; once down, a link stays down.
    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Latches the link down and wakes whoever waits to write to it.
    pub(crate) fn set_down(&self) {
        self.up.store(false, Ordering::Relaxed);
        self.down.cancel();
    }

    /// Waits until writing may work again or never will.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn writable(&self) {
        tokio::select! {
            () = self.carrier.writable() => {} // cancel-safe
            () = self.down.cancelled() => {} // cancel-safe
        }
    }

    /// Largest frame the link carries, in bytes.
    pub(crate) fn frame_len_max(&self) -> usize {
        usize::from(self.frame_len_max.load(Ordering::Relaxed))
    }

    /// Largest end-to-end packet behind an ordinary header, in bytes.
    pub(crate) fn mtu(&self) -> u16 {
        let header = u16::try_from(HEADER_LEN).expect("invariant: HEADER_LEN is small");
        self.frame_len_max.load(Ordering::Relaxed) - header
    }

    /// Whether the size of frames has been found, or need not be.
    pub(crate) fn is_size_known(&self) -> bool {
        self.frame_size.lock().is_known()
    }

    /// The neighbour has found that the path does not carry frames of the smallest size.
    pub(crate) fn set_too_small(&self) {
        self.too_small.store(true, Ordering::Relaxed);
    }

    /// Whether the path has been found not to carry frames of the smallest size.
    pub(crate) fn is_too_small(&self) -> bool {
        self.too_small.load(Ordering::Relaxed)
    }

    /// Nothing comes any more, or nothing that is sent arrives.
    pub(crate) fn set_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Whether it was given up, at either end, because nothing came any more.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    pub(crate) fn rtt(&self) -> Duration {
        self.liveness.lock().rtt()
    }

    /// Bytes of frames sent and received.
    pub(crate) fn traffic(&self) -> (u64, u64) {
        (self.bytes_sent.load(Ordering::Relaxed), self.bytes_received.load(Ordering::Relaxed))
    }

    /// Makes a frame valid on this link.
    pub(crate) fn seal(&self, frame: &mut [u8]) {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        frame::seal(frame, &self.send_key, self.epoch, counter);
    }

    /// Checks a frame from this link.
    ///
    /// # Errors
    /// When it is not authentic and new.
    pub(crate) fn open(&self, frame: &[u8]) -> Result<Header, OpenError> {
        self.opener.lock().open(frame)
    }

    /// Sends sealed frames that carry data and returns how many bytes of them; see [`Carrier::send`].
    ///
    /// # Errors
    /// Only `WouldBlock`, when nothing was sent.
    pub(crate) fn send(
        &self,
        frames: &[u8],
        stride: usize,
        ecn: Option<EcnCodepoint>,
        now: Instant,
    ) -> io::Result<usize> {
        let sent = self.carrier.send(frames, stride, ecn)?;
        self.bytes_sent.fetch_add(sent as u64, Ordering::Relaxed);
        self.data_moved(now);
        Ok(sent)
    }

    /// Notes authentic frames of `bytes` in all, and whether there was data among them.
    pub(crate) fn received(&self, bytes: usize, data: bool, now: Instant) {
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.liveness.lock().frame_received(now);
        if data {
            self.data_moved(now);
        }
    }

    fn data_moved(&self, now: Instant) {
        if self.liveness.lock().data_moved(now) {
            self.frame_size.lock().resume(now);
            self.rearm.notify_one();
        }
    }

    /// Waits until [`poll_attention`](Self::poll_attention) should be called before the time it told.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn rearmed(&self) {
        self.rearm.notified().await;
    }

    /// Sends the probes that are due and says what else is.
    pub(crate) fn poll_attention(&self, now: Instant, counters: &Counters) -> Attention {
        let due = self.liveness.lock().handle_timeout(now);
        let mut attention = None;
        match due {
            Some(Due::Dead(silence)) => {
                self.set_silent();
                return Attention::Dead(silence);
            }
            Some(Due::Probe { token, missed }) => {
                self.send_control(Control::Probe { token }, 0);
                if missed {
                    counters.probes_lost.add(1);
                    attention = Some(Attention::Missed);
                }
            }
            None => {}
        }
        let (rtt, token, active) = {
            let liveness = self.liveness.lock();
            (liveness.rtt(), liveness.token(now), liveness.is_active(now))
        };
        let (sizes, next_size) = {
            let mut frame_size = self.frame_size.lock();
            let sizes = frame_size.handle_timeout(now, rtt, active);
            if frame_size.is_too_small() {
                self.set_too_small();
                return Attention::TooSmall;
            }
            self.frame_len_max.store(frame_size.current(), Ordering::Relaxed);
            (sizes, frame_size.poll_timeout())
        };
        for size in sizes {
            self.send_control(Control::Probe { token }, usize::from(size));
        }
        let next = self.liveness.lock().poll_timeout(now).min(next_size);
        attention.unwrap_or(Attention::Sleep(next))
    }

    fn send_control(&self, control: Control, len: usize) {
        let frame = self.control_frame(control, len);
        // A probe that finds the socket full is a lost probe; the next one follows.
        if let Ok(sent) = self.carrier.send_control(&frame) {
            self.bytes_sent.fetch_add(sent as u64, Ordering::Relaxed);
        }
    }

    /// A sealed control frame, padded to `len` bytes if that is more than it needs.
    pub(crate) fn control_frame(&self, control: Control, len: usize) -> Vec<u8> {
        let mut frame = Vec::with_capacity(len.max(HEADER_LEN + CONTROL_LEN));
        control.encode(self.source, len, &mut frame);
        self.seal(&mut frame);
        frame
    }

    /// Handles an authentic control frame.
    pub(crate) fn control_received(self: &Arc<Self>, frame: &[u8], meta: &RecvMeta, now: Instant) {
        match Control::decode(frame) {
            Some(Control::Probe { token }) => {
                let size = u16::try_from(frame.len()).unwrap_or(u16::MAX);
                self.send_control(Control::ProbeReply { token, size }, 0);
            }
            Some(Control::ProbeReply { token, size }) => {
                self.liveness.lock().reply_received(now, token);
                let mut frame_size = self.frame_size.lock();
                let before = frame_size.current();
                frame_size.reply_received(size);
                self.frame_len_max.store(frame_size.current(), Ordering::Relaxed);
                if frame_size.current() != before {
                    self.rearm.notify_one();
                }
            }
            Some(Control::Challenge(nonce)) => self.send_control(Control::Echo(nonce), 0),
            Some(Control::Echo(nonce)) => self.carrier.echoed(self, nonce, meta),
            None => {}
        }
    }

    /// Takes the link out of its port's tables.
    pub(crate) fn detach(&self) {
        self.carrier.detach(self);
    }
}
