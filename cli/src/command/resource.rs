//! `skctl apply|get|delete|export`: the same state as documents.

mod watch;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use serde::Serialize;
use skein_api::{INPUT_LEN_MAX, Kind, NAME_LEN_MAX, Phase, Resource, parse_documents, to_yaml};
use skein_wire::proto::site::Change;

use crate::{
    args::{Format, Global},
    client::Client,
    clock,
    command::process,
    error::Failure,
    input,
    output::{self, Show, columns, note, printable},
};

/// How long a change is watched until it works or does not, so that a typo shows at once.
const SETTLE_MAX: Duration = Duration::from_secs(3);
const SETTLE_INTERVAL: Duration = Duration::from_millis(100);

/// Makes the site be as documents say
///
/// Takes YAML or JSON with the kinds Site, Link, AccessGrant, AccessToken, Listener and Connector. Applying the same again
/// changes nothing. Each file is applied as a whole or not at all; what it does not mention stays.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl apply -f site.yaml
  skctl apply -f services/            every .yaml, .yml and .json file, by name
  skctl export | ssh other skctl apply -f -
  skctl apply -f site.yaml --dry-run

An AccessGrant gets its token with `skctl token create FILE --grant NAME`; an AccessToken is redeemed, and `skctl get
accesstoken` says how that went.")]
pub(crate) struct Apply {
    /// File, directory, or - for standard input; may be given several times
    #[arg(short, long = "filename", value_name = "FILE|DIR|-", required = true)]
    files: Vec<String>,
    /// Checks everything and says what would change
    #[arg(long)]
    dry_run: bool,
}

/// Shows resources
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl get connector
  skctl get site -o yaml
  skctl get all -o name
  skctl get listener postgres -w")]
pub(crate) struct Get {
    /// site, link, accessgrant, accesstoken, listener, connector, or all
    #[arg(value_parser = parse_kinds)]
    kind: Kinds,
    /// Only the one of this name
    name: Option<String>,
    /// Goes on showing changes
    #[arg(short, long)]
    watch: bool,
}

/// Deletes a resource, or without KIND the whole site
///
/// Without KIND the site says farewell to the network, its processes end and its state is removed from this machine.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl delete connector postgres
  skctl delete link hub
  skctl delete --yes                     removes the site")]
pub(crate) struct Delete {
    /// site, link, accessgrant, accesstoken, listener or connector
    #[arg(requires = "name", conflicts_with = "yes")]
    kind: Option<Kind>,
    /// Name of the resource
    name: Option<String>,
    /// Resets running flows of a connector
    #[arg(long, requires = "kind")]
    now: bool,
    /// Removes the site without asking
    #[arg(long)]
    yes: bool,
}

/// Prints the links, listeners and connectors of the site as YAML, for `apply` here or elsewhere
///
/// Status is left out. So are the Site and its access grants, which are of this site alone (--all prints them too), and access
/// tokens, which are secrets.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl export | ssh other skctl apply -f -
  skctl export --all > site.yaml         to apply it here again")]
pub(crate) struct Export {
    /// The Site and its access grants too
    #[arg(long)]
    all: bool,
}

/// What `get` may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kinds {
    All,
    One(Kind),
}

impl Kinds {
    fn as_str(self) -> &'static str {
        match self {
            Self::All => "",
            Self::One(kind) => kind.as_str(),
        }
    }
}

fn parse_kinds(text: &str) -> Result<Kinds, String> {
    if text == "all" {
        return Ok(Kinds::All);
    }
    text.parse().map(Kinds::One).map_err(|error: skein_api::UnknownKind| error.to_string())
}

/// Checks a resource made from arguments.
pub(crate) fn check(resource: &Resource) -> Result<(), Failure> {
    resource.validate().map_err(Failure::usage)
}

/// A resource name for `address` that none of `taken` has: a name is one DNS label, an address may be several.
pub(crate) fn free_name(address: &str, taken: &[Resource]) -> String {
    let taken: BTreeSet<&str> = taken.iter().map(Resource::name).collect();
    // Room for a number at the end.
    let base: String = address.replace('.', "-").chars().take(NAME_LEN_MAX - 4).collect();
    let base = base.trim_end_matches('-');
    if !taken.contains(base) {
        return base.to_owned();
    }
    (2..)
        .map(|number| format!("{base}-{number}"))
        .find(|name| !taken.contains(name.as_str()))
        .expect("invariant: finitely many names are taken")
}

