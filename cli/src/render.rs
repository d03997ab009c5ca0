//! Status documents as tables.

use jiff::Timestamp;
use serde::Serialize;
use skein_api::Protocol;
use skein_api::status::{
    DoctorFinding, Endpoint, LinkRow, NetworkStatus, Problem, ServicePort, ServiceRow, SiteStatus,
    TraceCandidate, TracePath, TraceReport,
};

use crate::{
    clock,
    output::{Show, columns, printable},
};

/// Answer to `link list`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Links(pub(crate) Vec<LinkRow>);

impl Show for Links {
    fn table(&self, wide: bool) -> String {
        links(&self.0, wide, clock::now())
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|link| link.name.clone()).collect()
    }
}

pub(crate) fn links(links: &[LinkRow], wide: bool, now: Timestamp) -> String {
    if links.is_empty() {
        return "No links. Join a site with: skctl link TOKENFILE\n".to_owned();
    }
    let rows = links.iter().map(|link| {
        [
            link.name.clone(),
            link.peer.clone(),
            if link.incoming { "in" } else { "out" }.to_owned(),
            link.state.clone(),
            link.carrier.clone(),
            link.remote.clone(),
            rtt(link.rtt_us),
            link.cost.to_string(),
            clock::age(&link.since, now),
            link.peer_router.clone(),
            link.local.clone(),
            if link.mtu == 0 { String::new() } else { link.mtu.to_string() },
            bytes(link.bytes_sent),
            bytes(link.bytes_received),
        ]
    });
    let mut out = if wide {
        columns(
            [
                "NAME", "PEER", "DIR", "STATE", "CARRIER", "REMOTE", "RTT", "COST", "SINCE",
                "ROUTER", "LOCAL", "MTU", "SENT", "RECEIVED",
            ],
            rows,
        )
    } else {
        let narrow = rows.map(|row| {
            let [name, peer, dir, state, carrier, remote, rtt, cost, since, ..] = row;
            [name, peer, dir, state, carrier, remote, rtt, cost, since]
        });
        columns(
            ["NAME", "PEER", "DIR", "STATE", "CARRIER", "REMOTE", "RTT", "COST", "SINCE"],
            narrow,
        )
    };
    if wide {
        for link in links.iter().filter(|link| !link.carrier_reason.is_empty()) {
            let LinkRow { name, carrier, carrier_reason, .. } = link;
            out += &line(&format!("{name}: over {carrier}, for {carrier_reason}"));
        }
    }
    for link in links.iter().filter(|link| link.state != "up") {
        if !link.error.is_empty() {
            out += &line(&format!("{}: {}", link.name, link.error));
        }
        for attempt in &link.attempts {
            out += &line(&format!("{}: {}: {}", link.name, attempt.endpoint, attempt.outcome));
        }
    }
    out
}

/// Answer to `service list`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Services {
    pub(crate) rows: Vec<ServiceRow>,
    /// Whether a link is up, without which only this site's own are known.
    #[serde(skip)]
    pub(crate) is_linked: bool,
}

impl Show for Services {
    fn table(&self, wide: bool) -> String {
        if self.rows.is_empty() && !self.is_linked {
            return "No services: no link is up, see `skctl status`. Offer one with: skctl expose ADDRESS --port PORT\n".to_owned();
        }
        services(&self.rows, wide)
    }

    fn names(&self) -> Vec<String> {
        self.rows.iter().map(|service| service.address.clone()).collect()
    }
}

