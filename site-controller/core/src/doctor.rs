//! What is wrong with a site and how to mend it, from observations.

use std::collections::BTreeSet;

use skein_api::status::DoctorFinding;
use skein_core::Protocol;
use skein_wire::proto::{
    control::{ProbeResult, RouterStatus},
    routing,
};

use crate::{endpoint::LocalPorts, resources::Resources, status::link_state};

/// A statement is valid this long, so a fresh one tells its signer's clock.
const STATEMENT_VALIDITY_S: i64 = 7 * 86_400;
/// Clocks this far apart are reported: certificates begin an hour early, so this is well before anything breaks.
const CLOCK_DIFFERENCE_S: i64 = 120;
const DAY_S: i64 = 86_400;
/// Routers ask for a new certificate when a third of its 72 hours has passed; with less than this left nobody answered for a day.
const CERTIFICATE_LEFT_MIN_S: i64 = DAY_S;
/// An authority is good for ten years; people need time to replace one.
const CA_LEFT_MIN_S: i64 = 90 * DAY_S;
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
    /// When the certificate of the site's authority ends, Unix time.
    pub ca_not_after_unix_s: Option<i64>,
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
        out.extend(certificates(seen));
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

/// Certificates that are about to end although somebody should have renewed them.
fn certificates(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let mut out = Vec::new();
    for status in &seen.routers {
        let check = "router certificate";
        let left_s = status.certificate_not_after_unix_s - seen.now_unix_s;
        let fix =
            "see `skctl logs`; `skctl restart` asks for a new one; check the clock of this machine";
        out.push(match status.certificate_not_after_unix_s {
            0 => bad(check, "the router has none", fix),
            _ if left_s <= 0 => bad(check, format!("it ended {} ago", hours(-left_s)), fix),
            _ if left_s < CERTIFICATE_LEFT_MIN_S => {
                bad(check, format!("it ends in {}, its renewal is overdue", hours(left_s)), fix)
            }
            _ => good(check, format!("good for {}, renewed before", hours(left_s))),
        });
    }
    if let Some(not_after_unix_s) = seen.ca_not_after_unix_s {
        let check = "certificate authority";
        let left_s = not_after_unix_s - seen.now_unix_s;
        out.push(if left_s < CA_LEFT_MIN_S {
            let detail = format!("it ends in {} days", left_s / DAY_S);
            bad(check, detail, "make a new site before then, link it, and delete this one")
        } else {
            good(check, format!("good for {} days", left_s / DAY_S))
        });
    }
    out
}

fn hours(seconds: i64) -> String {
    if seconds < 3600 { format!("{} min", seconds / 60) } else { format!("{} h", seconds / 3600) }
}

