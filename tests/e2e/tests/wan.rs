//! Long, lossy, narrow and broken ways between two sites.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::topology::PUBLIC;
use skein_e2e::{Site, figure, flow, scaled};
use skein_lab::{Lab, Process, Profile, Wan, eventually};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Flows go on within this after an outage: most of it is the link's, whose dialler tries once a second.
const GO_ON_MAX: Duration = Duration::from_secs(4);

/// A reachable site, and one behind a WAN box, linked to it.
struct Away {
    _lab: Lab,
    hub: Site,
    branch: Site,
    wan: Wan,
}

impl Away {
    /// With the seed of the WAN box.
    fn new(seed: u64) -> Result<Self> {
        let lab = Lab::new()?;
        let internet = lab.lan("internet", PUBLIC)?;
        let host = lab.host("hub")?;
        let address = host.join(&internet)?.to_string();
        let hub = Site::init(&host, &["--advertise", &address])?;
        let host = lab.host("branch")?;
        let wan = host.join_through_wan(&internet, seed)?;
        let branch = Site::init(&host, &["--no-listen"])?;
        branch.link_to(&hub, &[])?;
        branch.wait_links_up(1)?;
        Ok(Self { _lab: lab, hub, branch, wan })
    }

    fn link(&self) -> Result<Value> {
        let links = self.branch.json(&["link", "list"])?;
        links.get(0).cloned().context("a link")
    }
}

/// HAProxy on the branch, which passes TCP connections on to one port of the hub, as they are.
fn proxy(net: &Away, port: u16, to: u16) -> Result<Process> {
    let host = net.branch.host();
    let config = host.dir().join("haproxy.cfg");
    let hub = net.hub.host().address();
    let text = format!(
        "defaults\n mode tcp\n timeout connect 30s\n timeout client 1h\n timeout server 1h\n\
         listen l\n bind 127.0.0.1:{port}\n server s {hub}:{to}\n"
    );
    std::fs::write(&config, text)?;
    let process = host.command("haproxy").args(["-db", "-f"]).arg(&config).spawn()?;
    let filter = format!("sport = :{port}");
    eventually("haproxy listens", Duration::from_secs(10), || {
        Ok(!host.command("ss").args(["-Hltn", &filter]).check()?.stdout.trim().is_empty())
    })
    .with_context(|| process.stderr())?;
    Ok(process)
}

fn clean(report: &Value) -> Result<()> {
    let none = |key: &str| report[key].is_null() || report[key] == 0;
    ensure!(none("failed") && none("wrong") && none("truncated"), "{report}");
    Ok(())
}

/// The longest silence of any flow.
fn gap_max(report: &Value) -> Duration {
    let gaps = report["gaps"].as_array().into_iter().flatten();
    let longest = gaps.filter_map(|gap| gap["length_ms"].as_u64()).max();
    Duration::from_millis(longest.unwrap_or(0))
}

#[test]
fn after_an_outage_flows_go_on_at_once() -> Result<()> {
    let net = Away::new(1)?;
    let _server = flow::serve(net.hub.host(), 8400, &[])?;
    net.hub.expose("resumed", 8400, &[])?;
    let to = net.branch.endpoint("resumed", 8400)?;
    let outages: &[_] =
        scaled(&[(100, 10)], &[(0, 1), (0, 5), (0, 20), (100, 1), (100, 5), (100, 20)]);
    for (rtt_ms, seconds) in outages {
        let (well, outage) =
            (Profile { delay: MS * *rtt_ms / 2, ..Profile::default() }, SECOND * *seconds);
        net.wan.set(&well);
        // More than the first congestion window, each way.
        let running = flow::start(net.branch.host(), "duplex", to, &["--flows", "20"])?;
        sleep(2 * SECOND);
        net.wan.change(|profile| profile.blackhole = true);
        sleep(outage);
        net.wan.set(&well);
        sleep(GO_ON_MAX);
        let report = flow::stop(running)?;
        clean(&report)?;
        let resumed = gap_max(&report).saturating_sub(outage);
        figure(
            &format!("RTT {rtt_ms} ms, {outage:?} of outage: flows go on after"),
            format!("{resumed:?}"),
        );
        ensure!(gap_max(&report) >= outage / 2, "there was no outage: {report}");
        ensure!(resumed < GO_ON_MAX, "{resumed:?}");
    }
    Ok(())
}

#[test]
fn a_long_or_lossy_way_is_no_dead_one() -> Result<()> {
    let radio = Profile { delay: 200 * MS, jitter: 200 * MS, ..Profile::default() };
    far("7 %, 600 ms", &Profile::lossy(300 * MS, 0.07), scaled(8, 600))?;
    far("1 %, 50 ms", &Profile::lossy(25 * MS, 0.01), scaled(5, 600))?;
    far("200 ms of jitter", &radio, scaled(5, 180))
}

/// Flows and bulk over one way, beside a proxy that only passes TCP on; the link stays up.
fn far(name: &str, profile: &Profile, seconds: u64) -> Result<()> {
    let net = Away::new(2)?;
    let (hub, host) = (net.hub.host(), net.branch.host());
    let _inner = flow::serve(hub, 8410, &[])?;
    let _outer = flow::serve_on(hub, (hub.address(), 8411).into(), &[])?;
    let _proxy = proxy(&net, 8412, 8411)?;
    net.hub.expose("far", 8410, &[])?;
    let to = net.branch.endpoint("far", 8410)?;
    net.wan.set(profile);
    // That the way has become longer all at once may cost the link; from then on nothing may.
    sleep(4 * SECOND);
    net.branch.wait_links_up(1)?;
    let before = net.link()?;
    let running = flow::start(host, "duplex", to, &["--flows", "5", "--rate", "1000"])?;
    // QUIC here is CUBIC; what the kernel uses by itself may be something else.
    let kernel = hub.read("/proc/sys/net/ipv4/tcp_congestion_control")?;
    let proxied = format!("HAProxy passing TCP on ({})", kernel.trim());
    for (what, to) in [("Skein", to), (&proxied, ([127, 0, 0, 1], 8412).into())] {
        // Downwards, so that what is queued when the time is over is not waited for: it may take minutes.
        let bulk =
            ["--flows", "1", "--seconds", &seconds.div_ceil(3).to_string(), "--direction", "down"];
        let bulk = flow::run(host, "bulk", to, &bulk)?;
        figure(&format!("{name}: bytes a second, {what}"), &bulk["bytes_per_s"]);
        ensure!(bulk["wrong"] == 0 && bulk["failed"] == 0, "{bulk}");
    }
    sleep(SECOND * u32::try_from(seconds / 3)?);
    let report = flow::stop(running)?;
    figure(&format!("{name}: longest silence of a flow"), format!("{:?}", gap_max(&report)));
    clean(&report)?;
    ensure!(report["received"].as_u64() > Some(0), "{report}");
    let after = net.link()?;
    figure(&format!("{name}: lost"), format!("{:?}", net.wan));
    ensure!(after["since"] == before["since"] && after["state"] == "up", "{before} {after}");
    Ok(())
}