fn services(services: &[ServiceRow], wide: bool) -> String {
    if services.is_empty() {
        return "No services. Offer one with: skctl expose ADDRESS --port PORT\n".to_owned();
    }
    let rows = services.iter().map(|service| {
        [
            service.address.clone(),
            service.ports.iter().map(port).collect::<Vec<_>>().join(","),
            service.endpoints.iter().map(endpoint).collect::<Vec<_>>().join(","),
            service.providers.iter().map(provider).collect::<Vec<_>>().join(","),
            service.state.clone(),
            service.strategy.clone(),
        ]
    });
    let mut out = if wide {
        columns(["ADDRESS", "PORTS", "CONNECT TO", "SERVED BY", "STATE", "STRATEGY"], rows)
    } else {
        let narrow = rows.map(|[address, ports, connect, sites, state, _]| {
            [address, ports, connect, sites, state]
        });
        columns(["ADDRESS", "PORTS", "CONNECT TO", "SERVED BY", "STATE"], narrow)
    };
    for service in services {
        if !service.message.is_empty() && service.state != "ready" {
            out += &line(&format!("{}: {}", service.address, service.message));
        }
        for endpoint in service.endpoints.iter().filter(|endpoint| !endpoint.error.is_empty()) {
            let number = ServicePort { port: endpoint.port, protocol: endpoint.protocol };
            let text = format!("{}: port {}: {}", service.address, port(&number), endpoint.error);
            out += &line(&text);
        }
        let targets = service.providers.iter().flat_map(|provider| &provider.targets);
        for target in targets.filter(|target| !target.healthy || !target.error.is_empty()) {
            let place = match target.protocol {
                Protocol::Tcp => target.target.clone(),
                Protocol::Udp => format!("{}/udp", target.target),
            };
            out += &line(&format!("{}: target {place}: {}", service.address, target.error));
        }
    }
    out
}

/// Lines for a hosts file.
pub(crate) fn hosts(services: &[ServiceRow]) -> String {
    services
        .iter()
        .filter(|service| !service.local_ip.is_empty())
        .map(|service| line(&format!("{} {}", service.local_ip, service.address)))
        .collect()
}

fn port(port: &ServicePort) -> String {
    match port.protocol {
        Protocol::Tcp => port.port.to_string(),
        Protocol::Udp => format!("{}/udp", port.port),
    }
}

fn endpoint(endpoint: &Endpoint) -> String {
    let place = if endpoint.bound.is_empty() { "(not bound)" } else { &endpoint.bound };
    match endpoint.protocol {
        Protocol::Tcp => place.to_owned(),
        Protocol::Udp => format!("{place}/udp"),
    }
}

fn provider(provider: &skein_api::status::Provider) -> String {
    let name = if provider.local { "here" } else { &provider.site };
    if provider.reachable || provider.local {
        name.to_owned()
    } else {
        format!("{name} (unreachable)")
    }
}

/// Answer to `status`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Site(pub(crate) SiteStatus);

impl Show for Site {
    fn table(&self, wide: bool) -> String {
        site(&self.0, wide, clock::now())
    }

    fn names(&self) -> Vec<String> {
        vec![self.0.name.clone()]
    }
}

pub(crate) fn site(status: &SiteStatus, wide: bool, now: Timestamp) -> String {
    let mut out = String::new();
    let mut row = |key: &str, value: String| out += &line(&format!("{key:<12}{value}"));
    row("Site", format!("{} ({}), {}", status.name, short(&status.site_id, wide), status.role));
    let sites =
        if status.sites == 1 { "1 site".to_owned() } else { format!("{} sites", status.sites) };
    row("Network", format!("{}, {sites}", short(&status.network_id, wide)));
    row("Links", format!("{} of {} up", status.links_up, status.links_total));
    row("Services", format!("{}, {} served from here", status.services, status.connectors));
    let controller = &status.controller;
    let process = |pid: u32, version: &str, since: &str| {
        let since = clock::age(since, now);
        let since = if since.is_empty() { since } else { format!(", for {since}") };
        format!("pid {pid}, version {version}{since}")
    };
    row("Controller", process(controller.pid, &controller.version, &controller.since));
    for router in &status.routers {
        let state = if router.pid == 0 {
            router.state.clone()
        } else {
            format!("{}, {}", router.state, process(router.pid, &router.version, &router.since))
        };
        row("Router", format!("{}: {state}", router.name));
        for socket in &router.sockets {
            let state =
                if socket.error.is_empty() { String::new() } else { format!(": {}", socket.error) };
            row("", format!("listens at {}{state}", socket.address));
        }
        row("", format!("{} flows now, {} so far", router.flows_active, router.flows_total));
        if wide {
            let traffic = (bytes(router.bytes_sent), bytes(router.bytes_received));
            row("", format!("sent {}, received {}", traffic.0, traffic.1));
            row("", format!("{} in flow buffers", bytes(router.memory_used_bytes)));
            row("", format!("metrics at {}, boot {}", router.metrics, router.boot_epoch));
        }
    }
    if !status.advertise.is_empty() {
        row("Reached at", status.advertise.join(", "));
    }
    out + &problems(&status.problems)
}

