//! Apply, get, delete: the desired state.

use skein_api::{Kind, Resource, ResourceStatus};
use skein_core::SiteId;
use skein_site_core::{Draining, Grant, Resources};
use skein_wire::proto::site::{
    self, ApplyReply, ApplyRequest, Change as ChangeReport, DeleteRequest,
};
use tonic::Status;

use crate::{
    clock,
    controller::{Controller, DRAIN_S, DrainingUntil, State},
    service::failed,
    store::{Change, ProxyCredentials},
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
        let given = request.proxy_credentials.map(credentials).transpose()?;
        let with_site = wanted.iter().any(|resource| resource.kind() == Kind::Site);
        let mut state = self.state();
        let (resources, mut reports, mut changes) = staged(&state, wanted, self.site)?;
        if with_site {
            let proxy = resources.site.as_ref().and_then(|site| site.spec.proxy.as_ref());
            let change = self.store.credentials_change(proxy, given.as_ref()).map_err(failed)?;
            if change.is_some() {
                reports.iter_mut().for_each(report_credentials);
            }
            changes.extend(change);
        }
        if request.dry_run || changes.is_empty() {
            return Ok(ApplyReply { changes: reports });
        }
        let grants = regranted(&state, &changes);
        changes.extend(grants.iter().map(|grant| Change::PutGrant(Box::new(grant.clone()))));
        self.store.commit(&changes).map_err(failed)?;
        state.resources = resources;
        state.grants.extend(grants.into_iter().map(|grant| (grant.name.clone(), grant)));
        for change in &changes {
            let Change::Put(resource) = change else { continue };
            let name = resource.name();
            match resource.kind() {
                Kind::Connector => {
                    state.draining.retain(|gone| gone.draining.connector.metadata.name != name);
                }
                // Another token, so another try.
                Kind::AccessToken => drop(state.redeeming.remove(name)),
                _ => {}
            }
        }
        self.refresh(&mut state);
        state.told(&changes);
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
        if request.withdraw {
            return self.unlink_and_withdraw(&mut state, kind, name);
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
        if let Some(Resource::Link(link)) = &gone {
            // Else its token would make it again.
            for token in state.tokens_of(&link.spec.peer) {
                changes.push(Change::Remove(Kind::AccessToken, token.clone()));
                resources.remove(Kind::AccessToken, &token);
            }
        }
        self.store.commit(&changes).map_err(failed)?;
        state.resources = resources;
        match kind {
            Kind::AccessGrant => drop(state.grants.remove(name)),
            Kind::AccessToken => drop(state.redeeming.remove(name)),
            _ => {}
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

    /// Takes back this site's endorsement of a link's peer, and its links to that peer; the link may be an incoming one.
    fn unlink_and_withdraw(
        &self,
        state: &mut State,
        kind: Kind,
        name: &str,
    ) -> Result<Vec<String>, Status> {
        if kind != Kind::Link {
            return Err(Status::invalid_argument("only links have a peer to withdraw trust from"));
        }
        let incoming = || {
            let links = state.statuses().flat_map(|status| &status.links);
            let found = links.filter(|link| link.name == name).map(|link| &link.peer_site_id);
            found.filter_map(|id| id[..].try_into().ok().map(SiteId)).next()
        };
        let outgoing = state.resources.links.get(name);
        let peer = outgoing.and_then(|link| SiteId::parse(&link.spec.peer)).or_else(incoming);
        let peer = peer.ok_or_else(|| not_found(kind, name))?;
        let text = peer.to_string();
        let links = state.resources.links.values().filter(|link| link.spec.peer == text);
        let links: Vec<String> = links.map(|link| link.metadata.name.clone()).collect();
        let gone = links.iter().map(|name| (Kind::Link, name.clone()));
        let tokens = state.tokens_of(&text).into_iter().map(|name| (Kind::AccessToken, name));
        let gone: Vec<(Kind, String)> = gone.chain(tokens).collect();
        let changes: Vec<Change> =
            gone.iter().map(|(kind, name)| Change::Remove(*kind, name.clone())).collect();
        // Trust first: it must not outlast the wish to end it.
        let withdrawn = self.withdraw(state, peer).map_err(failed)?;
        self.store.commit(&changes).map_err(failed)?;
        for (kind, name) in &gone {
            state.resources.remove(*kind, name);
        }
        let mut notes = vec![remaining_trust(state, &text)];
        if withdrawn {
            notes.insert(0, "this site no longer endorses it".to_owned());
        }
        self.refresh(state);
        Ok(notes)
    }
}

/// How long a connector that resets its flows stays in the configuration, so that every router has seen it.
pub(super) const RESET_S: i64 = 30;

/// The resources as they would be, what to say about each, and what to write.
fn staged(
    state: &State,
    wanted: Vec<Resource>,
    site: SiteId,
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

fn credentials(given: site::ProxyCredentials) -> Result<ProxyCredentials, Status> {
    let credentials = skein_proxy::Credentials::from_text(&given.credentials);
    let credentials = credentials
        .ok_or_else(|| Status::invalid_argument("credentials of a proxy are USER:PASSWORD"))?;
    Ok(ProxyCredentials { url: given.url, credentials })
}

/// The document may be as before, what it refers to is not.
fn report_credentials(report: &mut ChangeReport) {
    if report.kind == Kind::Site.as_str() && report.action == "unchanged" {
        report.action = "changed".to_owned();
        report.detail = "credentials of the proxy".to_owned();
    }
}

/// Tokens whose AccessGrant changes: what it says now holds for everybody who redeems from now on.
fn regranted(state: &State, changes: &[Change]) -> Vec<Grant> {
    let regranted = |change: &Change| {
        let Change::Put(resource) = change else { return None };
        let Resource::AccessGrant(applied) = resource.as_ref() else { return None };
        let grant = state.grants.get(&applied.metadata.name)?;
        let network = SiteId::parse(&grant.terms.network)?;
        Some(grant.changed(&applied.spec, network))
    };
    changes.iter().filter_map(regranted).collect()
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
    let id = SiteId::parse(peer);
    let known = id.and_then(|id| state.endorsed.get(&id));
    let endorsed = known.filter(|known| !known.withdrawn);
    let name = known.map_or(peer, |known| known.site_name.as_str());
    if !other_links.is_empty() {
        return format!("site {name} stays linked by {}", other_links.join(", "));
    }
    match endorsed {
        Some(endorsed) if endorsed.guest => {
            format!(
                "site {name} stays a guest of this site and may link again, until `skctl unlink NAME --withdraw`"
            )
        }
        Some(_) => format!(
            "site {name} stays a trusted member of the network: it may link again, and may still be reached over other sites; --withdraw takes this site's endorsement back"
        ),
        None => {
            let others = id.map_or(0, |id| state.learned.endorsers(id, clock::unix_s()).count());
            match others {
                0 => format!("nobody this site knows endorses site {name}: it is out"),
                others => format!(
                    "{others} other sites endorse site {name}: where they are trusted it is in until they withdraw that, or the founder of the network revokes it"
                ),
            }
        }
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
