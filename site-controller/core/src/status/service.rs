//! `service list`: every address with its local endpoints and providers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use skein_api::{
    Protocol,
    status::{Endpoint, Provider, ServicePort, ServiceRow, Target},
};
use skein_core::{Address, Port, SiteId};
use skein_wire::proto::{control, routing};

use super::{site_label, site_text};
use crate::{admission::LeftOut, endpoint::AutoEndpoints, resources::Resources};

/// Builds the rows: addresses of the network, of connectors and of listeners here, by name.
#[must_use]
pub fn services(
    site: SiteId,
    site_name: &str,
    resources: &Resources,
    endpoints: &AutoEndpoints,
    left_out: &LeftOut,
    statuses: &[&control::RouterStatus],
) -> Vec<ServiceRow> {
    let mut rows: BTreeMap<String, ServiceRow> = BTreeMap::new();
    let names = site_names(statuses);
    for service in statuses.iter().flat_map(|status| &status.addresses) {
        let row = entry(&mut rows, &service.address);
        for provider in &service.providers {
            if row.strategy.is_empty() {
                row.strategy = strategy(provider.strategy()).to_owned();
            }
            add_ports(&mut row.ports, &provider.ports);
            let id = site_text(&provider.site_id);
            let known = names.get(&provider.site_id).map_or("", String::as_str);
            let local = provider.site_id == site.0;
            let name = if local { site_name } else { known };
            add_provider(row, site_label(name, &provider.site_id), id, local, provider);
        }
    }
    for connector in resources.connectors.values() {
        let row = entry(&mut rows, &connector.spec.address);
        add_local_provider(row, site, site_name, connector, statuses);
    }
    for listener in resources.listeners.values() {
        entry(&mut rows, &listener.spec.address);
    }
    for status in statuses.iter().flat_map(|status| &status.listeners) {
        if let Some(row) = rows.get_mut(&status.address) {
            let explicit = resources.listeners.contains_key(&status.name);
            row.endpoints.extend(status.ports.iter().map(|port| endpoint(status, port, explicit)));
        }
    }
    for row in rows.values_mut() {
        let address = row.address.parse::<Address>().ok();
        let automatic = address.as_ref().and_then(|address| endpoints.get(address));
        let left_out = address.as_ref().and_then(|address| left_out.get(address));
        let has_automatic = row.endpoints.iter().any(|endpoint| endpoint.automatic);
        if let Some(automatic) = automatic.filter(|_| has_automatic) {
            row.local_ip = automatic.ip.to_string();
        }
        judge(row);
        if let Some(ports) = left_out.filter(|_| row.state == "ready") {
            explain_left_out(row, ports);
        } else if row.state == "ready" && automatic.is_some() && row.endpoints.is_empty() {
            "opening".clone_into(&mut row.state);
            "its local endpoint is being opened".clone_into(&mut row.message);
        }
    }
    rows.into_values().collect()
}

fn entry<'a>(rows: &'a mut BTreeMap<String, ServiceRow>, address: &str) -> &'a mut ServiceRow {
    rows.entry(address.to_owned())
        .or_insert_with(|| ServiceRow { address: address.to_owned(), ..ServiceRow::default() })
}

fn site_names(statuses: &[&control::RouterStatus]) -> BTreeMap<Vec<u8>, String> {
    let sites = statuses.iter().flat_map(|status| &status.sites);
    let mut out: BTreeMap<_, _> =
        sites.map(|site| (site.site_id.clone(), site.name.clone())).collect();
    for router in statuses.iter().flat_map(|status| &status.routers) {
        out.entry(router.site_id.clone()).or_insert_with(|| router.site_name.clone());
    }
    out
}

fn protocol(number: i32) -> Protocol {
    match routing::Protocol::try_from(number) {
        Ok(routing::Protocol::Udp) => Protocol::Udp,
        _ => Protocol::Tcp,
    }
}

fn strategy(strategy: routing::Strategy) -> &'static str {
    match strategy {
        routing::Strategy::Closest => "closest",
        routing::Strategy::Priority => "priority",
        routing::Strategy::Weighted => "weighted",
        routing::Strategy::Balanced | routing::Strategy::Unspecified => "balanced",
    }
}

fn add_ports(to: &mut Vec<ServicePort>, ports: &[routing::Port]) {
    for port in ports {
        let Ok(number) = u16::try_from(port.port) else { continue };
        let port = ServicePort { port: number, protocol: protocol(port.protocol) };
        if !to.contains(&port) {
            to.push(port);
        }
    }
    to.sort_by_key(|port| (port.port, port.protocol));
}