fn problems(problems: &[Problem]) -> String {
    let mut out = String::new();
    for problem in problems {
        let parts = [&problem.what, &problem.why, &problem.fix];
        let parts: Vec<&str> =
            parts.into_iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
        out += &line(&format!("Problem     {}", parts.join("; ")));
    }
    out
}

/// Answer to `network status`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Network(pub(crate) NetworkStatus);

impl Show for Network {
    fn table(&self, wide: bool) -> String {
        network(&self.0, wide)
    }

    fn names(&self) -> Vec<String> {
        self.0.sites.iter().map(|site| site.name.clone()).collect()
    }
}

fn network(status: &NetworkStatus, wide: bool) -> String {
    let routers = status.sites.iter().flat_map(|site| {
        site.routers.iter().map(move |router| {
            let peers = router.links.iter().map(|link| {
                if wide {
                    format!("{} ({}, cost {})", link.peer, rtt(link.rtt_us), link.cost)
                } else {
                    link.peer.clone()
                }
            });
            let state = match (site.local, router.reachable, site.trusted) {
                (true, ..) => "here",
                (_, _, false) => "not trusted",
                (_, true, _) => "reachable",
                _ => "unreachable",
            };
            [
                site.name.clone(),
                short(&site.id, wide).to_owned(),
                router.name.clone(),
                router.role.clone(),
                state.to_owned(),
                if router.reachable && !site.local {
                    router.hops.to_string()
                } else {
                    String::new()
                },
                peers.collect::<Vec<_>>().join(", "),
                site.addresses.join(", "),
            ]
        })
    });
    let headings = ["SITE", "ID", "ROUTER", "ROLE", "STATE", "HOPS", "LINKS", "SERVES"];
    let mut out = columns(headings, routers);
    // A site whose routers are unknown would otherwise be missing.
    for site in status.sites.iter().filter(|site| site.routers.is_empty()) {
        out += &line(&format!("{} ({}): no router is known", site.name, short(&site.id, wide)));
    }
    if !status.services.is_empty() {
        out += "\n";
        out += &services(&status.services, wide);
    }
    out + &problems(&status.problems)
}

/// Answer to `trace`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Trace {
    pub(crate) report: TraceReport,
    /// That was asked for; the report does not say it.
    #[serde(skip)]
    pub(crate) protocol: Protocol,
}

impl Show for Trace {
    fn table(&self, _: bool) -> String {
        trace(&self.report, self.protocol)
    }

    fn names(&self) -> Vec<String> {
        self.report.candidates.iter().filter(|c| c.chosen).map(|c| c.site.clone()).collect()
    }
}

fn trace(report: &TraceReport, protocol: Protocol) -> String {
    let port = match report.port {
        0 => String::new(),
        number => format!(":{}", port(&ServicePort { port: number, protocol })),
    };
    let mut out = String::new();
    let chosen = report.candidates.iter().find(|candidate| candidate.chosen);
    match chosen {
        Some(candidate) => {
            out += &line(&format!(
                "{}{port} goes to {}: {}",
                report.address, candidate.site, report.why
            ));
            out += &candidate_paths(candidate);
        }
        None => {
            let why = if report.error.is_empty() { &report.why } else { &report.error };
            out += &line(&format!("{}{port} goes nowhere: {why}", report.address));
        }
    }
    for candidate in report.candidates.iter().filter(|candidate| !candidate.chosen) {
        out += &line(&format!("not {}: {}", candidate.site, candidate.note));
        if let Some(path) = candidate.paths.first() {
            out += &line(&format!("  {}", one_line(path)));
        }
    }
    if report.candidates.iter().any(|candidate| !candidate.paths.is_empty()) {
        out += "metric: round-trip times of the links and 1ms for each unit of their costs, summed; less is better\n";
    }
    out
}

