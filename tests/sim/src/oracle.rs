//! What must hold, however things went.

use crate::{
    flow::{Attempt, Ended, Seen},
    run::Run,
    scenario::{Fault, FlowPlan, Scenario, What},
    site::Site,
};
use skein_api::Protocol;
use skein_netsim::Sockets;
use skein_wire::proto::control::{LinkStatus, RouterStatus, link_status::LinkState};
use std::collections::BTreeMap;

/// A session without a path lives for 30 s; with what detection and rerouting may add or take, this long is certain to be survived.
const SURVIVES_MS: u64 = 20_000;
/// After a fault is over, the network needs so long until it is surely whole again.
const RECOVERS_MS: u64 = 8_000;
/// When the router at the other end of a flow is killed and back, the flow is over after this.
const MOURNED_MS: u64 = 15_000;
/// When all is well, a client that sends datagrams is answered within this.
const ANSWERED_MS: u64 = 15_000;
/// A farewell has been flooded after this.
const FAREWELL_MS: u64 = 5_000;
/// What a router may hold for each of its peers while nothing flows: sessions, and what they have told each other.
const MEMORY_PER_PEER_BYTES: u64 = 1 << 20;
/// A frozen router is taken for dead by its peers' sessions after this.
const FROZEN_MS: u64 = 20_000;

/// What of the network is not as it will be in the end. It may still become so, but soon.
pub(crate) fn unconverged(run: &Run<'_>) -> Vec<String> {
    let mut failures = Vec::new();
    databases(run, &mut failures);
    farewells(run, &mut failures);
    links(run, &mut failures);
    failures
}

/// What of flows is not as it will be in the end. It may still become so.
pub(crate) fn open_matters(run: &Run<'_>, now_ms: u64) -> Vec<String> {
    let mut failures = Vec::new();
    unfinished(run, now_ms, &mut failures);
    unanswered(run, now_ms, &mut failures);
    if failures.is_empty() {
        leftovers(run, &mut failures);
    }
    failures
}

/// Every link that is wanted is up, and every site can be reached.
fn links(run: &Run<'_>, failures: &mut Vec<String>) {
    for link in &run.scenario.links {
        if run.gone[link.from] || run.gone[link.to] {
            continue;
        }
        let Some(status) = run.sites[link.from].shared.status() else { continue };
        let name = format!("to-{}", link.to);
        let is_up = |link: &LinkStatus| link.name == name && link.state() == LinkState::Up;
        if !status.links.iter().any(is_up) {
            failures.push(format!("the link from site {} to {} is not up", link.from, link.to));
        }
    }
    for site in run.sites.iter().filter(|site| !run.gone[site.index]) {
        let Some(status) = site.shared.status() else { continue };
        let reachable = status.routers.iter().filter(|router| router.reachable).count();
        let wanted = run.gone.iter().filter(|gone| !**gone).count();
        if reachable != wanted {
            failures.push(format!("site {} reaches {reachable} of {wanted}", site.index));
        }
    }
}

/// Every router that runs knows the same network, without those that have left.
fn databases(run: &Run<'_>, failures: &mut Vec<String>) {
    let mut views = Vec::new();
    for site in run.sites.iter().filter(|site| !run.gone[site.index]) {
        match site.shared.status() {
            Some(status) => views.push((site.index, status)),
            None => failures.push(format!("site {}: no status", site.index)),
        }
    }
    let Some((first, reference)) = views.first() else { return };
    let expected = view(reference);
    for (index, status) in &views[1..] {
        let seen = view(status);
        if seen != expected {
            let difference = difference(&expected, &seen);
            failures
                .push(format!("sites {first} and {index} see different networks: {difference}"));
            return;
        }
    }
    for (index, gone) in run.gone.iter().enumerate() {
        let id = run.sites[index].id().0;
        for (viewer, status) in &views {
            let of = |routers: &RouterStatus| {
                let addresses = routers.addresses.iter().flat_map(|address| &address.providers);
                addresses.filter(|provider| provider.site_id == id).count()
            };
            let services = run.scenario.services.iter().filter(|service| service.site == index);
            let kinds = run.scenario.kinds_of_services().count();
            let wanted = if *gone || run.withdrawn[index] { 0 } else { services.count() * kinds };
            if of(status) != wanted {
                let (found, kind) = (of(status), if *gone { "left" } else { "live" });
                failures.push(format!(
                    "site {viewer} sees {found} addresses of the {kind} site {index}, not {wanted}"
                ));
                return;
            }
        }
    }
}

