//! A site with one real router, its controller played by the test: identity, CA and configuration in memory.

use super::controller::{Attachment, FakeController};
use aws_lc_rs::rand::SystemRandom;
use prost::Message as _;
use skein_core::SiteId;
use skein_router::{Config, ControllerAddress, Router, Runtimes, clock};
use skein_trust::{EndorsementDraft, STATEMENT_VALIDITY_S, SiteCa, SiteIdentity, StatementDraft};
use skein_wire::{
    config,
    proto::{
        control::{
            Certificate, ConnectorConfig, ConnectorPort, LinkConfig, ListenerConfig, ListenerPort,
            RouterConfig, RouterSettings, RouterStatus, Welcome, from_router, to_router,
        },
        routing::{Protocol, Record, RecordBody, RecordKind, Role},
        trust::{Membership, SiteStatement},
    },
};
use std::{net::SocketAddr, sync::Arc, thread::JoinHandle, time::Duration};
use tempfile::TempDir;
use tokio::{
    runtime::{Builder, Handle},
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_util::sync::CancellationToken;

/// Nothing in these tests takes long; what takes longer than this does not happen.
pub(crate) const SOON: Duration = Duration::from_secs(15);

pub(crate) struct Site {
    pub(crate) identity: Arc<SiteIdentity>,
    pub(crate) name: &'static str,
    dir: TempDir,
    configuration: watch::Sender<RouterConfig>,
    status: watch::Receiver<RouterStatus>,
    orders: mpsc::Sender<to_router::Message>,
    pub(crate) answers: mpsc::Receiver<from_router::Message>,
    process: Option<Process>,
    _controller: JoinSet<()>,
}

/// A router on a runtime and thread of its own, so that it can be killed.
struct Process {
    router: Router,
    stop: CancellationToken,
    runtime: Handle,
    thread: JoinHandle<()>,
}

impl Process {
    /// Drops the runtime with every task on it, wherever it is.
    fn stop(self) {
        self.stop.cancel();
        self.thread.join().unwrap();
    }
}

/// What the controller's task works with.
struct Brain {
    identity: Arc<SiteIdentity>,
    ca: SiteCa,
    name: &'static str,
    founder: SiteId,
    boot_epoch: u64,
    configuration: watch::Receiver<RouterConfig>,
    status: watch::Sender<RouterStatus>,
    orders: mpsc::Receiver<to_router::Message>,
    answers: mpsc::Sender<from_router::Message>,
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.stop();
        }
    }
}

impl Site {
    /// A site of the network that `founder` began, or of its own.
    pub(crate) fn new(name: &'static str, founder: Option<SiteId>) -> Self {
        let random = SystemRandom::new();
        let identity = Arc::new(SiteIdentity::generate(&random).unwrap());
        let site = identity.site_id();
        let ca = SiteCa::generate(site, &random, clock::unix_s()).unwrap();
        let founder = founder.unwrap_or(site);
        let statement = identity.statement(&StatementDraft {
            epoch: 2,
            name: name.into(),
            ca_certificates: vec![ca.certificate().to_vec()],
            endpoints: Vec::new(),
            network_id: Some(founder),
            expires_unix_s: clock::unix_s() + i64::from(STATEMENT_VALIDITY_S),
        });
        let mut first = RouterConfig {
            settings: Some(RouterSettings {
                role: Role::Edge.into(),
                site_name: name.into(),
                metrics_listen: "127.0.0.1:0".into(),
                ..RouterSettings::default()
            }),
            records: vec![statement],
            ..RouterConfig::default()
        };
        config::canonicalise(&mut first);
        let dir = tempfile::tempdir().unwrap();
        let (configuration, configured) = watch::channel(first);
        let (status_tx, status) = watch::channel(RouterStatus::default());
        let (orders, orders_rx) = mpsc::channel(8);
        let (answers_tx, answers) = mpsc::channel(64);
        let brain = Brain {
            identity: Arc::clone(&identity),
            ca,
            name,
            founder,
            boot_epoch: 0,
            configuration: configured,
            status: status_tx,
            orders: orders_rx,
            answers: answers_tx,
        };
        let socket = FakeController::listen(&dir.path().join("c.sock"));
        let mut controller = JoinSet::new();
        controller.spawn(brain.run(socket));
        Self {
            identity,
            name,
            dir,
            configuration,
            status,
            orders,
            answers,
            process: None,
            _controller: controller,
        }
    }

