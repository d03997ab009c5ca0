//! `skctl debug dump`

use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use skein_controller::Paths;
use skein_wire::proto::site::DoctorRequest;

use crate::{
    args::Global,
    client::{self, Client},
    clock,
    command::{logs, resource},
    error::Failure,
    host::{self, LogSource},
    input,
    output::note,
    progress::Progress,
};

/// Last bytes of each log: an hour of a busy router.
const LOG_LEN_MAX: u64 = 2 * 1024 * 1024;

/// Last lines of each unit, about as much.
const JOURNAL_LINES_MAX: u32 = 10_000;

/// Helps whoever looks for a fault
#[derive(Debug, Args)]
pub(crate) struct Debug {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Dump(Dump),
}

/// Writes everything known about the site to one JSON file, without secrets
///
/// Versions, resources, status of site and network, links, services, checks, the ends of the logs. It names addresses,
/// sites and hosts; keys, codes and tokens are not in it. Works also while the controller is down.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  skctl debug dump site.json")]
struct Dump {
    /// File to write
    file: String,
    /// Replaces a file that is there
    #[arg(long)]
    force: bool,
}

pub(crate) async fn run(global: &Global, args: Debug) -> Result<(), Failure> {
    let Action::Dump(args) = args.action;
    let mut progress = Progress::start(global, "collecting");
    let paths = client::paths(global)?;
    let mut dump = Map::new();
    dump.insert("time".into(), clock::now().to_string().into());
    dump.insert("skctl".into(), env!("CARGO_PKG_VERSION").into());
    dump.insert("namespace".into(), global.namespace.clone().into());
    dump.insert("state".into(), paths.state().display().to_string().into());
    dump.insert("kernel".into(), kernel().into());
    match Client::connect_to(&paths).await {
        Ok(mut client) => collect(&mut client, &mut dump, &mut progress).await,
        Err(failure) => {
            dump.insert("controller".into(), json!({ "error": failure.to_string() }));
        }
    }
    progress.step("reading logs");
    dump.insert("logs".into(), log_tails(&paths).await.into());
    let text = crate::output::json(&dump)?;
    input::write_secret(Path::new(&args.file), text.as_bytes(), args.force)?;
    progress.finish();
    note(
        global,
        format_args!("Wrote {}. It has no secrets, but names hosts and services.", args.file),
    );
    Ok(())
}

/// The ends of the logs by what writes them; what cannot be read says why.
async fn log_tails(paths: &Paths) -> Map<String, Value> {
    let mut out = Map::new();
    let mut put = |name: &str, text: String| {
        out.insert(name.to_owned(), Value::from(text.lines().collect::<Vec<_>>()));
    };
    match host::logs(paths) {
        Ok(LogSource::Journal(units)) => {
            for (name, unit) in units {
                let text = host::journal_tail(&unit, JOURNAL_LINES_MAX).await;
                put(name, text.unwrap_or_else(|failure| failure.to_string()));
            }
        }
        Ok(LogSource::Files(files)) => {
            for (name, path) in files {
                let text = logs::tail_bytes(&path, LOG_LEN_MAX);
                put(name, text.unwrap_or_else(|error| error.to_string()));
            }
        }
        Err(failure) => put("error", failure.to_string()),
    }
    out
}

/// Asks for everything; what fails becomes part of the dump.
async fn collect(client: &mut Client, dump: &mut Map<String, Value>, progress: &mut Progress) {
    let or_error = |result: Result<Value, Failure>| {
        result.unwrap_or_else(|failure| json!({ "error": failure.to_string() }))
    };
    for what in ["version", "status", "links", "services", "network", "tokens", "sockets"] {
        progress.step(format!("asking for {what}"));
        let answer = or_error(client.query::<Value>(what).await);
        dump.insert(what.to_owned(), answer);
    }
    progress.step("asking for resources");
    let resources = client.get("", "").await.and_then(|mut resources| {
        resources.retain(|resource| resource.kind() != skein_api::Kind::AccessToken);
        serde_json::to_value(resource::Listing(resources))
            .map_err(|error| Failure::new("cannot write resources").because(error))
    });
    dump.insert("resources".into(), or_error(resources));
    progress.step("checking");
    dump.insert("doctor".into(), or_error(doctor(client).await));
}

async fn doctor(client: &mut Client) -> Result<Value, Failure> {
    let request = DoctorRequest { address: String::new() };
    let mut stream = client.raw().doctor(request).await?.into_inner();
    let mut findings = Vec::new();
    while let Some(document) = stream.message().await? {
        findings.push(client::parse::<Value>(&document.json)?);
    }
    Ok(findings.into())
}

fn kernel() -> String {
    let uname = rustix::system::uname();
    [uname.sysname(), uname.release(), uname.machine()].map(|part| part.to_string_lossy()).join(" ")
}
