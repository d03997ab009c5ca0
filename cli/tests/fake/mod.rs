//! A controller that answers with fixed documents and remembers what it was asked.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use skein_api::{
    AutoListen, ConnectorPort, ConnectorSpec, ListenerPort, ListenerSpec, Manifest, Phase,
    Protocol, Resource, ResourceStatus, SiteSpec, parse_json, status,
};
use skein_wire::proto::site::{self, site_server};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

/// What the controller hands out; not a usable token.
pub(crate) const TOKEN: &str = "SKEIN-TOKEN-1\nsecret\nEND 00000000\n";

/// What was asked.
#[derive(Debug, Default)]
struct Asked {
    applied: Vec<Resource>,
    deleted: Vec<String>,
    redeemed: usize,
}

/// A running controller; its socket is where `skctl` looks under [`Fake::dir`].
#[derive(Debug)]
pub(crate) struct Fake {
    dir: TempDir,
    asked: Arc<Mutex<Asked>>,
    /// Dropping it ends the server.
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("skctl-").tempdir().unwrap();
        let socket = dir.path().join("default/run/site.sock");
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let asked = Arc::new(Mutex::new(Asked::default()));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (bound, is_bound) = std::sync::mpsc::channel();
        let service = Service { asked: asked.clone() };
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = UnixListener::bind(socket).unwrap();
                bound.send(()).unwrap();
                tonic::transport::Server::builder()
                    .add_service(site_server::SiteServer::new(service))
                    .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                        // An error is the sender being dropped, which is the end as well.
                        let _ = stopped.await;
                    })
                    .await
                    .unwrap();
            });
        });
        is_bound.recv().unwrap();
        Self { dir, asked, _stop: stop }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.run_with_input(args, b"")
    }

    pub(crate) fn run_with_input(&self, args: &[&str], input: &[u8]) -> Output {
        skctl(self.dir.path(), args, input)
    }

    /// The resources of the last application.
    pub(crate) fn applied(&self) -> Vec<Resource> {
        self.asked.lock().unwrap().applied.clone()
    }

    pub(crate) fn deleted(&self) -> Vec<String> {
        self.asked.lock().unwrap().deleted.clone()
    }

    pub(crate) fn redeemed(&self) -> usize {
        self.asked.lock().unwrap().redeemed
    }
}

