//! Apply, get, delete: the desired state.

use skein_api::{Kind, Resource, ResourceStatus};
use skein_site_core::{Draining, Resources};
use skein_wire::proto::site::{
    self, ApplyReply, ApplyRequest, Change as ChangeReport, DeleteRequest,
};
use tonic::Status;

use crate::{
    clock,
    controller::{Controller, DRAIN_S, DrainingUntil, State},
    service::failed,
    store::Change,
};

/// Resources of one request; the largest `apply` people were seen to use has a few thousand.
const RESOURCES_MAX: usize = 20_000;

impl Controller {
    /// Applies all resources or none: all are checked, then written, then in force.
    pub(crate) fn apply(&self, request: ApplyRequest) -> Result<ApplyReply, Status> {
        if request.resources.len() > RESOURCES_MAX {
            return Err(Status::invalid_argument(format!(
                "more than {RESOURCES_MAX} resources at once"
            )));
        }
        let wanted: Vec<Resource> =
            request.resources.iter().map(parse).collect::<Result<_, _>>()?;
        let mut state = self.state();
        let (resources, reports, changes) = staged(&state, wanted, self.site)?;
        if request.dry_run || changes.is_empty() {
            return Ok(ApplyReply { changes: reports });
        }
        self.check_tokens(&changes)?;
        self.store.commit(&changes).map_err(failed)?;
        state.resources = resources;
        for change in &changes {
            if let Change::Put(resource) = change
                && let Resource::Connector(connector) = resource.as_ref()
            {
                let name = &connector.metadata.name;
                state.draining.retain(|gone| gone.draining.connector.metadata.name != *name);
            }
        }
        self.refresh(&mut state);
        for report in reports.iter().filter(|report| report.action != "unchanged") {
            tracing::info!(
                kind = report.kind,
                name = report.name,
                action = report.action,
                "resource applied"
            );
        }
        Ok(ApplyReply { changes: reports })
    }

    /// A grant or a token is more than a wish: it is made by `token create` and redeemed by `link`.
    fn check_tokens(&self, changes: &[Change]) -> Result<(), Status> {
        for change in changes {
            let Change::Put(resource) = change else { continue };
            let command = match resource.kind() {
                Kind::AccessGrant => "skctl token create",
                Kind::AccessToken => "skctl link FILE",
                _ => continue,
            };
            let what = resource.kind();
            return Err(Status::unimplemented(format!(
                "{what} cannot be applied on a host yet; use `{command}`"
            )));
        }
        Ok(())
    }

    /// Resources of a kind (empty: all) and name (empty: all of the kind), with their status.
    pub(crate) fn get_resources(
        &self,
        kind: &str,
        name: &str,
    ) -> Result<Vec<site::Resource>, Status> {
        let kind = if kind.is_empty() { None } else { Some(parse_kind(kind)?) };
        let state = self.state();
        let found: Vec<_> = state
            .resources
            .iter()
            .filter(|resource| kind.is_none_or(|kind| resource.kind() == kind))
            .filter(|resource| name.is_empty() || resource.name() == name)
            .map(|resource| message(&state, resource))
            .collect();
        match kind {
            Some(kind) if found.is_empty() && !name.is_empty() => Err(not_found(kind, name)),
            _ => Ok(found),
        }
    }

    /// Deletes one resource; what remains of it is in the notes.
    pub(crate) fn delete(&self, request: &DeleteRequest) -> Result<Vec<String>, Status> {
        if !request.address.is_empty() {
            return self.unserve(request);
        }
        let kind = parse_kind(&request.kind)?;
        let name = request.name.as_str();
        if kind == Kind::Site {
            return Err(Status::failed_precondition(
                "a site is deleted with `skctl delete`, which also tells the other sites",
            ));
        }
        let mut state = self.state();
        let drains = |draining: &Draining| draining.connector.metadata.name == name;
        if request.now
            && kind == Kind::Connector
            && !state.resources.connectors.contains_key(name)
            && self.reset_draining(&mut state, drains)
        {
            return Ok(Vec::new());
        }
        let mut resources = state.resources.clone();
        let gone = resources.remove(kind, name);
        let mut changes = vec![Change::Remove(kind, name.to_owned())];
        if kind == Kind::AccessGrant && state.grants.contains_key(name) {
            // A token ends also when its resource was lost.
            changes.push(Change::RemoveGrant(name.to_owned()));
        } else if gone.is_none() {
            return Err(not_found(kind, name));
        }
        self.store.commit(&changes).map_err(failed)?;
        state.resources = resources;
        if kind == Kind::AccessGrant {
            state.grants.remove(name);
        }
        let notes = match gone {
            Some(Resource::Connector(connector)) => {
                let drain_s = if request.now { RESET_S } else { DRAIN_S };
                state.draining.push(DrainingUntil {
                    draining: Draining { connector, reset: request.now },
                    until_unix_s: clock::unix_s() + drain_s,
                });
                Vec::new()
            }
            Some(Resource::Link(link)) => vec![remaining_trust(&state, &link.spec.peer)],
            _ => Vec::new(),
        };
        self.refresh(&mut state);
        tracing::info!(%kind, name, "resource deleted");
        Ok(notes)
    }
}

