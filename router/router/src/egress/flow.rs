//! One flow at its egress.

use super::{
    Egress,
    connector::{Connector, FlowGuard},
    datagrams, proxy_protocol,
};
use crate::{
    flows::{Edge, FlowRecord, FlowSlot, Outcome, Progress, may_consume},
    net::TcpStream,
    session::{Flow, IncomingFlow},
    splice::{self, Terms},
};
use bytes::Bytes;
use skein_core::{Address, Port, Protocol, SiteId};
use skein_wire::proto::{
    routing,
    session::{FlowOpen, refused::Reason},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

/// Why a flow is not taken, as told to its ingress.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) detail: String,
}

impl Refusal {
    pub(super) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

/// What a flow asks of an egress.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) address: Address,
    pub(super) port: Port,
    pub(super) site: SiteId,
    client: Option<SocketAddr>,
    flow_id: Vec<u8>,
}

/// A target that took a flow.
#[derive(Debug)]
struct Served {
    target: TcpStream,
    connector: Arc<Connector>,
    counted: FlowGuard,
    _slot: FlowSlot,
}

/// Takes a flow of a peer from its head to its end, or to that of the egress.
pub(super) async fn serve(egress: Egress, incoming: IncomingFlow) {
    let abort = egress.0.abort.clone();
    tokio::select! {
        // Polled first, because a flow that was accepted ends in its own way.
        biased;
        () = take(egress, incoming) => {}
        () = abort.cancelled() => {}
    }
}

async fn take(egress: Egress, incoming: IncomingFlow) {
    let peer = incoming.session().peer;
    let (head, flow) = match incoming.open().await {
        Ok(Some(opened)) => opened,
        Ok(None) => {
            tracing::debug!(peer = %peer.router, "flow refused: the memory budget is used up");
            return;
        }
        Err(error) => {
            tracing::debug!(peer = %peer.router, %error, "stream is no flow");
            return;
        }
    };
    let counters = Arc::clone(&egress.0.surroundings.counters);
    let flow_id = head.flow_id.first_chunk().copied().unwrap_or_default();
    let record = FlowRecord::start(counters, Edge::Egress, peer.site, flow_id);
    let span = record.span();
    serve_opened(egress, peer.site, head, flow, record).instrument(span).await;
}

/// The rest of a flow after its head.
async fn serve_opened(
    egress: Egress,
    ingress_site: SiteId,
    head: FlowOpen,
    mut flow: Flow,
    mut record: FlowRecord,
) {
    let surroundings = &egress.0.surroundings;
    record.egress_site = Some(surroundings.local.site);
    let asked = match asked(head, ingress_site) {
        Ok(asked) => asked,
        Err(refusal) => return refuse(flow, &mut record, refusal).await,
    };
    record.address = Some(asked.address.clone());
    if !flow.is_in_place(asked.port.protocol) {
        record.outcome = Outcome::Violation;
        return;
    }
    if asked.port.protocol == Protocol::Udp {
        record.set_association();
        return datagrams::serve(egress, asked, flow, record).await;
    }
    let served = match flow.buffer_during(connect(&egress, &asked)).await {
        Ok(Ok(served)) => served,
        Ok(Err(refusal)) => return refuse(flow, &mut record, refusal).await,
        Err(error) => return record.note_loss(&error),
    };
    let accepted = tokio::select! {
        accepted = flow.accept() => accepted.map_err(|error| record.note_loss(&error)),
        () = egress.0.abort.cancelled() => Err(()),
    };
    if accepted.is_err() {
        return splice::reset(served.target);
    }
    let progress = record.progress();
    let abort = served.counted.abort().clone();
    let idle_timeout = served.connector.idle_timeout();
    let terms =
        Terms { buffer: &surroundings.buffer, progress: &progress, idle_timeout, abort: &abort };
    record.outcome = tokio::select! {
        // Polled first, because only then does dropping it reset both sides.
        biased;
        outcome = splice::with_flow(served.target, flow, Bytes::new(), terms) => outcome,
        () = egress.0.abort.cancelled() => Outcome::Aborted,
        () = surroundings.revoked(|trust| may_consume(trust, asked.site, &asked.address)) => {
            tracing::debug!("flow reset: the site may not reach this address any more");
            Outcome::Aborted
        }
    };
}

pub(super) async fn refuse(flow: Flow, record: &mut FlowRecord, refusal: Refusal) {
    tracing::debug!(reason = ?refusal.reason, detail = %refusal.detail, "flow refused");
    record.outcome = Outcome::Refused;
    if let Err(error) = flow.refuse(refusal.reason, refusal.detail).await {
        record.note_loss(&error);
    }
}

