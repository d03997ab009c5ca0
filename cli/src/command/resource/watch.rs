//! `skctl get --watch`

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use skein_api::{Kind, Resource, to_yaml};
use skein_wire::proto::site::{GetRequest, ResourceEvent};
use tonic::Streaming;

use crate::{
    args::{Format, Global},
    client::{self, Client},
    clock,
    error::Failure,
    output::{self, note, printable},
};

/// How often a controller that went away is looked for.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(500);

/// Prints changes until interrupted. A controller that restarts is waited for; what changed meanwhile is told then.
pub(super) async fn watch(
    global: &Global,
    client: Client,
    kind: &str,
    name: &str,
) -> Result<(), Failure> {
    let mut known = Known::new();
    let mut client = Some(client);
    loop {
        let mut connected = match client.take() {
            Some(client) => client,
            None => reconnect(global).await?,
        };
        let request = GetRequest { kind: kind.to_owned(), name: name.to_owned() };
        let ended = match connected.raw().watch(request).await {
            Ok(stream) => follow(global, stream.into_inner(), &mut known).await?,
            // A kind that does not exist, at the first attempt only.
            Err(status) if known.is_empty() => return Err(status.into()),
            Err(status) => Failure::from(status),
        };
        note(global, format_args!("note: {ended}; waiting for the controller"));
    }
}

/// What was printed last of each resource.
type Known = BTreeMap<(Kind, String), Resource>;

/// Prints the changes of one stream; the answer says why it ended.
async fn follow(
    global: &Global,
    mut stream: Streaming<ResourceEvent>,
    known: &mut Known,
) -> Result<Failure, Failure> {
    let mut seen = BTreeSet::new();
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(Failure::new("the controller ended")),
            Err(status) => return Ok(status.into()),
        };
        let Some(message) = &event.resource else {
            // All that exists has been told; what was there before and is not is gone.
            let gone: Vec<_> = known.extract_if(.., |key, _| !seen.contains(key)).collect();
            for (_, resource) in gone {
                print_event(global, "deleted", resource)?;
            }
            continue;
        };
        let resource = client::resource(message)?;
        let key = (resource.kind(), resource.name().to_owned());
        if event.event == "deleted" {
            known.remove(&key);
            print_event(global, "deleted", resource)?;
            continue;
        }
        seen.insert(key.clone());
        let before = known.insert(key, resource.clone());
        match before {
            None => print_event(global, "added", resource)?,
            Some(before) if before != resource => print_event(global, "modified", resource)?,
            Some(_) => {}
        }
    }
}

async fn reconnect(global: &Global) -> Result<Client, Failure> {
    loop {
        clock::sleep(RECONNECT_INTERVAL).await;
        match Client::connect(global).await {
            Ok(client) => return Ok(client),
            Err(failure) if !client::paths(global)?.has_site() => return Err(failure),
            Err(_) => {}
        }
    }
}

fn print_event(global: &Global, event: &str, resource: Resource) -> Result<(), Failure> {
    let text = match global.output {
        Format::Yaml => format!("---\n# {event}\n{}", to_yaml(&[resource])),
        // One document a line, for programs that read lines.
        Format::Json => {
            format!("{{\"event\":{event:?},\"resource\":{}}}\n", resource.to_json())
        }
        _ => {
            let status = resource.status().cloned().unwrap_or_default();
            let line = format!(
                "{event:<9} {}/{}  {:?}  {}",
                resource.kind().as_str().to_lowercase(),
                resource.name(),
                status.phase,
                status.message
            );
            printable(line.trim_end()) + "\n"
        }
    };
    output::print(&text)
}
