//! One session: a connection, its control stream, its ring of writers and its flows.

use super::{
    Account, Class, INITIAL_CREDIT_BYTES, ReceiveWindow, Reservation, SendCredit, TURN_BYTES,
    congestion::Relief,
    control::{self, ControlError, ControlReader, Outbox},
    datagrams::{self, Departures},
    flow::{FlowError, FlowState},
    inbound::Inbound,
    incoming::IncomingFlow,
    pool::Key,
    transport::{Role, STREAMS_INITIAL},
    window::{self, WriteMeter},
};
use crate::{
    clock,
    flows::{DatagramCounters, DatagramDrop, FlowCounters},
};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use quinn::VarInt;
use skein_core::{Handle, Pin, RouterId, SiteId};
use skein_wire::{
    framing,
    proto::session::{FlowReply, SessionHello},
};
use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Flows a peer may have open in a session. More would wait, and the memory budget refuses long before.
const STREAMS_MAX: u32 = 65_536;

/// Implied for the stream of an association in each direction, whatever the hellos say: the largest datagram fits, and there are many
/// associations whose stream carries their first datagram and nothing more.
const ASSOCIATION_CREDIT_BYTES: u64 = 64 << 10;
const _: () = assert!(ASSOCIATION_CREDIT_BYTES >= TURN_BYTES as u64);

/// A peer that opens flows so long after it was told to open no more has not listened: they are reset.
const DRAINING_HEARD: Duration = Duration::from_secs(5);

/// A peer that takes nothing at all while a reply waits to be written is not there any more, whatever it acknowledges. No longer than what
/// the loss of all paths is given.
const STALLED_MAX: Duration = Duration::from_secs(30);
/// A reply waits for its turn through so many of these while others move; then its ingress has given up.
const REPLY_ROUNDS: u32 = 2;
/// Streams refused for lack of memory that wait to be told at a time: more than a peer that reads makes wait.
const REFUSALS_MAX: usize = 256;

/// Why a session was closed, as the peer sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Close {
    /// This router stops.
    Shutdown,
    /// The peer broke the protocol.
    Violation,
    /// The peer's boot or site is no longer in the network's view.
    Stale,
    /// No path for too long.
    NoPath,
    /// No flow for long.
    Unused,
    /// The peer has too many others.
    TooMany,
    /// Its site makes us hold as much as it may already.
    Overloaded,
    /// The peer takes nothing.
    Stalled,
}

impl Close {
    pub(super) fn code(self) -> VarInt {
        VarInt::from_u32(match self {
            Self::Shutdown => 0,
            Self::Violation => 1,
            Self::Stale => 2,
            Self::NoPath => 3,
            Self::Unused => 4,
            Self::TooMany => 5,
            Self::Overloaded => 6,
            Self::Stalled => 7,
        })
    }

    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Shutdown => "the router stops",
            Self::Violation => "the peer broke the protocol",
            Self::Stale => "the peer's boot or site is gone",
            Self::NoPath => "no path for too long",
            Self::Unused => "unused",
            Self::TooMany => "too many sessions",
            Self::Overloaded => "no memory for another session",
            Self::Stalled => "the peer takes nothing",
        }
    }
}

/// The router at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Peer {
    pub(crate) router: RouterId,
    pub(crate) site: SiteId,
    /// Names its boot.
    pub(crate) handle: Handle,
    /// The path that packets of this session take.
    pub(crate) pin: Pin,
}

/// What tells one session from another, as both ends found it when it was established.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) role: Role,
    pub(super) class: Class,
    /// Of the path it was opened over; the connection keeps it for life.
    pub(super) path_mtu: u16,
    /// Implied for what we send in a flow.
    pub(super) peer_credit_bytes: u64,
}

impl Terms {
    pub(super) fn new(role: Role, class: Class, path_mtu: u16, hello: &SessionHello) -> Self {
        let said = u64::from(hello.initial_credit_bytes);
        let peer_credit_bytes = match class {
            Class::Streams => said,
            Class::Datagrams => ASSOCIATION_CREDIT_BYTES,
        };
        Self { role, class, path_mtu, peer_credit_bytes }
    }