/// Runs the program with its state under `home`.
pub(crate) fn skctl(home: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_skctl"))
        .args(args)
        .env("SKEIN_HOME", home)
        .env_remove("SKEIN_NAMESPACE")
        .env("NO_COLOR", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        // A program that has seen enough closes its end.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// What the site has.
pub(crate) fn resources() -> Vec<Resource> {
    let site = SiteSpec { auto_listen: AutoListen("all".into()), ..SiteSpec::default() };
    let listener = ListenerSpec {
        address: "web.prod".into(),
        host: "127.0.0.1".into(),
        ports: vec![ListenerPort { port: 80, local_port: Some(8080), protocol: Protocol::Tcp }],
    };
    let port = ConnectorPort { port: 5432, target_port: None, protocol: Protocol::Tcp };
    let mut connector =
        Resource::Connector(Manifest::new("db", ConnectorSpec::new("db", vec![port])));
    connector.set_status(Some(ResourceStatus {
        phase: Phase::Error,
        message: "127.0.0.1:5432 refuses connections; start the server\u{1b}[2J".into(),
        conditions: Vec::new(),
    }));
    vec![
        Resource::Site(Manifest::new("here", site)),
        Resource::Listener(Manifest::new("web", listener)),
        connector,
    ]
}

fn document(value: &impl serde::Serialize) -> Response<site::Document> {
    Response::new(site::Document { json: serde_json::to_string(value).unwrap() })
}

fn site_status() -> status::SiteStatus {
    let router = status::RouterStatus {
        name: "router".into(),
        id: "aaaabbbb".into(),
        pid: 42,
        version: "0.1.0".into(),
        state: "attached".into(),
        boot_epoch: 3,
        sockets: vec![
            status::SocketStatus { address: "[::]:7443".into(), error: String::new() },
            status::SocketStatus {
                address: "192.0.2.1:7443".into(),
                error: "no such address".into(),
            },
        ],
        metrics: "127.0.0.1:40001".into(),
        flows_active: 2,
        flows_total: 10,
        bytes_sent: 1_536,
        bytes_received: 3 << 30,
        memory_used_bytes: 65_536,
        ..status::RouterStatus::default()
    };
    let problem = status::Problem {
        what: "link hub is down".into(),
        why: "203.0.113.7:7443 does not answer".into(),
        fix: "open UDP and TCP port 7443 there".into(),
    };
    status::SiteStatus {
        name: "here".into(),
        namespace: "default".into(),
        site_id: "heresiteidheresiteid".into(),
        network_id: "networkidnetworkid".into(),
        role: "interior".into(),
        platform: "linux".into(),
        service: "none".into(),
        controller: status::ProcessStatus {
            pid: 41,
            version: "0.1.0".into(),
            since: String::new(),
        },
        routers: vec![router],
        advertise: vec!["203.0.113.9:7443".into()],
        links_up: 1,
        links_total: 2,
        sites: 3,
        services: 2,
        connectors: 1,
        problems: vec![problem],
    }
}

fn links() -> Vec<status::LinkRow> {
    let up = status::LinkRow {
        name: "branch".into(),
        incoming: true,
        peer: "branch\u{1b}[31m".into(),
        peer_id: "branchid".into(),
        peer_router: "router".into(),
        state: "up".into(),
        carrier: "udp".into(),
        carrier_reason: String::new(),
        remote: "198.51.100.4:50321".into(),
        local: "203.0.113.9:7443".into(),
        rtt_us: 12_345,
        cost: 1,
        mtu: 1_452,
        bytes_sent: 1_000,
        bytes_received: 2_000_000,
        ..status::LinkRow::default()
    };
    let attempt =
        status::Attempt { endpoint: "hub.example:7443".into(), outcome: "UDP unanswered".into() };
    let down = status::LinkRow {
        name: "hub".into(),
        peer: "hub".into(),
        state: "connecting".into(),
        cost: 10,
        error: "no endpoint answers".into(),
        attempts: vec![attempt],
        ..status::LinkRow::default()
    };
    vec![up, down]
}

fn services() -> Vec<status::ServiceRow> {
    let port = |port| status::ServicePort { port, protocol: Protocol::Tcp };
    let db = status::ServiceRow {
        address: "db".into(),
        ports: vec![port(5432), status::ServicePort { port: 53, protocol: Protocol::Udp }],
        local_ip: "127.70.1.2".into(),
        endpoints: vec![status::Endpoint {
            port: 5432,
            bound: "127.70.1.2:20001".into(),
            automatic: true,
            fallback: true,
            ..status::Endpoint::default()
        }],
        providers: vec![
            status::Provider {
                site: "here".into(),
                local: true,
                reachable: true,
                ..status::Provider::default()
            },
            status::Provider { site: "hub".into(), ..status::Provider::default() },
        ],
        state: "ready".into(),
        strategy: "balanced".into(),
        ..status::ServiceRow::default()
    };
    let web = status::ServiceRow {
        address: "web.prod".into(),
        ports: vec![port(80)],
        endpoints: vec![status::Endpoint {
            port: 80,
            listener: "web".into(),
            error: "held by nginx (pid 7)".into(),
            ..status::Endpoint::default()
        }],
        state: "unserved".into(),
        message: "no site serves it".into(),
        ..status::ServiceRow::default()
    };
    vec![db, web]
}

/// The site whose tokens are redeemed; it is in the network.
pub(crate) const ISSUER: skein_core::SiteId = skein_core::SiteId([1; 32]);

fn network() -> status::NetworkStatus {
    let link =
        status::NetworkLink { peer: "here".into(), peer_id: "r1".into(), cost: 1, rtt_us: 900 };
    let router = |reachable, hops| status::NetworkRouter {
        name: "router".into(),
        id: "r".into(),
        role: "interior".into(),
        version: "0.1.0".into(),
        reachable,
        hops,
        metric_us: 2_000,
        links: vec![link.clone()],
    };
    let site = |name: &str, local, routers| status::NetworkSite {
        name: name.into(),
        id: format!("{name}-site-id"),
        local,
        trusted: true,
        membership: "member".into(),
        routers,
        addresses: vec!["db".into()],
    };
    status::NetworkStatus {
        network_id: "networkid".into(),
        sites: vec![
            site("here", true, vec![router(true, 0)]),
            status::NetworkSite {
                id: ISSUER.to_string(),
                ..site("hub\u{202e}", false, vec![router(true, 1)])
            },
            site("gone", false, Vec::new()),
        ],
        services: services(),
        problems: Vec::new(),
    }
}

fn trace() -> status::TraceReport {
    let hop = |site: &str, link_rtt_us| status::TraceHop {
        router: "router".into(),
        router_id: "r".into(),
        site: site.into(),
        link_rtt_us,
        cost: 1,
    };
    let path = |via: &str, measured_rtt_us| status::TracePath {
        hops: vec![hop(via, 1_200), hop("dc", 8_000)],
        metric_us: 11_200,
        mtu: 1_452,
        measured_rtt_us,
    };
    let chosen = status::TraceCandidate {
        site: "dc".into(),
        chosen: true,
        note: "fewest flows".into(),
        paths: vec![path("hub", 9_400), path("hub2", 0)],
        ..status::TraceCandidate::default()
    };
    let other = status::TraceCandidate {
        site: "dc2".into(),
        note: "more flows are outstanding".into(),
        paths: vec![path("hub", 0)],
        ..status::TraceCandidate::default()
    };
    status::TraceReport {
        address: "web.prod".into(),
        port: 80,
        candidates: vec![chosen, other],
        why: "fewest outstanding flows".into(),
        error: String::new(),
    }
}

fn findings() -> Vec<status::DoctorFinding> {
    let finding = |check: &str, ok, detail: &str, fix: &str| status::DoctorFinding {
        check: check.into(),
        ok,
        detail: detail.into(),
        fix: fix.into(),
    };
    vec![
        finding("router", true, "attached for 3m", ""),
        finding("socket buffers", false, "212992 bytes", "sysctl -w net.core.rmem_max=7500000"),
    ]
}

fn tokens() -> Vec<status::TokenRow> {
    let used = status::TokenRow {
        name: "grant-1".into(),
        state: "used".into(),
        uses: 1,
        used: 1,
        cost: 1,
        redeemers: vec!["branchid".into()],
        ..status::TokenRow::default()
    };
    vec![used]
}

struct Service {
    asked: Arc<Mutex<Asked>>,
}

type Streaming<T> = ReceiverStream<Result<T, Status>>;

/// A stream of what is known already.
fn stream<T: Send + 'static>(items: Vec<T>) -> Response<Streaming<T>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(items.len().max(1));
    for item in items {
        sender.try_send(Ok(item)).unwrap_or_else(|_| panic!("the channel has room for all"));
    }
    Response::new(ReceiverStream::new(receiver))
}

fn message(resource: &Resource) -> site::Resource {
    site::Resource {
        api_version: skein_api::API_VERSION.into(),
        kind: resource.kind().to_string(),
        name: resource.name().into(),
        json: resource.to_json(),
    }
}

#[tonic::async_trait]
impl site_server::Site for Service {
    type WatchStream = Streaming<site::ResourceEvent>;
    type RedeemTokenStream = Streaming<site::Progress>;
    type DoctorStream = Streaming<site::Document>;
    type LeaveStream = Streaming<site::Progress>;
    type RestartRouterStream = Streaming<site::Progress>;

    async fn apply(
        &self,
        request: Request<site::ApplyRequest>,
    ) -> Result<Response<site::ApplyReply>, Status> {
        let resources: Vec<Resource> =
            request.into_inner().resources.iter().map(|r| parse_json(&r.json).unwrap()).collect();
        let changes = resources.iter().map(|resource| site::Change {
            kind: resource.kind().to_string(),
            name: resource.name().into(),
            action: "created".into(),
            detail: String::new(),
        });
        let changes = changes.collect();
        self.asked.lock().unwrap().applied = resources;
        Ok(Response::new(site::ApplyReply { changes }))
    }

    async fn get(
        &self,
        request: Request<site::GetRequest>,
    ) -> Result<Response<site::Resources>, Status> {
        let request = request.into_inner();
        let mut all = resources();
        all.retain(|resource| {
            (request.kind.is_empty() || resource.kind().as_str() == request.kind)
                && (request.name.is_empty() || resource.name() == request.name)
        });
        Ok(Response::new(site::Resources { resources: all.iter().map(message).collect() }))
    }

    async fn watch(
        &self,
        _: Request<site::GetRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(stream(Vec::new()))
    }

    async fn delete(
        &self,
        request: Request<site::DeleteRequest>,
    ) -> Result<Response<site::DeleteReply>, Status> {
        let request = request.into_inner();
        let now = if request.now { " now" } else { "" };
        if !request.address.is_empty() {
            if request.address != "db" {
                return Err(Status::not_found("it is not served from here; see `skctl get`"));
            }
            self.asked.lock().unwrap().deleted.push(format!("address {}{now}", request.address));
            return Ok(Response::new(site::DeleteReply::default()));
        }
        self.asked.lock().unwrap().deleted.push(format!("{}/{}{now}", request.kind, request.name));
        let notes = match request.kind.as_str() {
            "Link" => vec!["hub remains a member of the network".to_owned()],
            _ => Vec::new(),
        };
        Ok(Response::new(site::DeleteReply { notes }))
    }

    async fn create_token(
        &self,
        _: Request<site::CreateTokenRequest>,
    ) -> Result<Response<site::CreateTokenReply>, Status> {
        let reply = site::CreateTokenReply {
            token: TOKEN.into(),
            grant: "grant-1".into(),
            warnings: Vec::new(),
            uses: 1,
            expires_s: 900,
        };
        Ok(Response::new(reply))
    }

    async fn redeem_token(
        &self,
        request: Request<site::RedeemTokenRequest>,
    ) -> Result<Response<Self::RedeemTokenStream>, Status> {
        self.asked.lock().unwrap().redeemed += 1;
        let token: skein_api::Token = request.into_inner().token.parse().unwrap();
        let step =
            site::Progress { step: "waiting for the link".into(), ..site::Progress::default() };
        let done = |name: &str, error: &str, timed_out| site::Progress {
            done: true,
            error: error.into(),
            name: name.into(),
            timed_out,
            ..site::Progress::default()
        };
        Ok(stream(match token.issuer_name.as_str() {
            "refuses" => vec![step, done("", "used up; ask for another", false)],
            "sleeps" => vec![step, done("", "the link is not up", true)],
            "breaks" => vec![step],
            name => vec![step, done(name, "", false)],
        }))
    }

    async fn query(
        &self,
        request: Request<site::QueryRequest>,
    ) -> Result<Response<site::Document>, Status> {
        match request.into_inner().what.as_str() {
            "status" => Ok(document(&site_status())),
            "links" => Ok(document(&links())),
            "services" => Ok(document(&services())),
            "network" => Ok(document(&network())),
            "tokens" => Ok(document(&tokens())),
            "sockets" => Ok(document(&site_status().routers[0].sockets)),
            "version" => Ok(document(&status::VersionInfo {
                controller: "0.1.0".into(),
                routers: vec![status::RouterVersion {
                    name: "router".into(),
                    version: "0.1.0".into(),
                }],
                ..status::VersionInfo::default()
            })),
            other => Err(Status::invalid_argument(format!("unknown query {other}"))),
        }
    }

    async fn trace(
        &self,
        _: Request<site::TraceRequest>,
    ) -> Result<Response<site::Document>, Status> {
        Ok(document(&trace()))
    }

    async fn doctor(
        &self,
        _: Request<site::DoctorRequest>,
    ) -> Result<Response<Self::DoctorStream>, Status> {
        Ok(stream(findings().iter().map(|finding| document(finding).into_inner()).collect()))
    }

    async fn export_identity(
        &self,
        _: Request<site::ExportIdentityRequest>,
    ) -> Result<Response<site::ExportIdentityReply>, Status> {
        Ok(Response::new(site::ExportIdentityReply { archive: b"sealed".to_vec() }))
    }

    async fn leave(
        &self,
        _: Request<site::LeaveRequest>,
    ) -> Result<Response<Self::LeaveStream>, Status> {
        Ok(stream(Vec::new()))
    }

    async fn shutdown(
        &self,
        _: Request<site::ShutdownRequest>,
    ) -> Result<Response<site::ShutdownReply>, Status> {
        Ok(Response::new(site::ShutdownReply {}))
    }

    async fn restart_router(
        &self,
        _: Request<site::RestartRouterRequest>,
    ) -> Result<Response<Self::RestartRouterStream>, Status> {
        Ok(stream(Vec::new()))
    }
}
