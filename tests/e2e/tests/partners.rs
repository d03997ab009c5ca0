//! Sites of other owners get what was named, sites that leave are forgotten, and trust can be taken back.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::topology::{internet, reachable};
use skein_e2e::{Site, flow};
use skein_lab::eventually;

const SETTLE: Duration = Duration::from_secs(30);

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// Addresses that a site lists.
fn addresses(site: &Site) -> Result<Vec<String>> {
    let rows = site.json(&["service", "list"])?;
    let rows = rows.as_array().into_iter().flatten();
    Ok(rows.filter_map(|row| Some(row["address"].as_str()?.to_owned())).collect())
}

fn answers(site: &Site, to: SocketAddr) -> Result<bool> {
    let report = flow::run(site.host(), "probe", to, &["--count", "1"])?;
    Ok(report["ok"] == 1)
}

fn links(site: &Site) -> Result<usize> {
    Ok(site.json(&["link", "list"])?.as_array().map_or(0, Vec::len))
}

#[test]
fn partners_share_what_both_named_until_one_withdraws() -> Result<()> {
    let (lab, internet) = internet()?;
    let hub = reachable(&lab, &internet, "hub")?;
    let partner = Site::init(&lab.host_behind_nat("partner", &internet)?, &[])?;
    let _servers = [
        flow::serve(hub.host(), 7100, &[])?,
        flow::serve(hub.host(), 7101, &[])?,
        flow::serve(partner.host(), 7200, &[])?,
        flow::serve(partner.host(), 7201, &[])?,
    ];
    for (site, service, port) in [
        (&hub, "catalogue", 7100),
        (&hub, "ledger", 7101),
        (&partner, "orders", 7200),
        (&partner, "payroll", 7201),
    ] {
        site.expose(service, port, &[])?;
    }
    let token =
        hub.token("partner", &["--guest", "--consume", "catalogue", "--provide", "orders"])?;
    let linked = partner
        .skctl(&["link", text(&token)?, "--consume", "catalogue", "--provide", "orders"])
        .check()?;
    ensure!(linked.stderr.contains("lets it reach catalogue and serve orders"), "{linked}");

    let catalogue = partner.endpoint("catalogue", 7100)?;
    eventually("the partner reaches the catalogue", SETTLE, || answers(&partner, catalogue))?;
    let orders = hub.endpoint("orders", 7200)?;
    eventually("the hub reaches the orders", SETTLE, || answers(&hub, orders))?;
    ensure!(!addresses(&partner)?.contains(&"ledger".to_owned()), "{:?}", addresses(&partner)?);
    ensure!(!addresses(&hub)?.contains(&"payroll".to_owned()), "{:?}", addresses(&hub)?);

    let rows = hub.json(&["link", "list"])?;
    let name = rows[0]["name"].as_str().context("an incoming link")?.to_owned();
    hub.refuses(&["unlink", &name], 1, &["incoming", "--withdraw"])?;
    let gone = hub.skctl(&["unlink", &name, "--withdraw"]).check()?;
    ensure!(gone.stderr.contains("no longer endorses"), "{gone}");
    eventually("the incoming link is cut", SETTLE, || Ok(links(&hub)? == 0))?;
    eventually("nothing is served any more", SETTLE, || Ok(!answers(&partner, catalogue)?))?;
    Ok(())
}

#[test]
fn a_site_that_was_deleted_disappears_from_the_others() -> Result<()> {
    let net = skein_e2e::topology::Hub::new()?;
    net.hub.wait_links_up(2)?;
    let sites =
        |site: &Site| -> Result<String> { Ok(site.json(&["network", "status"])?.to_string()) };
    eventually("all sites know each other", SETTLE, || Ok(sites(&net.branch)?.contains("\"dc\"")))?;
    net.dc.skctl(&["delete", "--yes"]).check()?;
    for site in [&net.hub, &net.branch] {
        eventually("it has disappeared", SETTLE, || Ok(!sites(site)?.contains("\"dc\"")))?;
        let status = site.status()?;
        ensure!(status["problems"].as_array().is_none_or(Vec::is_empty), "{status}");
    }
    ensure!(links(&net.hub)? == 1, "the hub still lists the link");
    Ok(())
}
