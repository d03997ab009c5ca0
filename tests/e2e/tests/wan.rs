//! Long, lossy, narrow and broken ways between two sites.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use skein_e2e::flow::{clean, gap_max};
use skein_e2e::topology::{Away, internet, reachable};
use skein_e2e::{Site, figure, flow, long, scaled, servers};
use skein_lab::{Direction, Lab, Loss, Mtu, Profile, Signal, eventually};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Flows go on within this after an outage: most of it is the link's, whose dialler tries once a second.
const GO_ON_MAX: Duration = Duration::from_secs(4);

#[test]
fn after_an_outage_flows_go_on_at_once() -> Result<()> {
    let net = Away::new(1)?;
    let _server = flow::serve(net.hub.host(), 8400, &[])?;
    net.hub.expose("resumed", 8400, &[])?;
    let to = net.branch.endpoint("resumed", 8400)?;
    let outages: &[_] =
        scaled(&[(100, 7)], &[(0, 1), (0, 5), (0, 20), (100, 1), (100, 5), (100, 20)]);
    for (rtt_ms, seconds) in outages {
        let (well, outage) =
            (Profile { delay: MS * *rtt_ms / 2, ..Profile::default() }, SECOND * *seconds);
        net.wan.set(&well);
        // More than the first congestion window, each way.
        let running = flow::start_open(net.branch.host(), to, 20, &[])?;
        sleep(2 * SECOND);
        net.wan.change(|profile| profile.blackhole = true);
        sleep(outage);
        net.wan.set(&well);
        let shown = net.wait_link("up again", |link| link["state"] == "up")?;
        sleep(GO_ON_MAX);
        let report = flow::stop(running)?;
        clean(&report)?;
        let resumed = gap_max(&report).saturating_sub(outage);
        figure(
            &format!("RTT {rtt_ms} ms, {outage:?} of outage: flows go on after"),
            format!("{resumed:?}, link: {shown:?}"),
        );
        ensure!(gap_max(&report) >= outage / 2, "there was no outage: {report}");
        ensure!(resumed < shown.extended(GO_ON_MAX), "{resumed:?}, {shown:?}");
    }
    Ok(())
}

#[test]
fn a_long_or_lossy_way_is_no_dead_one() -> Result<()> {
    let radio = Profile { delay: 200 * MS, jitter: 200 * MS, ..Profile::default() };
    far("7 %, 600 ms", &Profile::lossy(300 * MS, 0.07), scaled(8, 600))?;
    if long() {
        far("1 %, 50 ms", &Profile::lossy(25 * MS, 0.01), scaled(4, 600))?;
    }
    far("200 ms of jitter", &radio, scaled(4, 180))
}

/// Flows and bulk over one way, beside a proxy that only passes TCP on; the link stays up.
fn far(name: &str, profile: &Profile, seconds: u64) -> Result<()> {
    let net = Away::new(2)?;
    let (hub, host) = (net.hub.host(), net.branch.host());
    let _inner = flow::serve(hub, 8410, &[])?;
    let _outer = flow::serve_on(hub, (hub.address(), 8411).into(), &[])?;
    let _proxy = servers::tcp_proxy(host, 8412, (hub.address(), 8411).into())?;
    net.hub.expose("far", 8410, &[])?;
    let to = net.branch.endpoint("far", 8410)?;
    net.wan.set(profile);
    // That the way has become longer all at once may cost the link; from then on nothing may.
    sleep(2 * SECOND);
    net.branch.wait_links_up(1)?;
    let before = net.link()?;
    let running = flow::start_open(host, to, 5, &["--rate", "1000"])?;
    let bulk = |what: &str, to| -> Result<()> {
        // Downwards, so that what is queued when the time is over is not waited for: it may take minutes.
        let seconds = seconds.div_ceil(4).to_string();
        let args = ["--flows", "1", "--seconds", &seconds, "--direction", "down"];
        let bulk = flow::run(host, "bulk", to, &args)?;
        figure(&format!("{name}: bytes a second, {what}"), &bulk["bytes_per_s"]);
        ensure!(bulk["wrong"] == 0 && bulk["failed"] == 0, "{bulk}");
        Ok(())
    };
    bulk("Skein", to)?;
    // What the kernel uses by itself may be something else than what QUIC here does.
    for control in scaled(&["bbr"][..], &["bbr", "cubic", "reno"]) {
        let set = format!("net.ipv4.tcp_congestion_control={control}");
        if hub.command("sysctl").args(["-w", &set]).run()?.code == Some(0) {
            bulk(&format!("HAProxy passing TCP on, {control}"), ([127, 0, 0, 1], 8412).into())?;
        }
    }
    sleep(SECOND * u32::try_from(seconds / 4)?);
    let report = flow::stop(running)?;
    figure(&format!("{name}: longest silence of a flow"), format!("{:?}", gap_max(&report)));
    clean(&report)?;
    ensure!(report["received"].as_u64() > Some(0), "{report}");
    let after = net.link()?;
    figure(&format!("{name}: lost"), format!("{:?}", net.wan));
    ensure!(after["since"] == before["since"] && after["state"] == "up", "{before} {after}");
    Ok(())
}

