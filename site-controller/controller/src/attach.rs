//! Serves routers: each keeps one stream on which it gets its boot epoch, certificate and configuration and reports what it sees.

use std::{collections::BTreeMap, pin::Pin, sync::Arc, time::Duration};

use skein_wire::{
    config,
    proto::control::{
        Applied, Attach, Certificate, CertificateRequest, FromRouter, RouterStatus, ToRouter,
        Welcome, control_server::Control, from_router, to_router,
    },
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    clock,
    controller::{Controller, State, Versioned},
};

/// Messages on their way to one router: a snapshot's chunks wait for the stream's flow control, answers do not wait for each other.
const OUTBOUND_QUEUE: usize = 16;
/// A router says who it is at once, or it is none.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest message from a router: the status of a network with 100,000 addresses.
pub(crate) const MESSAGE_LEN_MAX: usize = 64 << 20;
/// A router that outlived its controller tells it within this time what it sees; until then its configuration stays as it is, because a
/// controller that does not know the network yet would close every listener.
const FIRST_STATUS_TIMEOUT: Duration = Duration::from_secs(3);
/// A router that could not take its configuration over is not sent another before this time is over: the next is probably no better.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// Routers refuse a boot epoch beyond this.
const EPOCH_MAX: u64 = u32::MAX as u64;
/// A router that lets us wait for longer does not read any more; its attachment is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests of ours a router has not answered.
const PENDING_MAX: usize = 64;

/// Messages on their way to one router.
type Outbound = mpsc::Sender<Result<ToRouter, Status>>;

/// A router of this site, attached or remembered.
#[derive(Debug)]
pub(crate) struct RouterEntry {
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) boot_epoch: u64,
    /// Since when it is attached or away, Unix time.
    pub(crate) since_unix_s: i64,
    pub(crate) status: Option<RouterStatus>,
    /// The number under which it knows the configuration it has applied.
    pub(crate) held: u64,
    /// Version of that configuration; above `held` where nothing but the number has changed.
    pub(crate) applied: u64,
    /// Why it did not take over what it was sent last; empty if it did.
    pub(crate) refused: String,
    /// Version of the configuration that was in force when it made its last status.
    pub(crate) seen: u64,
    /// `None` while it is away.
    pub(crate) session: Option<Session>,
}

/// The way to an attached router.
#[derive(Debug)]
pub(crate) struct Session {
    id: u64,
    outbound: mpsc::Sender<Result<ToRouter, Status>>,
    pending: BTreeMap<u64, oneshot::Sender<from_router::Message>>,
    next_request: u64,
    /// Set when the router said it has drained.
    pub(crate) drained: bool,
}

/// The gRPC service.
#[derive(Clone, Debug)]
pub(crate) struct ControlService(pub(crate) Arc<Controller>);

#[tonic::async_trait]
impl Control for ControlService {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ToRouter, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<FromRouter>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(ATTACH_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no attach message"))??;
        let Some(from_router::Message::Attach(attach)) = first.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument("the first message must be attach"));
        };
        if !skein_trust::router_name_is_valid(&attach.router_name) {
            return Err(Status::invalid_argument("the router's name is not valid"));
        }
        if self.0.is_stopped() {
            // systemd restarts a router that said farewell before it is told to stop.
            return Err(Status::unavailable("the site is being stopped"));
        }
        let (outbound, queue) = mpsc::channel(OUTBOUND_QUEUE);
        let welcome = self.0.welcome(&attach)?;
        let message = ToRouter { message: Some(to_router::Message::Welcome(welcome.clone())) };
        outbound.try_send(Ok(message)).expect("invariant: the queue is new and has room");
        let id = self.0.attached(&attach, welcome.boot_epoch, outbound.clone());
        tracing::info!(
            router = attach.router_name,
            boot_epoch = welcome.boot_epoch,
            pid = attach.pid,
            "router attached"
        );
        let serving = Serving {
            controller: Arc::clone(&self.0),
            router: attach.router_name.clone(),
            id,
            outbound,
            config: self.0.config(),
            sent: None,
            held: (attach.config_version > 0).then_some(Held::FirstStatus),
            hold: Box::pin(tokio::time::sleep(FIRST_STATUS_TIMEOUT)),
        };
        self.0.tasks.spawn(serving.run(inbound, attach));
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

/// One attachment, as a task.
struct Serving {
    controller: Arc<Controller>,
    router: String,
    id: u64,
    outbound: mpsc::Sender<Result<ToRouter, Status>>,
    config: watch::Receiver<Versioned>,
    /// What the router has, as far as we know.
    sent: Option<Versioned>,
    /// Why nothing is sent at the moment.
    held: Option<Held>,
    /// The end of that.
    hold: Pin<Box<tokio::time::Sleep>>,
}