    /// Implied for what the peer sends in a flow.
    fn own_credit_bytes(&self) -> u64 {
        match self.class {
            Class::Streams => INITIAL_CREDIT_BYTES,
            Class::Datagrams => ASSOCIATION_CREDIT_BYTES,
        }
    }
}

/// An established session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(super) connection: quinn::Connection,
    pub(crate) peer: Peer,
    pub(super) terms: Terms,
    pub(super) established: Instant,
    /// What quinn made of the path's MTU at first; less later means that it has given up on larger packets.
    first_mtu: u16,
    /// How often a flow was opened, or was about to be.
    uses: AtomicU64,
    /// A successor is being dialled.
    pub(super) is_succeeded: AtomicBool,
    /// One writer at a time, first come first served. quinn wakes blocked writers last-in-first-out, which starves some for seconds.
    ring: Arc<Semaphore>,
    /// Streams that may wait for a turn to be told that they are no flow.
    pub(super) refusals: Semaphore,
    pub(super) meter: WriteMeter,
    pub(super) outbox: Outbox,
    pub(super) departures: Departures,
    /// Of the connection's congestion control.
    relief: Option<Arc<Relief>>,
    inbound: Mutex<Inbound>,
    flows: Mutex<HashMap<u64, Weak<FlowState>>>,
    /// Streams that the peer has open, also those that are no flow yet.
    open_streams: AtomicUsize,
    /// Since when no flows are to be opened.
    draining: OnceLock<Instant>,
    /// Pays for what the peer's site makes us hold in sessions of this class.
    pub(crate) account: Arc<Account>,
    /// For what it holds besides flows.
    _paid: Reservation,
    counters: Arc<FlowCounters>,
}

