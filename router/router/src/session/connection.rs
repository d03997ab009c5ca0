//! One session: a connection, its control stream, its ring of writers and its flows.

use super::{
    Budget, SendCredit,
    control::{self, ControlError, ControlReader, Outbox},
    flow::FlowState,
    incoming::IncomingFlow,
    transport::STREAMS_INITIAL,
    window::{self, WriteMeter},
};
use crate::flows::FlowCounters;
use parking_lot::Mutex;
use quinn::VarInt;
use skein_core::{Handle, Pin, RouterId, SiteId};
use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::Semaphore;

/// Flows a peer may have open in a session. More would wait, and the memory budget refuses long before.
const STREAMS_MAX: u32 = 65_536;

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
}

impl Close {
    pub(super) fn code(self) -> VarInt {
        VarInt::from_u32(match self {
            Self::Shutdown => 0,
            Self::Violation => 1,
            Self::Stale => 2,
            Self::NoPath => 3,
        })
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Shutdown => "the router stops",
            Self::Violation => "the peer broke the protocol",
            Self::Stale => "the peer's boot or site is gone",
            Self::NoPath => "no path for too long",
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

/// An established session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(super) connection: quinn::Connection,
    pub(crate) peer: Peer,
    /// Implied by the peer's hello for what we send.
    peer_credit_bytes: u64,
    /// One writer at a time, first come first served. quinn wakes blocked writers last-in-first-out, which starves some for seconds.
    ring: Semaphore,
    pub(super) meter: WriteMeter,
    pub(super) outbox: Outbox,
    flows: Mutex<HashMap<u64, Weak<FlowState>>>,
    /// Streams that the peer has open, also those that are no flow yet.
    open_streams: AtomicUsize,
    draining: AtomicBool,
    pub(super) budget: Arc<Budget>,
    counters: Arc<FlowCounters>,
}

impl Session {
    pub(super) fn new(
        connection: quinn::Connection,
        peer: Peer,
        peer_credit_bytes: u64,
        budget: Arc<Budget>,
        counters: Arc<FlowCounters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            connection,
            peer,
            peer_credit_bytes,
            ring: Semaphore::new(1),
            meter: WriteMeter::default(),
            outbox: Outbox::default(),
            flows: Mutex::default(),
            open_streams: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            budget,
            counters,
        })
    }

    /// Whether new flows may be opened on it.
    pub(crate) fn is_usable(&self) -> bool {
        self.connection.close_reason().is_none() && !self.draining.load(Ordering::Relaxed)
    }

    pub(super) fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
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

    /// Writes in turn: at most one writer per session at a time, in the order of asking.
    pub(super) async fn write(
        &self,
        stream: &mut quinn::SendStream,
        chunks: &mut [bytes::Bytes],
    ) -> Result<(), quinn::WriteError> {
        let _turn = self.ring.acquire().await.expect("invariant: the ring is never closed");
        let len = chunks.iter().map(bytes::Bytes::len).sum();
        stream.write_all_chunks(chunks).await?;
        self.meter.add(len);
        Ok(())
    }

    pub(super) fn flow(&self, index: u64) -> Option<Arc<FlowState>> {
        self.flows.lock().get(&index).and_then(Weak::upgrade)
    }

    /// Makes a flow known to the control stream. Until it is dropped, credit and aborts reach it.
    pub(super) fn register(
        self: &Arc<Self>,
        index: u64,
        window: super::ReceiveWindow,
        counted: Option<OpenStream>,
    ) -> Arc<FlowState> {
        let credit = SendCredit::new(self.peer_credit_bytes);
        let state = Arc::new(FlowState::new(Arc::clone(self), index, credit, window, counted));
        self.flows.lock().insert(index, Arc::downgrade(&state));
        state
    }

    pub(super) fn unregister(&self, index: u64) {
        self.flows.lock().remove(&index);
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
            () = self.accept_flows(accept) => Ok(()),
            () = window::follow(&self.connection, &self.meter) => Ok(()),
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
            accept(IncomingFlow::new(OpenStream::count(self), send, recv));
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