/// How long a connector that resets its flows stays in the configuration, so that every router has seen it.
pub(super) const RESET_S: i64 = 30;

/// The resources as they would be, what to say about each, and what to write.
fn staged(
    state: &State,
    wanted: Vec<Resource>,
    site: skein_core::SiteId,
) -> Result<(Resources, Vec<ChangeReport>, Vec<Change>), Status> {
    let mut resources = state.resources.clone();
    let mut reports = Vec::new();
    let mut changes = Vec::new();
    for mut resource in wanted {
        resource.set_status(None);
        resource.validate().map_err(|invalids| {
            let (kind, name) = (resource.kind(), resource.name());
            Status::invalid_argument(format!("{kind} {name:?}: {invalids}"))
        })?;
        if let Resource::Link(link) = &resource
            && link.spec.peer == site.to_string()
        {
            return Err(Status::invalid_argument(format!(
                "Link {:?}: spec.peer is this very site",
                link.metadata.name
            )));
        }
        let before = resources
            .insert(resource.clone())
            .map_err(|conflict| Status::failed_precondition(conflict.to_string()))?;
        let (action, detail) = match &before {
            None => ("created", String::new()),
            Some(before) if *before == resource => ("unchanged", String::new()),
            Some(before) => ("changed", difference(before, &resource)),
        };
        reports.push(ChangeReport {
            kind: resource.kind().to_string(),
            name: resource.name().to_owned(),
            action: action.to_owned(),
            detail,
        });
        if action != "unchanged" {
            changes.push(Change::put(resource));
        }
    }
    resources.check().map_err(|conflict| Status::failed_precondition(conflict.to_string()))?;
    Ok((resources, reports, changes))
}

/// Names the fields of `spec` that differ.
fn difference(before: &Resource, after: &Resource) -> String {
    let spec = |resource: &Resource| {
        serde_json::to_value(resource).ok().and_then(|value| value.get("spec").cloned())
    };
    let (Some(before), Some(after)) = (spec(before), spec(after)) else { return String::new() };
    let (Some(before), Some(after)) = (before.as_object(), after.as_object()) else {
        return String::new();
    };
    let fields: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let changed: Vec<&str> = fields
        .into_iter()
        .filter(|field| before.get(*field) != after.get(*field))
        .map(String::as_str)
        .collect();
    if changed.is_empty() { "labels or annotations".to_owned() } else { changed.join(", ") }
}

/// What `unlink` leaves: a link is a connection, trust is a statement.
fn remaining_trust(state: &State, peer: &str) -> String {
    let other_links: Vec<&str> = state
        .resources
        .links
        .values()
        .filter(|link| link.spec.peer == peer)
        .map(|link| link.metadata.name.as_str())
        .collect();
    let endorsed = state.endorsed.values().find(|endorsed| endorsed.site == peer);
    let name = endorsed.map_or(peer, |endorsed| endorsed.site_name.as_str());
    if !other_links.is_empty() {
        return format!("site {name} stays linked by {}", other_links.join(", "));
    }
    match endorsed {
        Some(endorsed) if endorsed.guest => {
            format!(
                "site {name} stays a guest of this site: it may link again, and others may carry its traffic here"
            )
        }
        Some(_) => format!(
            "site {name} stays a trusted member of the network: it may link again, and may still be reached over other sites"
        ),
        None => format!("this site does not vouch for site {name}; others may"),
    }
}

fn parse(resource: &site::Resource) -> Result<Resource, Status> {
    skein_api::parse_json(&resource.json).map_err(|error| {
        Status::invalid_argument(format!("{} {:?}: {error}", resource.kind, resource.name))
    })
}

fn parse_kind(text: &str) -> Result<Kind, Status> {
    text.parse()
        .map_err(|error: skein_api::UnknownKind| Status::invalid_argument(error.to_string()))
}

fn not_found(kind: Kind, name: &str) -> Status {
    Status::not_found(format!("there is no {kind} {name:?}; see `skctl get {kind}`"))
}

/// A resource with its status, as it goes to `skctl`. What is secret in a token stays here.
pub(crate) fn message(state: &State, mut resource: Resource) -> site::Resource {
    let status: ResourceStatus = crate::service::query::resource_status(state, &resource);
    resource.set_status(Some(status));
    site::Resource {
        api_version: skein_api::API_VERSION.to_owned(),
        kind: resource.kind().to_string(),
        name: resource.name().to_owned(),
        json: resource.to_json(),
    }
}
