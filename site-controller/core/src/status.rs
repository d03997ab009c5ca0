//! Documents users read, made from what the controller and its routers know.

mod network;
mod resource;
mod service;

use skein_api::status::{Attempt, LinkRow, TraceCandidate, TraceHop, TracePath, TraceReport};
use skein_core::{RouterId, SiteId};
use skein_wire::proto::control::{LinkStatus, RouterStatus, TraceReply, link_status::LinkState};

pub use network::network;
pub use resource::{connector_status, link_status, listener_status};
pub use service::services;

/// A site id as text; what is none is shown as nothing.
#[must_use]
pub fn site_text(bytes: &[u8]) -> String {
    <[u8; 32]>::try_from(bytes).map(|id| SiteId(id).to_string()).unwrap_or_default()
}

/// A router id as text; what is none is shown as nothing.
#[must_use]
pub fn router_text(bytes: &[u8]) -> String {
    <[u8; 16]>::try_from(bytes).map(|id| RouterId(id).to_string()).unwrap_or_default()
}

/// A site's name, or the beginning of its id while the name is unknown.
#[must_use]
pub fn site_label(name: &str, id: &[u8]) -> String {
    if !name.is_empty() {
        return name.to_owned();
    }
    <[u8; 32]>::try_from(id).map(|id| SiteId(id).short()).unwrap_or_default()
}

/// Links of all routers, outgoing ones first, by name; `time` writes Unix milliseconds for people.
#[must_use]
pub fn links<'a>(
    statuses: impl IntoIterator<Item = &'a RouterStatus>,
    time: impl Fn(i64) -> String,
) -> Vec<LinkRow> {
    let mut rows: Vec<LinkRow> = statuses
        .into_iter()
        .flat_map(|status| &status.links)
        .map(|link| row(link, &time))
        .collect();
    rows.sort_by(|a, b| (a.incoming, &a.name, &a.remote).cmp(&(b.incoming, &b.name, &b.remote)));
    rows
}

fn row(link: &LinkStatus, time: &impl Fn(i64) -> String) -> LinkRow {
    LinkRow {
        name: link.name.clone(),
        incoming: link.incoming,
        peer: site_label(&link.peer_site_name, &link.peer_site_id),
        peer_id: site_text(&link.peer_site_id),
        peer_router: link.peer_router_name.clone(),
        state: link_state(link).to_owned(),
        carrier: link.carrier.clone(),
        carrier_reason: link.carrier_reason.clone(),
        remote: link.remote.clone(),
        local: link.local.clone(),
        rtt_us: link.rtt_us,
        cost: link.cost,
        mtu: link.mtu,
        since: if link.since_unix_ms > 0 { time(link.since_unix_ms) } else { String::new() },
        error: link.error.clone(),
        attempts: link
            .attempts
            .iter()
            .map(|attempt| Attempt {
                endpoint: attempt.endpoint.clone(),
                outcome: attempt.outcome.clone(),
            })
            .collect(),
        bytes_sent: link.bytes_sent,
        bytes_received: link.bytes_received,
    }
}

/// `up`, `connecting` or `down`.
#[must_use]
pub fn link_state(link: &LinkStatus) -> &'static str {
    match link.state() {
        LinkState::Up => "up",
        LinkState::Connecting => "connecting",
        LinkState::Down | LinkState::Unspecified => "down",
    }
}

/// The answer to a trace.
#[must_use]
pub fn trace(address: &str, port: u32, reply: &TraceReply) -> TraceReport {
    let chosen = usize::try_from(reply.chosen).ok();
    let candidates = reply.candidates.iter().enumerate().map(|(index, candidate)| TraceCandidate {
        site: site_label(&candidate.site_name, &candidate.site_id),
        site_id: site_text(&candidate.site_id),
        router_id: router_text(&candidate.router_id),
        chosen: Some(index) == chosen,
        note: candidate.note.clone(),
        paths: candidate
            .paths
            .iter()
            .map(|path| TracePath {
                hops: path
                    .hops
                    .iter()
                    .map(|hop| TraceHop {
                        router: hop.router_name.clone(),
                        router_id: router_text(&hop.router_id),
                        site: hop.site_name.clone(),
                        link_rtt_us: hop.link_rtt_us,
                        cost: hop.cost,
                    })
                    .collect(),
                metric_us: path.metric_us,
                mtu: path.mtu,
                measured_rtt_us: path.measured_rtt_us,
            })
            .collect(),
    });
    TraceReport {
        address: address.to_owned(),
        port: u16::try_from(port).unwrap_or(0),
        candidates: candidates.collect(),
        why: reply.why.clone(),
        error: reply.error.clone(),
    }
}
