//! A ring of rings: 24 routers, one pair more than eight hops apart.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::topology::{PUBLIC, reachable};
use skein_e2e::{Shown, Site, figure, flow, scaled};
use skein_lab::{Lab, eventually};

/// Three rings of eight: the routers 0 of the rings form a ring themselves, and routers 4 of two rings are nine
/// hops apart.
const RINGS: usize = 3;
const RING_SIZE: usize = 8;

fn build(lab: &Lab, rings: usize, size: usize) -> Result<Vec<Site>> {
    let internet = lab.lan("internet", PUBLIC)?;
    let mut sites = Vec::new();
    for number in 0..rings * size {
        sites.push(reachable(lab, &internet, &format!("r{number:02}"))?);
    }
    // Neighbours first, so that whoever links is new to the network or already in it.
    for ring in 0..rings {
        let first = ring * size;
        if ring > 0 {
            sites[first].link_to(&sites[first - size], &[])?;
        }
        for member in 1..size {
            sites[first + member].link_to(&sites[first + member - 1], &[])?;
        }
        sites[first].link_to(&sites[first + size - 1], &[])?;
    }
    if rings > 2 {
        sites[0].link_to(&sites[(rings - 1) * size], &[])?;
    }
    Ok(sites)
}

/// How many routers every site reaches.
fn converged(sites: &[Site]) -> Result<bool> {
    for site in sites {
        let network = site.json(&["network", "status"])?;
        let all = network["sites"].as_array().context("sites")?;
        let reachable = all
            .iter()
            .filter(|site| site["local"] == true || site["routers"][0]["reachable"] == true)
            .count();
        if reachable < sites.len() {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn a_ring_of_rings_converges_and_stays_small() -> Result<()> {
    let lab = Lab::new()?;
    let (rings, size) = scaled((3, 3), (RINGS, RING_SIZE));
    let sites = build(&lab, rings, size)?;
    eventually("converged", Duration::from_secs(30), || converged(&sites))?;
    for site in &sites {
        site.host().power_cut()?;
    }
    for site in &sites {
        site.skctl(&["start"]).check()?;
    }
    let ask = || sites[0].status();
    let minute = Duration::from_secs(60);
    let shown = Shown::watch("converged again", minute, ask, |_| converged(&sites))?;
    figure(&format!("{} routers converge after the last start", sites.len()), format!("{shown:?}"));
    ensure!(shown.after < shown.extended(Duration::from_secs(3)), "{shown:?}");
    let mut rss_max_kib = 0;
    for site in &sites {
        rss_max_kib = rss_max_kib.max(site.usage(site.processes()?.router)?.rss_kib);
    }
    figure("largest idle router, KiB", rss_max_kib);
    ensure!(rss_max_kib <= scaled(40 << 10, 20 << 10), "{rss_max_kib} KiB");

    let (near, far) = (&sites[size / 2], &sites[(rings / 2) * size + size / 2]);
    let _server = flow::serve(far.host(), 8000, &[])?;
    far.expose("far", 8000, &[])?;
    let to = near.endpoint("far", 8000)?;
    let trace = near.json(&["trace", "far"])?;
    let hops = trace["candidates"][0]["paths"][0]["hops"].as_array().map_or(0, Vec::len);
    figure("hops to the farthest", hops);
    ensure!(hops >= scaled(3, 9), "{trace}");
    let report = flow::run(near.host(), "bulk", to, &["--flows", "4", "--seconds", "2"])?;
    ensure!(report["failed"] == 0 && report["wrong"] == 0, "{report}");
    many_services(near, far)
}

fn many_services(near: &Site, far: &Site) -> Result<()> {
    let count = scaled(100, 500);
    let documents: String = (0..count)
        .map(|n| {
            format!(
                "---\napiVersion: skein.dev/v1alpha1\nkind: Connector\nmetadata: {{name: s{n}}}\n\
                 spec: {{address: s{n}, host: 127.0.0.1, ports: [{{port: {}, targetPort: 8000}}]}}\n",
                10_000 + n
            )
        })
        .collect();
    let path = far.host().dir().join("many.yaml");
    std::fs::write(&path, documents)?;
    let applied = eventually("applied", Duration::ZERO, || {
        far.skctl(&["apply", "-f"]).arg(&path).check()?;
        Ok(true)
    })?;
    let ask = || near.json(&["service", "list"]);
    let shown =
        Shown::watch("every service is usable", Duration::from_secs(60), ask, |services| {
            let rows = services.as_array().context("rows")?;
            let ready = rows.iter().filter(|row| {
                row["state"] == "ready"
                    && row["endpoints"][0]["bound"].as_str().is_some_and(|b| !b.is_empty())
            });
            Ok(ready.count() > count)
        })?;
    figure(
        &format!("{count} services applied and usable at the other end"),
        format!("{applied:?}, {shown:?}"),
    );
    let took = applied + shown.after;
    ensure!(took < shown.extended(Duration::from_secs(10)), "{applied:?}, {shown:?}");
    let report = flow::run(
        near.host(),
        "probe",
        near.endpoint(&format!("s{}", count - 1), u16::try_from(10_000 + count - 1)?)?,
        &["--count", "5"],
    )?;
    ensure!(report["ok"] == 5, "{report}");
    Ok(())
}