/// Waits a moment for what became of a resource that was changed; returns its phase and what there is to say about it.
pub(crate) async fn settled(
    global: &Global,
    client: &mut Client,
    kind: &str,
    name: &str,
) -> Result<(Phase, String), Failure> {
    let deadline = clock::instant() + SETTLE_MAX;
    let mut last = (Phase::Pending, String::new());
    while !global.quiet && last.0 == Phase::Pending && clock::instant() < deadline {
        if !last.1.is_empty() {
            clock::sleep(SETTLE_INTERVAL).await;
        }
        let resources = client.get(kind, name).await?;
        let Some(status) = resources.first().and_then(Resource::status) else { break };
        last = (status.phase, status.message.clone());
    }
    Ok(last)
}

/// Shows changes in the format asked for; for people as `sentence` words them.
pub(crate) fn show_changes(
    global: &Global,
    changes: Vec<Change>,
    sentence: impl Fn(&Change) -> String,
) -> Result<(), Failure> {
    if global.structured() {
        return output::show(global, &Changes::from(changes));
    }
    let mut text = String::new();
    for change in &changes {
        text += &(printable(&sentence(change)) + "\n");
        if !change.detail.is_empty() {
            text += &format!("  {}\n", printable(&change.detail));
        }
    }
    output::print(&text)
}

#[derive(Serialize)]
struct Changes(Vec<ChangeRow>);

#[derive(Serialize)]
struct ChangeRow {
    kind: String,
    name: String,
    action: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
}

impl From<Vec<Change>> for Changes {
    fn from(changes: Vec<Change>) -> Self {
        let row = |change: Change| ChangeRow {
            kind: change.kind,
            name: change.name,
            action: change.action,
            detail: change.detail,
        };
        Self(changes.into_iter().map(row).collect())
    }
}

impl Show for Changes {
    fn table(&self, _: bool) -> String {
        let line = |row: &ChangeRow| {
            let detail =
                if row.detail.is_empty() { String::new() } else { format!(" ({})", row.detail) };
            printable(&format!("{}/{} {}{detail}\n", row.kind.to_lowercase(), row.name, row.action))
        };
        self.0.iter().map(line).collect()
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|row| format!("{}/{}", row.kind.to_lowercase(), row.name)).collect()
    }
}

pub(crate) async fn apply(global: &Global, args: Apply) -> Result<(), Failure> {
    let mut inputs = Vec::new();
    // Everything is read and checked before anything is sent.
    for file in args.files.iter().map(|file| expand(file)).collect::<Result<Vec<_>, _>>()?.concat()
    {
        let shown = if file == "-" { "standard input".to_owned() } else { file.clone() };
        let bytes = input::blocking(move || input::read(&file, INPUT_LEN_MAX)).await?;
        let resources = parse_documents(&bytes).map_err(|error| {
            Failure::new(format_args!("{shown}: {error}")).next("nothing was applied")
        })?;
        if !resources.is_empty() {
            inputs.push((shown, resources));
        }
    }
    if inputs.is_empty() {
        return Err(Failure::new("there is nothing to apply").because("the input has no documents"));
    }
    let mut client = Client::connect(global).await?;
    let mut changes = Vec::new();
    for (index, (file, resources)) in inputs.iter().enumerate() {
        match client.apply(resources, args.dry_run).await {
            Ok(made) => changes.extend(made),
            Err(failure) => {
                output::show(global, &Changes::from(changes))?;
                let before =
                    if index == 0 { "nothing was applied" } else { "earlier files were applied" };
                return Err(failure.within(file).next(before));
            }
        }
    }
    output::show(global, &Changes::from(changes))?;
    if args.dry_run {
        note(global, "Nothing was changed (--dry-run).");
    }
    Ok(())
}

/// The files meant by an argument of `-f`.
fn expand(argument: &str) -> Result<Vec<String>, Failure> {
    if argument == "-" || !Path::new(argument).is_dir() {
        return Ok(vec![argument.to_owned()]);
    }
    let failed =
        |error: std::io::Error| Failure::new(format_args!("cannot read {argument}")).because(error);
    let mut files = Vec::new();
    for entry in fs::read_dir(argument).map_err(failed)? {
        let path: PathBuf = entry.map_err(failed)?.path();
        let known = path
            .extension()
            .and_then(|extension| extension.to_str())
            .is_some_and(|extension| matches!(extension, "yaml" | "yml" | "json"));
        if known && path.is_file() {
            files.push(path.to_string_lossy().into_owned());
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Failure::new(format_args!("{argument} has no .yaml, .yml or .json file")));
    }
    Ok(files)
}