fn candidate_paths(candidate: &TraceCandidate) -> String {
    let mut out = String::new();
    if let Some(path) = candidate.paths.first() {
        let hops = path.hops.iter().enumerate().map(|(index, hop)| {
            [
                format!("  {}", index + 1),
                hop.site.clone(),
                hop.router.clone(),
                rtt(hop.link_rtt_us),
                hop.cost.to_string(),
            ]
        });
        out += &columns(["  HOP", "SITE", "ROUTER", "LINK RTT", "COST"], hops);
        let measured = match path.measured_rtt_us {
            0 => "no session yet".to_owned(),
            us => format!("session {}", rtt(us)),
        };
        out += &line(&format!("  metric {}, MTU {}, {measured}", rtt(path.metric_us), path.mtu));
    }
    for path in candidate.paths.iter().skip(1) {
        out += &line(&format!("  or {}", one_line(path)));
    }
    out
}

fn one_line(path: &TracePath) -> String {
    let via: Vec<&str> = path.hops.iter().map(|hop| hop.site.as_str()).collect();
    format!("{} (metric {}, MTU {})", via.join(" > "), rtt(path.metric_us), path.mtu)
}

/// Answer to `doctor`.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Findings {
    pub(crate) findings: Vec<DoctorFinding>,
    #[serde(skip)]
    pub(crate) colour: bool,
}

impl Show for Findings {
    fn table(&self, _: bool) -> String {
        let mut out = String::new();
        for finding in &self.findings {
            let mark = match (finding.ok, self.colour) {
                (true, false) => "ok  ",
                (false, false) => "FAIL",
                (true, true) => "\u{1b}[32mok\u{1b}[0m  ",
                (false, true) => "\u{1b}[31mFAIL\u{1b}[0m",
            };
            let text = match finding.detail.as_str() {
                "" => finding.check.clone(),
                detail => format!("{}: {detail}", finding.check),
            };
            out += &format!("{mark}  {}\n", printable(&text));
            if !finding.fix.is_empty() {
                out += &format!("      fix: {}\n", printable(&finding.fix));
            }
        }
        let failed = self.findings.iter().filter(|finding| !finding.ok).count();
        out += &match failed {
            0 => format!("All {} checks passed.\n", self.findings.len()),
            _ => format!("{failed} of {} checks failed.\n", self.findings.len()),
        };
        out
    }

    fn names(&self) -> Vec<String> {
        self.findings.iter().filter(|finding| !finding.ok).map(|f| f.check.clone()).collect()
    }
}

fn line(text: &str) -> String {
    printable(text).trim_end().to_owned() + "\n"
}

pub(crate) fn short(id: &str, wide: bool) -> &str {
    // The first characters are what people compare; see SiteId::short.
    if wide { id } else { id.get(..8).unwrap_or(id) }
}

/// A round-trip time or metric of `us` microseconds.
pub(crate) fn rtt(us: u64) -> String {
    match us {
        0 => String::new(),
        1..10_000 => format!("{}.{:02}ms", us / 1_000, us % 1_000 / 10),
        _ => format!("{}.{}ms", us / 1_000, us % 1_000 / 100),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (count.checked_ilog2().unwrap_or(0) / 10).min(4);
    if unit == 0 {
        return format!("{count}B");
    }
    let tenths = (count >> (10 * (unit - 1))) * 10 / 1_024;
    format!("{}.{}{}", tenths / 10, tenths % 10, UNITS[unit as usize])
}
