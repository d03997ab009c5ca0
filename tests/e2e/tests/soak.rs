//! Flows come and go, some die midway: nothing is left of any.

use std::time::Duration;

use anyhow::{Result, ensure};
use skein_e2e::topology::Hub;
use skein_e2e::{Site, Usage, figure, flow, scaled};
use skein_lab::eventually;

#[test]
fn churn_leaves_nothing_behind() -> Result<()> {
    let _alone = skein_lab::alone();
    let net = Hub::new()?;
    // One flow in two hundred is killed by the target, about as many by the client.
    let _server = flow::serve(net.dc.host(), 8100, &["--kill-every", "200"])?;
    net.dc.expose("churn", 8100, &[])?;
    let to = net.branch.endpoint("churn", 8100)?;
    let rate = ["--rate", "200", "--kill-every", "201", "--seconds"];
    let churn = |seconds: &str| {
        flow::run(net.branch.host(), "churn", to, &[&rate[..], &[seconds]].concat())
    };
    // Buffers and tables reach their size first.
    churn(scaled("10", "60"))?;
    let before = usages(&net)?;
    let report = churn(scaled("20", "600"))?;
    let expected = |key: &str| report[key].as_f64().unwrap_or(0.0);
    // Whoever the target resets sees a reset; nobody else fails.
    let total = expected("done") + expected("killed") + expected("failed");
    ensure!(expected("failed") <= 0.007 * total && expected("killed") > 0.0, "{report}");
    ensure!(report["errors"].as_object().is_some_and(|errors| errors.len() <= 1), "{report}");
    figure("churn", &report);
    eventually("no flow is left", Duration::from_secs(10), || {
        let left =
            |site: &Site| Ok::<_, anyhow::Error>(site.status()?["routers"][0]["flowsActive"] != 0);
        Ok(!left(&net.branch)? && !left(&net.dc)?)
    })?;
    for ((name, before), (_, after)) in before.into_iter().zip(usages(&net)?) {
        figure(&format!("{name} before and after"), format!("{before:?} {after:?}"));
        ensure!(after.descriptors <= before.descriptors + 4, "{name}: {before:?} {after:?}");
        ensure!(after.rss_kib <= before.rss_kib * 11 / 10 + 2048, "{name}: {before:?} {after:?}");
    }
    Ok(())
}

fn usages(net: &Hub) -> Result<Vec<(String, Usage)>> {
    let mut usages = Vec::new();
    for site in [&net.branch, &net.hub, &net.dc] {
        let processes = site.processes()?;
        usages.push((format!("router of {}", site.name()), site.usage(processes.router)?));
        usages.push((format!("controller of {}", site.name()), site.usage(processes.controller)?));
    }
    Ok(usages)
}
