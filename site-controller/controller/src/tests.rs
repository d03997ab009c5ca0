//! The controller as its neighbours see it: here a router that attaches.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clap::Parser as _;
use hyper_util::rt::TokioIo;
use skein_api::{ConnectorPort, ConnectorSpec, Manifest, Protocol, Resource};
use skein_trust::{
    ClaimDraft, Code, EndorsementDraft, KeyRequest, SiteIdentity, StatementDraft, VerifiedClaim,
    claim_request, verify_claim,
};
use skein_wire::{
    config::{self, Assembler},
    proto::{
        claim::{claim_refused::Reason, claim_response::Outcome},
        control::{
            Attach, CertificateRequest, FromRouter, NetworkAddress, RouterConfig, RouterStatus,
            ToRouter, control_client::ControlClient, from_router, to_router,
        },
        routing, site as rpc,
        trust::Membership,
    },
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use crate::{
    claim::client::{self, RedeemError, Wish},
    clock,
    controller::Controller,
    learned::LearnedRecords,
    paths::Paths,
    process::{Args, Sockets, serve},
    site::{InitOptions, create},
    store::{Store, tests::FullAfter},
};

mod applying;
mod parting;
mod redeeming;
mod trust;

const PATIENCE: Duration = Duration::from_secs(30);

/// A controller in this process.
struct Site {
    controller: Arc<Controller>,
    paths: Paths,
    _dir: tempfile::TempDir,
    tasks: JoinSet<()>,
    /// Ends with the site.
    splices: JoinSet<()>,
}

impl Site {
    /// A site called `name` that says it can be reached at `advertise`.
    fn start(name: &str, advertise: Option<SocketAddr>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
        let options = InitOptions {
            name: Some(name.into()),
            listen: Some(advertise.map(|_| "127.0.0.1:0".parse().unwrap()).into_iter().collect()),
            advertise: advertise.map(|addr| vec![addr.to_string()]),
            ..InitOptions::default()
        };
        create(&paths, &options).unwrap();
        Self::of(paths, dir)
    }

    fn of(paths: Paths, dir: tempfile::TempDir) -> Self {
        let store = Store::new(paths.clone());
        let controller = Controller::new(store.clone(), store.load().unwrap());
        let sockets = Sockets::open(&paths).unwrap();
        let args =
            Args::parse_from(["skein-controller", "--state", "/", "--runtime", "/", "--no-router"]);
        let mut tasks = JoinSet::new();
        let serving = Arc::clone(&controller);
        tasks.spawn(async move { serve(serving, sockets, &args).await.unwrap() });
        Self { controller, paths, _dir: dir, tasks, splices: JoinSet::new() }
    }

    /// Ends the controller in order; the state stays.
    async fn stop(mut self) -> (Paths, tempfile::TempDir) {
        self.controller.shutdown.cancel();
        while self.tasks.join_next().await.is_some() {}
        (self.paths, self._dir)
    }

    /// Does what a router does with claims: passes bytes on. Returns where.
    fn splice_claims(listener: TcpListener, socket: std::path::PathBuf, tasks: &mut JoinSet<()>) {
        tasks.spawn(async move {
            let mut splices = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let socket = socket.clone();
                splices.spawn(async move {
                    if let Ok(mut far) = UnixStream::connect(&socket).await {
                        // Either end may go first.
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        });
    }

    fn token(&self, uses: u32) -> String {
        let request = rpc::CreateTokenRequest { uses, ..Default::default() };
        self.controller.create_token(&request).unwrap().token
    }
}

fn listener() -> TcpListener {
    let std = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    std.set_nonblocking(true).unwrap();
    TcpListener::from_std(std).unwrap()
}

/// A site with whatever a router needs to pass claims on.
fn issuer() -> Site {
    let port = listener();
    let mut site = Site::start("hub", Some(port.local_addr().unwrap()));
    Site::splice_claims(port, site.paths.claim_socket(), &mut site.splices);
    site
}

/// A router's end of an attachment.
struct Router {
    send: mpsc::Sender<FromRouter>,
    receive: Streaming<ToRouter>,
    config: RouterConfig,
    version: u64,
    assembler: Assembler,
}

impl Router {
    async fn attach(paths: &Paths, attach: Attach) -> Self {
        let socket = paths.control_socket();
        let channel = Endpoint::from_static("http://controller.invalid")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .unwrap();
        let (send, queue) = mpsc::channel(8);
        let attach = Attach { router_name: "router".into(), pid: std::process::id(), ..attach };
        let first = FromRouter { message: Some(from_router::Message::Attach(attach)) };
        send.send(first).await.unwrap();
        let receive = ControlClient::new(channel)
            .attach(ReceiverStream::new(queue))
            .await
            .unwrap()
            .into_inner();
        Self {
            send,
            receive,
            config: RouterConfig::default(),
            version: 0,
            assembler: Assembler::default(),
        }
    }

    async fn next(&mut self) -> to_router::Message {
        let message = tokio::time::timeout(PATIENCE, self.receive.message()).await.unwrap();
        message.unwrap().unwrap().message.unwrap()
    }

    async fn welcome(&mut self) -> u64 {
        let to_router::Message::Welcome(welcome) = self.next().await else { panic!("no welcome") };
        assert_eq!(welcome.site_secret.len(), 32);
        welcome.boot_epoch
    }

    async fn tell(&self, message: from_router::Message) {
        self.send.send(FromRouter { message: Some(message) }).await.unwrap();
    }

    /// Takes configurations until one satisfies `wanted`.
    async fn configured(&mut self, wanted: impl Fn(&RouterConfig) -> bool) {
        loop {
            match self.next().await {
                to_router::Message::Snapshot(chunk) => {
                    if let Some((version, config)) = self.assembler.push(&chunk).unwrap() {
                        (self.version, self.config) = (version, config);
                    }
                }
                to_router::Message::Delta(delta) => {
                    self.config = config::apply(self.version, &self.config, &delta).unwrap();
                    self.version = delta.version;
                }
                other => panic!("unexpected {other:?}"),
            }
            if wanted(&self.config) {
                return;
            }
        }
    }
}

fn connector(name: &str) -> rpc::ApplyRequest {
    let port = ConnectorPort { port: 5432, target_port: None, protocol: Protocol::Tcp };
    let resource = Resource::Connector(Manifest::new(name, ConnectorSpec::new(name, vec![port])));
    let resource = rpc::Resource {
        kind: "Connector".into(),
        name: name.into(),
        json: resource.to_json(),
        ..Default::default()
    };
    rpc::ApplyRequest { resources: vec![resource], ..Default::default() }
}

fn seen(address: &str) -> RouterStatus {
    let port = routing::Port { port: 80, protocol: routing::Protocol::Tcp.into() };
    let provider = skein_wire::proto::control::AddressProvider {
        site_id: vec![9; 32],
        ports: vec![port],
        reachable: true,
        ..Default::default()
    };
    let addresses = vec![NetworkAddress { address: address.into(), providers: vec![provider] }];
    RouterStatus { addresses, ..RouterStatus::default() }
}

#[tokio::test]
async fn a_router_gets_epoch_certificate_and_configuration() {
    let site = Site::start("hub", None);
    let mut router = Router::attach(&site.paths, Attach::default()).await;
    let first = router.welcome().await;
    let key = KeyRequest::generate().unwrap();
    router.configured(|config| config.settings.is_some()).await;
    let request = CertificateRequest { csr: key.csr().to_vec() };
    router.tell(from_router::Message::CertificateRequest(request)).await;
    let to_router::Message::Certificate(certificate) = router.next().await else { panic!("none") };
    assert_eq!(certificate.chain.len(), 2);
    let chain = certificate.chain.into_iter().map(Into::into).collect();
    let identity = skein_trust::RouterIdentity::new(chain, key.private_key()).unwrap();
    assert_eq!((identity.site(), identity.name()), (site.controller.site, "router"));

    site.controller.apply(connector("db")).unwrap();
    router.configured(|config| config.connectors.len() == 1 && !config.listeners.is_empty()).await;
    let delete = |now| rpc::DeleteRequest {
        kind: "connector".into(),
        name: "db".into(),
        now,
        ..Default::default()
    };
    site.controller.delete(&delete(false)).unwrap();
    router.configured(|config| config.connectors[0].draining && !config.connectors[0].reset).await;
    site.controller.delete(&delete(true)).unwrap();
    router.configured(|config| config.connectors[0].reset).await;

    let mut again = Router::attach(&site.paths, Attach::default()).await;
    let second = again.welcome().await;
    assert!(second > first, "a boot has a later epoch");
    let (paths, dir) = site.stop().await;
    let site = Site::of(paths, dir);
    let mut third = Router::attach(&site.paths, Attach::default()).await;
    assert!(third.welcome().await > second, "also after the controller restarted");
    let mut same =
        Router::attach(&site.paths, Attach { boot_epoch: second, ..Attach::default() }).await;
    assert_eq!(same.welcome().await, second, "a running router keeps its epoch");
    site.stop().await;
}

#[tokio::test]
async fn a_router_that_outlived_its_controller_keeps_its_listeners() {
    let site = Site::start("hub", None);
    let mut router = Router::attach(&site.paths, Attach::default()).await;
    let boot_epoch = router.welcome().await;
    router.tell(from_router::Message::Status(seen("web"))).await;
    router.configured(|config| config.listeners.len() == 1).await;
    let (before, version) = (router.config.clone(), router.version);
    let (paths, dir) = site.stop().await;

    let site = Site::of(paths, dir);
    let attach = Attach {
        boot_epoch,
        config_version: version,
        config_sha256: config::hash(&before).to_vec(),
        ..Attach::default()
    };
    let mut router = Router::attach(&site.paths, attach).await;
    (router.config, router.version) = (before.clone(), version);
    router.welcome().await;
    router.tell(from_router::Message::Status(seen("web"))).await;
    site.controller.apply(connector("db")).unwrap();
    router
        .configured(|config| {
            assert!(config.listeners.iter().any(|listener| listener.address == "web"));
            config.connectors.len() == 1
        })
        .await;
    let endpoint = |config: &RouterConfig| {
        config.listeners.iter().find(|l| l.address == "web").map(|l| l.host.clone())
    };
    assert_eq!(endpoint(&router.config), endpoint(&before), "endpoints are kept");
    site.stop().await;
}

/// A proven claim of a new site.
fn claim(issuer: &Controller, identity: &SiteIdentity, token: &str) -> VerifiedClaim {
    let token: skein_api::Token = token.parse().unwrap();
    let now = clock::unix_s();
    let statement = identity.statement(&StatementDraft {
        epoch: 1,
        name: "leaf".into(),
        network_id: Some(issuer.site),
        expires_unix_s: now + 600,
        ..StatementDraft::default()
    });
    let endorsement = identity.endorsement(&EndorsementDraft {
        subject: issuer.site,
        membership: Membership::Member,
        scope: None,
        may_endorse: true,
        sequence: 1,
        valid_until_unix_s: now + 600,
    });
    let code = Code::from_bytes(token.code.expose()).unwrap();
    let draft = ClaimDraft {
        code: &code,
        issuer: issuer.site,
        statement,
        endorsement,
        merge: false,
        unix_s: now,
    };
    let request = prost::Message::encode_to_vec(&claim_request(identity, draft, &[7; 32]));
    verify_claim(&request, issuer.site, &[7; 32], now).unwrap()
}

fn identity() -> SiteIdentity {
    SiteIdentity::generate(&aws_lc_rs::rand::SystemRandom::new()).unwrap()
}

/// A controller that nobody talks to, on a given disk.
fn silent(paths: &Paths, disk: Option<FullAfter>) -> Arc<Controller> {
    let store = Store::new(paths.clone());
    let loaded = store.load().unwrap();
    let store = disk.map_or(store, |disk| Store::with_disk(paths.clone(), Arc::new(disk)));
    Controller::new(store, loaded)
}

fn listening() -> (tempfile::TempDir, Paths) {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
    let listen = Some(vec!["127.0.0.1:0".parse().unwrap()]);
    let options = InitOptions { name: Some("hub".into()), listen, ..InitOptions::default() };
    create(&paths, &options).unwrap();
    (dir, paths)
}

fn reason(outcome: &Outcome) -> Option<Reason> {
    match outcome {
        Outcome::Accepted(_) => None,
        Outcome::Refused(refused) => Some(refused.reason()),
    }
}