/// Routers of one site count as one provider.
fn add_provider(
    row: &mut ServiceRow,
    name: String,
    id: String,
    local: bool,
    seen: &control::AddressProvider,
) {
    let index = row.providers.iter().position(|provider| provider.site_id == id);
    let index = index.unwrap_or_else(|| {
        row.providers.push(Provider { site: name, site_id: id, local, ..Provider::default() });
        row.providers.len() - 1
    });
    let provider = &mut row.providers[index];
    provider.reachable |= seen.reachable || local;
    add_ports(&mut provider.ports, &seen.ports);
}

fn add_local_provider(
    row: &mut ServiceRow,
    site: SiteId,
    site_name: &str,
    connector: &skein_api::Manifest<skein_api::ConnectorSpec>,
    statuses: &[&control::RouterStatus],
) {
    let ports: Vec<routing::Port> = connector
        .spec
        .ports
        .iter()
        .map(|port| routing::Port {
            port: port.port,
            protocol: match port.protocol {
                Protocol::Tcp => routing::Protocol::Tcp.into(),
                Protocol::Udp => routing::Protocol::Udp.into(),
            },
        })
        .collect();
    add_ports(&mut row.ports, &ports);
    if row.strategy.is_empty() {
        row.strategy = strategy_text(connector.spec.strategy).to_owned();
    }
    let id = site.to_string();
    let index = row.providers.iter().position(|provider| provider.site_id == id);
    let index = index.unwrap_or_else(|| {
        let site = site_name.to_owned();
        row.providers.push(Provider { site, site_id: id, local: true, ..Provider::default() });
        row.providers.len() - 1
    });
    let provider = &mut row.providers[index];
    add_ports(&mut provider.ports, &ports);
    let seen = statuses.iter().flat_map(|status| &status.connectors);
    for status in seen.filter(|status| status.name == connector.metadata.name) {
        provider.targets.extend(status.targets.iter().map(|target| Target {
            target: target.target.clone(),
            protocol: protocol(target.protocol),
            healthy: target.healthy,
            error: target.error.clone(),
        }));
    }
}

fn strategy_text(of: skein_api::Strategy) -> &'static str {
    match of {
        skein_api::Strategy::Closest => "closest",
        skein_api::Strategy::Balanced => "balanced",
        skein_api::Strategy::Priority => "priority",
        skein_api::Strategy::Weighted => "weighted",
    }
}

fn endpoint(
    listener: &control::ListenerStatus,
    port: &control::ListenerPortStatus,
    explicit: bool,
) -> Endpoint {
    let is_own = port.bound.parse::<SocketAddr>().is_ok_and(|at| u32::from(at.port()) == port.port);
    Endpoint {
        port: u16::try_from(port.port).unwrap_or(0),
        protocol: protocol(port.protocol),
        bound: port.bound.clone(),
        automatic: !explicit,
        fallback: !explicit && !port.bound.is_empty() && !is_own,
        listener: if explicit { listener.name.clone() } else { String::new() },
        error: port.error.clone(),
    }
}

/// Says why a service that is ready cannot be reached from here.
fn explain_left_out(row: &mut ServiceRow, ports: &BTreeSet<Port>) {
    let open: BTreeSet<_> = row
        .endpoints
        .iter()
        .map(|endpoint| Port { port: endpoint.port, protocol: endpoint.protocol.into() })
        .collect();
    let text = |port: &Port| match port.protocol {
        skein_core::Protocol::Tcp => port.port.to_string(),
        skein_core::Protocol::Udp => format!("{}/udp", port.port),
    };
    let missing: Vec<String> = ports.difference(&open).map(text).collect();
    if missing.is_empty() {
        return;
    }
    "blocked".clone_into(&mut row.state);
    row.message = format!(
        "port {}: not opened by itself, the network offers more than there is room for; run `skctl listen {} --port {}`",
        missing.join(", "),
        row.address,
        missing[0],
    );
}

