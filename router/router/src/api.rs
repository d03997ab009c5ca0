//! Attachment to the controller: one gRPC stream over its Unix socket, dialled again whenever it ends.
//!
//! What the router knows of the world is kept in `watch` cells ([`Facts`]); each attachment sends what is in them and then what
//! changes. So nothing is queued while the controller is away, and a controller that comes back is told everything again.

use crate::{ControllerAddress, clock, net};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use skein_core::RecordKey;
use skein_wire::{
    config::{self, Assembler},
    proto::{
        control::{
            Applied, Attach, Certificate, CertificateRequest, Delta, Drain, FromRouter, Learned,
            ProbeRequest, RouterConfig, RouterStatus, Snapshot, TraceRequest, Welcome,
            control_client::ControlClient, from_router, to_router,
        },
        routing::Record,
    },
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Endpoint};

/// First wait before dialling again: a controller that restarts is back within a second.
const REDIAL_MIN: Duration = Duration::from_millis(100);
/// Longest wait: a dial to a Unix socket that nobody serves costs microseconds.
const REDIAL_MAX: Duration = Duration::from_secs(1);
/// Dial and attach together; a controller that accepts but does not answer is frozen.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages on their way to the controller: enough that bursts of answers do not wait for each other.
const OUTBOUND_QUEUE: usize = 16;
/// Answers waiting for the attachment; each belongs to a request of the controller, which waits for its own.
const REPLIES_QUEUE: usize = 64;
/// Orders waiting for the control task; beyond that the controller waits.
const ORDERS_QUEUE: usize = 16;
/// Time between two status messages: four a second are enough for people and for planning.
const STATUS_INTERVAL_MIN: Duration = Duration::from_millis(250);
/// Large networks have large statuses; they are sent at most at this rate, in bytes per second.
const STATUS_RATE_MAX: u64 = 4 << 20;
/// Records per message, so that none comes near the message size limit of gRPC (a record is under 64 KiB).
const LEARNED_PER_MESSAGE: usize = 32;

/// What the controller wants.
#[derive(Debug)]
pub(crate) enum Order {
    /// A new attachment began; the boot epoch counts on the first one only.
    Attached(Welcome),
    /// A certificate for the key that was last asked for.
    Certificate(Certificate),
    /// A complete configuration, canonical and checked.
    Configure {
        /// Its version.
        version: u64,
        /// What shall be.
        config: Arc<RouterConfig>,
    },
    /// Explain the path to an address.
    Trace(TraceRequest),
    /// Try endpoints from here.
    Probe(ProbeRequest),
    /// End in an orderly way.
    Drain(Drain),
}

/// Trust records accepted from the network.
pub(crate) type LearnedRecords = BTreeMap<RecordKey, Record>;

/// What the controller shall know, as of now.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Epoch of this boot, 0 before the first attachment.
    pub(crate) boot_epoch: watch::Sender<u64>,
    /// State of everything.
    pub(crate) status: watch::Sender<Option<Arc<RouterStatus>>>,
    /// Trust records the controller keeps for us.
    pub(crate) learned: watch::Sender<Arc<LearnedRecords>>,
    /// Request for a certificate, DER; `None` while the one we have is good.
    pub(crate) csr: watch::Sender<Option<Vec<u8>>>,
    /// Outcome of the last configuration.
    pub(crate) applied: watch::Sender<Option<Applied>>,
}

/// The control task's end of the attachment.
#[derive(Debug)]
pub(crate) struct Controller {
    /// What arrives.
    pub(crate) orders: mpsc::Receiver<Order>,
    /// What it shall know.
    pub(crate) facts: Facts,
    /// Whether it is attached now.
    pub(crate) attached: watch::Receiver<bool>,
    replies: mpsc::Sender<from_router::Message>,
}

impl Controller {
    /// Answers a request; dropped when the attachment that asked is gone or does not read.
    pub(crate) fn reply(&self, message: from_router::Message) {
        if self.replies.try_send(message).is_err() {
            tracing::debug!("an answer to the controller was dropped: it does not read");
        }
    }

    /// A sender of replies for tasks that answer later.
    pub(crate) fn replier(&self) -> mpsc::Sender<from_router::Message> {
        self.replies.clone()
    }
}