/// Neighbours tell their time when a link comes up. Of others there are their statements: one that expires later than one signed now would
/// has been signed by a clock ahead of this one.
fn clock(seen: &Observations<'_>) -> DoctorFinding {
    let links = seen.routers.iter().flat_map(|status| &status.links);
    let told = links
        .filter_map(|link| Some((link.peer_site_name.as_str(), link.peer_clock_ahead_ms? / 1000)));
    let signed = seen.clocks.iter().map(|peer| {
        (peer.site.as_str(), peer.expires_unix_s - STATEMENT_VALIDITY_S - seen.now_unix_s)
    });
    let told: Vec<_> = told.collect();
    let farthest = told.iter().copied().max_by_key(|(_, ahead_s)| ahead_s.abs());
    let ahead = signed.max_by_key(|(_, ahead_s)| *ahead_s);
    let fix = "set the clock of the machine that is wrong; run an NTP client on both";
    match (farthest, ahead) {
        (Some((site, ahead_s)), _) if ahead_s.abs() > CLOCK_DIFFERENCE_S => {
            let side = if ahead_s > 0 { "behind" } else { "ahead of" };
            let detail =
                format!("the clock here is {} s {side} that of site {site}", ahead_s.abs());
            bad("clock", detail, fix)
        }
        (_, Some((site, ahead_s))) if ahead_s > CLOCK_DIFFERENCE_S => {
            let detail =
                format!("the clock here is at least {ahead_s} s behind that of site {site}");
            bad("clock", detail, fix)
        }
        (Some((site, ahead_s)), _) => good(
            "clock",
            format!("within {} s of all neighbours (most: {site})", ahead_s.abs() + 1),
        ),
        (None, Some(_)) => good("clock", "no other site's clock is ahead of this one's"),
        (None, None) => good("clock", "no other site to compare with"),
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

/// How a router words the alert of a peer that does not know this site, or no longer trusts it.
const NOT_TRUSTED: &str = "does not trust this site";

fn links(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let all = seen.routers.iter().flat_map(|status| &status.links);
    let check = |link: &skein_wire::proto::control::LinkStatus| {
        let name = format!("link {}", link.name);
        if link_state(link) == "up" {
            let mut detail = format!("up over {} to {}", link.carrier, link.remote);
            if !link.carrier_reason.is_empty() {
                detail += &format!(" ({})", link.carrier_reason);
            }
            return good(name, detail);
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
        let fix = if detail.contains(NOT_TRUSTED) {
            "get a new token from it (`skctl token create` there) and `skctl link` it here"
        } else {
            "check that the other site runs and that nothing between blocks its port"
        };
        bad(name, detail, fix)
    };
    all.filter(|link| !link.incoming || link_state(link) != "up").map(check).collect()
}

/// What became of an attempt over `carrier`, which its outcome may name already.
fn over(carrier: &str, outcome: &str) -> String {
    let first = |text: &str| text.split(' ').next().map(str::to_owned);
    if first(carrier) == first(outcome) {
        outcome.to_owned()
    } else {
        format!("{carrier}: {outcome}")
    }
}

fn endpoints(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let Some(probes) = &seen.probes else {
        return vec![bad("endpoints", "the router did not try them", "see `skctl logs`")];
    };
    let check = |probe: &ProbeResult| {
        let name = format!("endpoint {}", probe.endpoint);
        let detail = format!("{}, {}", over("UDP", &probe.udp), over("TLS over TCP", &probe.tcp));
        match (probe.udp.as_str(), probe.tcp.as_str()) {
            ("ok", "ok") => good(name, detail),
            ("ok", _) => {
                bad(name, detail, "links work, and are lost where UDP is: allow the TCP port too")
            }
            // Works as it should where nothing else can.
            (_, "ok") => good(
                name,
                detail + "; links use TLS, and would be faster if the UDP port was allowed",
            ),
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
            let is_udp = target.protocol() == routing::Protocol::Udp;
            let suffix = suffix(if is_udp { Protocol::Udp } else { Protocol::Tcp });
            let name = format!("target {}{suffix} of {}", target.target, connector.address);
            out.push(if target.healthy && is_udp && !target.error.is_empty() {
                bad(
                    name,
                    format!("refused the last datagram: {}", target.error),
                    "start the workload, or correct its host and port with `skctl expose`",
                )
            } else if target.healthy && is_udp {
                good(name, "has refused no datagram; whether it answers cannot be checked")
            } else if target.healthy {
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

/// What is written behind a port.
fn suffix(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "",
        Protocol::Udp => "/udp",
    }
}

fn number((port, protocol): &(u16, Protocol)) -> String {
    format!("{port}{}", suffix(*protocol))
}

/// Local endpoints: what cannot be bound, and whom an endpoint keeps from binding the wildcard.
fn listeners(seen: &Observations<'_>) -> Vec<DoctorFinding> {
    let all = seen.routers.iter().flat_map(|status| &status.listeners);
    let wanted = all.filter(|l| seen.address.is_empty() || l.address == seen.address);
    let mut out = Vec::new();
    let mut blocking: BTreeSet<(u16, Protocol)> = BTreeSet::new();
    for listener in wanted {
        for port in &listener.ports {
            let protocol = match port.protocol() {
                routing::Protocol::Udp => Protocol::Udp,
                routing::Protocol::Tcp | routing::Protocol::Unspecified => Protocol::Tcp,
            };
            let suffix = suffix(protocol);
            let name = format!("endpoint of {} port {}{suffix}", listener.address, port.port);
            if !port.error.is_empty() {
                out.push(bad(
                    name,
                    port.error.clone(),
                    "free the port, or choose one with `skctl listen`",
                ));
            }
            let bound = port.bound.parse::<std::net::SocketAddr>().ok();
            let bound = bound.filter(|b| b.ip().is_loopback());
            blocking.extend(bound.map(|bound| (bound.port(), protocol)));
        }
    }
    let held: Vec<String> =
        blocking.iter().filter(|port| seen.host.wildcard.contains(*port)).map(number).collect();
    if !held.is_empty() {
        let detail =
            format!("another program holds port {} on all addresses as well", held.join(", "));
        out.push(bad(
            "wildcard binds",
            detail,
            "give that program an address of its own, or `skctl init --auto-listen none`",
        ));
    } else if !blocking.is_empty() && seen.address.is_empty() {
        let ports: Vec<String> = blocking.iter().map(number).collect();
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
                    error: "refused".into(),
                    ..TargetStatus::default()
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
            udp: "ok".into(),
            tcp: "unanswered".into(),
            rtt_us: 0,
        };
        let findings = diagnose(&Observations {
            routers: vec![&status],
            probes: Some(vec![probe]),
            clocks: vec![PeerClock {
                site: "dc".into(),
                expires_unix_s: STATEMENT_VALIDITY_S + 3600,
            }],
            ca_not_after_unix_s: Some(DAY_S),
            socket_buffers: Some((212_992, 212_992)),
            problems: vec!["x was damaged".into()],
            ..Observations::default()
        });
        assert!(
            findings.iter().all(|finding| !finding.ok && !finding.fix.is_empty()),
            "{findings:#?}"
        );
        assert_eq!(findings.len(), 11);
        assert!(find(&findings, "clock").detail.contains("3600 s behind"));
    }

    #[test]
    fn a_peer_without_trust_asks_for_a_token() {
        let fix = |error: &str| {
            let link = skein_wire::proto::control::LinkStatus {
                name: "hub".into(),
                error: error.into(),
                ..Default::default()
            };
            let status = RouterStatus { links: vec![link], ..Default::default() };
            links(&Observations { routers: vec![&status], ..Observations::default() }).remove(0).fix
        };
        assert!(
            fix("the peer does not trust this site (or has not heard of it yet)")
                .contains("token create")
        );
        assert!(fix("UDP to 203.0.113.7:7443 unanswered").contains("blocks its port"));
    }

    #[test]
    fn a_carrier_is_named_once() {
        assert_eq!(
            over("UDP", "UDP to 203.0.113.7:7443 unanswered"),
            "UDP to 203.0.113.7:7443 unanswered"
        );
        assert_eq!(over("UDP", "ok"), "UDP: ok");
        assert_eq!(over("TLS over TCP", "refused"), "TLS over TCP: refused");
    }

    #[test]
    fn clocks_are_compared_both_ways() {
        let clock_of = |ahead_ms: &[i64]| {
            let link = |ahead_ms: &i64| skein_wire::proto::control::LinkStatus {
                peer_site_name: "dc".into(),
                peer_clock_ahead_ms: Some(*ahead_ms),
                ..Default::default()
            };
            let links = ahead_ms.iter().map(link).collect();
            let status = RouterStatus { links, ..Default::default() };
            clock(&Observations { routers: vec![&status], ..Observations::default() })
        };
        assert!(clock_of(&[]).ok && clock_of(&[-1_500, 119_000]).ok);
        let ahead = clock_of(&[20, -3_600_000]);
        assert!(!ahead.ok && ahead.detail.contains("3600 s ahead of"), "{ahead:?}");
        let behind = clock_of(&[3_600_000, -20]);
        assert!(!behind.ok && behind.detail.contains("3600 s behind"), "{behind:?}");
    }

    #[test]
    fn certificates_that_are_not_renewed_are_told() {
        const NOW: i64 = 1_000_000;
        let of = |router: i64, ca: i64| {
            let status =
                RouterStatus { certificate_not_after_unix_s: router, ..Default::default() };
            certificates(&Observations {
                routers: vec![&status],
                ca_not_after_unix_s: Some(ca),
                now_unix_s: NOW,
                ..Observations::default()
            })
        };
        let good = of(NOW + 2 * DAY_S, NOW + 100 * DAY_S);
        assert!(good.len() == 2 && good.iter().all(|finding| finding.ok), "{good:?}");
        for router in [0, NOW - 7_200, NOW + 3_600] {
            assert!(!of(router, NOW + 100 * DAY_S)[0].ok, "{router}");
        }
        assert!(of(NOW - 7_200, 0)[0].detail.contains("2 h ago"));
        assert!(!of(NOW + 2 * DAY_S, NOW + 10 * DAY_S)[1].ok);
    }

    #[test]
    fn of_a_target_of_datagrams_only_refusals_are_known() {
        let finding = |error: &str| {
            let target = TargetStatus {
                target: "h:53".into(),
                healthy: true,
                error: error.into(),
                protocol: routing::Protocol::Udp.into(),
            };
            let connector = ConnectorStatus { targets: vec![target], ..Default::default() };
            let status = RouterStatus { connectors: vec![connector], ..Default::default() };
            targets(&Observations { routers: vec![&status], ..Observations::default() }).remove(0)
        };
        let (quiet, refused) = (finding(""), finding("Connection refused"));
        assert!(quiet.ok && quiet.detail.contains("cannot be checked"), "{quiet:?}");
        assert!(!refused.ok && refused.detail.contains("Connection refused"), "{refused:?}");
        assert!(refused.check.contains("h:53/udp"));
    }

    #[test]
    fn one_address_is_looked_at_alone() {
        let target = |address: &str| ConnectorStatus {
            address: address.into(),
            targets: vec![TargetStatus {
                target: "h:1".into(),
                healthy: true,
                ..TargetStatus::default()
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
