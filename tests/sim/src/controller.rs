//! The controller of a simulated site: plans with `skein-site-core`, signs and issues with `skein-trust`, and serves its router over the
//! real protocol. What a production controller does besides (files, `skctl`, claims, systemd) is not here.

use anyhow::{Result, ensure};
use aws_lc_rs::{
    digest::{SHA256, digest},
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use parking_lot::Mutex;
use skein_core::{Room, SiteId};
use skein_netsim::{Host, UnixListener, UnixStream};
use skein_site_core::{AutoEndpoints, Inputs, LocalPorts, Resources, Services, plan};
use skein_trust::{EndorsementDraft, STATEMENT_VALIDITY_S, SiteCa, SiteIdentity, StatementDraft};
use skein_wire::{
    config,
    proto::{
        control::{
            Attach, Certificate, FromRouter, RouterConfig, RouterStatus, ToRouter, Welcome,
            control_server::{Control, ControlServer},
            from_router, to_router,
        },
        routing::Record,
        trust::Membership,
    },
};
use std::{
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Request, Response, Status, Streaming, transport::server::Connected};

/// Messages on their way to a router.
const OUTBOUND_QUEUE: usize = 64;
/// Connections that the server has not taken over yet.
const INCOMING_QUEUE: usize = 4;

/// What a controller knows and wants; survives its death, as on disk.
pub(crate) struct Brain {
    pub(crate) identity: SiteIdentity,
    ca: SiteCa,
    name: String,
    founder: SiteId,
    pub(crate) resources: Resources,
    pub(crate) advertise: Vec<String>,
    statement: Record,
    endorsements: Vec<Record>,
    learned: Vec<Record>,
    boot_epoch: u64,
    version: u64,
    status: Option<Arc<RouterStatus>>,
    problems: Vec<String>,
    unix_s: i64,
}

/// The brain, and who wants to know of its plans.
pub(crate) struct Shared {
    brain: Mutex<Brain>,
    planned: watch::Sender<(u64, Arc<RouterConfig>)>,
}

/// The identity that follows from a seed. Site ids order routers in many places, so they must be the same in every run.
pub(crate) fn identity(seed: u64, index: usize) -> Result<SiteIdentity> {
    let secret = |which: u8| {
        let bytes = [&seed.to_be_bytes()[..], &(index as u64).to_be_bytes(), &[which]].concat();
        digest(&SHA256, &bytes).as_ref().to_vec()
    };
    let public = |secret: &[u8]| -> Result<Vec<u8>> {
        let key = Ed25519KeyPair::from_seed_unchecked(secret);
        Ok(key.map_err(|_| anyhow::anyhow!("no key"))?.public_key().as_ref().to_vec())
    };
    let (key, next) = (secret(0), secret(1));
    let stored = SiteIdentity::generate(&SystemRandom::new())?.to_secret_bytes();
    ensure!(stored.len() > 128, "the form of stored identities has changed");
    let magic = &stored[..stored.len() - 128];
    let next_hash = digest(&SHA256, &public(&next)?);
    let bytes = [magic, &key, &next, &public(&key)?, next_hash.as_ref()].concat();
    Ok(SiteIdentity::from_secret_bytes(&bytes)?)
}

impl Brain {
    pub(crate) fn new(
        identity: SiteIdentity,
        name: String,
        founder: SiteId,
        unix_s: i64,
    ) -> Result<Self> {
        let ca = SiteCa::generate(identity.site_id(), &SystemRandom::new(), unix_s)?;
        let statement = identity.statement(&StatementDraft {
            epoch: 2,
            name: name.clone(),
            ca_certificates: vec![ca.certificate().to_vec()],
            endpoints: Vec::new(),
            network_id: Some(founder),
            expires_unix_s: unix_s + i64::from(STATEMENT_VALIDITY_S),
        });
        Ok(Self {
            identity,
            ca,
            name,
            founder,
            resources: Resources::default(),
            advertise: Vec::new(),
            statement,
            endorsements: Vec::new(),
            learned: Vec::new(),
            boot_epoch: 0,
            version: 0,
            status: None,
            problems: Vec::new(),
            unix_s,
        })
    }

    /// Trusts another site and knows of its trust, as after a claim.
    pub(crate) fn befriend(&mut self, other: &Self) {
        self.endorsements.push(endorsement(&self.identity, other));
        self.endorsements.push(endorsement(&other.identity, self));
        self.endorsements.push(other.statement.clone());
    }

    fn plan(&mut self) -> (u64, Arc<RouterConfig>) {
        let mut records = vec![self.statement.clone()];
        records.extend(self.endorsements.iter().chain(&self.learned).cloned());
        records.sort_by(|a, b| a.body.cmp(&b.body));
        records.dedup_by(|a, b| a.body == b.body);
        let planned = plan(Inputs {
            site: self.identity.site_id(),
            resources: &self.resources,
            draining: &[],
            services: &Services::new(),
            automatic: Room { per_site: 0, total: 0 },
            endpoints: &AutoEndpoints::default(),
            host: &LocalPorts::default(),
            advertise: &self.advertise,
            records,
            claim_socket: "/nobody",
            authorities: &[self.founder],
        });
        self.version += 1;
        (self.version, Arc::new(planned.config))
    }

    fn welcome(&mut self, attach: &Attach) -> Welcome {
        if attach.boot_epoch == 0 {
            self.boot_epoch += 1;
        }
        Welcome {
            boot_epoch: self.boot_epoch,
            site_secret: digest(&SHA256, &self.identity.site_id().0).as_ref().to_vec(),
            site_id: self.identity.site_id().0.to_vec(),
            site_name: self.name.clone(),
            network_id: self.founder.0.to_vec(),
        }
    }
}

fn endorsement(issuer: &SiteIdentity, subject: &Brain) -> Record {
    issuer.endorsement(&EndorsementDraft {
        subject: subject.identity.site_id(),
        membership: Membership::Member,
        scope: None,
        may_endorse: true,
        sequence: 1,
        valid_until_unix_s: subject.unix_s + i64::from(STATEMENT_VALIDITY_S),
    })
}

impl Shared {
    pub(crate) fn new(mut brain: Brain) -> Self {
        let planned = watch::Sender::new(brain.plan());
        Self { brain: Mutex::new(brain), planned }
    }

    pub(crate) fn id(&self) -> SiteId {
        self.brain.lock().identity.site_id()
    }

    /// What the router reported last.
    pub(crate) fn status(&self) -> Option<Arc<RouterStatus>> {
        self.brain.lock().status.clone()
    }

    /// What it reported before it ended no longer counts.
    pub(crate) fn forget_status(&self) {
        self.brain.lock().status = None;
    }

    /// What the router complained of.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.brain.lock().problems.clone()
    }

    /// Changes what is wanted, and plans anew.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Brain)) {
        let planned = {
            let mut brain = self.brain.lock();
            change(&mut brain);
            brain.plan()
        };
        self.planned.send_replace(planned);
    }

    fn learn(&self, records: Vec<Record>) {
        let mut is_new = false;
        {
            let mut brain = self.brain.lock();
            for record in records {
                if !brain.learned.iter().any(|known| known.body == record.body) {
                    brain.learned.push(record);
                    is_new = true;
                }
            }
        }
        // As the production controller: what routers have told is told to routers only when the plan changes or one attaches.
        if is_new {
            self.planned.send_modify(|(version, config)| {
                let mut brain = self.brain.lock();
                let (_, planned) = brain.plan();
                *version = brain.version;
                *config = planned;
            });
        }
    }
}

