//! Links in every shape, and networks that change under them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::flow::clean;
use skein_e2e::topology::{Hub, PUBLIC};
use skein_e2e::{Shown, Site, figure, flow};
use skein_lab::{Lab, eventually};

const OTHER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 0);

fn answers(from: &Site, to: SocketAddr) -> Result<bool> {
    Ok(flow::run(from.host(), "probe", to, &flow::ONE_PROBE)?["ok"] == 1)
}

/// A running router that learns of a new path uses it within this.
const REROUTE_MAX: Duration = Duration::from_secs(5);
/// Nothing here takes this long unless it fails.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn flows_survive_a_gateway_that_gets_another_address() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve(net.dc.host(), 8200, &[])?;
    net.dc.expose("moved", 8200, &[])?;
    let to = net.branch.endpoint("moved", 8200)?;
    let running = flow::start_open(net.branch.host(), to, 20, &[])?;
    for site in [&net.branch, &net.dc, &net.branch] {
        site.host().gateway().context("a gateway")?.renumber(&net.internet)?;
        let ask = || net.branch.status();
        let shown = Shown::watch("the path carries", PATIENCE, ask, |_| answers(&net.branch, to))?;
        figure(
            &format!("new connections after {} was renumbered", site.name()),
            format!("{shown:?}"),
        );
        ensure!(shown.after < shown.extended(REROUTE_MAX), "{shown:?}");
    }
    clean(&flow::stop(running)?)
}

#[test]
fn two_links_between_the_same_pair_carry_for_each_other() -> Result<()> {
    let lab = Lab::new()?;
    let lans = [lab.lan("one", PUBLIC)?, lab.lan("two", OTHER)?];
    let hosts = [lab.host("near")?, lab.host("far")?];
    let mut advertise = Vec::new();
    for lan in &lans {
        hosts[0].join(lan)?;
        advertise.push(hosts[1].join(lan)?.to_string());
    }
    let far = Site::init(&hosts[1], &["--advertise", &advertise[0]])?;
    let near = Site::init(&hosts[0], &["--no-listen"])?;
    near.link_to(&far, &["--name", "first"])?;
    // From now on tokens name the other address.
    far.skctl(&["init", far.name(), "--advertise", &advertise[1]]).check()?;
    near.link_to(&far, &["--name", "second"])?;
    near.wait_links_up(2)?;

    let _server = flow::serve(far.host(), 8210, &[])?;
    far.expose("twice", 8210, &[])?;
    let to = near.endpoint("twice", 8210)?;
    let running = flow::start_open(near.host(), to, 20, &[])?;
    for lan in [&lans[0], &lans[1], &lans[0]] {
        hosts[0].unplug(lan)?;
        let ask = || near.json(&["link", "list"]);
        let shown = Shown::watch("the other link carries", PATIENCE, ask, |_| answers(&near, to))
            .with_context(|| format!("{:?}", ask()))?;
        figure(&format!("new connections without LAN {}", lan.name()), format!("{shown:?}"));
        ensure!(shown.after < shown.extended(REROUTE_MAX), "{shown:?}");
        hosts[0].plug(lan)?;
        near.wait_links_up(2)?;
    }
    clean(&flow::stop(running)?)
}

#[test]
fn a_link_over_ipv6_alone() -> Result<()> {
    let lab = Lab::new()?;
    let lan = lab.lan("six", PUBLIC)?;
    let (near, far) = (lab.host("near")?, lab.host("far")?);
    near.join(&lan)?;
    far.join(&lan)?;
    near.add_ipv6(&lan, "2001:db8::1".parse()?)?;
    far.add_ipv6(&lan, "2001:db8::2".parse()?)?;
    let far = Site::init(&far, &["--advertise", "[2001:db8::2]:7443"])?;
    let near = Site::init(&near, &["--no-listen"])?;
    near.link_to(&far, &[])?;
    let links = near.json(&["link", "list"])?;
    ensure!(links.to_string().contains("2001:db8::2"), "{links}");
    let _server = flow::serve(far.host(), 8220, &[])?;
    far.expose("six", 8220, &[])?;
    let report = flow::run(
        near.host(),
        "bulk",
        near.endpoint("six", 8220)?,
        &["--flows", "2", "--seconds", "1"],
    )?;
    clean(&report)
}

#[test]
fn links_that_make_no_sense_are_refused_and_odd_ones_work() -> Result<()> {
    let net = Hub::new()?;
    // To itself.
    let own = net.hub.token("own", &[])?;
    let own = own.to_str().context("a path")?;
    net.hub.refuses(&["link", own], 1, &["this very site"])?;
    // Twice to the same peer: the same link, or a second one by another name.
    net.branch.link_to(&net.hub, &[])?;
    ensure!(net.branch.json(&["link", "list"])?.as_array().map(Vec::len) == Some(1));
    // A ring of three.
    let address = net.lab.host("relay")?;
    let relay_at = address.join(&net.internet)?.to_string();
    let relay = Site::init(&address, &["--advertise", &relay_at])?;
    relay.link_to(&net.hub, &[])?;
    net.branch.link_to(&relay, &[])?;
    net.branch.wait_links_up(2)?;
    // A site of a name that is taken: ids differ, links get names of their own.
    let twin = net.lab.host("twin")?;
    twin.join(&net.internet)?;
    let skctl = || twin.command(skein_e2e::skctl());
    skctl().args(["init", net.branch.name(), "--no-listen", "--service", "none"]).check()?;
    skctl().arg("link").arg(net.hub.token("twin", &[])?).check()?;
    let mut named = 0;
    eventually("both of the name are known", Duration::from_secs(10), || {
        let network = net.dc.json(&["network", "status"])?;
        let sites = network["sites"].as_array().into_iter().flatten();
        named = sites.filter(|site| site["name"] == net.branch.name()).count();
        Ok(named == 2)
    })
    .with_context(|| format!("{named} sites of that name"))?;
    Ok(())
}

#[test]
fn two_grown_networks_join_only_when_told_to() -> Result<()> {
    let net = Hub::new()?;
    let (first, second) =
        (net.lab.host("north")?, net.lab.host_behind_nat("south", &net.internet)?);
    let at = first.join(&net.internet)?.to_string();
    let (north, south) =
        (Site::init(&first, &["--advertise", &at])?, Site::init(&second, &["--no-listen"])?);
    south.link_to(&north, &[])?;

    let plain = north.token("plain", &[])?;
    net.hub.refuses(&["link", plain.to_str().context("a path")?], 1, &["--merge"])?;
    let token = north.token("merge", &["--merge"])?;
    let token = token.to_str().context("a path")?;
    net.hub.refuses(&["link", token], 1, &["--merge"])?;
    net.hub.skctl(&["link", token, "--merge"]).check()?;
    let _server = flow::serve(south.host(), 8230, &[])?;
    south.expose("merged", 8230, &[])?;
    let to = net.branch.endpoint("merged", 8230)?;
    eventually("the networks are one", Duration::from_secs(10), || answers(&net.branch, to))?;
    Ok(())
}