/// The task's end.
#[derive(Debug)]
pub(crate) struct Attachment {
    controller: ControllerAddress,
    router_name: String,
    orders: mpsc::Sender<Order>,
    replies: mpsc::Receiver<from_router::Message>,
    boot_epoch: watch::Receiver<u64>,
    status: watch::Receiver<Option<Arc<RouterStatus>>>,
    learned: watch::Receiver<Arc<LearnedRecords>>,
    csr: watch::Receiver<Option<Vec<u8>>>,
    applied: watch::Receiver<Option<Applied>>,
    attached: watch::Sender<bool>,
    in_force: InForce,
}

/// The configuration the controller may send deltas against.
#[derive(Debug, Default)]
struct InForce {
    version: u64,
    config: Arc<RouterConfig>,
    sha256: Vec<u8>,
}

/// Why an attachment ended.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("the controller's socket: {0}")]
    Dial(#[from] tonic::transport::Error),
    #[error("the controller: {0}")]
    Rpc(#[from] tonic::Status),
    #[error("the controller does not answer")]
    Timeout,
    #[error("the controller closed the attachment")]
    Closed,
    #[error("the router ends")]
    Ends,
}

/// Makes both ends; nothing is dialled before [`Attachment::run`].
pub(crate) fn attachment(
    controller: ControllerAddress,
    router_name: String,
) -> (Controller, Attachment) {
    let (orders_tx, orders) = mpsc::channel(ORDERS_QUEUE);
    let (replies, replies_rx) = mpsc::channel(REPLIES_QUEUE);
    let (attached_tx, attached) = watch::channel(false);
    let facts = Facts {
        boot_epoch: watch::Sender::new(0),
        status: watch::Sender::new(None),
        learned: watch::Sender::default(),
        csr: watch::Sender::new(None),
        applied: watch::Sender::new(None),
    };
    let task = Attachment {
        controller,
        router_name,
        orders: orders_tx,
        replies: replies_rx,
        boot_epoch: facts.boot_epoch.subscribe(),
        status: facts.status.subscribe(),
        learned: facts.learned.subscribe(),
        csr: facts.csr.subscribe(),
        applied: facts.applied.subscribe(),
        attached: attached_tx,
        in_force: InForce::default(),
    };
    (Controller { orders, facts, attached, replies }, task)
}

impl Attachment {
    /// Attaches, again and again, until cancelled.
    ///
    /// # Cancel safety
    /// Dropping it ends the attachment and loses nothing but answers on their way.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut wait = REDIAL_MIN;
        let mut reported = false;
        loop {
            let ended = tokio::select! {
                biased;
                () = cancel.cancelled() => return, // cancel-safe
                ended = self.attach_and_serve() => ended, // dropped only at the end
            };
            let Err(error) = ended;
            if matches!(error, AttachError::Ends) {
                return;
            }
            if self.attached.send_replace(false) {
                tracing::warn!(%error, "detached from the controller; forwarding goes on");
                wait = REDIAL_MIN;
                reported = true;
            } else if !reported {
                tracing::warn!(%error, "cannot attach to the controller; trying on");
                reported = true;
            }
            while self.replies.try_recv().is_ok() {} // They answered an attachment that is gone.
            tokio::select! {
                () = cancel.cancelled() => return, // cancel-safe
                () = time::sleep(wait) => {} // cancel-safe
            }
            wait = (wait * 2).min(REDIAL_MAX);
        }
    }

    async fn attach_and_serve(&mut self) -> Result<std::convert::Infallible, AttachError> {
        let (outbound, mut inbound) = time::timeout(ATTACH_TIMEOUT, self.attach())
            .await
            .map_err(|_| AttachError::Timeout)??;
        self.attached.send_replace(true);
        tracing::info!("attached to the controller");
        let mut assembler = Assembler::default();
        let mut sent = Sent::new(self);
        // What waits for room. Reading never waits for it: the controller may be writing as well, and both would wait for ever.
        let mut ready: Option<FromRouter> = None;
        loop {
            tokio::select! {
                message = inbound.message() => { // cancel-safe
                    let message = message?.and_then(|m| m.message).ok_or(AttachError::Closed)?;
                    self.receive(message, &mut assembler, &outbound).await?;
                }
                room = outbound.reserve(), if ready.is_some() => { // cancel-safe
                    let room = room.map_err(|_| AttachError::Closed)?;
                    room.send(ready.take().expect("invariant: the branch is on only with a message"));
                }
                message = sent.next(), if ready.is_none() => { // cancel-safe: what it marks as sent it has returned
                    ready = Some(message);
                }
                reply = self.replies.recv(), if ready.is_none() => { // cancel-safe
                    let message = reply.ok_or(AttachError::Ends)?;
                    ready = Some(FromRouter { message: Some(message) });
                }
            }
        }
    }

    async fn attach(
        &self,
    ) -> Result<
        (mpsc::Sender<FromRouter>, Streaming<skein_wire::proto::control::ToRouter>),
        AttachError,
    > {
        let ControllerAddress::Unix(path) = self.controller.clone();
        // The URI is a placeholder: the connector decides where to go.
        let channel = Endpoint::from_static("http://controller.invalid")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { net::connect_unix(&path).await.map(TokioIo::new) }
            }))
            .await?;
        let (outbound, queue) = mpsc::channel(OUTBOUND_QUEUE);
        let attach = Attach {
            router_name: self.router_name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            boot_epoch: *self.boot_epoch.borrow(),
            config_version: self.in_force.version,
            config_sha256: self.in_force.sha256.clone(),
            pid: std::process::id(),
        };
        let first = FromRouter { message: Some(from_router::Message::Attach(attach)) };
        outbound.try_send(first).expect("invariant: the queue is new and has room");
        let inbound =
            ControlClient::new(channel).attach(ReceiverStream::new(queue)).await?.into_inner();
        Ok((outbound, inbound))
    }

    async fn receive(
        &mut self,
        message: to_router::Message,
        assembler: &mut Assembler,
        outbound: &mpsc::Sender<FromRouter>,
    ) -> Result<(), AttachError> {
        let order = match message {
            to_router::Message::Welcome(welcome) => Order::Attached(welcome),
            to_router::Message::Certificate(certificate) => Order::Certificate(certificate),
            to_router::Message::Trace(request) => Order::Trace(request),
            to_router::Message::Probe(request) => Order::Probe(request),
            to_router::Message::Drain(drain) => Order::Drain(drain),
            to_router::Message::Snapshot(chunk) => {
                match self.in_force.snapshot(&chunk, assembler) {
                    Ok(None) => return Ok(()),
                    Ok(Some(order)) => order,
                    Err(error) => return self.refuse(&error, outbound).await,
                }
            }
            to_router::Message::Delta(delta) => match self.in_force.delta(&delta) {
                Ok(order) => order,
                Err(error) => return self.refuse(&error, outbound).await,
            },
        };
        self.orders.send(order).await.map_err(|_| AttachError::Ends)
    }

    /// Keeps what is in force, and asks for everything where that can help.
    async fn refuse(
        &self,
        error: &config::ConfigError,
        outbound: &mpsc::Sender<FromRouter>,
    ) -> Result<(), AttachError> {
        let (version, need_full) = (self.in_force.version, error.is_transient());
        tracing::warn!(%error, version, need_full, "a configuration is not taken over");
        let applied =
            Applied { version, need_full, problems: vec![error.to_string()], refused: !need_full };
        let message = FromRouter { message: Some(from_router::Message::Applied(applied)) };
        let sent = time::timeout(ATTACH_TIMEOUT, outbound.send(message)).await;
        sent.map_err(|_| AttachError::Timeout)?.map_err(|_| AttachError::Closed)
    }
}