/// Listens and serves until stopped.
pub(crate) fn serve(
    host: &Host,
    path: &Path,
    shared: Arc<Shared>,
    stop: CancellationToken,
) -> io::Result<()> {
    let listener = UnixListener::bind(host, path)?;
    let (arrived, incoming) = mpsc::channel(INCOMING_QUEUE);
    let runtime = tokio::runtime::Handle::current();
    let service = ControlServer::new(Service { host: host.clone(), shared, stop: stop.clone() });
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(ReceiverStream::new(incoming));
    let stopped = stop.clone().cancelled_owned();
    // Both end when stopped, and with the runtime.
    runtime.spawn(async move {
        tokio::select! {
            _ended = server => {}
            () = stopped => {}
        }
    });
    runtime.spawn(async move {
        loop {
            let stream = tokio::select! {
                stream = listener.accept() => stream,
                () = stop.cancelled() => return,
            };
            let Ok(stream) = stream else { return };
            let killed = Box::pin(stop.clone().cancelled_owned());
            if arrived.send(Ok::<_, io::Error>(Mortal { stream, killed })).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

#[derive(Clone)]
struct Service {
    host: Host,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl Control for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ToRouter, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<FromRouter>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut from = request.into_inner();
        let Some(from_router::Message::Attach(attach)) =
            from.message().await?.and_then(|message| message.message)
        else {
            return Err(Status::invalid_argument("attach comes first"));
        };
        let (to, messages) = mpsc::channel(OUTBOUND_QUEUE);
        let welcome = self.shared.brain.lock().welcome(&attach);
        let session =
            Session { service: self.clone(), to, planned: self.shared.planned.subscribe() };
        tokio::runtime::Handle::current().spawn(session.run(welcome, from));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

/// One attachment.
struct Session {
    service: Service,
    to: mpsc::Sender<Result<ToRouter, Status>>,
    planned: watch::Receiver<(u64, Arc<RouterConfig>)>,
}

impl Session {
    async fn run(mut self, welcome: Welcome, mut from: Streaming<FromRouter>) {
        if !self.send(to_router::Message::Welcome(welcome)).await {
            return;
        }
        self.planned.mark_changed();
        let stop = self.service.stop.clone();
        loop {
            let goes_on = tokio::select! {
                biased;
                () = stop.cancelled() => false,
                Ok(()) = self.planned.changed() => {
                    let (version, config) = self.planned.borrow_and_update().clone();
                    let mut goes_on = true;
                    for chunk in config::snapshot(version, &config) {
                        goes_on &= self.send(to_router::Message::Snapshot(chunk)).await;
                    }
                    goes_on
                }
                message = from.message() => match message {
                    Ok(Some(FromRouter { message: Some(message) })) => self.receive(message).await,
                    Ok(Some(_)) => true,
                    Ok(None) | Err(_) => false,
                },
            };
            if !goes_on {
                return;
            }
        }
    }

    async fn receive(&self, message: from_router::Message) -> bool {
        let shared = &self.service.shared;
        match message {
            from_router::Message::CertificateRequest(request) => {
                let unix_s = self.service.host.unix_ms() / 1_000;
                let issued = shared.brain.lock().ca.issue_router(
                    &request.csr,
                    "router",
                    &SystemRandom::new(),
                    unix_s,
                );
                let Ok(issued) = issued else { return true };
                let chain = issued.chain.iter().map(|der| der.to_vec()).collect();
                let certificate = Certificate { chain, not_after_unix_s: issued.not_after_unix_s };
                return self.send(to_router::Message::Certificate(certificate)).await;
            }
            from_router::Message::Status(status) => {
                shared.brain.lock().status = Some(Arc::new(status));
            }
            from_router::Message::Learned(learned) => shared.learn(learned.records),
            from_router::Message::Applied(applied) => {
                shared.brain.lock().problems.extend(applied.problems);
            }
            _ => {}
        }
        true
    }

    async fn send(&self, message: to_router::Message) -> bool {
        self.to.send(Ok(ToRouter { message: Some(message) })).await.is_ok()
    }
}

/// A connection that breaks when its controller is killed.
struct Mortal {
    stream: UnixStream,
    killed: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Mortal {
    fn poll_killed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.killed.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Poll::Pending => Poll::Ready(Ok(())),
        }
    }
}

impl Connected for Mortal {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Mortal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.poll_killed(cx)? {
            Poll::Ready(()) => Pin::new(&mut self.stream).poll_read(cx, buf),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Mortal {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