    pub(crate) fn id(&self) -> SiteId {
        self.identity.site_id()
    }

    pub(crate) fn start(&mut self) {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let runtimes =
            Runtimes { data: runtime.handle().clone(), control: runtime.handle().clone() };
        let config = Config {
            name: "router".into(),
            controller: ControllerAddress::Unix(self.dir.path().join("c.sock")),
            state_dir: self.dir.path().join("state"),
            respawn_controller: Vec::new(),
            seed: self.id().0,
        };
        let router = Router::start(config, &runtimes).unwrap();
        let stop = CancellationToken::new();
        let (stopped, handle) = (stop.clone(), runtime.handle().clone());
        let thread = std::thread::spawn(move || runtime.block_on(stopped.cancelled()));
        self.process = Some(Process { router, stop, runtime: handle, thread });
    }

    /// What the router runs on, while it does.
    pub(crate) fn runtime(&self) -> Option<Handle> {
        self.process.as_ref().map(|process| process.runtime.clone())
    }

    /// Ends the router as `kill -9` would: nothing of it runs any more, nobody is told.
    pub(crate) fn kill(&mut self) {
        self.process.take().unwrap().stop();
    }

    pub(crate) async fn drain(&mut self, farewell: bool) -> u64 {
        let process = self.process.take().unwrap();
        let drained = time::timeout(SOON, process.router.drain(SOON / 3, farewell)).await.unwrap();
        process.stop();
        drained
    }

    pub(crate) fn configure(&self, change: impl FnOnce(&mut RouterConfig)) {
        self.configuration.send_modify(|config| {
            change(config);
            config::canonicalise(config);
        });
    }

    pub(crate) fn settings(&self, change: impl FnOnce(&mut RouterSettings)) {
        self.configure(|config| change(config.settings.as_mut().unwrap()));
    }

    /// Makes this site trust another, and know of its trust.
    pub(crate) fn befriend(&self, other: &Self) {
        let ours = endorsement(&self.identity, other.id());
        let theirs = endorsement(&other.identity, self.id());
        let statement = other.configuration.borrow().records.clone();
        self.configure(|config| {
            config.records.extend([ours, theirs]);
            config.records.extend(statement);
        });
    }

    /// Makes this site trust another of which it has heard nothing since its statement expired.
    pub(crate) fn remember(&self, other: &Self) {
        let known = {
            let config = other.configuration.borrow();
            let mut said =
                config.records.iter().map(|r| RecordBody::decode(r.body.as_ref()).unwrap());
            let of_other = |body: &RecordBody| {
                body.kind == i32::from(RecordKind::SiteStatement) && body.origin == other.id().0
            };
            SiteStatement::decode(said.find(of_other).unwrap().payload.as_slice()).unwrap()
        };
        let lapsed = other.identity.statement(&StatementDraft {
            epoch: 1,
            name: known.name,
            ca_certificates: known.ca_certificates,
            endpoints: Vec::new(),
            network_id: Some(known.network_id.as_slice().try_into().map(SiteId).unwrap()),
            expires_unix_s: clock::unix_s() - 86_400,
        });
        let ours = endorsement(&self.identity, other.id());
        self.configure(|config| config.records.extend([ours, lapsed]));
    }

    pub(crate) fn dial(&self, name: &str, peer: &Self, endpoint: SocketAddr) {
        self.configure(|config| {
            config.links.push(LinkConfig {
                name: name.into(),
                peer_site_id: peer.id().0.to_vec(),
                endpoints: vec![endpoint.to_string()],
                cost: 1,
            });
        });
    }