/// What a configuration waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// The first status of a router that has a configuration.
    FirstStatus,
    /// Time, because it refused the last one.
    Refused,
}

impl Serving {
    async fn run(mut self, mut inbound: Streaming<FromRouter>, attach: Attach) {
        let current = self.config.borrow_and_update().clone();
        let mut is_alive = true;
        if current.version > 0 && attach.config_sha256 == current.sha256 {
            // It outlived us with exactly this configuration.
            self.controller.holds_the_same(&self.router, self.id, current.version);
            self.sent = Some(Versioned { version: attach.config_version, ..current });
        } else {
            is_alive = self.send_config().await;
        }
        while is_alive {
            is_alive = tokio::select! {
                () = self.controller.shutdown.cancelled() => false, // cancel-safe
                () = &mut self.hold, if self.held.is_some() => { // cancel-safe
                    self.held = None;
                    self.send_config().await
                }
                changed = self.config.changed() => { // cancel-safe
                    changed.is_ok() && self.send_config().await
                }
                message = inbound.message() => match message { // cancel-safe
                    Ok(Some(FromRouter { message: Some(message) })) => self.receive(message).await,
                    Ok(Some(FromRouter { message: None })) => true, // from a later version
                    Ok(None) => false,
                    Err(error) => {
                        tracing::debug!(router = self.router, %error, "attachment broke");
                        false
                    }
                },
            };
        }
        self.controller.detached(&self.router, self.id);
    }

    async fn receive(&mut self, message: from_router::Message) -> bool {
        match message {
            from_router::Message::Attach(_) => true,
            from_router::Message::Applied(applied) => self.applied(applied).await,
            from_router::Message::Status(status) => {
                self.controller.observe(&self.router, status);
                if self.held != Some(Held::FirstStatus) {
                    return true;
                }
                self.held = None;
                self.send_config().await
            }
            from_router::Message::Learned(learned) => {
                self.controller.learn(learned.records);
                true
            }
            from_router::Message::CertificateRequest(request) => self.certify(&request).await,
            from_router::Message::Drained(drained) => {
                tracing::info!(
                    router = self.router,
                    flows_reset = drained.flows_reset,
                    "router drained"
                );
                self.controller.with_session(&self.router, |session| session.drained = true);
                self.controller.touch();
                true
            }
            from_router::Message::Trace(ref reply) => {
                let id = reply.id;
                self.answered(id, message);
                true
            }
            from_router::Message::Probe(ref reply) => {
                let id = reply.id;
                self.answered(id, message);
                true
            }
        }
    }

    fn answered(&self, id: u64, message: from_router::Message) {
        let waiting =
            self.controller.with_session(&self.router, |session| session.pending.remove(&id));
        if let Some(waiting) = waiting.flatten() {
            // Whoever asked may have given up.
            let _ = waiting.send(message);
        }
    }

    async fn applied(&mut self, applied: Applied) -> bool {
        for problem in &applied.problems {
            tracing::warn!(router = self.router, problem, "configuration problem");
        }
        if applied.need_full {
            self.sent = None;
            self.held = None;
            return self.send_config().await;
        }
        if applied.refused {
            self.sent = None;
            self.held = Some(Held::Refused);
            self.hold.as_mut().reset(tokio::time::Instant::now() + REFUSED_PAUSE);
        }
        self.controller.applied(&self.router, self.id, &applied);
        true
    }

    /// Sends what the router does not have: a delta if it has something, else everything.
    async fn send_config(&mut self) -> bool {
        let current = self.config.borrow_and_update().clone();
        if current.version == 0 || self.held.is_some() {
            return true; // Nothing is planned yet, or not on what the router sees, or it would refuse it.
        }
        let delta = self.sent.as_ref().and_then(|sent| {
            config::diff(sent.version, &sent.config, current.version, &current.config)
        });
        let messages = match (delta, &self.sent) {
            (_, Some(sent)) if sent.sha256 == current.sha256 => Vec::new(),
            (Some(delta), _) => vec![to_router::Message::Delta(delta)],
            (None, _) => config::snapshot(current.version, &current.config)
                .into_iter()
                .map(to_router::Message::Snapshot)
                .collect(),
        };
        if messages.is_empty() {
            // The same again under another number.
            self.controller.holds_the_same(&self.router, self.id, current.version);
        } else {
            self.sent = Some(current);
        }
        for message in messages {
            if !self.send(message).await {
                return false;
            }
        }
        true
    }