impl Session {
    pub(super) fn new(
        connection: quinn::Connection,
        peer: Peer,
        terms: Terms,
        paid: Reservation,
        counters: Arc<FlowCounters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            first_mtu: connection.stats().path.current_mtu,
            established: clock::now(),
            relief: Relief::of(&connection),
            connection,
            peer,
            terms,
            uses: AtomicU64::new(0),
            is_succeeded: AtomicBool::new(false),
            ring: Arc::new(Semaphore::new(1)),
            refusals: Semaphore::new(REFUSALS_MAX),
            meter: WriteMeter::default(),
            outbox: Outbox::default(),
            departures: Departures::default(),
            inbound: Mutex::new(Inbound::new(paid.account().nothing(), clock::now())),
            flows: Mutex::default(),
            open_streams: AtomicUsize::new(0),
            draining: OnceLock::new(),
            account: Arc::clone(paid.account()),
            _paid: paid,
            counters,
        })
    }

    /// What it is known by at its initiator.
    pub(super) fn key(&self) -> Key {
        let Peer { router, handle, pin, .. } = self.peer;
        Key { router, handle, pin, class: self.terms.class }
    }

    /// Whether new flows may be opened on it.
    pub(crate) fn is_usable(&self) -> bool {
        self.connection.close_reason().is_none() && self.draining.get().is_none()
    }

    pub(super) fn set_draining(&self) {
        self.draining.get_or_init(clock::now);
    }

    /// Whether packets of another size fit the path now, whose MTU is `path_mtu`, or quinn's no longer do.
    pub(super) fn is_outgrown(&self, path_mtu: u16) -> bool {
        self.terms.path_mtu != path_mtu || self.connection.stats().path.current_mtu < self.first_mtu
    }

    /// Notes that a flow is about to be opened.
    pub(super) fn note_use(&self) {
        self.uses.fetch_add(1, Ordering::Relaxed);
    }

    /// How often flows were opened, and whether there are none now.
    pub(super) fn uses(&self) -> (u64, bool) {
        let is_unused = self.flow_count() == 0 && self.open_streams.load(Ordering::Relaxed) == 0;
        (self.uses.load(Ordering::Relaxed), is_unused)
    }

    /// The session has a path again, or another one: what is in flight is likely lost, and must not keep it from finding out.
    pub(super) fn path_changed(&self) {
        if let Some(relief) = &self.relief {
            relief.grant();
        }
        self.meter.path_changed();
        self.outbox.sign_of_life();
        // Changes nothing, but has the connection look what it may send now.
        self.connection.set_max_concurrent_uni_streams(VarInt::from_u32(0));
    }

    /// Whether the peer has acknowledged anything since the path changed.
    pub(super) fn is_heard(&self) -> bool {
        self.relief.as_ref().is_none_or(|relief| relief.is_heard())
    }

    /// Tells the peer to open no more flows and opens none.
    pub(super) fn drain(&self) {
        self.set_draining();
        self.outbox.drain();
    }

    /// Flows open now.
    pub(crate) fn flow_count(&self) -> usize {
        self.flows.lock().len()
    }

    /// Smoothed round-trip time.
    pub(crate) fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    pub(super) fn close(&self, close: Close) {
        tracing::debug!(peer = %self.peer.router, reason = close.reason(), "session closed");
        self.connection.close(close.code(), close.reason().as_bytes());
    }

    /// Closes the session because the peer broke the protocol.
    pub(super) fn violated(&self, violation: &dyn std::error::Error) {
        if self.connection.close_reason().is_none() {
            self.counters.protocol_violations.add(1);
            tracing::warn!(peer = %self.peer.router, error = %violation, "session closed: the peer broke the protocol");
            self.close(Close::Violation);
        }
    }

    /// Waits for a turn to write: at most one writer per session at a time, in the order of asking.
    pub(super) async fn turn(&self) -> Turn {
        let ring = Arc::clone(&self.ring);
        Turn(ring.acquire_owned().await.expect("invariant: the ring is never closed"))
    }

    /// Writes in turn. `written` is told what quinn has accepted, which counts also where the rest fails or is cancelled.
    pub(super) async fn write(
        &self,
        _turn: Turn,
        stream: &mut quinn::SendStream,
        mut chunks: &mut [Bytes],
        mut written: impl FnMut(usize),
    ) -> Result<(), quinn::WriteError> {
        while !chunks.is_empty() {
            let accepted = stream.write_chunks(chunks).await?;
            self.meter.add(accepted.bytes);
            written(accepted.bytes);
            chunks = &mut chunks[accepted.chunks..];
        }
        Ok(())
    }

    /// Answers a stream in turn. A session in which nothing moves meanwhile is closed.
    ///
    /// # Errors
    /// The stream or the session is gone, or it takes too long.
    ///
    /// # Cancel safety
    /// Not cancel-safe: reset the stream then.
    pub(super) async fn reply(
        &self,
        stream: &mut quinn::SendStream,
        reply: &FlowReply,
    ) -> Result<(), FlowError> {
        let mut buffer = BytesMut::new();
        framing::encode(reply, &mut buffer);
        let chunks = &mut [buffer.freeze()];
        let written = async { self.write(self.turn().await, stream, chunks, |_| {}).await };
        let mut written = std::pin::pin!(written);
        for _ in 0..REPLY_ROUNDS {
            let before = self.meter.total();
            if let Ok(written) = timeout(STALLED_MAX, &mut written).await {
                return Ok(written?);
            }
            if self.meter.total() == before {
                self.close(Close::Stalled);
                break;
            }
        }
        Err(FlowError::SessionLost)
    }

    pub(super) fn flow(&self, index: u64) -> Option<Arc<FlowState>> {
        self.flows.lock().get(&index).and_then(Weak::upgrade)
    }

    /// Makes a flow known to the control stream. Until it is dropped, credit and aborts reach it.
    pub(super) fn register(
        self: &Arc<Self>,
        index: u64,
        window: ReceiveWindow,
        counted: Option<OpenStream>,
    ) -> Arc<FlowState> {
        let credit = SendCredit::new(self.terms.peer_credit_bytes);
        let state = Arc::new(FlowState::new(Arc::clone(self), index, credit, window, counted));
        self.flows.lock().insert(index, Arc::downgrade(&state));
        state
    }

    pub(super) fn unregister(&self, index: u64) {
        self.flows.lock().remove(&index);
        let left = self.departures.remove(index);
        self.datagrams().add_dropped(DatagramDrop::Ended, left);
    }

    /// Largest frame of a datagram that fits a packet now; `None` where the peer takes none.
    pub(crate) fn frame_len_max(&self) -> Option<usize> {
        self.connection.max_datagram_size()
    }

    /// Queues a frame of a datagram, and returns how many older ones had to go for it.
    pub(crate) fn send_frame(&self, flow: u64, frame: Bytes) -> u64 {
        self.departures.push(flow, frame)
    }

    pub(super) fn datagrams(&self) -> &Arc<DatagramCounters> {
        &self.counters.datagrams
    }

    /// Takes note that so much was taken from QUIC, whose window follows that.
    pub(super) fn took(&self, bytes: u64) {
        let mut inbound = self.inbound.lock();
        if let Some(window) = inbound.took(bytes, clock::now(), || self.rtt()) {
            self.connection.set_receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX));
        }
    }

    /// Pays for the window of a new flow; `None` at the ceiling of memory.
    pub(crate) fn window(&self) -> Option<ReceiveWindow> {
        let reservation = self.account.reserve(self.terms.own_credit_bytes())?;
        Some(ReceiveWindow::new(reservation, clock::now()))
    }

    /// Runs the session until its connection is gone; incoming flows go to `accept`.
    ///
    /// # Cancel safety
    /// Dropped midway, the session stays open but no credit moves any more: close the connection as well.
    pub(super) async fn run(
        self: &Arc<Self>,
        writer: quinn::SendStream,
        reader: ControlReader,
        accept: impl Fn(IncomingFlow),
    ) {
        // None of these is resumed after another has ended.
        let ended = tokio::select! {
            ended = control::write(writer, &self.outbox) => ended,
            ended = control::read(reader, self) => ended,
            () = datagrams::send(self) => Ok(()),
            () = datagrams::receive(self) => Ok(()),
            () = self.accept_flows(accept) => Ok(()),
            () = window::follow(&self.connection, &self.meter, &self.account) => Ok(()),
            _reason = self.connection.closed() => Ok(()),
        };
        match ended {
            Ok(())
            | Err(
                ControlError::Read(quinn::ReadError::ConnectionLost(_))
                | ControlError::Write(quinn::WriteError::ConnectionLost(_)),
            ) => {}
            Err(error) => self.violated(&error),
        }
        let reason = self.connection.closed().await;
        tracing::info!(%reason, "session ended");
    }

    async fn accept_flows(self: &Arc<Self>, accept: impl Fn(IncomingFlow)) {
        let mut limit = STREAMS_INITIAL;
        while let Ok((send, recv)) = self.connection.accept_bi().await {
            self.note_use();
            let incoming = IncomingFlow::new(OpenStream::count(self), send, recv);
            if self
                .draining
                .get()
                .is_none_or(|since| clock::now().saturating_duration_since(*since) < DRAINING_HEARD)
            {
                accept(incoming);
            }
            let open = self.open_streams.load(Ordering::Relaxed);
            if open > limit as usize / 2 && limit < STREAMS_MAX {
                limit *= 2;
                self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(limit));
            }
        }
        // The connection is gone: `closed` tells why.
        std::future::pending::<()>().await;
    }
}

/// A writer's turn, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(#[allow(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

/// Counts a stream of the peer until it is dropped.
#[derive(Debug)]
pub(super) struct OpenStream(Arc<Session>);

impl OpenStream {
    fn count(session: &Arc<Session>) -> Self {
        session.open_streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(session))
    }

    pub(super) fn session(&self) -> &Arc<Session> {
        &self.0
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open_streams.fetch_sub(1, Ordering::Relaxed);
    }
}
