//! Documents: status, links, services, network, tokens, version, sockets.

use std::collections::BTreeSet;

use serde::Serialize;
use skein_api::{
    Phase, Resource, ResourceStatus,
    status::{
        LinkRow, Problem, ProcessStatus, RouterStatus as RouterDocument, RouterVersion, SiteStatus,
        SocketStatus, TokenRow, VersionInfo,
    },
};
use skein_core::{Room, SiteId};
use skein_site_core::status;
use skein_wire::proto::control::RouterStatus;
use tonic::Status;

use crate::{
    attach::RouterEntry,
    clock,
    controller::{Controller, State},
    platform::linux,
};

/// Resources that do not work are all in `get`; with more than these something else is wrong.
const PROBLEMS_SHOWN_MAX: usize = 10;

impl Controller {
    /// One of the documents of `skein_api::status`, as JSON.
    pub(crate) fn document(&self, what: &str) -> Result<String, Status> {
        let state = self.state();
        let time = |ms: i64| clock::rfc3339(ms.div_euclid(1000));
        Ok(match what {
            "status" => to_json(&self.site_status(&state)),
            "links" => to_json(&links(&state, time)),
            "services" => to_json(&self.services(&state)),
            "network" => {
                let services = self.services(&state);
                let statuses: Vec<&RouterStatus> = state.statuses().collect();
                let network = state.network(self.site);
                to_json(&status::network(
                    self.site,
                    state.site_name(),
                    network,
                    &statuses,
                    services,
                ))
            }
            "tokens" => to_json(&tokens(&state)),
            "version" => to_json(&version(&state)),
            "sockets" => to_json(&sockets(&state)),
            other => {
                return Err(Status::invalid_argument(format!("there is no document {other:?}")));
            }
        })
    }

    fn services(&self, state: &State) -> Vec<skein_api::status::ServiceRow> {
        let statuses: Vec<&RouterStatus> = state.statuses().collect();
        let (name, endpoints) = (state.site_name(), &state.endpoints);
        let left_out = &state.left_out;
        status::services(self.site, name, &state.resources, endpoints, left_out, &statuses)
    }

    fn site_status(&self, state: &State) -> SiteStatus {
        let spec = state.resources.site.as_ref().map(|site| site.spec.clone()).unwrap_or_default();
        let links: Vec<_> = state.statuses().flat_map(|status| &status.links).collect();
        let up = links.iter().filter(|link| status::link_state(link) == "up").count();
        let sites: BTreeSet<&[u8]> = state
            .statuses()
            .flat_map(|status| &status.sites)
            .map(|site| site.site_id.as_slice())
            .chain([self.site.0.as_slice()])
            .collect();
        let role = match spec.effective_role() {
            skein_api::Role::Interior => "interior",
            skein_api::Role::Edge => "edge",
        };
        let service = match linux::chosen_service(spec.service) {
            skein_api::Service::Systemd => "systemd",
            skein_api::Service::Auto | skein_api::Service::None => "none",
        };
        SiteStatus {
            name: state.site_name().to_owned(),
            namespace: self.store.paths().namespace().to_owned(),
            site_id: self.site.to_string(),
            network_id: state.site.network.clone(),
            role: role.to_owned(),
            platform: "linux".to_owned(),
            service: service.to_owned(),
            controller: ProcessStatus {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                since: clock::rfc3339(self.started_unix_s),
            },
            routers: state.routers.iter().map(|(name, entry)| router(self, name, entry)).collect(),
            advertise: state.advertise(),
            links_up: count(up),
            links_total: count(links.len()),
            sites: count(sites.len()),
            services: count(self.services(state).len()),
            connectors: count(state.resources.connectors.len()),
            problems: self.problems(state),
        }
    }

    /// Why no flow is taken for an address that a connector of this site serves.
    pub(super) fn why_not_served(&self, address: &str) -> Option<String> {
        let state = self.state();
        let mut connectors = state.resources.connectors.values();
        let connector = connectors.find(|connector| connector.spec.address == address)?;
        let status = resource_status(&state, &Resource::Connector(connector.clone()));
        (status.phase != Phase::Ready).then_some(status.message)
    }

    fn problems(&self, state: &State) -> Vec<Problem> {
        let mut out = problems(state);
        let mut links = state.statuses().flat_map(|status| &status.links);
        let mut sites = state.statuses().flat_map(|status| &status.sites);
        let others = sites.any(|site| site.trusted && site.site_id != self.site.0);
        if others && links.next().is_none() {
            out.push(Problem {
                what: "no link leads to the other sites of the network".to_owned(),
                why: "this site dials none, and none that dials it is there".to_owned(),
                fix: "see `skctl status` at the others, or join one with `skctl link TOKENFILE`"
                    .to_owned(),
            });
        }
        out.extend(not_working(state));
        out
    }
}