/// Resources as shown by `get`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Listing(pub(crate) Vec<Resource>);

impl Show for Listing {
    fn table(&self, wide: bool) -> String {
        if self.0.is_empty() {
            return "No resources.\n".to_owned();
        }
        let rows = self.0.iter().map(|resource| {
            let status = resource.status();
            let phase = status.map(|status| match status.phase {
                Phase::Pending => "Pending",
                Phase::Ready => "Ready",
                Phase::Error => "Error",
            });
            [
                resource.kind().to_string(),
                resource.name().to_owned(),
                phase.unwrap_or_default().to_owned(),
                summary(resource),
                status.map(|status| status.message.clone()).unwrap_or_default(),
            ]
        });
        if wide {
            return columns(["KIND", "NAME", "STATUS", "SPEC", "MESSAGE"], rows);
        }
        let rows = rows.map(|[kind, name, phase, _, message]| [kind, name, phase, message]);
        columns(["KIND", "NAME", "STATUS", "MESSAGE"], rows)
    }

    fn names(&self) -> Vec<String> {
        let name = |resource: &Resource| {
            format!("{}/{}", resource.kind().as_str().to_lowercase(), resource.name())
        };
        self.0.iter().map(name).collect()
    }
}

fn summary(resource: &Resource) -> String {
    match resource {
        Resource::Site(site) => format!("listen {}", site.spec.listen.join(",")),
        Resource::Link(link) => link.spec.endpoints.join(","),
        Resource::AccessGrant(grant) => format!("{} uses, {}", grant.spec.uses, grant.spec.expires),
        Resource::AccessToken(_) => String::new(),
        Resource::Listener(listener) => {
            format!("{} at {}", listener.spec.address, listener.spec.host)
        }
        Resource::Connector(connector) => {
            format!("{} to {}", connector.spec.address, connector.spec.targets().join(","))
        }
    }
}

pub(crate) async fn get(global: &Global, args: Get) -> Result<(), Failure> {
    let mut client = Client::connect(global).await?;
    let (kind, name) = (args.kind.as_str(), args.name.unwrap_or_default());
    if args.watch {
        return watch::watch(global, client, kind, &name).await;
    }
    let resources = client.get(kind, &name).await?;
    if resources.is_empty() && !name.is_empty() {
        return Err(Failure::new(format_args!("there is no {kind} named {name:?}"))
            .next("see `skctl get all`"));
    }
    match global.output {
        // As written to a file, so that it can be applied again.
        Format::Yaml => output::print(&to_yaml(&resources)),
        Format::Json if !name.is_empty() && resources.len() == 1 => {
            output::print(&output::json(&resources[0])?)
        }
        _ => output::show(global, &Listing(resources)),
    }
}

pub(crate) async fn delete(global: &Global, args: Delete) -> Result<(), Failure> {
    let (Some(kind), Some(name)) = (args.kind, args.name) else {
        return process::delete_site(global, args.yes).await;
    };
    let notes = Client::connect(global).await?.delete(kind.as_str(), &name, args.now).await?;
    note(global, format_args!("{kind} {name} is deleted."));
    for text in notes {
        note(global, text);
    }
    Ok(())
}

pub(crate) async fn export(global: &Global, args: &Export) -> Result<(), Failure> {
    let mut resources = Client::connect(global).await?.get("", "").await?;
    let count = resources.len();
    resources.retain(|resource| resource.kind() != Kind::AccessToken);
    if resources.len() < count {
        note(global, "note: access tokens are secrets and are left out");
    }
    resources
        .retain(|resource| args.all || !matches!(resource.kind(), Kind::Site | Kind::AccessGrant));
    for resource in &mut resources {
        resource.set_status(None);
    }
    match global.output {
        Format::Table | Format::Wide | Format::Yaml => output::print(&to_yaml(&resources)),
        _ => output::show(global, &Listing(resources)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_api::{ConnectorPort, ConnectorSpec, Manifest, Protocol};

    #[test]
    fn names_are_labels_and_free() {
        let taken = |name: &str| {
            let port = ConnectorPort { port: 1, target_port: None, protocol: Protocol::Tcp };
            Resource::Connector(Manifest::new(name, ConnectorSpec::new("a", vec![port])))
        };
        assert_eq!(free_name("web.prod", &[]), "web-prod");
        assert_eq!(free_name("web.prod", &[taken("web-prod"), taken("web-prod-2")]), "web-prod-3");
        let long = ["a"; 120].join(".");
        assert!(skein_api::valid_name(&free_name(&long, &[])));
    }
}
