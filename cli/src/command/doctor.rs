//! `skctl doctor`

use std::io::IsTerminal as _;

use clap::Args;
use skein_api::status::DoctorFinding;
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
        Ok(client) => ask(global, client, args.address.unwrap_or_default()).await?,
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
    address: String,
) -> Result<Vec<DoctorFinding>, Failure> {
    let mut progress = Progress::start(global, "checking");
    let mut stream = client.raw().doctor(DoctorRequest { address }).await?.into_inner();
    let mut findings = Vec::new();
    while let Some(document) = stream.message().await? {
        let finding: DoctorFinding = client::parse(&document.json)?;
        progress.step(format!("checked {}", output::printable(&finding.check)));
        findings.push(finding);
    }
    Ok(findings)
}

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
