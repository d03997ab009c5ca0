//! The controller as its neighbours see it: a router that attaches, a site that redeems a token.

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

mod parting;
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
    rpc::ApplyRequest { resources: vec![resource], dry_run: false }
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

#[tokio::test]
async fn a_token_links_two_sites() {
    let hub = issuer();
    let branch = Site::start("branch", None);
    let token = hub.token(1);
    let own = client::redeem(&hub.controller, &token, &Wish::default()).await;
    assert!(matches!(own, Err(RedeemError::OwnToken)));
    let redeemed = client::redeem(&branch.controller, &token, &Wish::default()).await.unwrap();
    assert_eq!(redeemed.link, "hub");
    // The answer may have been lost: the same again is fine.
    client::redeem(&branch.controller, &token, &Wish::default()).await.unwrap();
    {
        let (hub, branch) = (hub.controller.site, branch.controller.state());
        assert_eq!(branch.site.network, hub.to_string());
        assert!(branch.endorsed.contains_key(&hub) && branch.resources.links.len() == 1);
        assert!(branch.learned.iter().count() >= 2, "statement and endorsement of the hub");
    }
    assert!(hub.controller.state().endorsed.contains_key(&branch.controller.site));
    for (site, peer) in [(&hub, "branch"), (&branch, "hub")] {
        let stored = Store::new(site.paths.clone()).load().unwrap();
        let learned = LearnedRecords::new(site.controller.site, stored.learned);
        assert!(learned.statements().any(|of| of.name == peer), "power may be cut from now on");
    }

    let third = Site::start("third", None);
    let used = client::redeem(&third.controller, &token, &Wish::default()).await.unwrap_err();
    assert!(used.to_string().contains("used by another site"), "{used}");
    // The branch belongs to the hub's network now; a third one's token needs --merge.
    let other = issuer();
    let foreign = client::redeem(&branch.controller, &other.token(1), &Wish::default()).await;
    assert!(matches!(foreign, Err(RedeemError::OtherNetwork { .. })));
    for site in [hub, branch, third, other] {
        site.stop().await;
    }
}

#[tokio::test]
async fn what_is_no_skein_endpoint_is_named() {
    let web = listener();
    let addr = web.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = web.accept().await {
            // The client may be gone already.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let hub = Site::start("hub", Some(addr));
    let branch = Site::start("branch", None);
    let error =
        client::redeem(&branch.controller, &hub.token(1), &Wish::default()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&addr.to_string()) && text.contains("not a Skein endpoint"), "{text}");
    assert!(branch.controller.state().resources.links.is_empty());

    let closed = listener().local_addr().unwrap();
    let gone = Site::start("gone", Some(closed));
    let error =
        client::redeem(&branch.controller, &gone.token(1), &Wish::default()).await.unwrap_err();
    assert!(error.to_string().contains("TCP refused"), "{error}");
    for site in [hub, branch, gone] {
        site.stop().await;
    }
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

#[test]
fn of_a_thousand_redemptions_at_once_one_succeeds() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    let token = controller.create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
    let claims: Vec<VerifiedClaim> =
        (0..1_000).map(|_| claim(&controller, &identity(), &token)).collect();
    let accepted = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for claims in claims.chunks(125) {
            let (controller, accepted) = (&controller, &accepted);
            scope.spawn(move || {
                for claim in claims {
                    match reason(&controller.redeemed(claim)) {
                        None => drop(accepted.fetch_add(1, Ordering::SeqCst)),
                        Some(reason) => assert_eq!(reason, Reason::UsedUp),
                    }
                }
            });
        }
    });
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
    assert_eq!(Store::new(paths).load().unwrap().endorsed.len(), 1);
}

#[test]
fn what_was_answered_was_on_disk_wherever_it_fills_up() {
    let (first, second) = (identity(), identity());
    let mut outcomes = BTreeSet::new();
    for writes in 0..6 {
        let (_dir, paths) = listening();
        let token =
            silent(&paths, None).create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
        let full = silent(&paths, Some(FullAfter(AtomicUsize::new(writes))));
        let answer = full.redeemed(&claim(&full, &first, &token));
        // The machine stops here. What is on disk decides.
        let restarted = silent(&paths, None);
        let consumed = restarted.state().grants.values().any(|grant| !grant.redemptions.is_empty());
        match reason(&answer) {
            None => assert!(consumed && restarted.state().endorsed.contains_key(&first.site_id())),
            Some(reason) => assert_eq!(reason, Reason::Unavailable),
        }
        outcomes.insert(reason(&answer).is_none());
        let again = restarted.redeemed(&claim(&restarted, &first, &token));
        assert_eq!(reason(&again), None, "a lost answer burns nothing ({writes} writes)");
        let other = restarted.redeemed(&claim(&restarted, &second, &token));
        assert_eq!(reason(&other), Some(Reason::UsedUp));
    }
    assert_eq!(outcomes.len(), 2, "both ends of the race were seen");
}

#[test]
fn a_redemption_outlives_a_change_that_was_not_finished() {
    let (_dir, paths) = listening();
    // The journal of the new token and the first of its files find room, the second does not.
    let disk = Arc::new(FullAfter(AtomicUsize::new(2)));
    let loaded = Store::new(paths.clone()).load().unwrap();
    let hub = Controller::new(Store::with_disk(paths.clone(), Arc::clone(&disk) as _), loaded);
    let token = hub.create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
    assert!(paths.state().join("apply.journal").exists());
    // Somebody frees some space.
    disk.0.store(usize::MAX, Ordering::SeqCst);
    assert_eq!(reason(&hub.redeemed(&claim(&hub, &identity(), &token))), None);
    let restarted = silent(&paths, None);
    let other = restarted.redeemed(&claim(&restarted, &identity(), &token));
    assert_eq!(reason(&other), Some(Reason::UsedUp));
    assert_eq!(restarted.state().endorsed.len(), 1);
}

#[test]
fn apply_is_all_or_nothing() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    let mut request = connector("good");
    request.resources.push(rpc::Resource {
        kind: "Connector".into(),
        name: "bad".into(),
        json: connector("bad").resources[0].json.replace("5432", "70000"),
        ..Default::default()
    });
    let error = controller.apply(request).unwrap_err();
    assert!(error.message().contains("bad") && error.message().contains("port"), "{error}");
    assert!(controller.state().resources.connectors.is_empty());

    let full = silent(&paths, Some(FullAfter(AtomicUsize::new(0))));
    let error = full.apply(connector("db")).unwrap_err();
    assert!(error.message().contains("disk is full"), "{error}");
    assert!(full.state().resources.connectors.is_empty());

    let actions = |reply: rpc::ApplyReply| reply.changes[0].action.clone();
    assert_eq!(actions(controller.apply(connector("db")).unwrap()), "created");
    assert_eq!(actions(controller.apply(connector("db")).unwrap()), "unchanged");
    assert_eq!(controller.get_resources("connectors", "db").unwrap().len(), 1);
    assert!(controller.get_resources("connector", "other").is_err());
}
