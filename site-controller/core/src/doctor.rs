//! What is wrong with a site and how to mend it, from observations.

use std::collections::BTreeSet;

use skein_api::status::DoctorFinding;
use skein_core::Protocol;
use skein_wire::proto::control::{ProbeResult, RouterStatus};

use crate::{endpoint::LocalPorts, resources::Resources, status::link_state};

/// A statement is valid this long, so a fresh one tells its signer's clock.
const STATEMENT_VALIDITY_S: i64 = 7 * 86_400;
/// Clocks this far apart are reported: certificates begin an hour early, so this is well before anything breaks.
const CLOCK_DIFFERENCE_S: i64 = 120;
/// Below this a socket buffer drops packets in bursts, bytes.
const SOCKET_BUFFER_MIN: u64 = 4 << 20;

/// What was found out.
#[derive(Clone, Debug, Default)]
pub struct Observations<'a> {
    /// The one address to look at; empty: everything.
    pub address: String,
    /// What is wanted.
    pub resources: Option<&'a Resources>,
    /// What each attached router sees.
    pub routers: Vec<&'a RouterStatus>,
    /// Router processes attached.
    pub attached: usize,
    /// What became of each endpoint of each link, tried from the router; `None` when the router did not answer.
    pub probes: Option<Vec<ProbeResult>>,
    /// Clocks of other sites.
    pub clocks: Vec<PeerClock>,
    /// Now, Unix time.
    pub now_unix_s: i64,
    /// `net.core.rmem_max` and `wmem_max`, bytes.
    pub socket_buffers: Option<(u64, u64)>,
    /// Ports of this host.
    pub host: LocalPorts,
    /// State files that were damaged.
    pub problems: Vec<String>,
}

/// What a statement tells of the clock of the site that signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerClock {
    /// Name of the site.
    pub site: String,
    /// When its newest statement expires, Unix time.
    pub expires_unix_s: i64,
}

/// Every check, in the order in which to mend things.
#[must_use]
pub fn diagnose(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let mut out = Vec::new();
    if seen.address.is_empty() {
        out.push(processes(seen));
        out.extend(seen.problems.iter().map(|text| {
            bad(
                "state files",
                text.clone(),
                "apply the lost resource again or restore the file, then remove the damaged one",
            )
        }));
        out.extend(sockets(seen));
        out.push(clock(seen));
        out.extend(buffers(seen));
        out.extend(links(seen));
        out.extend(endpoints(seen));
    }
    out.extend(targets(seen));
    out.extend(listeners(seen));
    out
}

fn good(check: impl Into<String>, detail: impl Into<String>) -> DoctorFinding {
    DoctorFinding { check: check.into(), ok: true, detail: detail.into(), fix: String::new() }
}

fn bad(
    check: impl Into<String>,
    detail: impl Into<String>,
    fix: impl Into<String>,
) -> DoctorFinding {
    DoctorFinding { check: check.into(), ok: false, detail: detail.into(), fix: fix.into() }
}

fn processes(seen: &Observations<'_>) -> DoctorFinding {
    match seen.attached {
        0 => bad(
            "processes",
            "the controller runs, but no router is attached to it",
            "see `skctl logs`; `skctl restart` starts both anew",
        ),
        count => good("processes", format!("the controller runs, {count} router(s) attached")),
    }
}

fn sockets(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let all = seen.routers.iter().flat_map(|status| &status.sockets);
    let check = |socket: &skein_wire::proto::control::BoundSocket| {
        let name = format!("socket {}", socket.address);
        match socket.error.as_str() {
            "" => good(name, "bound, UDP and TCP"),
            error => {
                bad(name, error, "free the port, or choose another: skctl init --listen ADDR:PORT")
            }
        }
    };
    all.map(check).collect()
}

