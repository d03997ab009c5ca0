//! `skctl demo`: the whole product on loopback, with a transit killed under a download.
//!
//! Made of the same calls as the commands: what the demo shows is what users get.

mod download;
mod sites;

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use skein_api::{
    ConnectorPort, ConnectorSpec, Manifest, Protocol, Resource,
    status::{ServiceRow, TraceReport},
};

use crate::{
    args::Global,
    clock,
    error::Failure,
    output::{self, Show},
    progress::Progress,
};

use download::{Download, Server};
use sites::Sites;

/// The address that is served.
const ADDRESS: &str = "files.demo";
/// Its port.
const PORT: u16 = 8080;
/// How far the download is when the transit dies.
const KILL_AT_PERCENT: u64 = 30;
/// How long routes may take to appear; a tenth of it is usual.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the sites are asked whether they are there yet.
const POLL: Duration = Duration::from_millis(50);

/// Shows the whole thing on this machine: four sites, a download, and a transit killed under it
///
/// Needs no privileges, talks to loopback only, removes everything it made. Two leaf sites are joined by two transits; a
/// file is served at one leaf and downloaded at the other; the router that carries it is killed in the middle.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl demo\n  skctl demo --size 1024 -o json")]
pub(crate) struct Demo {
    /// Size of the download in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=65536))]
    size: u32,
    /// How long the download takes when nothing happens, in seconds
    #[arg(long, value_name = "S", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
}

/// What happened.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    bytes: u64,
    sha256: String,
    intact: bool,
    killed: String,
    path_before: Vec<String>,
    path_after: Vec<String>,
    stall_ms: u64,
    download_ms: u64,
    total_ms: u64,
}

pub(crate) async fn run(global: &Global, args: Demo) -> Result<(), Failure> {
    let mut story = Story { global, chapter: 0 };
    let mut sites = Sites::new()?;
    let result = tell(global, &args, &mut story, &mut sites).await;
    if result.is_err() && global.verbose {
        sites.show_logs(global);
    }
    let mut progress = Progress::start(global, "cleaning up");
    progress.step("ending the processes and removing the files");
    drop(sites);
    progress.finish();
    let report = result?;
    output::show(global, &report)?;
    if report.intact { Ok(()) } else { Err(Failure::new("the download was damaged")) }
}

async fn tell(
    global: &Global,
    args: &Demo,
    story: &mut Story<'_>,
    sites: &mut Sites,
) -> Result<Report, Failure> {
    let began = clock::instant();
    story.chapter(
        "Four sites on this machine: leaves demo-a and demo-b, transits demo-t1 and demo-t2",
    );
    story.detail("each has its own identity, controller and router; the leaves listen nowhere");
    let mut progress = Progress::start(global, "creating and starting the sites");
    sites.start(&mut progress).await?;
    story.chapter("Links: each leaf redeems a token of each transit");
    sites.link(&mut progress).await?;
    progress.finish();
    let server =
        Server::start(u64::from(args.size) << 20, Duration::from_secs(args.seconds.into())).await?;
    story.chapter(&format!("demo-b serves {ADDRESS}:{PORT}, demo-a gets a local endpoint for it"));
    expose(sites, server.port()).await?;
    let endpoint = endpoint(sites).await?;
    story.detail(&format!("at demo-a it is {endpoint}"));
    story.chapter(&format!("A client at demo-a downloads {} MiB through it", args.size));
    let before = path(sites).await?;
    story.detail(&format!("path: {}", shown(&before)));
    let transit = before.first().cloned().ok_or_else(|| Failure::new("the path has no transit"))?;
    let mut progress = Progress::start(global, "downloading");
    let mut download = Download::start(&endpoint, server.len()).await?;
    let download_began = clock::instant();
    download.read_to(server.len() / 100 * KILL_AT_PERCENT, &mut progress).await?;
    let pid = sites.kill_router(&transit).await?;
    story.chapter(&format!(
        "kill -9 {pid}: the router of {transit}, which carries the download, is gone"
    ));
    download.forget_stall();
    download.read_to(server.len(), &mut progress).await?;
    let download_ms = millis(download_began.elapsed());
    progress.finish();
    let after = path(sites).await?;
    story.detail(&format!("path: {}", shown(&after)));
    let (received, sent) = (download.sha256(), server.sha256());
    Ok(Report {
        bytes: server.len(),
        intact: received == sent,
        sha256: received,
        killed: transit,
        path_before: before,
        path_after: after,
        stall_ms: millis(download.stall()),
        download_ms,
        total_ms: millis(began.elapsed()),
    })
}

