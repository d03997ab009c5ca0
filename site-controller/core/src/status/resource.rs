//! The `status` of resources.

use std::collections::BTreeSet;

use skein_api::{Condition, ListenerSpec, Manifest, Phase, Protocol, ResourceStatus};
use skein_wire::proto::{
    control::{ConnectorStatus, LinkStatus, ListenerStatus, RouterStatus},
    routing,
};

use super::link_state;

/// Of a link, by its name.
#[must_use]
pub fn link_status<'a>(
    name: &str,
    statuses: impl IntoIterator<Item = &'a RouterStatus>,
) -> ResourceStatus {
    let links: Vec<&LinkStatus> = statuses
        .into_iter()
        .flat_map(|status| &status.links)
        .filter(|link| !link.incoming && link.name == name)
        .collect();
    let Some(first) = links.first() else {
        return pending("Up", "NoRouter", "the router takes it up");
    };
    match links.iter().find(|link| link_state(link) == "up") {
        Some(up) => {
            let message = format!("up over {} to {}", up.carrier, up.remote);
            settled(Phase::Ready, "Up", "Up", message)
        }
        None if first.error.is_empty() => pending("Up", "Connecting", "connecting"),
        None => settled(Phase::Error, "Up", "Down", first.error.clone()),
    }
}

/// Of a listener.
#[must_use]
pub fn listener_status<'a>(
    listener: &Manifest<ListenerSpec>,
    statuses: impl IntoIterator<Item = &'a RouterStatus>,
) -> ResourceStatus {
    let statuses: Vec<&RouterStatus> = statuses.into_iter().collect();
    let name = &listener.metadata.name;
    let found: Vec<&ListenerStatus> = statuses
        .iter()
        .flat_map(|status| &status.listeners)
        .filter(|listener| listener.name == *name)
        .collect();
    let errors: Vec<String> = found
        .iter()
        .flat_map(|listener| &listener.ports)
        .filter(|port| !port.error.is_empty())
        .map(|port| format!("port {}: {}", port.port, port.error))
        .collect();
    let bound: Vec<String> = found
        .iter()
        .flat_map(|listener| &listener.ports)
        .filter(|port| !port.bound.is_empty())
        .map(|port| match port.protocol() {
            routing::Protocol::Udp => format!("{}/udp", port.bound),
            routing::Protocol::Tcp | routing::Protocol::Unspecified => port.bound.clone(),
        })
        .collect();
    if !errors.is_empty() {
        return settled(Phase::Error, "Bound", "Failed", errors.join(", "));
    }
    if bound.is_empty() {
        return unbound(&listener.spec, &statuses);
    }
    settled(Phase::Ready, "Bound", "Bound", format!("listens on {}", bound.join(", ")))
}

/// Why a listener has no port open.
fn unbound(spec: &ListenerSpec, statuses: &[&RouterStatus]) -> ResourceStatus {
    let addresses = statuses.iter().flat_map(|status| &status.addresses);
    let served = addresses.filter(|served| served.address == spec.address);
    let providers = served.flat_map(|served| &served.providers);
    let offered: BTreeSet<(u32, &str)> = providers
        .flat_map(|provider| &provider.ports)
        .map(|port| {
            (port.port, if port.protocol() == routing::Protocol::Udp { "udp" } else { "tcp" })
        })
        .collect();
    if offered.is_empty() {
        return pending("Bound", "NoProvider", "no site serves the address, so nothing listens");
    }
    let wanted = spec
        .ports
        .iter()
        .map(|port| (port.port, if port.protocol == Protocol::Udp { "udp" } else { "tcp" }));
    let missing: BTreeSet<_> = wanted.filter(|port| !offered.contains(port)).collect();
    if missing.is_empty() {
        return pending("Bound", "Opening", "the router opens it");
    }
    let text = |ports: BTreeSet<(u32, &str)>| {
        let texts = ports.into_iter().map(|(port, protocol)| format!("{port}/{protocol}"));
        texts.collect::<Vec<_>>().join(", ")
    };
    let message = format!("served, but not on {}; it has {}", text(missing), text(offered));
    pending("Bound", "NoSuchPort", &message)
}

