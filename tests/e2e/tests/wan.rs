//! Long, lossy, narrow and broken ways between two sites.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::topology::PUBLIC;
use skein_e2e::{Site, figure, flow, scaled};
use skein_lab::{Direction, Lab, Lan, Profile, Wan, eventually};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Flows go on within this after an outage: most of it is the link's, whose dialler tries once a second.
const GO_ON_MAX: Duration = Duration::from_secs(4);

/// A reachable site, and one behind a WAN box, linked to it.
struct Away {
    lab: Lab,
    internet: Lan,
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
        Ok(Self { lab, internet, hub, branch, wan })
    }

    fn link(&self) -> Result<Value> {
        let links = self.branch.json(&["link", "list"])?;
        links.get(0).cloned().context("a link")
    }
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