/// Nobody shows the router of a site that has said farewell, if anybody can have heard it.
fn farewells(run: &Run<'_>, failures: &mut Vec<String>) {
    for fault in &run.scenario.faults {
        let What::Leave { site } = fault.what else { continue };
        if !is_surely_heard(run.scenario, site, fault) {
            continue;
        }
        let id = run.sites[site].id().0;
        for viewer in run.sites.iter().filter(|viewer| !run.gone[viewer.index]) {
            let Some(status) = viewer.shared.status() else { continue };
            if status.routers.iter().any(|router| router.site_id == id) {
                failures.push(format!(
                    "site {} shows the router of the left site {site}",
                    viewer.index
                ));
                return;
            }
        }
    }
}

/// Whether nothing keeps the neighbours of a site from hearing its farewell, and from passing it on before anything happens to them. What goes wrong
/// farther away may keep it from others for a while, but not for good.
fn is_surely_heard(scenario: &Scenario, site: usize, farewell: &Fault) -> bool {
    let is_near = |other: usize| {
        let is_end = |end: usize| end == site || end == other;
        other == site || scenario.links.iter().any(|link| is_end(link.from) && is_end(link.to))
    };
    let from_ms = farewell.at_ms.saturating_sub(RECOVERS_MS);
    let spoils = |fault: &&Fault| match fault.what {
        What::Partition { .. } => true,
        What::ControllerAway { .. } | What::DiskFull { .. } | What::Clock { .. } => false,
        _ => {
            let ends = fault.link().map(|link| &scenario.links[link]);
            fault.site().is_some_and(is_near)
                || ends.is_some_and(|link| link.from == site || link.to == site)
        }
    };
    !scenario.faults.iter().filter(|fault| *fault != farewell).filter(spoils).any(|fault| {
        fault.at_ms <= farewell.at_ms + FAREWELL_MS && fault.at_ms + fault.for_ms >= from_ms
    })
}

/// What all routers must agree on.
fn view(status: &RouterStatus) -> BTreeMap<String, String> {
    let mut view = BTreeMap::new();
    for router in
        status.routers.iter().filter(|router| router.reachable || !router.links.is_empty())
    {
        let mut links: Vec<_> =
            router.links.iter().map(|link| (link.link_id, link.neighbor.clone())).collect();
        links.sort();
        view.insert(
            format!("router {}", router.site_name),
            format!("boot {} links {links:x?}", router.boot_epoch),
        );
    }
    for address in &status.addresses {
        let mut providers: Vec<_> =
            address.providers.iter().map(|p| (&p.router_id[..2], p.reachable)).collect();
        providers.sort();
        view.insert(format!("address {}", address.address), format!("{providers:x?}"));
    }
    view
}