impl InForce {
    fn snapshot(
        &mut self,
        chunk: &Snapshot,
        assembler: &mut Assembler,
    ) -> Result<Option<Order>, config::ConfigError> {
        Ok(assembler.push(chunk)?.map(|(version, config)| self.replace(version, config)))
    }

    fn delta(&mut self, delta: &Delta) -> Result<Order, config::ConfigError> {
        let config = config::apply(self.version, &self.config, delta)?;
        Ok(self.replace(delta.version, config))
    }

    fn replace(&mut self, version: u64, config: RouterConfig) -> Order {
        self.sha256 = config::hash(&config).to_vec();
        self.version = version;
        self.config = Arc::new(config);
        Order::Configure { version, config: Arc::clone(&self.config) }
    }
}

/// What one attachment has been told, beside what there is to tell.
struct Sent {
    status: watch::Receiver<Option<Arc<RouterStatus>>>,
    status_next: Instant,
    learned: watch::Receiver<Arc<LearnedRecords>>,
    learned_sent: LearnedRecords,
    csr: watch::Receiver<Option<Vec<u8>>>,
    applied: watch::Receiver<Option<Applied>>,
}

impl Sent {
    fn new(attachment: &Attachment) -> Self {
        let mut sent = Self {
            status: attachment.status.clone(),
            status_next: now(),
            learned: attachment.learned.clone(),
            learned_sent: LearnedRecords::default(),
            csr: attachment.csr.clone(),
            applied: attachment.applied.clone(),
        };
        sent.status.mark_changed();
        sent.learned.mark_changed();
        sent.csr.mark_changed();
        sent.applied.mark_changed();
        sent
    }