fn asked(head: FlowOpen, site: SiteId) -> Result<Asked, Refusal> {
    let no_such = |detail: &str| Refusal::new(Reason::NoSuchAddress, detail);
    let protocol = match head.protocol() {
        routing::Protocol::Tcp => Protocol::Tcp,
        routing::Protocol::Udp => Protocol::Udp,
        routing::Protocol::Unspecified => return Err(no_such("not a protocol")),
    };
    let port = u16::try_from(head.port).map_err(|_| no_such("not a port"))?;
    Ok(Asked {
        address: head.address.parse().map_err(|_| no_such("not an address"))?,
        port: Port { port, protocol },
        site,
        client: head.client.parse().ok(),
        flow_id: head.flow_id,
    })
}

/// Checks that the site may, and that there is room.
pub(super) fn admit(egress: &Egress, asked: &Asked) -> Result<FlowSlot, Refusal> {
    if egress.is_draining() {
        return Err(Refusal::new(Reason::Draining, "the egress router is shutting down"));
    }
    if !may_consume(&egress.0.surroundings.trust.borrow(), asked.site, &asked.address) {
        return Err(Refusal::new(Reason::NotAllowed, "the site may not reach this address"));
    }
    let limit = &egress.0.surroundings.limit;
    let slot = limit.enter(Edge::Egress, asked.port.protocol, asked.site);
    let detail = "the egress router has as many flows as it may, or as the site may";
    slot.ok_or_else(|| Refusal::new(Reason::Overloaded, detail))
}

pub(super) fn no_such_service() -> Refusal {
    Refusal::new(Reason::NoSuchAddress, "no connector serves this address and port")
}

/// Connects to a target.
async fn connect(egress: &Egress, asked: &Asked) -> Result<Served, Refusal> {
    let slot = admit(egress, asked)?;
    let connectors = egress.connectors_for(&asked.address, asked.port);
    let mut last = no_such_service();
    for connector in connectors {
        match connector.connect(asked.port, asked.site).await {
            Ok((mut target, counted)) => {
                if let Err(error) = introduce(&connector, &mut target, asked).await {
                    last = Refusal::new(Reason::TargetUnreachable, error.to_string());
                    continue;
                }
                return Ok(Served { target, connector, counted, _slot: slot });
            }
            Err(Some(error)) => last = Refusal::new(error.reason(), error.to_string()),
            Err(None) => {}
        }
    }
    Err(last)
}

/// Tells the target who the client is, where the connector wants that.
async fn introduce(
    connector: &Connector,
    target: &mut TcpStream,
    asked: &Asked,
) -> std::io::Result<()> {
    if connector.config.proxy_protocol != 2 {
        return Ok(());
    }
    let header = proxy_protocol::header(asked.client, target.peer_addr()?, &asked.flow_id);
    // Fits into the empty buffer of a new socket, so this does not wait.
    target.write_all(&header).await
}

/// A flow that leaves at the router where it enters.
#[derive(Debug)]
pub(crate) struct Local<'a> {
    pub(crate) address: &'a Address,
    pub(crate) port: u16,
    pub(crate) client: Option<SocketAddr>,
    pub(crate) flow_id: [u8; 16],
}

impl Local<'_> {
    pub(super) fn asked(&self, protocol: Protocol, site: SiteId) -> Asked {
        Asked {
            address: self.address.clone(),
            port: Port { port: self.port, protocol },
            site,
            client: self.client,
            flow_id: self.flow_id.to_vec(),
        }
    }
}

/// A local target that took a flow.
#[derive(Debug)]
pub(crate) struct LocalFlow {
    served: Served,
    egress: Egress,
}

impl Egress {
    /// Connects a flow of this router's own ingress to a local target.
    ///
    /// # Errors
    /// Why it was refused.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(crate) async fn connect_local(&self, local: Local<'_>) -> Result<LocalFlow, Refusal> {
        let asked = local.asked(Protocol::Tcp, self.0.surroundings.local.site);
        let served = connect(self, &asked).await?;
        Ok(LocalFlow { served, egress: self.clone() })
    }
}

impl LocalFlow {
    /// Joins the client's socket and the target until both have ended.
    ///
    /// # Cancel safety
    /// Dropped midway, both are reset.
    pub(crate) async fn splice(
        self,
        client: TcpStream,
        first: Bytes,
        progress: &Progress,
        abort: &CancellationToken,
    ) -> Outcome {
        let Self { served, egress } = self;
        let idle_timeout: Option<Duration> = served.connector.idle_timeout();
        let buffer = &egress.0.surroundings.buffer;
        let terms = Terms { buffer, progress, idle_timeout, abort };
        tokio::select! {
            // Polled first, because only then does dropping it reset both sides.
            biased;
            outcome = splice::with_socket(client, served.target, first, terms) => outcome,
            () = served.counted.abort().cancelled() => Outcome::Aborted,
            () = egress.0.abort.cancelled() => Outcome::Aborted,
        }
    }
}