/// Of a connector, by its name.
#[must_use]
pub fn connector_status<'a>(
    name: &str,
    statuses: impl IntoIterator<Item = &'a RouterStatus>,
) -> ResourceStatus {
    let found: Vec<&ConnectorStatus> = statuses
        .into_iter()
        .flat_map(|status| &status.connectors)
        .filter(|connector| connector.name == name)
        .collect();
    if found.iter().any(|connector| connector.advertised) {
        let message = match refusals(&found).as_str() {
            "" => "served to the network".to_owned(),
            refusals => format!("served to the network, but datagrams were refused by {refusals}"),
        };
        return settled(Phase::Ready, "Advertised", "Advertised", message);
    }
    let errors: Vec<String> = found
        .iter()
        .flat_map(|connector| &connector.targets)
        .filter(|target| !target.healthy && !target.error.is_empty())
        .map(|target| format!("{}: {}", target.target, target.error))
        .collect();
    if errors.is_empty() {
        return pending("Advertised", "Checking", "targets are being checked");
    }
    settled(
        Phase::Error,
        "Advertised",
        "NoTarget",
        format!("no target answers: {}", errors.join(", ")),
    )
}

/// Targets of datagrams whose hosts said lately that nobody listens.
fn refusals(connectors: &[&ConnectorStatus]) -> String {
    let targets = connectors.iter().flat_map(|connector| &connector.targets);
    let refusing = targets.filter(|target| target.healthy && !target.error.is_empty());
    let texts = refusing.map(|target| format!("{}/udp: {}", target.target, target.error));
    texts.collect::<Vec<_>>().join(", ")
}

fn settled(phase: Phase, kind: &str, reason: &str, message: String) -> ResourceStatus {
    let status = if phase == Phase::Ready { "True" } else { "False" };
    let condition = Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.clone(),
        last_transition_time: String::new(),
    };
    ResourceStatus { phase, message, conditions: vec![condition] }
}

fn pending(kind: &str, reason: &str, message: &str) -> ResourceStatus {
    ResourceStatus {
        phase: Phase::Pending,
        ..settled(Phase::Pending, kind, reason, message.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_api::ListenerPort;
    use skein_wire::proto::control::{
        AddressProvider, ListenerPortStatus, NetworkAddress, TargetStatus, link_status::LinkState,
    };

    #[test]
    fn a_link_is_as_its_best_router_says() {
        assert_eq!(link_status("hub", []).phase, Phase::Pending);
        let mut status = RouterStatus::default();
        status.links.push(LinkStatus {
            name: "hub".into(),
            error: "UDP to h:1 unanswered".into(),
            ..LinkStatus::default()
        });
        let failed = link_status("hub", [&status]);
        assert_eq!(
            (failed.phase, failed.message.as_str()),
            (Phase::Error, "UDP to h:1 unanswered")
        );
        status.links[0].state = LinkState::Up.into();
        assert_eq!(link_status("hub", [&status]).phase, Phase::Ready);
        status.links[0].incoming = true;
        assert_eq!(link_status("hub", [&status]).phase, Phase::Pending);
    }

    #[test]
    fn a_listener_on_a_port_that_nobody_serves_says_which_there_are() {
        let port = ListenerPort { port: 9999, local_port: Some(19_999), protocol: Protocol::Tcp };
        let spec =
            ListenerSpec { address: "http".into(), host: "127.0.0.1".into(), ports: vec![port] };
        let listener = Manifest::new("http", spec);
        let mut status = RouterStatus::default();
        let none = listener_status(&listener, [&status]);
        assert!(none.message.starts_with("no site serves"), "{none:?}");
        status.addresses.push(NetworkAddress {
            address: "http".into(),
            providers: vec![AddressProvider {
                ports: vec![routing::Port { port: 8000, ..Default::default() }],
                ..Default::default()
            }],
        });
        let other = listener_status(&listener, [&status]);
        assert_eq!(other.message, "served, but not on 9999/tcp; it has 8000/tcp");
        let bound = |bound: &str, protocol: routing::Protocol| ListenerPortStatus {
            bound: bound.into(),
            protocol: protocol.into(),
            ..Default::default()
        };
        status.listeners.push(ListenerStatus {
            name: "http".into(),
            ports: vec![
                bound("127.0.0.1:53", routing::Protocol::Tcp),
                bound("127.0.0.1:53", routing::Protocol::Udp),
            ],
            ..Default::default()
        });
        let ready = listener_status(&listener, [&status]);
        assert_eq!(ready.message, "listens on 127.0.0.1:53, 127.0.0.1:53/udp");
    }

    #[test]
    fn a_connector_is_ready_when_it_is_advertised() {
        let target = TargetStatus {
            target: "h:1".into(),
            error: "refused".into(),
            ..TargetStatus::default()
        };
        let mut status = RouterStatus::default();
        status.connectors.push(ConnectorStatus {
            name: "db".into(),
            targets: vec![target],
            ..ConnectorStatus::default()
        });
        assert_eq!(connector_status("db", [&status]).phase, Phase::Error);
        status.connectors[0].advertised = true;
        assert_eq!(connector_status("db", [&status]).phase, Phase::Ready);
        assert_eq!(connector_status("other", [&status]).phase, Phase::Pending);
    }
}