/// State and message from everything else.
fn judge(row: &mut ServiceRow) {
    let unhealthy: BTreeSet<&str> = row
        .providers
        .iter()
        .flat_map(|provider| &provider.targets)
        .filter(|target| !target.healthy)
        .map(|target| target.target.as_str())
        .collect();
    let blocked: Vec<String> = row
        .endpoints
        .iter()
        .filter(|endpoint| !endpoint.error.is_empty())
        .map(|endpoint| format!("port {}: {}", endpoint.port, endpoint.error))
        .collect();
    let all_local_unhealthy =
        row.providers.iter().all(|p| p.local && p.targets.iter().all(|t| !t.healthy));
    let (state, message) = if row.providers.is_empty() {
        (
            "unserved",
            "no site in reach serves it; run `skctl expose` where the workload is, and see `skctl status`"
                .to_owned(),
        )
    } else if !blocked.is_empty() {
        ("blocked", format!("{}; free the port or use `skctl listen`", blocked.join(", ")))
    } else if !unhealthy.is_empty() && all_local_unhealthy {
        let targets: Vec<&str> = unhealthy.into_iter().collect();
        ("unreachable", format!("no target answers ({}); start the workload", targets.join(", ")))
    } else if row.providers.iter().all(|provider| !provider.reachable && !provider.local) {
        ("unreachable", "no path to any site that serves it; see `skctl network status`".to_owned())
    } else {
        ("ready", String::new())
    };
    state.clone_into(&mut row.state);
    row.message = message;
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_api::{ConnectorPort, ConnectorSpec, Manifest, Resource};
    use skein_wire::proto::control::{
        AddressProvider, ConnectorStatus, ListenerPortStatus, ListenerStatus, NetworkAddress,
        NetworkSite, RouterStatus, TargetStatus,
    };

    const HERE: SiteId = SiteId([1; 32]);
    const THERE: SiteId = SiteId([2; 32]);

    fn remote(reachable: bool) -> RouterStatus {
        let port = routing::Port { port: 5432, protocol: routing::Protocol::Tcp.into() };
        let provider = AddressProvider {
            site_id: THERE.0.to_vec(),
            ports: vec![port],
            reachable,
            ..AddressProvider::default()
        };
        RouterStatus {
            addresses: vec![NetworkAddress { address: "db".into(), providers: vec![provider] }],
            sites: vec![NetworkSite {
                site_id: THERE.0.to_vec(),
                name: "dc".into(),
                ..NetworkSite::default()
            }],
            ..RouterStatus::default()
        }
    }

    fn rows(resources: &Resources, status: &RouterStatus) -> Vec<ServiceRow> {
        services(HERE, "hub", resources, &AutoEndpoints::new(), &LeftOut::new(), &[status])
    }

    #[test]
    fn a_remote_service_is_ready_while_there_is_a_path() {
        let row = &rows(&Resources::default(), &remote(true))[0];
        assert_eq!((row.address.as_str(), row.state.as_str()), ("db", "ready"));
        assert_eq!((row.ports[0].port, row.providers[0].site.as_str()), (5432, "dc"));
        assert_eq!(rows(&Resources::default(), &remote(false))[0].state, "unreachable");
    }

    #[test]
    fn a_port_there_is_no_room_for_is_shown_until_it_is_opened() {
        let port = Port { port: 5432, protocol: skein_core::Protocol::Tcp };
        let left_out = LeftOut::from([("db".parse().unwrap(), [port].into())]);
        let mut status = remote(true);
        let row = |status: &RouterStatus| {
            let (resources, endpoints) = (Resources::default(), AutoEndpoints::new());
            services(HERE, "hub", &resources, &endpoints, &left_out, &[status]).remove(0)
        };
        let blocked = row(&status);
        assert_eq!(blocked.state, "blocked");
        assert!(blocked.message.contains("`skctl listen db --port 5432`"), "{}", blocked.message);
        let ports = vec![ListenerPortStatus { port: 5432, ..ListenerPortStatus::default() }];
        let (name, address) = ("mine".into(), "db".into());
        status.listeners.push(ListenerStatus { name, address, ports, reachable: true });
        assert_eq!(row(&status).state, "ready");
    }

    #[test]
    fn a_port_that_cannot_be_bound_is_shown() {
        let mut status = remote(true);
        status.listeners.push(ListenerStatus {
            name: "auto:db".into(),
            address: "db".into(),
            ports: vec![ListenerPortStatus {
                port: 5432,
                error: "held by postgres (pid 7)".into(),
                ..ListenerPortStatus::default()
            }],
            reachable: true,
        });
        let row = &rows(&Resources::default(), &status)[0];
        assert_eq!(row.state, "blocked");
        assert!(row.message.contains("held by postgres") && row.endpoints[0].automatic);
    }

    #[test]
    fn a_local_service_whose_target_is_down_says_so() {
        let mut resources = Resources::default();
        let port = ConnectorPort { port: 80, target_port: None, protocol: Protocol::Tcp };
        let connector = Manifest::new("web", ConnectorSpec::new("web", vec![port]));
        resources.insert(Resource::Connector(connector)).unwrap();
        let target = TargetStatus {
            target: "127.0.0.1:80".into(),
            error: "refused".into(),
            ..TargetStatus::default()
        };
        let mut status = RouterStatus {
            connectors: vec![ConnectorStatus {
                name: "web".into(),
                targets: vec![target],
                ..ConnectorStatus::default()
            }],
            ..RouterStatus::default()
        };
        let row = &rows(&resources, &status)[0];
        assert!(row.state == "unreachable" && row.message.contains("127.0.0.1:80"), "{row:?}");
        status.connectors[0].targets[0].healthy = true;
        assert_eq!(rows(&resources, &status)[0].state, "ready");
    }
}