    /// The next thing this controller does not know yet; pends while it knows everything.
    ///
    /// # Cancel safety
    /// Nothing is marked as sent before it is returned.
    async fn next(&mut self) -> FromRouter {
        loop {
            if let Some(message) = self.ready() {
                return FromRouter { message: Some(message) };
            }
            // Senders live as long as the control task; when it ends, so does this one.
            tokio::select! {
                Ok(()) = wait_for_change(&mut self.csr) => {} // cancel-safe
                Ok(()) = wait_for_change(&mut self.applied) => {} // cancel-safe
                Ok(()) = wait_for_change(&mut self.learned) => {} // cancel-safe
                Ok(()) = async { // cancel-safe
                    time::sleep_until(self.status_next).await;
                    wait_for_change(&mut self.status).await
                } => {}
                else => std::future::pending().await,
            }
        }
    }

    fn ready(&mut self) -> Option<from_router::Message> {
        if self.csr.has_changed().unwrap_or(false)
            && let Some(csr) = self.csr.borrow_and_update().clone()
        {
            let request = CertificateRequest { csr };
            return Some(from_router::Message::CertificateRequest(request));
        }
        if self.applied.has_changed().unwrap_or(false)
            && let Some(applied) = self.applied.borrow_and_update().clone()
        {
            return Some(from_router::Message::Applied(applied));
        }
        if self.learned.has_changed().unwrap_or(false) {
            if let Some(learned) = self.learned_next() {
                return Some(from_router::Message::Learned(learned));
            }
            self.learned.mark_unchanged();
        }
        if now() >= self.status_next
            && self.status.has_changed().unwrap_or(false)
            && let Some(status) = self.status.borrow_and_update().clone()
        {
            let status = RouterStatus::clone(&status);
            let len = u64::try_from(status.encoded_len()).unwrap_or(u64::MAX);
            let pause = Duration::from_millis(len.saturating_mul(1_000) / STATUS_RATE_MAX);
            self.status_next = now() + pause.max(STATUS_INTERVAL_MIN);
            return Some(from_router::Message::Status(status));
        }
        None
    }

    /// The next few records not sent in this attachment, and forgets those that are gone.
    fn learned_next(&mut self) -> Option<Learned> {
        let learned = Arc::clone(&self.learned.borrow());
        self.learned_sent.retain(|key, _| learned.contains_key(key));
        let fresh: Vec<_> = learned
            .iter()
            .filter(|(key, record)| self.learned_sent.get(*key) != Some(record))
            .take(LEARNED_PER_MESSAGE)
            .map(|(key, record)| (*key, record.clone()))
            .collect();
        if fresh.is_empty() {
            return None;
        }
        self.learned_sent.extend(fresh.iter().cloned());
        Some(Learned { records: fresh.into_iter().map(|(_, record)| record).collect() })
    }
}

fn now() -> Instant {
    Instant::from_std(clock::now())
}

/// Waits for a change without marking it as seen.
async fn wait_for_change<T>(cell: &mut watch::Receiver<T>) -> Result<(), watch::error::RecvError> {
    cell.changed().await?;
    cell.mark_changed();
    Ok(())
}

#[cfg(test)]
#[path = "../tests/support/controller.rs"]
mod fake_controller;

#[cfg(test)]
mod tests;