/// Resources that do not do what they are for.
fn not_working(state: &State) -> Vec<Problem> {
    let problem = |resource: Resource| {
        let status = resource_status(state, &resource);
        let (what, fix) = match &resource {
            _ if status.phase != Phase::Error => return None,
            Resource::Connector(connector) => (
                format!("{} is not served from here", connector.spec.address),
                "start the workload, or change it with `skctl expose`; see `skctl doctor`",
            ),
            Resource::Listener(listener) => (
                format!("{} has no endpoint at {}", listener.spec.address, listener.spec.host),
                "free the port, or choose another: `skctl listen ADDRESS --port PORT:LOCALPORT`",
            ),
            _ => return None,
        };
        Some(Problem { what, why: status.message, fix: fix.to_owned() })
    };
    state.resources.iter().filter_map(problem).take(PROBLEMS_SHOWN_MAX).collect()
}

impl State {
    /// What each attached router saw last. One that is away may be dead, and its links with it.
    pub(crate) fn statuses(&self) -> impl Iterator<Item = &RouterStatus> {
        let attached = self.routers.values().filter(|entry| entry.session.is_some());
        attached.filter_map(|entry| entry.status.as_ref())
    }

    /// What each attached router saw while it had this version of the configuration or a later one.
    pub(crate) fn statuses_since(&self, version: u64) -> impl Iterator<Item = &RouterStatus> {
        let attached = self.routers.values().filter(|entry| entry.session.is_some());
        attached
            .filter(move |entry| entry.seen >= version)
            .filter_map(|entry| entry.status.as_ref())
    }
}