/// A statement that expires later than one signed now would has been signed by a clock ahead of this one.
fn clock(seen: &Observations<'_>) -> DoctorFinding {
    let ahead = |peer: &&PeerClock| peer.expires_unix_s - STATEMENT_VALIDITY_S - seen.now_unix_s;
    let farthest = seen.clocks.iter().max_by_key(ahead);
    match farthest.map(|peer| (peer, ahead(&peer))) {
        Some((peer, seconds)) if seconds > CLOCK_DIFFERENCE_S => bad(
            "clock",
            format!("the clock here is at least {seconds} s behind that of site {}", peer.site),
            "set the clock of the machine that is wrong; run an NTP client on both",
        ),
        Some(_) => good("clock", "no other site's clock is ahead of this one's"),
        None => good("clock", "no other site to compare with"),
    }
}

fn buffers(seen: &Observations<'_>) -> Option<DoctorFinding> {
    let (receive, send) = seen.socket_buffers?;
    let smallest = receive.min(send);
    let check = "socket buffers";
    Some(if smallest >= SOCKET_BUFFER_MIN {
        good(check, format!("up to {} KiB", smallest >> 10))
    } else {
        let fix = format!(
            "sysctl -w net.core.rmem_max={SOCKET_BUFFER_MIN} net.core.wmem_max={SOCKET_BUFFER_MIN}, and the same lines in /etc/sysctl.d/skein.conf"
        );
        bad(
            check,
            format!("the kernel allows {} KiB only, so bursts are dropped", smallest >> 10),
            fix,
        )
    })
}

fn links(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let all = seen.routers.iter().flat_map(|status| &status.links);
    let check = |link: &skein_wire::proto::control::LinkStatus| {
        let name = format!("link {}", link.name);
        if link_state(link) == "up" {
            return good(name, format!("up over {} to {}", link.carrier, link.remote));
        }
        let attempts: Vec<String> = link
            .attempts
            .iter()
            .map(|attempt| format!("{}: {}", attempt.endpoint, attempt.outcome))
            .collect();
        let detail = match (link.error.is_empty(), attempts.is_empty()) {
            (true, true) => link_state(link).to_owned(),
            (false, true) => link.error.clone(),
            (true, false) => attempts.join(", "),
            (false, false) => format!("{} ({})", link.error, attempts.join(", ")),
        };
        bad(name, detail, "check that the other site runs and that nothing between blocks its port")
    };
    all.filter(|link| !link.incoming || link_state(link) != "up").map(check).collect()
}

fn endpoints(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let Some(probes) = &seen.probes else {
        return vec![bad("endpoints", "the router did not try them", "see `skctl logs`")];
    };
    let check = |probe: &ProbeResult| {
        let name = format!("endpoint {}", probe.endpoint);
        let detail = format!("UDP: {}, TCP: {}", probe.udp, probe.tcp);
        match (probe.udp.as_str(), probe.tcp.as_str()) {
            ("ok", "ok") => good(name, detail),
            ("ok", _) => bad(
                name,
                detail,
                "links work; tokens are redeemed over UDP only, so allow the TCP port too",
            ),
            (_, "ok") => bad(name, detail, "something between drops UDP: allow the UDP port there"),
            _ => bad(name, detail, "check the address, and that the other site runs and listens"),
        }
    };
    probes.iter().map(check).collect()
}

fn targets(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let all = seen.routers.iter().flat_map(|status| &status.connectors);
    let wanted = all.filter(|c| seen.address.is_empty() || c.address == seen.address);
    let mut out = Vec::new();
    for connector in wanted {
        for target in &connector.targets {
            let name = format!("target {} of {}", target.target, connector.address);
            out.push(if target.healthy {
                good(name, "answers")
            } else {
                bad(
                    name,
                    target.error.clone(),
                    "start the workload, or correct its host and port with `skctl expose`",
                )
            });
        }
    }
    out
}

