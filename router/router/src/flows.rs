//! What ingress and egress know about flows in common: their surroundings, their counters and the access log.

mod datagrams;
mod limit;

pub use datagrams::{DatagramCounters, DatagramDrop, Way};
pub use limit::FlowLimit;
pub(crate) use limit::FlowSlot;

use crate::fabric::Counter;
use crate::{
    session::{Budget, FlowError},
    splice::ReadBuffer,
};
use skein_core::{Address, Fib, Protocol, RouterId, SiteId, TrustView};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{runtime::Handle, sync::watch};

/// What sessions, ingress and egress of one router share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Runs every task of the data path.
    pub runtime: Handle,
    /// This router.
    pub local: LocalRouter,
    /// The network as it is now.
    pub fib: watch::Receiver<Arc<Fib>>,
    /// The same, but told only of changes in who serves what: listeners need not wake when a path is a little longer.
    pub services: watch::Receiver<Arc<Fib>>,
    /// Who is trusted now.
    pub trust: watch::Receiver<Arc<TrustView>>,
    /// Ceiling of the memory that flows may take.
    pub budget: Arc<Budget>,
    /// How many of them there may be.
    pub limit: Arc<FlowLimit>,
    /// What became of flows.
    pub counters: Arc<FlowCounters>,
    /// What every socket is read into.
    pub buffer: Arc<ReadBuffer>,
}

/// This router, as its peers see it.
#[derive(Clone, Copy, Debug)]
pub struct LocalRouter {
    /// Its id.
    pub router: RouterId,
    /// Its site.
    pub site: SiteId,
    /// Of this start.
    pub boot_epoch: u64,
}

/// Which edge of a flow a router is; both, for a flow that never leaves it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Edge {
    /// The flow enters here.
    Ingress,
    /// The flow leaves here.
    Egress,
}

/// How a flow ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Both sides finished.
    Finished,
    /// The socket on this router's side was reset.
    NearReset,
    /// The other router reset the flow: its socket was reset, or it gave up.
    FarReset,
    /// The session was lost.
    SessionLost,
    /// The other router broke the protocol of the flow.
    Violation,
    /// Nothing moved for the address's idle timeout.
    Idle,
    /// This router reset it: shutdown, its connector was withdrawn at once, or the site at the other end may not any more.
    Aborted,
    /// Every candidate refused.
    Refused,
    /// No candidate could be reached in time.
    Unreachable,
    /// At the ceiling of memory or flows.
    Overloaded,
}

impl Outcome {
    /// All of them, for tables.
    pub const ALL: [Self; 10] = [
        Self::Finished,
        Self::NearReset,
        Self::FarReset,
        Self::SessionLost,
        Self::Violation,
        Self::Idle,
        Self::Aborted,
        Self::Refused,
        Self::Unreachable,
        Self::Overloaded,
    ];

    /// The label in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::NearReset => "near_reset",
            Self::FarReset => "far_reset",
            Self::SessionLost => "session_lost",
            Self::Violation => "violation",
            Self::Idle => "idle",
            Self::Aborted => "aborted",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Overloaded => "overloaded",
        }
    }
}

impl From<&FlowError> for Outcome {
    fn from(error: &FlowError) -> Self {
        match error {
            FlowError::Reset => Self::FarReset,
            FlowError::SessionLost | FlowError::NoStream => Self::SessionLost,
            FlowError::Malformed(_) => Self::Violation,
        }
    }
}

/// What became of the flows of this router.
#[derive(Debug, Default)]
pub struct FlowCounters {
    active: AtomicU64,
    /// Flows that began: a client was accepted, or a peer opened one.
    pub opened: Counter,
    /// Bytes from clients towards targets.
    pub bytes_sent: Counter,
    /// Bytes from targets towards clients.
    pub bytes_received: Counter,
    /// Another candidate was tried.
    pub retries: Counter,
    /// Sessions established, either way.
    pub sessions_opened: Counter,
    /// Sessions that could not be established.
    pub sessions_failed: Counter,
    /// Sessions closed because the peer broke the protocol.
    pub protocol_violations: Counter,
    /// What became of datagrams.
    pub datagrams: Arc<DatagramCounters>,
    outcomes: [[Counter; Outcome::ALL.len()]; 2],
}

impl FlowCounters {
    /// Flows open now.
    #[must_use]
    pub fn active(&self) -> u64 {
        self.active.load(Ordering::Relaxed)
    }

    /// Flows that ended in this way at this edge.
    #[must_use]
    pub fn ended(&self, edge: Edge, outcome: Outcome) -> u64 {
        self.outcomes[edge as usize][outcome as usize].total()
    }
}

/// Whether flows to `address` may leave the network at `site`.
pub(crate) fn may_provide(trust: &TrustView, site: SiteId, address: &Address) -> bool {
    site == trust.local || trust.site(site).is_some_and(|site| site.may_provide(address))
}

/// Whether flows to `address` may enter the network at `site`.
pub(crate) fn may_consume(trust: &TrustView, site: SiteId, address: &Address) -> bool {
    site == trust.local || trust.site(site).is_some_and(|site| site.may_consume(address))
}

impl Surroundings {
    /// Completes when `allowed` does not hold any more.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn revoked(&self, allowed: impl Fn(&TrustView) -> bool) {
        let mut trust = self.trust.clone();
        if trust.wait_for(|trust| !allowed(trust)).await.is_err() {
            // Nobody says any more who is trusted: this router stops.
            std::future::pending().await
        }
    }
}