async fn expose(sites: &Sites, target_port: u16) -> Result<(), Failure> {
    let port = ConnectorPort {
        port: u32::from(PORT),
        target_port: Some(u32::from(target_port)),
        protocol: Protocol::Tcp,
    };
    let connector = Manifest::new("files", ConnectorSpec::new(ADDRESS, vec![port]));
    let mut client = sites.client("demo-b").await?;
    client.apply(&[Resource::Connector(connector)], false).await?;
    Ok(())
}

/// Where to connect at demo-a, once there is a path.
async fn endpoint(sites: &Sites) -> Result<String, Failure> {
    let mut client = sites.client("demo-a").await?;
    let deadline = clock::instant() + ROUTE_TIMEOUT;
    let mut last = "demo-a has not heard of it".to_owned();
    while clock::instant() < deadline {
        let services: Vec<ServiceRow> = client.query("services").await?;
        if let Some(service) = services.into_iter().find(|service| service.address == ADDRESS) {
            let bound = service.endpoints.iter().find(|endpoint| !endpoint.bound.is_empty());
            match bound {
                Some(endpoint) if service.state == "ready" => return Ok(endpoint.bound.clone()),
                _ => last = format!("{}: {}", service.state, service.message),
            }
        }
        clock::sleep(POLL).await;
    }
    Err(Failure::timeout(format_args!("{ADDRESS} does not become usable at demo-a")).because(last))
}

/// Names of the sites a new flow would pass now.
async fn path(sites: &Sites) -> Result<Vec<String>, Failure> {
    let mut client = sites.client("demo-a").await?;
    let report: TraceReport =
        client.trace(ADDRESS.to_owned(), u32::from(PORT), Protocol::Tcp).await?;
    let chosen = report.candidates.into_iter().find(|candidate| candidate.chosen);
    let path =
        chosen.and_then(|candidate| candidate.paths.into_iter().next()).ok_or_else(|| {
            let why = if report.error.is_empty() { report.why } else { report.error };
            Failure::new("there is no path").because(why)
        })?;
    Ok(path.hops.into_iter().map(|hop| hop.site).collect())
}

fn shown(path: &[String]) -> String {
    output::printable(&format!("demo-a > {}", path.join(" > ")))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Tells people what happens; programs get the report only.
struct Story<'a> {
    global: &'a Global,
    chapter: u32,
}

impl Story<'_> {
    fn chapter(&mut self, text: &str) {
        self.chapter += 1;
        self.tell(&format!("{}. {text}", self.chapter));
    }

    fn detail(&self, text: &str) {
        self.tell(&format!("   {text}"));
    }

    fn tell(&self, text: &str) {
        if !self.global.structured() {
            output::note(self.global, text);
        }
    }
}

impl Show for Report {
    fn table(&self, _: bool) -> String {
        let result = if self.intact { "every byte arrived once" } else { "DAMAGED" };
        format!(
            "\nDownloaded {} MiB in {}.{} s: {result} (SHA-256 {}).\n\
             The router of {} was killed on the way; the download stalled for {} ms and went on.\n\
             Before: demo-a > {}\nAfter:  demo-a > {}\n\
             Nothing is left behind. Everything took {} s.\n",
            self.bytes >> 20,
            self.download_ms / 1_000,
            self.download_ms % 1_000 / 100,
            self.sha256.get(..16).unwrap_or(&self.sha256),
            self.killed,
            self.stall_ms,
            self.path_before.join(" > "),
            self.path_after.join(" > "),
            self.total_ms.div_ceil(1_000),
        )
    }

    fn names(&self) -> Vec<String> {
        vec![self.sha256.clone()]
    }
}