#[test]
fn a_dead_or_frozen_neighbour_is_noticed_and_so_is_loss_in_one_direction() -> Result<()> {
    let net = Away::new(3)?;
    let _server = flow::serve(net.hub.host(), 8420, &[])?;
    net.hub.expose("noticed", 8420, &[])?;
    let to = net.branch.endpoint("noticed", 8420)?;
    let running = flow::start_open(net.branch.host(), to, 5, &[])?;
    let black = || Profile { blackhole: true, ..Profile::default() };
    let noticed = |what: &str| -> Result<()> {
        let shown = net.wait_link("noticed", |link| link["state"] != "up")?;
        figure(&format!("{what}: noticed"), format!("{shown:?}"));
        ensure!(shown.after < shown.extended(2 * SECOND), "{what}: {shown:?}");
        Ok(())
    };
    for (what, direction) in [("loss upwards", Direction::Up), ("loss downwards", Direction::Down)]
    {
        sleep(SECOND);
        net.wan.set_one_way(direction, black());
        noticed(what)?;
        net.wan.set_one_way(direction, Profile::default());
        net.wait_link("up again", |link| link["state"] == "up")?;
    }
    sleep(SECOND);
    net.hub.signal_router(Signal::Freeze)?;
    noticed("a freeze")?;
    net.hub.signal_router(Signal::Thaw)?;
    net.wait_link("up again", |link| link["state"] == "up")?;
    clean(&flow::stop(running)?)
}

#[test]
fn a_transit_leads_round_a_lost_link_before_the_news_arrives() -> Result<()> {
    let (lab, internet) = internet()?;
    let transits = [reachable(&lab, &internet, "t1")?, reachable(&lab, &internet, "t2")?];
    let host = lab.host("far")?;
    // So long is the ingress not told.
    host.join_through_wan(&internet, 5)?.set(&Profile { delay: 100 * MS, ..Profile::default() });
    let far = Site::init(&host, &["--no-listen"])?;
    let host = lab.host("near")?;
    host.join(&internet)?;
    let near = Site::init(&host, &["--no-listen"])?;
    far.link_to(&transits[0], &[])?;
    near.link_to(&transits[0], &[])?;
    transits[1].link_to(&transits[0], &[])?;
    far.link_to(&transits[1], &[])?;
    near.link_to(&transits[1], &[])?;
    let _server = flow::serve(near.host(), 8430, &[])?;
    near.expose("repaired", 8430, &[])?;
    let to = far.endpoint("repaired", 8430)?;
    let running = flow::start_open(far.host(), to, 20, &[])?;
    sleep(2 * SECOND);
    let mut repaired = 0.0;
    // Which of them the flows take follows from round-trip times that are alike, and may change between two cuts.
    for transit in [&transits; 4].into_iter().flatten() {
        lab.cut(transit.host(), near.host())?;
        sleep(2 * SECOND);
        lab.heal(transit.host(), near.host())?;
        near.wait_links_up(2)?;
        repaired = transit.metric("skein_frames_total{action=\"repaired\"}")?;
        figure(&format!("frames led round by {}", transit.name()), repaired);
        if repaired > 0.0 {
            break;
        }
    }
    let report = flow::stop(running)?;
    figure("longest silence of a flow", format!("{:?}", gap_max(&report)));
    clean(&report)?;
    ensure!(repaired > 0.0, "none");
    Ok(())
}