/// Local endpoints: what cannot be bound, and whom an endpoint keeps from binding the wildcard.
fn listeners(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let all = seen.routers.iter().flat_map(|status| &status.listeners);
    let wanted = all.filter(|l| seen.address.is_empty() || l.address == seen.address);
    let mut out = Vec::new();
    let mut blocking: BTreeSet<u16> = BTreeSet::new();
    for listener in wanted {
        for port in &listener.ports {
            let name = format!("endpoint of {} port {}", listener.address, port.port);
            if !port.error.is_empty() {
                out.push(bad(
                    name,
                    port.error.clone(),
                    "free the port, or choose one with `skctl listen`",
                ));
            }
            let bound = port.bound.parse::<std::net::SocketAddr>().ok();
            blocking.extend(bound.filter(|b| b.ip().is_loopback()).map(|bound| bound.port()));
        }
    }
    let held: Vec<String> = blocking
        .iter()
        .filter(|port| seen.host.wildcard.contains(&(**port, Protocol::Tcp)))
        .map(u16::to_string)
        .collect();
    if !held.is_empty() {
        let detail =
            format!("another program holds port {} on all addresses as well", held.join(", "));
        out.push(bad(
            "wildcard binds",
            detail,
            "give that program an address of its own, or `skctl init --auto-listen none`",
        ));
    } else if !blocking.is_empty() && seen.address.is_empty() {
        let ports: Vec<String> = blocking.iter().map(u16::to_string).collect();
        out.push(good(
            "wildcard binds",
            format!(
                "while local endpoints listen there, no program can bind 0.0.0.0 or [::] on port {}",
                ports.join(", ")
            ),
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_wire::proto::control::{
        ConnectorStatus, ListenerPortStatus, ListenerStatus, TargetStatus,
    };

    fn find<'a>(findings: &'a [DoctorFinding], check: &str) -> &'a DoctorFinding {
        findings.iter().find(|finding| finding.check.contains(check)).expect(check)
    }

    #[test]
    fn every_failure_has_a_fix() {
        let status = RouterStatus {
            sockets: vec![skein_wire::proto::control::BoundSocket {
                address: "[::]:7443".into(),
                error: "in use".into(),
            }],
            links: vec![Default::default()],
            connectors: vec![ConnectorStatus {
                address: "db".into(),
                targets: vec![TargetStatus {
                    target: "h:1".into(),
                    healthy: false,
                    error: "refused".into(),
                }],
                ..Default::default()
            }],
            listeners: vec![ListenerStatus {
                address: "db".into(),
                ports: vec![ListenerPortStatus {
                    port: 1,
                    error: "in use".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }],
            ..Default::default()
        };
        let probe = ProbeResult {
            endpoint: "h:2".into(),
            udp: "unanswered".into(),
            tcp: "ok".into(),
            rtt_us: 0,
        };
        let findings = diagnose(&Observations {
            routers: vec![&status],
            probes: Some(vec![probe]),
            clocks: vec![PeerClock {
                site: "dc".into(),
                expires_unix_s: STATEMENT_VALIDITY_S + 3600,
            }],
            socket_buffers: Some((212_992, 212_992)),
            problems: vec!["x was damaged".into()],
            ..Observations::default()
        });
        assert!(
            findings.iter().all(|finding| !finding.ok && !finding.fix.is_empty()),
            "{findings:#?}"
        );
        assert_eq!(findings.len(), 9);
        assert!(find(&findings, "clock").detail.contains("3600 s behind"));
    }

    #[test]
    fn one_address_is_looked_at_alone() {
        let target = |address: &str| ConnectorStatus {
            address: address.into(),
            targets: vec![TargetStatus {
                target: "h:1".into(),
                healthy: true,
                error: String::new(),
            }],
            ..Default::default()
        };
        let status =
            RouterStatus { connectors: vec![target("a"), target("b")], ..Default::default() };
        let seen =
            Observations { address: "b".into(), routers: vec![&status], ..Default::default() };
        let findings = diagnose(&seen);
        assert!(findings.len() == 1 && findings[0].ok && findings[0].check.contains(" b"));
    }
}