/// A document as JSON.
pub(super) fn to_json<T: Serialize>(document: &T) -> String {
    serde_json::to_string(document).expect("invariant: documents have string keys only")
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn router(controller: &Controller, name: &str, entry: &RouterEntry) -> RouterDocument {
    let attached = entry.session.is_some();
    let status = entry.status.clone().unwrap_or_default();
    let state = match (attached, &entry.status) {
        (true, Some(_)) => "attached",
        (true, None) => "starting",
        (false, _) => "down",
    };
    RouterDocument {
        name: name.to_owned(),
        id: skein_trust::router_id(controller.site, name).to_string(),
        pid: if attached { entry.pid } else { 0 },
        version: entry.version.clone(),
        state: state.to_owned(),
        since: clock::rfc3339(entry.since_unix_s),
        boot_epoch: entry.boot_epoch,
        sockets: status
            .sockets
            .into_iter()
            .map(|socket| SocketStatus { address: socket.address, error: socket.error })
            .collect(),
        metrics: status.metrics_address,
        flows_active: status.flows_active,
        flows_total: status.flows_total,
        bytes_sent: status.bytes_sent,
        bytes_received: status.bytes_received,
        memory_used_bytes: status.memory_used_bytes,
    }
}

fn problems(state: &State) -> Vec<Problem> {
    let problem = |what: &str, why: &str, fix: &str| Problem {
        what: what.to_owned(),
        why: why.to_owned(),
        fix: fix.to_owned(),
    };
    let mut out: Vec<Problem> = state
        .problems
        .iter()
        .map(|aside| problem("a state file was damaged", &aside.to_string(), aside.fix()))
        .collect();
    if state.resources.site.is_none() {
        out.push(problem(
            "the Site document is lost",
            "without it the site listens nowhere and carries no transit",
            "say what it shall be: `skctl init NAME --listen ADDR:PORT --advertise HOST`, or --no-listen",
        ));
    }
    if !state.left_out.is_empty() {
        let Room { per_site, total } = state.automatic_room();
        let ports: usize = state.left_out.values().map(BTreeSet::len).sum();
        out.push(problem(
            &format!("{ports} ports of the network have no automatic local endpoint"),
            &format!("a site opens at most {total}, and {per_site} for what one other site alone offers"),
            "choose with `skctl init --auto-listen PATTERN`, or open single ones with `skctl listen`",
        ));
    }
    if !state.routers.values().any(|entry| entry.session.is_some()) {
        out.push(problem(
            "no router is attached",
            "it has not started, or it ended",
            "see `skctl logs`",
        ));
    }
    for (name, entry) in &state.routers {
        if !entry.refused.is_empty() {
            out.push(problem(
                &format!("router {name} goes on with its last configuration"),
                &format!("it cannot take over the new one: {}", entry.refused),
                "make it smaller: `skctl init --auto-listen PATTERN`; see `skctl logs`",
            ));
        }
    }
    for status in state.statuses() {
        for text in &status.problems {
            out.push(problem("the router reports a problem", text, "see `skctl doctor`"));
        }
        for socket in status.sockets.iter().filter(|socket| !socket.error.is_empty()) {
            let what = format!("the router cannot listen on {}", socket.address);
            out.push(problem(
                &what,
                &socket.error,
                "free the port, or `skctl init --listen ADDR:PORT`",
            ));
        }
        for link in status.links.iter().filter(|link| !link.incoming && !link.error.is_empty()) {
            if status::link_state(link) != "up" {
                let what = format!("link {} is {}", link.name, status::link_state(link));
                out.push(problem(&what, &link.error, "see `skctl doctor`"));
            }
        }
    }
    out
}

/// Links as routers see them, and those that no router has taken up.
fn links(state: &State, time: impl Fn(i64) -> String) -> Vec<LinkRow> {
    let mut rows = status::links(state.statuses(), time);
    let attached = state.routers.values().any(|entry| entry.session.is_some());
    let error =
        if attached { "the router has not taken it up yet" } else { "no router is running" };
    for link in state.resources.links.values() {
        let name = &link.metadata.name;
        if !rows.iter().any(|row| !row.incoming && row.name == *name) {
            let peer = SiteId::parse(&link.spec.peer);
            let known = peer.and_then(|peer| state.endorsed.get(&peer));
            rows.push(LinkRow {
                name: name.clone(),
                peer: known.map_or_else(|| link.spec.peer.clone(), |peer| peer.site_name.clone()),
                peer_id: link.spec.peer.clone(),
                state: "down".to_owned(),
                cost: link.spec.cost,
                error: error.to_owned(),
                ..LinkRow::default()
            });
        }
    }
    rows
}

fn tokens(state: &State) -> Vec<TokenRow> {
    let now = clock::unix_s();
    let row = |grant: &skein_site_core::Grant| {
        let spec = state.resources.grants.get(&grant.name).map(|grant| &grant.spec);
        TokenRow {
            name: grant.name.clone(),
            state: grant.state(now).to_owned(),
            uses: grant.uses,
            used: count(grant.redemptions.len()),
            created: clock::rfc3339(grant.created_unix_s),
            expires: clock::rfc3339(grant.expires_unix_s),
            cost: spec.map_or(1, |spec| spec.cost),
            guest: grant.terms.guest,
            redeemers: grant.redemptions.iter().map(|used| used.site.clone()).collect(),
        }
    };
    state.grants.values().map(row).collect()
}

fn version(state: &State) -> VersionInfo {
    VersionInfo {
        skctl: String::new(),
        controller: env!("CARGO_PKG_VERSION").to_owned(),
        routers: state
            .routers
            .iter()
            .map(|(name, entry)| RouterVersion {
                name: name.clone(),
                version: entry.version.clone(),
            })
            .collect(),
    }
}

fn sockets(state: &State) -> Vec<SocketStatus> {
    state
        .statuses()
        .flat_map(|status| &status.sockets)
        .map(|socket| SocketStatus { address: socket.address.clone(), error: socket.error.clone() })
        .collect()
}

/// The `status` of a resource.
pub(super) fn resource_status(state: &State, resource: &Resource) -> ResourceStatus {
    let name = resource.name();
    // What routers said before they had it as it is now is of another one.
    let seen = state.statuses_since(state.told_in(resource));
    match resource {
        Resource::Link(_) => status::link_status(name, seen),
        Resource::Listener(listener) => status::listener_status(listener, seen),
        Resource::Connector(_) => status::connector_status(name, seen),
        Resource::AccessGrant(_) => {
            let grant = state.grants.get(name).map(|grant| grant.state(clock::unix_s()));
            let none = || format!("no token yet: `skctl token create FILE --grant {name}`");
            let message = grant.map_or_else(none, str::to_owned);
            let phase = match grant {
                // Nothing is to be done for one that has served its purpose.
                Some("valid" | "used") => Phase::Ready,
                _ => Phase::Pending,
            };
            ResourceStatus { phase, message, conditions: Vec::new() }
        }
        Resource::Site(_) => {
            let problems = problems(state);
            match problems.first() {
                None => ResourceStatus { phase: Phase::Ready, ..ResourceStatus::default() },
                Some(first) => ResourceStatus {
                    phase: Phase::Error,
                    message: format!("{}: {}", first.what, first.why),
                    conditions: Vec::new(),
                },
            }
        }
        Resource::AccessToken(_) => crate::claim::applied::status(state, name),
    }
}