fn difference(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> String {
    let keys = a.keys().chain(b.keys());
    let differing = keys.filter(|key| a.get(*key) != b.get(*key));
    let shown = differing.take(2).map(|key| format!("{key}: {:?} / {:?}", a.get(key), b.get(key)));
    shown.collect::<Vec<_>>().join("; ")
}

/// Every flow has ended, in whatever way.
fn unfinished(run: &Run<'_>, now_ms: u64, failures: &mut Vec<String>) {
    let attempts = run.desk.ledger.attempts();
    for (index, plan) in run.scenario.flows.iter().enumerate() {
        let of_flow: Vec<_> =
            attempts.iter().filter(|((flow, _), _)| *flow == index).map(|(_, a)| a).collect();
        for attempt in &of_flow {
            let servers = attempt.servers.iter().map(|(_, seen)| ("server", seen));
            let mut ends = servers.chain([("client", &attempt.client)]);
            if let Some((end, seen)) = ends.find(|(_, seen)| seen.over_ms.is_none()) {
                failures.push(format!("flow {index}: its {end} is stuck at {now_ms} ms: {seen:?}"));
            }
        }
        let opened = of_flow.iter().any(|attempt| attempt.client.read > 0);
        let providers = run.scenario.services.iter().filter(|s| s.address == plan.address);
        if !opened && is_served(run, plan.address) && !run.gone[plan.site] {
            let providers: Vec<_> = providers.map(|service| service.site).collect();
            failures.push(format!(
                "flow {index} from site {} to {providers:?} was never opened in {} tries: {:?}",
                plan.site,
                of_flow.len(),
                of_flow.last()
            ));
        }
    }
}

/// Who has datagrams to send gets answers in the end, and before long.
fn unanswered(run: &Run<'_>, now_ms: u64, failures: &mut Vec<String>) {
    let talks = run.desk.talks.all();
    for (index, (plan, talk)) in run.scenario.associations.iter().zip(&talks).enumerate() {
        let is_wanted = is_served(run, plan.address) && !run.gone[plan.site];
        let due_ms = run.scenario.healed_ms().max(plan.at_ms) + ANSWERED_MS;
        let answered_ms = talk.answered_ms.unwrap_or(now_ms);
        if is_wanted && (!talk.is_over || answered_ms > due_ms) {
            let (sent, heard, since) = (talk.sent, talk.heard.len(), talk.answered_ms);
            failures.push(format!(
                "association {index} from site {} sent {sent} datagrams and heard {heard} answers by \
                 {now_ms} ms, all being well since {since:?}",
                plan.site
            ));
        }
    }
}

/// Whether anybody serves an address now.
fn is_served(run: &Run<'_>, address: usize) -> bool {
    let serves = |site: usize| !run.gone[site] && !run.withdrawn[site];
    run.scenario.services.iter().any(|s| s.address == address && serves(s.site))
}

/// Every datagram that arrived is whole, once, and where it belongs.
pub(crate) fn associations(run: &Run<'_>) -> Vec<String> {
    run.desk.talks.wrongs()
}

/// Nothing is held for flows that are over.
fn leftovers(run: &Run<'_>, failures: &mut Vec<String>) {
    for site in run.sites.iter().filter(|site| site.router().is_some()) {
        let Some(status) = site.shared.status() else { continue };
        sockets(run, site, &status, failures);
        if status.flows_active > 0 {
            failures.push(format!(
                "site {} counts {} flows, and there are none",
                site.index, status.flows_active
            ));
        }
        let peers = status.routers.len() as u64 + 4;
        if status.memory_used_bytes > peers * MEMORY_PER_PEER_BYTES {
            failures.push(format!(
                "site {} holds {} bytes of flows, and there are none",
                site.index, status.memory_used_bytes
            ));
        }
        for problem in site.shared.problems() {
            failures.push(format!("site {}: {problem}", site.index));
        }
    }
}

/// A router holds the sockets of its links and entrances, and one to its controller.
fn sockets(run: &Run<'_>, site: &Site, status: &RouterStatus, failures: &mut Vec<String>) {
    let scenario = run.scenario;
    let over_tls = status.links.iter().filter(|link| link.carrier == "tls").count();
    let dialled = scenario.links.iter().filter(|link| link.from == site.index).count();
    let listens = usize::from(scenario.sites[site.index].is_interior);
    let has_entrances = scenario.kinds_of_services().any(|(_, kind)| kind == Protocol::Udp);
    let entrances = if has_entrances { scenario.addresses() } else { 0 };
    let most = Sockets {
        unix: 1,
        tcp_within: 0,
        tcp_between: over_tls,
        udp_connected: 0,
        // Where UDP does not pass it is tried now and then.
        udp_bound: listens + dialled + over_tls + entrances,
    };
    let held = site.sockets();
    let is_within = held.unix <= most.unix
        && held.tcp_within <= most.tcp_within
        && held.tcp_between <= most.tcp_between
        && held.udp_connected <= most.udp_connected
        && held.udp_bound <= most.udp_bound;
    if !is_within {
        let index = site.index;
        failures.push(format!("site {index} holds sockets for nothing: {held:?}, not {most:?}"));
    }
}

/// Every flow that was opened: its bytes, and its end.
pub(crate) fn flows(run: &Run<'_>) -> Vec<String> {
    let mut failures = Vec::new();
    for ((flow, number), attempt) in run.desk.ledger.attempts() {
        let plan = &run.scenario.flows[flow];
        let judged = judge(run, plan, &attempt);
        failures.extend(judged.into_iter().map(|what| format!("flow {flow}.{number}: {what}")));
    }
    failures
}

fn judge(run: &Run<'_>, plan: &FlowPlan, attempt: &Attempt) -> Vec<String> {
    let mut failures = Vec::new();
    if attempt.servers.len() > 1 {
        let sites: Vec<_> = attempt.servers.iter().map(|(site, _)| site).collect();
        failures.push(format!("it reached {} targets, at sites {sites:?}", sites.len()));
    }
    let Some((site, server)) = attempt.servers.first() else {
        if attempt.client.read > 0 {
            failures.push("its client heard from nobody knows whom".into());
        }
        return failures;
    };
    let client = &attempt.client;
    for (end, seen) in [("client", client), ("server", server)] {
        if let Some(offset) = seen.wrong_at {
            failures.push(format!("the {end} read a wrong byte at {offset}"));
        }
    }
    let over_ms = client.over_ms.max(server.over_ms).unwrap_or(u64::MAX);
    let life = (client.began_ms, over_ms);
    let (near, far) = (plan.site, *site);
    let sides = [
        ("client", client, server, near, &plan.server),
        ("server", server, client, far, &plan.client),
    ];
    for (end, seen, other, own, script) in sides {
        if seen.read > other.written {
            failures.push(format!("the {end} read {} bytes of {}", seen.read, other.written));
        }
        // A router that is killed has its sockets closed by the kernel, which is a clean end to who is connected to it.
        let own_kill = was_killed(run, own, life);
        let whole = other.has_ended && !script.resets && seen.read == other.written;
        if seen.ended == Some(Ended::Finished) && !whole && !own_kill {
            failures.push(format!(
                "the {end} saw a clean end after {} bytes of {}",
                seen.read, other.written
            ));
        }
    }
    // Who is told of an end may still have something to say.
    let told_ms = client.ended_ms.max(server.ended_ms).unwrap_or(over_ms);
    // And what was not open yet when a router was killed may be opened at its next boot.
    let open_ms = client.began_ms.max(server.began_ms);
    outlived(run, (near, far), (open_ms, told_ms.min(over_ms)), &mut failures);
    let scripted = plan.client.resets || plan.server.resets;
    let is_whole = |seen: &Seen, other: &Seen| {
        seen.ended == Some(Ended::Finished) && seen.read == other.written && other.has_ended
    };
    let complete = is_whole(client, server) && is_whole(server, client);
    let opened = client.read > 0;
    if opened && !complete && !scripted && !excused(run, near, far, life) {
        failures.push(format!(
            "it broke without a reason: client {client:?}, server at site {far} {server:?}"
        ));
    }
    failures
}

/// Sessions with a router that is gone end once its next boot, or its death, is known; flows do not wait for their timeout.
fn outlived(run: &Run<'_>, ends: (usize, usize), life: (u64, u64), failures: &mut Vec<String>) {
    for fault in &run.scenario.faults {
        let What::Kill { site, .. } = fault.what else { continue };
        let back_ms = fault.at_ms + fault.for_ms;
        let lived = life.0 < fault.at_ms && life.1 > back_ms + MOURNED_MS;
        let quiet = run.scenario.faults.iter().all(|other| {
            other == fault
                || other.at_ms > back_ms + MOURNED_MS
                || other.at_ms + other.for_ms + RECOVERS_MS < back_ms
        });
        if lived && quiet && (site == ends.0 || site == ends.1) && life.1 != u64::MAX {
            let after_ms = life.1 - back_ms;
            failures.push(format!("it ended {after_ms} ms after its router was back"));
        }
    }
}

/// Whether the router of a site ended while the flow lived, or just around its end.
fn was_killed(run: &Run<'_>, site: usize, (from_ms, to_ms): (u64, u64)) -> bool {
    let around = from_ms.saturating_sub(1_000)..=to_ms.saturating_add(1_000);
    run.kills_ms.iter().any(|(killed, at_ms)| *killed == site && around.contains(at_ms))
}

/// Whether a flow between two sites may have broken in that time.
fn excused(run: &Run<'_>, near: usize, far: usize, life: (u64, u64)) -> bool {
    if was_killed(run, near, life) || was_killed(run, far, life) {
        return true;
    }
    let touches = |at_ms: u64, for_ms: u64| at_ms <= life.1 && at_ms + for_ms >= life.0;
    let frozen = run.scenario.faults.iter().any(|fault| {
        let of_ends = matches!(fault.what, What::Freeze { site } if site == near || site == far);
        of_ends && fault.for_ms >= FROZEN_MS && touches(fault.at_ms, fault.for_ms)
    });
    frozen || longest_outage_ms(run, near, far, life) >= SURVIVES_MS
}

/// How long the two may have been without a path at most, going by the faults alone.
fn longest_outage_ms(run: &Run<'_>, near: usize, far: usize, life: (u64, u64)) -> u64 {
    if near == far {
        return 0;
    }
    let faults = &run.scenario.faults;
    let mut times: Vec<u64> = faults
        .iter()
        .flat_map(|fault| {
            let end_ms = fault.at_ms + fault.for_ms;
            [fault.at_ms, fault.at_ms + RECOVERS_MS, end_ms, end_ms + RECOVERS_MS]
        })
        .chain([life.0, life.1])
        .filter(|at_ms| (life.0..=life.1).contains(at_ms))
        .collect();
    times.sort_unstable();
    let (mut longest, mut since) = (0, None);
    for window in times.windows(2) {
        let (from_ms, to_ms) = (window[0], window[1]);
        if is_surely_connected(run, near, far, from_ms, to_ms) {
            since = None;
        } else {
            let since = *since.get_or_insert(from_ms);
            longest = longest.max(to_ms - since);
        }
    }
    longest
}

/// Whether the router of a site may be started while a fault lasts, or shortly after.
fn starts_during(scenario: &Scenario, of: usize, fault: &Fault) -> bool {
    let end = |fault: &Fault| fault.at_ms + fault.for_ms + RECOVERS_MS;
    scenario.faults.iter().any(|other| {
        let ends_router = match other.what {
            What::Kill { site, .. } | What::Withdraw { site } | What::PowerLoss { site } => {
                site == of
            }
            _ => false,
        };
        ends_router && other.at_ms < end(fault) && fault.at_ms < end(other)
    })
}

/// Whether there is a way between two sites in all that time that no fault touches.
pub(crate) fn is_surely_connected(
    run: &Run<'_>,
    near: usize,
    far: usize,
    from_ms: u64,
    to_ms: u64,
) -> bool {
    let scenario = run.scenario;
    let lasts = |at_ms: u64, for_ms: u64| at_ms < to_ms && at_ms + for_ms + RECOVERS_MS > from_ms;
    let lasts = |fault: &&Fault| match fault.what {
        // The link moves to TLS, and may move back.
        What::UdpBlocked { .. } => lasts(fault.at_ms, 0) || lasts(fault.at_ms + fault.for_ms, 0),
        // Frames become as small as they have to be.
        What::Mtu { .. } => lasts(fault.at_ms, 0) || lasts(fault.at_ms + fault.for_ms, 0),
        _ => lasts(fault.at_ms, fault.for_ms),
    };
    let ails: Vec<_> = scenario.faults.iter().filter(lasts).collect();
    let is_good = |index: usize| {
        let plan = &scenario.links[index];
        !ails.iter().any(|fault| match fault.what {
            What::Kill { site, .. }
            | What::Withdraw { site }
            | What::PowerLoss { site }
            | What::Freeze { site }
            | What::Rebind { site }
            | What::NatExpiry { site, .. }
            | What::Leave { site } => site == plan.from || site == plan.to,
            // A router that runs needs no controller; one that starts does.
            What::ControllerAway { site } => {
                (site == plan.from || site == plan.to) && starts_during(scenario, site, fault)
            }
            What::Cut { link }
            | What::OneWay { link, .. }
            | What::UdpBlocked { link }
            | What::Degraded { link, .. }
            | What::Mtu { link, .. } => {
                let other = &scenario.links[link];
                (other.from, other.to) == (plan.from, plan.to)
            }
            What::Partition { below } => (plan.from < below) != (plan.to < below),
            What::DiskFull { .. } | What::Clock { .. } => false,
        })
    };
    let mut reached = vec![false; scenario.sites.len()];
    let mut todo = vec![near];
    while let Some(site) = todo.pop() {
        if std::mem::replace(&mut reached[site], true) {
            continue;
        }
        if site != near && !scenario.sites[site].is_interior {
            continue;
        }
        let links = scenario.links.iter().enumerate();
        for (_, link) in links.filter(|(index, _)| is_good(*index)) {
            if link.from == site {
                todo.push(link.to);
            } else if link.to == site {
                todo.push(link.from);
            }
        }
    }
    reached[far]
}
