//! `skctl doctor`: collects what there is to see and says what it means.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use skein_site_core::{Observations, PeerClock, diagnose};
use skein_wire::proto::{
    control::{ProbeRequest, ProbeResult, from_router, to_router},
    site::Document,
};
use tokio::sync::mpsc;
use tonic::Status;

use crate::{clock, controller::Controller};

/// Dials take up to several seconds each, in parallel.
const PROBE_TIMEOUT: Duration = Duration::from_secs(15);
/// Endpoints tried at once.
const PROBES_MAX: usize = 64;

/// Sends one finding after the other.
///
/// # Cancel safety
/// Dropping it ends the examination.
pub(crate) async fn run(
    controller: Arc<Controller>,
    address: String,
    findings: mpsc::Sender<Result<Document, Status>>,
) {
    let probes = if address.is_empty() { probe_links(&controller).await } else { Some(Vec::new()) };
    let found = {
        let state = controller.state();
        let peers = state.learned.statements();
        diagnose(&Observations {
            address,
            resources: Some(&state.resources),
            routers: state.statuses().collect(),
            attached: state.routers.values().filter(|router| router.session.is_some()).count(),
            probes,
            clocks: peers
                .map(|peer| PeerClock { site: peer.name, expires_unix_s: peer.expires_unix_s })
                .collect(),
            ca_not_after_unix_s: controller.ca.not_after_unix_s(),
            now_unix_s: clock::unix_s(),
            socket_buffers: socket_buffers(),
            host: state.host.clone(),
            problems: state.problems.iter().map(ToString::to_string).collect(),
        })
    };
    for finding in found {
        let json = serde_json::to_string(&finding).expect("invariant: findings have string keys");
        if findings.send(Ok(Document { json })).await.is_err() {
            return;
        }
    }
}

/// Every endpoint of every link, tried from where the router stands.
async fn probe_links(controller: &Controller) -> Option<Vec<ProbeResult>> {
    let endpoints: BTreeSet<String> = {
        let state = controller.state();
        state.resources.links.values().flat_map(|link| link.spec.endpoints.clone()).collect()
    };
    if endpoints.is_empty() {
        return Some(Vec::new());
    }
    let endpoints: Vec<String> = endpoints.into_iter().take(PROBES_MAX).collect();
    let request = |id| to_router::Message::Probe(ProbeRequest { id, endpoints });
    match controller.ask(request, PROBE_TIMEOUT).await {
        Ok(from_router::Message::Probe(reply)) => Some(reply.results),
        _ => None,
    }
}

fn socket_buffers() -> Option<(u64, u64)> {
    let read = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/core/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    Some((read("rmem_max")?, read("wmem_max")?))
}
