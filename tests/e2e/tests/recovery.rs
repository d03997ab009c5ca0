//! Processes die; what they did goes on or comes back by itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::topology::Hub;
use skein_e2e::{Processes, Shown, Site, figure, flow};
use skein_lab::{Signal, eventually};

/// What died is back within this.
const BACK_MAX: Duration = Duration::from_secs(3);

/// The issue of a restart is new process ids; gives when both were there and linked. `other` is a site that lives.
fn back(site: &Site, gone: u32, links: usize, other: &Site) -> Result<(Processes, Shown)> {
    let mut now = None;
    let what = "both processes and the links are back";
    let shown = Shown::watch(
        what,
        Duration::from_secs(20),
        || other.status(),
        |_| {
            let processes = site.processes()?;
            now = Some(processes);
            let fresh = processes.controller != gone && processes.router != gone;
            let rows = site.json(&["link", "list"])?;
            let up =
                rows.as_array().into_iter().flatten().filter(|row| row["state"] == "up").count();
            Ok(fresh && up >= links)
        },
    )?;
    now.map(|processes| (processes, shown)).context("invariant: waited for")
}

#[test]
fn a_controller_that_dies_costs_nothing_and_comes_back() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve(net.dc.host(), 7900, &[])?;
    net.dc.expose("steady", 7900, &[])?;
    let to = net.branch.endpoint("steady", 7900)?;
    let running = flow::start_open(net.branch.host(), to, 20, &[])?;
    for (site, other) in [(&net.hub, &net.branch), (&net.branch, &net.dc), (&net.dc, &net.hub)] {
        let before = site.processes()?;
        site.host().signal(before.controller, Signal::Kill)?;
        let (after, shown) = back(site, before.controller, 1, other)?;
        figure(&format!("controller of {} back", site.name()), format!("{shown:?}"));
        ensure!(after.router == before.router, "the router went with its controller");
        ensure!(shown.after < shown.extended(BACK_MAX), "{shown:?}");
    }
    flow::clean(&flow::stop(running)?)
}

#[test]
fn a_router_that_dies_is_back_without_a_command() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve(net.dc.host(), 7950, &[])?;
    net.dc.expose("again", 7950, &[])?;
    let to = net.branch.endpoint("again", 7950)?;
    for (site, other) in [(&net.hub, &net.dc), (&net.dc, &net.branch), (&net.branch, &net.hub)] {
        let before = site.processes()?;
        site.host().signal(before.router, Signal::Kill)?;
        let (_, shown) = back(site, before.router, 1, other)?;
        figure(&format!("router of {} back", site.name()), format!("{shown:?}"));
        ensure!(shown.after < shown.extended(BACK_MAX), "{shown:?}");
        ensure!(net.branch.endpoint("again", 7950)? == to, "the endpoint moved");
        let most = shown.extended(Duration::from_secs(5));
        eventually("connections again", most, || {
            let report = flow::run(net.branch.host(), "probe", to, &flow::ONE_PROBE)?;
            Ok(report["ok"] == 1)
        })?;
    }
    Ok(())
}

#[test]
fn a_transit_that_loses_its_router_keeps_flows() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve(net.dc.host(), 7960, &[])?;
    net.dc.expose("kept", 7960, &[])?;
    let to = net.branch.endpoint("kept", 7960)?;
    let running = flow::start_open(net.branch.host(), to, 20, &[])?;
    let before = net.hub.processes()?;
    net.hub.host().signal(before.router, Signal::Kill)?;
    back(&net.hub, before.router, 2, &net.dc)?;
    net.branch.wait_links_up(1)?;
    net.dc.wait_links_up(1)?;
    flow::clean(&flow::stop(running)?)
}

#[test]
fn after_a_power_cut_one_command_brings_the_site_back() -> Result<()> {
    let net = Hub::new()?;
    let server = flow::serve(net.dc.host(), 7970, &[])?;
    net.dc.expose("power", 7970, &[])?;
    let to = net.branch.endpoint("power", 7970)?;
    drop(server);
    net.dc.host().power_cut()?;
    let _server = flow::serve(net.dc.host(), 7970, &[])?;
    net.dc.refuses(&["status"], 1, &["skctl start"])?;
    net.dc.skctl(&["start"]).check()?;
    eventually("connections again", Duration::from_secs(30), || {
        let report = flow::run(net.branch.host(), "probe", to, &flow::ONE_PROBE)?;
        Ok(report["ok"] == 1)
    })?;
    Ok(())
}

#[test]
fn stop_start_restart_and_delete() -> Result<()> {
    let net = Hub::new()?;
    net.branch.skctl(&["stop"]).check()?;
    net.branch.refuses(&["status"], 1, &["skctl start"])?;
    net.branch.skctl(&["start"]).check()?;
    net.branch.wait_links_up(1)?;
    let before = net.branch.processes()?;
    net.branch.skctl(&["restart"]).check()?;
    net.branch.wait_links_up(1)?;
    ensure!(net.branch.processes()?.router != before.router, "restart restarted nothing");

    let links = |site: &Site| -> Result<usize> {
        Ok(site.json(&["link", "list"])?.as_array().map_or(0, Vec::len))
    };
    ensure!(links(&net.hub)? == 2);
    net.branch.skctl(&["delete", "--yes"]).check()?;
    let left = std::fs::read_dir(net.branch.host().dir().join("skein"))?.flatten().count();
    ensure!(left == 0, "delete left state behind");
    eventually("the link is gone", Duration::from_secs(10), || Ok(links(&net.hub)? == 1))?;
    let processes = net.branch.host().command("pgrep").args(["-f", "bin/skein-"]).run()?;
    ensure!(processes.stdout.is_empty(), "delete left processes behind: {processes}");
    Ok(())
}
