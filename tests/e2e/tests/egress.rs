//! Two sites serve one address: either may go, and both are used.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::topology::{Hub, internet, reachable};
use skein_e2e::{Site, figure, flow, unix_ms};
use skein_lab::Host;

/// A client at the hub's branch, servers `one` at dc and `two` at a third leaf.
fn two_providers(strategy: &str) -> Result<(Hub, Site, [skein_lab::Process; 2])> {
    let net = Hub::new()?;
    let second = Site::init(&net.lab.host_behind_nat("second", &net.internet)?, &[])?;
    second.link_to(&net.hub, &[])?;
    let serve = |host: &Host, name: &str| flow::serve(host, 7700, &["--name", name]);
    let servers = [serve(net.dc.host(), "one")?, serve(second.host(), "two")?];
    for site in [&net.dc, &second] {
        site.expose("shared", 7700, &["--strategy", strategy])?;
    }
    Ok((net, second, servers))
}

/// Probes until both sites have answered, so that what follows starts from a converged network.
fn both_answer(net: &Hub) -> Result<std::net::SocketAddr> {
    let to = net.branch.endpoint("shared", 7700)?;
    skein_lab::eventually("both sites answer", Duration::from_secs(20), || {
        let report = flow::run(net.branch.host(), "probe", to, &["--count", "20"])?;
        Ok(report["servers"].as_object().is_some_and(|servers| servers.len() == 2))
    })?;
    Ok(to)
}

#[test]
fn killing_one_provider_loses_no_new_connection() -> Result<()> {
    let (net, second, _servers) = two_providers("balanced")?;
    let to = both_answer(&net)?;
    let probes = flow::start(net.branch.host(), "probe", to, &["--interval-ms", "20"])?;
    std::thread::sleep(Duration::from_secs(2));
    let before = unix_ms();
    second.host().power_cut()?;
    let after = unix_ms();
    std::thread::sleep(Duration::from_secs(4));
    let report = flow::stop(probes)?;
    figure("new connections while a provider dies", &report);
    // One to which the target had said yes, and that has been handed what the client sent, is not new: nobody knows what became of that.
    let failed = report["failed_unix_ms"].as_array().context("failed_unix_ms")?;
    let was_in_flight = |times: &Value| {
        let (began, ended) = (times[0].as_u64(), times[1].as_u64());
        began.is_some_and(|began| began <= after) && ended.is_some_and(|ended| ended >= before)
    };
    ensure!(failed.iter().all(was_in_flight), "{before} to {after}: {report}");
    let told = report["ok"].as_u64().map(|ok| ok + failed.len() as u64);
    ensure!(told.is_some() && told == report["probes"].as_u64(), "not all are told: {report}");
    ensure!(report["servers"]["two"].as_u64() > Some(0), "{report}");
    Ok(())
}

#[test]
fn a_target_that_is_gone_is_not_chosen() -> Result<()> {
    let (net, _second, servers) = two_providers("balanced")?;
    let to = both_answer(&net)?;
    let [one, two] = servers;
    drop(two);
    // Refused at one site, the ingress tries the other: nobody notices.
    let report = flow::run(net.branch.host(), "probe", to, &["--count", "100"])?;
    ensure!(report["ok"] == 100 && report["servers"]["one"] == 100, "{report}");
    drop(one);
    Ok(())
}

#[test]
fn balanced_spreads_evenly() -> Result<()> {
    let (net, _second, _servers) = two_providers("balanced")?;
    let to = both_answer(&net)?;
    let args = ["--count", "400", "--interval-ms", "5"];
    let report = flow::run(net.branch.host(), "probe", to, &args)?;
    let count = |name: &str| report["servers"][name].as_f64().unwrap_or(0.0);
    figure("balanced over two", &report["servers"]);
    ensure!((count("one") - count("two")).abs() <= 0.1 * 400.0, "{report}");
    Ok(())
}

#[test]
fn withdrawing_the_last_provider_closes_the_socket_and_drains() -> Result<()> {
    let (lab, internet) = internet()?;
    let hub = reachable(&lab, &internet, "hub")?;
    let leaf = Site::init(&lab.host_behind_nat("leaf", &internet)?, &[])?;
    leaf.link_to(&hub, &[])?;
    let _server = flow::serve(hub.host(), 7800, &[])?;
    hub.expose("gone", 7800, &[])?;
    let to = leaf.endpoint("gone", 7800)?;
    let running = flow::start_open(leaf.host(), to, 5, &[])?;
    let ask = || -> Result<Value> { flow::run(leaf.host(), "play", to, &["--script", "fin; end"]) };
    hub.skctl(&["unexpose", "gone"]).check()?;
    skein_lab::eventually("no socket any more", Duration::from_secs(10), || {
        Ok(ask()?["connect"] == "refused")
    })?;
    let report = flow::stop(running)?;
    ensure!(report["failed"] == 0 && report["truncated"] == 0, "draining broke flows: {report}");

    hub.expose("gone", 7800, &[])?;
    let to = leaf.endpoint("gone", 7800)?;
    let running = flow::start_open(leaf.host(), to, 5, &[])?;
    hub.skctl(&["unexpose", "gone", "--now"]).check()?;
    skein_lab::eventually("flows are reset", Duration::from_secs(10), || {
        Ok(leaf.status()?["routers"][0]["flowsActive"] == 0)
    })?;
    let report = flow::stop(running)?;
    ensure!(report["failed"] == 5, "{report}");

    // The reset was for the flows of that time only.
    hub.expose("gone", 7800, &[])?;
    let to = leaf.endpoint("gone", 7800)?;
    let report = flow::run(leaf.host(), "probe", to, &["--count", "20"])?;
    ensure!(report["ok"] == report["probes"], "{report}");
    Ok(())
}