    pub(crate) fn serve(&self, address: &str, port: u32, target: SocketAddr) {
        self.configure(|config| {
            config.connectors.push(ConnectorConfig {
                name: address.into(),
                address: address.into(),
                targets: vec![target.ip().to_string()],
                ports: vec![ConnectorPort {
                    port,
                    target_port: target.port().into(),
                    protocol: Protocol::Tcp.into(),
                }],
                ..ConnectorConfig::default()
            });
        });
    }

    pub(crate) fn listen_for(&self, address: &str, port: u32) {
        self.configure(|config| {
            config.listeners.push(ListenerConfig {
                name: address.into(),
                address: address.into(),
                host: "127.0.0.1".into(),
                ports: vec![ListenerPort {
                    port,
                    local_port: 0,
                    fallback_port: 0,
                    protocol: Protocol::Tcp.into(),
                }],
                automatic: false,
            });
        });
    }

    /// Waits until the router reports what `found` looks for.
    pub(crate) async fn until<T>(
        &mut self,
        what: &str,
        mut found: impl FnMut(&RouterStatus) -> Option<T>,
    ) -> T {
        let name = self.name;
        let search = async {
            loop {
                if let Some(found) = found(&self.status.borrow_and_update()) {
                    return found;
                }
                self.status.changed().await.unwrap();
            }
        };
        match time::timeout(SOON, search).await {
            Ok(found) => found,
            Err(_) => panic!("{name}: no {what} in {:#?}", *self.status.borrow()),
        }
    }

    pub(crate) async fn order(&self, message: to_router::Message) {
        self.orders.send(message).await.unwrap();
    }
}

fn endorsement(issuer: &SiteIdentity, subject: SiteId) -> Record {
    issuer.endorsement(&EndorsementDraft {
        subject,
        membership: Membership::Member,
        scope: None,
        may_endorse: true,
        sequence: 1,
        valid_until_unix_s: clock::unix_s() + i64::from(STATEMENT_VALIDITY_S),
    })
}

impl Brain {
    async fn run(mut self, mut socket: FakeController) {
        let mut attachment = socket.attached().await;
        loop {
            self.welcome(&attachment).await;
            attachment = tokio::select! {
                next = socket.attached() => next,
                () = self.serve(attachment) => socket.attached().await,
            };
        }
    }

    async fn welcome(&mut self, attachment: &Attachment) {
        if attachment.attach.boot_epoch == 0 {
            self.boot_epoch += 1;
        }
        attachment
            .try_send(to_router::Message::Welcome(Welcome {
                boot_epoch: self.boot_epoch,
                site_secret: vec![3; 32],
                site_id: self.identity.site_id().0.to_vec(),
                site_name: self.name.into(),
                network_id: self.founder.0.to_vec(),
            }))
            .await;
    }

    async fn serve(&mut self, mut attachment: Attachment) {
        self.configuration.mark_changed();
        let mut version = attachment.attach.config_version;
        loop {
            tokio::select! {
                message = attachment.next() => match message {
                    None => return,
                    Some(from_router::Message::CertificateRequest(request)) => {
                        let issued = self.ca
                            .issue_router(&request.csr, "router", &SystemRandom::new(), clock::unix_s())
                            .unwrap();
                        let chain = issued.chain.iter().map(|der| der.to_vec()).collect();
                        let not_after_unix_s = issued.not_after_unix_s;
                        let certificate = Certificate { chain, not_after_unix_s };
                        attachment.try_send(to_router::Message::Certificate(certificate)).await;
                    }
                    Some(from_router::Message::Status(status)) => {
                        self.status.send_replace(status);
                    }
                    Some(from_router::Message::Applied(applied)) => {
                        assert!(applied.problems.is_empty(), "{applied:?}");
                    }
                    // The test may have no use for it; then the queue fills and the rest is dropped.
                    Some(other) => drop(self.answers.try_send(other)),
                },
                Ok(()) = self.configuration.changed() => {
                    version += 1;
                    let config = self.configuration.borrow_and_update().clone();
                    for chunk in config::snapshot(version, &config) {
                        attachment.try_send(to_router::Message::Snapshot(chunk)).await;
                    }
                }
                Some(order) = self.orders.recv() => attachment.try_send(order).await,
            }
        }
    }
}