/// Bytes of one flow so far.
#[derive(Debug, Default)]
struct Moved {
    /// From client to target.
    sent: AtomicU64,
    /// From target to client.
    received: AtomicU64,
}

/// Counts the bytes of one flow as they pass, from the point of view of the socket on this router's side.
#[derive(Debug)]
pub(crate) struct Progress {
    counters: Arc<FlowCounters>,
    moved: Arc<Moved>,
    edge: Edge,
}

impl Progress {
    /// All of them, in both directions.
    pub(crate) fn total(&self) -> u64 {
        self.moved.sent.load(Ordering::Relaxed) + self.moved.received.load(Ordering::Relaxed)
    }

    /// Counts what went on from the socket.
    pub(crate) fn add_from_socket(&self, bytes: u64) {
        match self.edge {
            Edge::Ingress => self.add_sent(bytes),
            Edge::Egress => self.add_received(bytes),
        }
    }

    /// Counts what the socket took.
    pub(crate) fn add_to_socket(&self, bytes: u64) {
        match self.edge {
            Edge::Ingress => self.add_received(bytes),
            Edge::Egress => self.add_sent(bytes),
        }
    }

    /// For the socket of a local target of the same flow: its bytes are counted at the client's.
    pub(crate) fn of_target(&self) -> Self {
        Self { counters: Arc::default(), moved: Arc::default(), edge: Edge::Egress }
    }

    fn add_sent(&self, bytes: u64) {
        self.moved.sent.fetch_add(bytes, Ordering::Relaxed);
        self.counters.bytes_sent.add(bytes);
    }

    fn add_received(&self, bytes: u64) {
        self.moved.received.fetch_add(bytes, Ordering::Relaxed);
        self.counters.bytes_received.add(bytes);
    }
}

/// One flow, from its first byte until its line in the access log, which is written when this is dropped.
#[derive(Debug)]
pub struct FlowRecord {
    counters: Arc<FlowCounters>,
    edge: Edge,
    started: std::time::Instant,
    /// The address.
    pub address: Option<Address>,
    protocol: Protocol,
    /// Where the flow entered the network.
    pub ingress_site: SiteId,
    /// Where it leaves the network, once chosen.
    pub egress_site: Option<SiteId>,
    /// The flow's name at both edges.
    pub flow_id: [u8; 16],
    moved: Arc<Moved>,
    /// How it ended.
    pub outcome: Outcome,
}

impl FlowRecord {
    /// Starts the record of a flow; unless told otherwise it was aborted.
    #[must_use]
    pub fn start(
        counters: Arc<FlowCounters>,
        edge: Edge,
        ingress_site: SiteId,
        flow_id: [u8; 16],
    ) -> Self {
        counters.opened.add(1);
        counters.active.fetch_add(1, Ordering::Relaxed);
        Self {
            counters,
            edge,
            started: crate::clock::now(),
            address: None,
            protocol: Protocol::Tcp,
            ingress_site,
            egress_site: None,
            flow_id,
            moved: Arc::default(),
            outcome: Outcome::Aborted,
        }
    }

    /// It is an association, not a byte stream.
    pub(crate) fn set_association(&mut self) {
        if self.protocol != Protocol::Udp {
            self.protocol = Protocol::Udp;
            self.counters.datagrams.began();
        }
    }

    /// The span of everything that is logged about this flow.
    #[must_use]
    pub fn span(&self) -> tracing::Span {
        tracing::info_span!("flow", id = %hex(&self.flow_id))
    }

    /// What counts its bytes: the record knows them however the flow ends.
    pub(crate) fn progress(&self) -> Progress {
        let (counters, moved) = (Arc::clone(&self.counters), Arc::clone(&self.moved));
        Progress { counters, moved, edge: self.edge }
    }

    /// It ended before it was one, or with its session.
    pub(crate) fn note_loss(&mut self, error: &FlowError) {
        self.outcome = error.into();
    }

    fn duration(&self) -> Duration {
        crate::clock::now().saturating_duration_since(self.started)
    }
}

impl Drop for FlowRecord {
    fn drop(&mut self) {
        self.counters.active.fetch_sub(1, Ordering::Relaxed);
        if self.protocol == Protocol::Udp {
            self.counters.datagrams.ended();
        }
        self.counters.outcomes[self.edge as usize][self.outcome as usize].add(1);
        tracing::info!(
            target: "skein::access",
            edge = match self.edge { Edge::Ingress => "ingress", Edge::Egress => "egress" },
            flow = %hex(&self.flow_id),
            protocol = match self.protocol { Protocol::Tcp => "tcp", Protocol::Udp => "udp" },
            address = self.address.as_ref().map_or("", Address::as_str),
            ingress_site = %self.ingress_site.short(),
            egress_site = self.egress_site.map(|site| site.short()),
            sent_bytes = self.moved.sent.load(Ordering::Relaxed),
            received_bytes = self.moved.received.load(Ordering::Relaxed),
            duration_ms = u64::try_from(self.duration().as_millis()).unwrap_or(u64::MAX),
            ended = self.outcome.as_str(),
            "flow ended"
        );
    }
}

fn hex(bytes: &[u8]) -> impl std::fmt::Display + '_ {
    std::fmt::from_fn(|f| bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")))
}
