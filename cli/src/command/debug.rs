//! `skctl debug dump`

use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use skein_wire::proto::site::DoctorRequest;

use crate::{
    args::Global,
    client::{self, Client},
    clock,
    command::{logs, resource},
    error::Failure,
    input,
    output::note,
    progress::Progress,
};

/// Last bytes of each log: an hour of a busy router.
const LOG_LEN_MAX: u64 = 2 * 1024 * 1024;

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
    let mut tails = Map::new();
    for (name, path) in logs::files(&paths) {
        let text = logs::tail_bytes(&path, LOG_LEN_MAX).unwrap_or_else(|error| error.to_string());
        tails.insert(name.to_owned(), Value::from(text.lines().collect::<Vec<_>>()));
    }
    dump.insert("logs".into(), tails.into());
    let text = crate::output::json(&dump)?;
    input::write_secret(Path::new(&args.file), text.as_bytes(), true)?;
    progress.finish();
    note(
        global,
        format_args!("Wrote {}. It has no secrets, but names hosts and services.", args.file),
    );
    Ok(())
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