#[test]
fn flows_go_on_while_packets_must_become_smaller_and_may_become_larger() -> Result<()> {
    let net = Away::with_mtu(6, 9_000)?;
    let _server = flow::serve(net.hub.host(), 8440, &[])?;
    net.hub.expose("sized", 8440, &[])?;
    let to = net.branch.endpoint("sized", 8440)?;
    let mtu = |link: &Value| link["mtu"].as_u64().unwrap_or(0);
    net.wait_link("jumbo frames", |link| mtu(link) == 8_940)?;
    let changes =
        [(1_280, false, 1_200), (9_000, true, 8_940), (1_500, false, 1_440), (1_280, true, 1_200)];
    for (bytes, is_told, found) in changes.into_iter().take(scaled(2, 4)) {
        // What grows is found when a link is made, or within a minute.
        let grows = found > mtu(&net.link()?);
        let running = flow::start_open(net.branch.host(), to, 50, &[])?;
        sleep(2 * SECOND);
        net.wan.set(&Profile { mtu: Some(Mtu { bytes, is_told }), ..Profile::default() });
        if grows {
            net.wan.change(|profile| profile.blackhole = true);
            net.wait_link("lost", |link| link["state"] != "up")?;
            net.wan.change(|profile| profile.blackhole = false);
        }
        let shown =
            net.wait_link("the size", |link| mtu(link) == found && link["state"] == "up")?;
        sleep(2 * SECOND);
        let report = flow::stop(running)?;
        let gap = gap_max(&report);
        figure(
            &format!("MTU {bytes}, told {is_told}"),
            format!("found: {shown:?}, longest silence of a flow {gap:?}"),
        );
        clean(&report)?;
        ensure!(grows || gap < shown.extended(2 * SECOND), "{gap:?}, {shown:?}");
    }
    Ok(())
}

#[test]
fn sites_on_one_host_use_jumbo_frames() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("both")?;
    let one =
        Site::init_in(&host, "one", &["--advertise", "127.0.0.1", "--listen", "127.0.0.1:7001"])?;
    let two = Site::init_in(&host, "two", &["--no-listen"])?;
    two.link_to(&one, &[])?;
    two.wait_links_up(1)?;
    eventually(
        "jumbo frames",
        20 * SECOND,
        || Ok(two.json(&["link", "list"])?[0]["mtu"] == 8_940),
    )?;
    Ok(())
}

#[test]
fn a_path_too_small_for_frames_is_named() -> Result<()> {
    let net = Away::new(7)?;
    let _server = flow::serve(net.hub.host(), 8450, &[])?;
    net.hub.expose("squeezed", 8450, &[])?;
    // An idle link looks at its size twice a minute only.
    let to = net.branch.endpoint("squeezed", 8450)?;
    let traffic = flow::start(net.branch.host(), "probe", to, &["--interval-ms", "50"])?;
    let mtu = Mtu { bytes: 1_250, is_told: true };
    net.wan.set(&Profile { mtu: Some(mtu), ..Profile::default() });
    let shown =
        net.wait_link("over TCP", |link| link["state"] == "up" && link["carrier"] == "tls")?;
    figure("a path of 1,250 bytes is left for TCP", format!("{shown:?}"));
    let named = "does not carry packets of 1,280 bytes";
    let doctor = net.branch.skctl(&["doctor"]).run()?.stdout;
    ensure!(doctor.contains(named) && doctor.contains("raise the MTU"), "{doctor}");
    let link = net.link()?;
    ensure!(link["carrierReason"].as_str().is_some_and(|why| why.contains(named)), "{link}");
    drop(traffic);
    let bulk = flow::run(net.branch.host(), "bulk", to, &["--flows", "2", "--seconds", "2"])?;
    clean(&bulk)
}

#[test]
fn a_fast_flow_outlives_the_loss_of_many_packets_at_once() -> Result<()> {
    let net = Away::new(8)?;
    let _server = flow::serve(net.hub.host(), 8460, &[])?;
    net.hub.expose("fast", 8460, &[])?;
    let to = net.branch.endpoint("fast", 8460)?;
    net.wan.set(&Profile { delay: 100 * MS, ..Profile::default() });
    sleep(2 * SECOND);
    net.branch.wait_links_up(1)?;
    let (clear, lossy) = scaled((3, 4), (12, 6));
    let seconds = (clear + lossy).to_string();
    let args = ["--flows", "1", "--direction", "down", "--seconds", &seconds];
    let running = flow::start(net.branch.host(), "bulk", to, &args)?;
    sleep(SECOND * clear);
    let before = net.wan.counters(Direction::Down).delivered_bytes;
    net.wan.change(|profile| profile.loss = Loss::Random(0.1));
    let bulk = flow::finish(running)?;
    figure("a fast flow before and with 10 % of loss", format!("{before} bytes, {bulk}"));
    figure("packets lost", net.wan.counters(Direction::Down).lost);
    clean(&bulk)?;
    // One that stands still from then on is silent for almost all of it.
    let gap = bulk["gap_max_ms"].as_u64().map(Duration::from_millis);
    ensure!(gap.is_some_and(|gap| gap < SECOND * lossy / 2), "{bulk}");
    Ok(())
}
