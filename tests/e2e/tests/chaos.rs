//! A diamond whose transits fail one at a time, in every way there is: flows go on, byte for byte.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use skein_e2e::topology::Diamond;
use skein_e2e::{Site, figure, flow, scaled};
use skein_lab::{Host, Signal, eventually};

/// How a transit fails.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Reboot,
    Freeze,
    Cut,
    CutTowards,
    CutFrom,
}

const FAULTS: [Fault; 6] =
    [Fault::Kill, Fault::Reboot, Fault::Freeze, Fault::Cut, Fault::CutTowards, Fault::CutFrom];

#[test]
fn flows_survive_transits_failing_one_at_a_time() -> Result<()> {
    let seed = match std::env::var("SKEIN_SEED") {
        Ok(seed) => seed.parse().context("SKEIN_SEED")?,
        Err(_) => StdRng::from_os_rng().random(),
    };
    figure("chaos seed (SKEIN_SEED repeats it)", seed);
    let net = Diamond::new()?;
    let _server = flow::serve(net.b.host(), 7500, &[])?;
    net.b.expose("chaos", 7500, &[])?;
    let to = net.a.endpoint("chaos", 7500)?;
    let flows = flow::start(net.a.host(), "duplex", to, &["--flows", "200", "--rate", "5000"])?;
    let probes = flow::start(net.a.host(), "probe", to, &["--interval-ms", "50"])?;
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..scaled(8, 100) {
        let transit = &net.transits[rng.random_range(0..2)];
        let fault = *FAULTS.choose(&mut rng).context("invariant: there are faults")?;
        fail(&net, transit, fault).with_context(|| format!("round {round}: {fault:?}"))?;
        recovered(&net).with_context(|| format!("after round {round}: {fault:?}"))?;
    }
    let flows = flow::stop(flows)?;
    report(&flows, &flow::stop(probes)?);
    ensure!(flows["failed"] == 0 && flows["wrong"] == 0 && flows["truncated"] == 0, "{flows}");
    ensure!(flows["flows"] == 200, "{flows}");
    Ok(())
}

/// Lets a transit fail for as long as everybody needs to notice, and undoes it.
fn fail(net: &Diamond, transit: &Site, fault: Fault) -> Result<()> {
    let outage = Duration::from_millis(1500);
    let host = transit.host();
    let cut = |from: &Host, to: &Host| -> Result<()> {
        net.lab.cut_one_way(from, to)?;
        std::thread::sleep(outage);
        net.lab.heal(from, to)
    };
    match fault {
        Fault::Kill => {
            let before = transit.processes()?.router;
            host.signal(before, Signal::Kill)?;
            // Until then everybody may still believe in the old one.
            eventually("a new router", Duration::from_secs(20), || {
                Ok(transit.processes()?.router != before)
            })
            .map(drop)
        }
        Fault::Reboot => {
            host.power_cut()?;
            transit.skctl(&["start"]).check().map(drop)
        }
        Fault::Freeze => {
            transit.signal_router(Signal::Freeze)?;
            std::thread::sleep(outage);
            let listing = host.command("sh").args(["-c", "kill -CONT -1"]).run()?;
            ensure!(listing.code == Some(0), "{listing}");
            Ok(())
        }
        Fault::Cut => {
            net.lab.cut(net.a.host(), host)?;
            net.lab.cut(net.b.host(), host)?;
            std::thread::sleep(outage);
            net.lab.heal(net.a.host(), host)?;
            net.lab.heal(net.b.host(), host)
        }
        Fault::CutTowards => cut(net.a.host(), host),
        Fault::CutFrom => cut(host, net.b.host()),
    }
}

/// The next transit may fail only when the last one carries again.
fn recovered(net: &Diamond) -> Result<()> {
    net.a.wait_links_up(2)?;
    net.b.wait_links_up(2)?;
    for transit in &net.transits {
        transit.wait_links_up(3)?;
    }
    Ok(())
}

fn report(flows: &Value, probes: &Value) {
    let gaps = flows["gaps"].as_array().into_iter().flatten();
    let mut stalls: Vec<_> = gaps.filter_map(|gap| gap["length_ms"].as_u64()).collect();
    stalls.sort_unstable();
    let percentile = |p: usize| stalls.get(stalls.len() * p / 100).or_else(|| stalls.last());
    figure("stalls over 100 ms", stalls.len());
    figure("stall p50, ms", percentile(50).unwrap_or(&0));
    figure("stall p99, ms", percentile(99).unwrap_or(&0));
    figure("stall max, ms", stalls.last().unwrap_or(&0));
    for name in ["probes", "ok", "errors", "outage_max_ms", "p50_ms", "p99_ms", "max_ms"] {
        figure(&format!("new connections, {name}"), &probes[name]);
    }
}

#[test]
fn without_any_path_flows_wait_and_then_go_on_or_are_reset() -> Result<()> {
    let net = Diamond::new()?;
    let _server = flow::serve(net.b.host(), 7600, &[])?;
    net.b.expose("paths", 7600, &[])?;
    let to = net.a.endpoint("paths", 7600)?;

    let waiting = flow::start(net.a.host(), "duplex", to, &["--flows", "20", "--rate", "5000"])?;
    carries(&net.a, to)?;
    isolate(&net, true)?;
    std::thread::sleep(Duration::from_secs(10));
    isolate(&net, false)?;
    recovered(&net)?;
    carries(&net.a, net.a.endpoint("paths", 7600)?)?;
    let report = flow::stop(waiting)?;
    ensure!(report["failed"] == 0 && report["wrong"] == 0 && report["truncated"] == 0, "{report}");

    let doomed = flow::start(net.a.host(), "duplex", to, &["--flows", "20", "--rate", "5000"])?;
    carries(&net.a, to)?;
    isolate(&net, true)?;
    std::thread::sleep(Duration::from_secs(40));
    let report = flow::stop(doomed)?;
    ensure!(report["failed"] == 20 && report["truncated"] == 0 && report["wrong"] == 0, "{report}");
    let errors = report["errors"].to_string();
    ensure!(!errors.contains("eof"), "a flow ended as if it were complete: {errors}");
    Ok(())
}

fn isolate(net: &Diamond, on: bool) -> Result<()> {
    for transit in &net.transits {
        if on {
            net.lab.cut(net.a.host(), transit.host())?;
        } else {
            net.lab.heal(net.a.host(), transit.host())?;
        }
    }
    Ok(())
}

fn carries(site: &Site, to: SocketAddr) -> Result<()> {
    let report = flow::run(site.host(), "probe", to, &["--count", "1"])?;
    ensure!(report["ok"] == 1, "{report}");
    Ok(())
}
