//! `network status`: every site, router and link this site knows.

use std::collections::BTreeMap;

use skein_api::status::{
    NetworkLink, NetworkRouter, NetworkSite, NetworkStatus, Problem, ServiceRow,
};
use skein_core::SiteId;
use skein_wire::proto::{control, routing};

use super::{router_text, site_label, site_text};

/// Builds the document. `services` are those of [`services`](super::services).
#[must_use]
pub fn network(
    site: SiteId,
    site_name: &str,
    network_id: SiteId,
    statuses: &[&control::RouterStatus],
    services: Vec<ServiceRow>,
) -> NetworkStatus {
    let mut sites: BTreeMap<Vec<u8>, NetworkSite> = BTreeMap::new();
    sites.insert(
        site.0.to_vec(),
        NetworkSite {
            name: site_name.to_owned(),
            id: site.to_string(),
            local: true,
            trusted: true,
            membership: "member".to_owned(),
            ..NetworkSite::default()
        },
    );
    for known in statuses.iter().flat_map(|status| &status.sites) {
        sites.entry(known.site_id.clone()).or_insert_with(|| NetworkSite {
            name: site_label(&known.name, &known.site_id),
            id: site_text(&known.site_id),
            local: false,
            trusted: known.trusted,
            membership: if known.member { "member" } else { "guest" }.to_owned(),
            ..NetworkSite::default()
        });
    }
    let routers: BTreeMap<&[u8], &control::NetworkRouter> = statuses
        .iter()
        .flat_map(|status| &status.routers)
        .map(|router| (router.router_id.as_slice(), router))
        .collect();
    for router in routers.values() {
        let row = network_router(router, &routers);
        let site = sites.entry(router.site_id.clone()).or_insert_with(|| NetworkSite {
            name: site_label(&router.site_name, &router.site_id),
            id: site_text(&router.site_id),
            trusted: router.trusted,
            ..NetworkSite::default()
        });
        site.routers.push(row);
    }
    for service in &services {
        for provider in &service.providers {
            let found = sites.values_mut().find(|site| site.id == provider.site_id);
            if let Some(site) = found
                && !site.addresses.contains(&service.address)
            {
                site.addresses.push(service.address.clone());
            }
        }
    }
    let mut sites: Vec<NetworkSite> = sites.into_values().collect();
    sites.sort_by(|a, b| (!a.local, &a.name, &a.id).cmp(&(!b.local, &b.name, &b.id)));
    let problems = problems(&sites);
    NetworkStatus { network_id: network_id.to_string(), sites, services, problems }
}

fn network_router(
    router: &control::NetworkRouter,
    all: &BTreeMap<&[u8], &control::NetworkRouter>,
) -> NetworkRouter {
    let role = match router.role() {
        routing::Role::Interior => "interior",
        routing::Role::Edge => "edge",
        routing::Role::Unspecified => "",
    };
    let links = router.links.iter().map(|link| {
        let peer = all.get(link.neighbor.as_slice());
        NetworkLink {
            peer: peer.map_or_else(
                || router_text(&link.neighbor),
                |peer| site_label(&peer.site_name, &peer.site_id),
            ),
            peer_id: router_text(&link.neighbor),
            cost: link.cost,
            rtt_us: link.rtt_us.into(),
        }
    });
    NetworkRouter {
        name: router.name.clone(),
        id: router_text(&router.router_id),
        role: role.to_owned(),
        version: router.version.clone(),
        reachable: router.reachable,
        hops: router.hops,
        metric_us: router.metric_us,
        links: links.collect(),
    }
}

fn problems(sites: &[NetworkSite]) -> Vec<Problem> {
    let mut out = Vec::new();
    for site in sites.iter().filter(|site| !site.local) {
        let label = &site.name;
        if !site.trusted {
            out.push(Problem {
                what: format!("site {label} is not trusted"),
                why: "nobody this site trusts vouches for it".to_owned(),
                fix: "link it with a token of this network, or ignore it".to_owned(),
            });
        } else if !site.routers.is_empty() && site.routers.iter().all(|router| !router.reachable) {
            out.push(Problem {
                what: format!("site {label} is out of reach"),
                why: "no path of links leads to any of its routers".to_owned(),
                fix: "see `skctl link list` here and at that site".to_owned(),
            });
        }
    }
    out
}