    async fn certify(&self, request: &CertificateRequest) -> bool {
        let controller = &self.controller;
        let issued = controller.ca.issue_router(
            &request.csr,
            &self.router,
            &controller.random,
            clock::unix_s(),
        );
        match issued {
            Ok(issued) => {
                tracing::info!(
                    router = self.router,
                    expires = clock::rfc3339(issued.not_after_unix_s),
                    "certificate issued"
                );
                let chain = issued.chain.iter().map(|certificate| certificate.to_vec()).collect();
                let not_after_unix_s = issued.not_after_unix_s;
                self.send(to_router::Message::Certificate(Certificate { chain, not_after_unix_s }))
                    .await
            }
            Err(error) => {
                tracing::error!(router = self.router, %error, "no certificate issued");
                true
            }
        }
    }

    async fn send(&self, message: to_router::Message) -> bool {
        deliver(&self.outbound, message).await
    }
}

/// Why a router did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AskError {
    #[error("no router is attached; see `skctl status`")]
    NoRouter,
    #[error("the router has too many unanswered requests")]
    Busy,
    #[error("the router does not answer")]
    Timeout,
}

impl Controller {
    /// The first answer to a router. A router that boots gets an epoch above every earlier one, persisted before it is told.
    fn welcome(&self, attach: &Attach) -> Result<Welcome, Status> {
        let mut state = self.state();
        let known = state.epochs.get(&attach.router_name).copied().unwrap_or(0);
        let boot_epoch = if attach.boot_epoch == 0 {
            next_epoch(known, clock::unix_s())
        } else {
            attach.boot_epoch
        };
        if attach.boot_epoch == 0 || boot_epoch > known {
            let mut epochs = state.epochs.clone();
            epochs.insert(attach.router_name.clone(), boot_epoch);
            self.store.save_epochs(&epochs).map_err(|error| {
                tracing::error!(%error, "a router cannot start");
                Status::unavailable(error.to_string())
            })?;
            state.epochs = epochs;
        }
        self.count_from(&mut state, attach.config_version);
        Ok(Welcome {
            boot_epoch,
            site_secret: self.site_secret.to_vec(),
            site_id: self.site.0.to_vec(),
            site_name: state.site_name().to_owned(),
            network_id: state.network(self.site).0.to_vec(),
        })
    }

    fn attached(
        &self,
        attach: &Attach,
        boot_epoch: u64,
        outbound: mpsc::Sender<Result<ToRouter, Status>>,
    ) -> u64 {
        let mut state = self.state();
        let earlier = state.routers.remove(&attach.router_name);
        let id =
            earlier.as_ref().and_then(|e| e.session.as_ref()).map_or(1, |session| session.id + 1);
        // The status of an earlier boot says nothing any more.
        let status = earlier.filter(|e| e.boot_epoch == boot_epoch).and_then(|e| e.status);
        let held = attach.config_version;
        state.routers.insert(
            attach.router_name.clone(),
            RouterEntry {
                version: attach.version.clone(),
                pid: attach.pid,
                boot_epoch,
                since_unix_s: clock::unix_s(),
                status,
                held,
                applied: held,
                refused: String::new(),
                seen: 0,
                session: Some(Session {
                    id,
                    outbound,
                    pending: BTreeMap::new(),
                    next_request: 1,
                    drained: false,
                }),
            },
        );
        drop(state);
        self.touch();
        id
    }

    fn applied(&self, router: &str, id: u64, applied: &Applied) {
        if let Some(entry) = self.state().entry_of(router, id) {
            if applied.refused {
                entry.refused = applied.problems.join("; ");
            } else {
                entry.refused = String::new();
                (entry.held, entry.applied) = (applied.version, applied.version);
            }
        }
        self.touch();
    }

    /// The router has the configuration that is now called `version`.
    fn holds_the_same(&self, router: &str, id: u64, version: u64) {
        if let Some(entry) = self.state().entry_of(router, id) {
            if entry.seen == entry.applied {
                entry.seen = version;
            }
            entry.applied = version;
        }
        self.touch();
    }

    fn detached(&self, router: &str, id: u64) {
        let mut state = self.state();
        if let Some(entry) = state.entry_of(router, id) {
            entry.session = None;
            entry.since_unix_s = clock::unix_s();
            tracing::info!(router, "router detached");
        }
        drop(state);
        self.touch();
    }

    fn with_session<T>(&self, router: &str, act: impl FnOnce(&mut Session) -> T) -> Option<T> {
        let mut state = self.state();
        state.routers.get_mut(router)?.session.as_mut().map(act)
    }

