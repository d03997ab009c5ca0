//! `skctl doctor`

use std::io::IsTerminal as _;

use clap::Args;
use skein_api::{
    Protocol,
    status::{DoctorFinding, TraceReport},
};
use skein_controller::Paths;
use skein_wire::proto::site::DoctorRequest;

use crate::{
    args::{Format, Global},
    client::{self, Client},
    error::Failure,
    output,
    progress::Progress,
    render::Findings,
};

/// Checks this site, or what stands between it and an address, and says how to mend each fault
///
/// Checks processes, ports, the clock against peers, each endpoint of each link over UDP and TCP, certificates, targets,
/// socket buffers and ports that local endpoints block. Exits 1 when a check fails.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl doctor\n  skctl doctor postgres")]
pub(crate) struct Doctor {
    /// Only what concerns this address
    address: Option<String>,
}

pub(crate) async fn run(global: &Global, args: Doctor) -> Result<(), Failure> {
    let paths = client::paths(global)?;
    let findings = match Client::connect_to(&paths).await {
        Ok(client) => ask(global, client, args.address.as_deref()).await?,
        Err(failure) => without_controller(&paths, &failure),
    };
    let failed = findings.iter().any(|finding| !finding.ok);
    let streams = global.output == Format::Table && std::io::stdout().is_terminal();
    let colour = streams && global.colour();
    output::show(global, &Findings { findings, colour })?;
    if failed { Err(Failure::told()) } else { Ok(()) }
}

async fn ask(
    global: &Global,
    mut client: Client,
    address: Option<&str>,
) -> Result<Vec<DoctorFinding>, Failure> {
    let mut progress = Progress::start(global, "checking");
    let mut findings = Vec::new();
    if let Some(address) = address {
        findings.push(path(&mut client, address).await?);
    }
    let request = DoctorRequest { address: address.unwrap_or_default().to_owned() };
    let mut stream = client.raw().doctor(request).await?.into_inner();
    while let Some(document) = stream.message().await? {
        let finding: DoctorFinding = client::parse(&document.json)?;
        progress.step(format!("checked {}", output::printable(&finding.check)));
        findings.push(finding);
    }
    Ok(findings)
}

/// Whether a flow to `address` would get anywhere from here.
async fn path(client: &mut Client, address: &str) -> Result<DoctorFinding, Failure> {
    let report: TraceReport = client.trace(address.to_owned(), 0, Protocol::Tcp).await?;
    let chosen = report.candidates.iter().find(|candidate| candidate.chosen);
    let (detail, fix) = match chosen {
        Some(candidate) => (format!("leads to {}", candidate.site), ""),
        None if report.error.is_empty() => (report.why.clone(), NO_PATH),
        None => (report.error.clone(), NO_PATH),
    };
    Ok(DoctorFinding {
        check: format!("path to {address}"),
        ok: chosen.is_some(),
        detail,
        fix: fix.to_owned(),
    })
}

const NO_PATH: &str =
    "see `skctl service list` for what is served, `skctl network status` for links that are down";

/// What can be told when nobody answers.
fn without_controller(paths: &Paths, failure: &Failure) -> Vec<DoctorFinding> {
    let site = DoctorFinding {
        check: "site".to_owned(),
        ok: paths.has_site(),
        detail: format!("state in {}", paths.state().display()),
        fix: if paths.has_site() { String::new() } else { "skctl init".to_owned() },
    };
    let controller = DoctorFinding {
        check: "controller".to_owned(),
        ok: false,
        detail: failure.to_string(),
        fix: if paths.has_site() { "skctl start".to_owned() } else { String::new() },
    };
    vec![site, controller]
}
