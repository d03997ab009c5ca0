//! The `status` of resources.

use skein_api::{Condition, Phase, ResourceStatus};
use skein_wire::proto::control::{ConnectorStatus, LinkStatus, ListenerStatus, RouterStatus};

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

/// Of a listener, by its name.
#[must_use]
pub fn listener_status<'a>(
    name: &str,
    statuses: impl IntoIterator<Item = &'a RouterStatus>,
) -> ResourceStatus {
    let found: Vec<&ListenerStatus> = statuses
        .into_iter()
        .flat_map(|status| &status.listeners)
        .filter(|listener| listener.name == name)
        .collect();
    let errors: Vec<String> = found
        .iter()
        .flat_map(|listener| &listener.ports)
        .filter(|port| !port.error.is_empty())
        .map(|port| format!("port {}: {}", port.port, port.error))
        .collect();
    let bound: Vec<&str> = found
        .iter()
        .flat_map(|listener| &listener.ports)
        .map(|port| port.bound.as_str())
        .filter(|bound| !bound.is_empty())
        .collect();
    if !errors.is_empty() {
        return settled(Phase::Error, "Bound", "Failed", errors.join(", "));
    }
    if bound.is_empty() {
        return pending("Bound", "NoProvider", "no site serves the address, so nothing listens");
    }
    settled(Phase::Ready, "Bound", "Bound", format!("listens on {}", bound.join(", ")))
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
    use skein_wire::proto::control::{TargetStatus, link_status::LinkState};

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