    fn learn(&self, records: Vec<skein_wire::proto::routing::Record>) {
        let mut state = self.state();
        let adopted = self.adopt(&mut state, &records);
        // They come from a router, so no router has to be told; a router that starts later gets them.
        if state.learned.learn(records, clock::unix_s()) || adopted {
            self.refresh(&mut state);
        }
    }

    /// Asks one attached router; `request` builds the message around the request's number.
    ///
    /// # Errors
    /// There is no router, or it does not answer within `timeout`.
    ///
    /// # Cancel safety
    /// A late answer is dropped.
    pub(crate) async fn ask(
        &self,
        request: impl FnOnce(u64) -> to_router::Message,
        timeout: Duration,
    ) -> Result<from_router::Message, AskError> {
        let (outbound, message, answer) = {
            let mut state = self.state();
            let session = first_session(&mut state).ok_or(AskError::NoRouter)?;
            session.pending.retain(|_, waiting| !waiting.is_closed());
            if session.pending.len() >= PENDING_MAX {
                return Err(AskError::Busy);
            }
            let (sender, answer) = oneshot::channel();
            let id = session.next_request;
            session.next_request += 1;
            session.pending.insert(id, sender);
            (session.outbound.clone(), ToRouter { message: Some(request(id)) }, answer)
        };
        let exchange = async {
            outbound.send(Ok(message)).await.map_err(|_| AskError::NoRouter)?;
            answer.await.map_err(|_| AskError::NoRouter)
        };
        tokio::time::timeout(timeout, exchange).await.map_err(|_| AskError::Timeout)?
    }

    /// Sends a message to every attached router; returns how many there are.
    ///
    /// # Cancel safety
    /// Some may have got it.
    pub(crate) async fn tell_all(&self, message: to_router::Message) -> usize {
        let outbound: Vec<_> = {
            let state = self.state();
            let sessions = state.routers.values().filter_map(|entry| entry.session.as_ref());
            sessions.map(|session| session.outbound.clone()).collect()
        };
        for sender in &outbound {
            // One that has just gone needs no message, and one that does not read gets none.
            deliver(sender, message.clone()).await;
        }
        outbound.len()
    }
}

impl State {
    /// The router, if this is still its session.
    fn entry_of(&mut self, router: &str, id: u64) -> Option<&mut RouterEntry> {
        let entry = self.routers.get_mut(router)?;
        entry.session.as_ref().is_some_and(|session| session.id == id).then_some(entry)
    }
}

impl RouterEntry {
    /// Takes a status over, and whether it was made with the configuration we know the router to have.
    pub(crate) fn observe(&mut self, status: RouterStatus) {
        // An older router does not say.
        if status.config_version == 0 || status.config_version == self.held {
            self.seen = self.applied;
        }
        self.status = Some(status);
    }
}

/// Hands a message to an attachment; `false` if that is gone or does not read.
async fn deliver(outbound: &Outbound, message: to_router::Message) -> bool {
    let sent = outbound.send(Ok(ToRouter { message: Some(message) }));
    let sent = tokio::time::timeout(SEND_TIMEOUT, sent).await;
    if sent.is_err() {
        tracing::warn!("a router does not read what it is sent");
    }
    matches!(sent, Ok(Ok(())))
}

fn first_session(state: &mut State) -> Option<&mut Session> {
    state.routers.values_mut().find_map(|entry| entry.session.as_mut())
}

/// At least the time in seconds, so that epochs grow also when the file that counts them was lost. They must fit 32 bits: a time that does
/// not is wrong, and one that was counted is not counted on from.
fn next_epoch(known: u64, now_unix_s: i64) -> u64 {
    let fits = |epoch: &u64| *epoch < EPOCH_MAX;
    let now = u64::try_from(now_unix_s).ok().filter(fits).unwrap_or(0);
    (Some(known).filter(fits).unwrap_or(0) + 1).max(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_grow_and_fit_whatever_the_clock_says() {
        const NOW: i64 = 1_800_000_000;
        let now = u64::try_from(NOW).unwrap();
        assert_eq!(next_epoch(0, NOW), now);
        assert_eq!(next_epoch(now, NOW), now + 1);
        assert_eq!(next_epoch(now, 1 << 40), now + 1, "a clock beyond 2106");
        assert_eq!(next_epoch(1 << 40, NOW), now, "it was counted by an earlier version");
        assert_eq!(next_epoch(EPOCH_MAX - 1, NOW), EPOCH_MAX, "the last of all");
    }
}
