//! A diamond whose transits fail one at a time, in every way there is: flows go on, byte for byte.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use skein_e2e::faults::{FAULTS, fail, recovered};
use skein_e2e::topology::Diamond;
use skein_e2e::{Site, Usage, figure, flow, scaled, unix_ms};
use skein_lab::{Deadline, Mtu, Profile, Wan};

/// A flow sends fifty times a second, on a busy machine less often: so much before a fault it may have heard the last before a stall.
const STALL_BEGINS_BEFORE_MS: u64 = 100;

#[test]
fn flows_survive_transits_failing_one_at_a_time() -> Result<()> {
    let seed = seed()?;
    let net = Diamond::new()?;
    let _server = flow::serve(net.b.host(), 7500, &[])?;
    net.b.expose("chaos", 7500, &[])?;
    let to = net.a.endpoint("chaos", 7500)?;
    let flows = flow::start_open(net.a.host(), to, 200, &["--rate", "5000"])?;
    let probes = flow::start(net.a.host(), "probe", to, &["--interval-ms", "50"])?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut rounds = Vec::new();
    for round in 0..scaled(8, 100) {
        let transit = &net.transits[rng.random_range(0..2)];
        let fault = *FAULTS.choose(&mut rng).context("invariant: there are faults")?;
        rounds.push((unix_ms(), format!("round {round}: {fault:?} of {}", transit.name())));
        fail(&net, transit, fault).with_context(|| format!("round {round}: {fault:?}"))?;
        recovered(&net).with_context(|| format!("after round {round}: {fault:?}"))?;
    }
    let flows = flow::stop(flows)?;
    report(&flows, &flow::stop(probes)?);
    figure("the longest stall", longest_stall(&flows, &rounds).unwrap_or_default());
    flow::clean(&flows)?;
    ensure!(flows["flows"] == 200, "{flows}");
    Ok(())
}

/// Of everything that is drawn.
fn seed() -> Result<u64> {
    let seed = match std::env::var("SKEIN_SEED") {
        Ok(seed) => seed.parse().context("SKEIN_SEED")?,
        Err(_) => StdRng::from_os_rng().random(),
    };
    figure("chaos seed (SKEIN_SEED repeats it)", seed);
    Ok(seed)
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

/// How long it was, and what befell the network when it began or just before.
fn longest_stall(flows: &Value, rounds: &[(u64, String)]) -> Option<String> {
    let start_ms = flows["start_unix_ms"].as_u64()?;
    let gaps = flows["gaps"].as_array()?;
    let longest = gaps.iter().max_by_key(|gap| gap["length_ms"].as_u64())?;
    let (flow, length_ms) = (longest["flow"].as_u64()?, longest["length_ms"].as_u64()?);
    let began_ms = start_ms + longest["at_ms"].as_u64()?;
    let fault = rounds.iter().rfind(|(at_ms, _)| *at_ms <= began_ms + STALL_BEGINS_BEFORE_MS);
    let after = fault.map_or_else(
        || "before the first round".to_owned(),
        |(at_ms, what)| {
            let since_ms = i128::from(began_ms) - i128::from(*at_ms);
            format!("{since_ms} ms after the beginning of {what}")
        },
    );
    Some(format!("{length_ms} ms of flow {flow}, {after}"))
}

/// What befalls the network in a storm, besides the faults of its transits.
#[derive(Clone, Copy, Debug)]
enum Weather {
    /// A transit fails.
    Fault,
    /// Links of a leaf have to go over TLS, and back.
    WithoutUdp,
    /// Packets are delayed and some lost.
    Lossy,
    /// Packets get smaller, and senders may not be told.
    Narrow,
}

const WEATHERS: [Weather; 4] =
    [Weather::Fault, Weather::WithoutUdp, Weather::Lossy, Weather::Narrow];
/// A link that has lost UDP is up over TLS long before, as is one whose packets shrank.
const WEATHER_LASTS: Duration = Duration::from_secs(5);

#[test]
fn flows_and_datagrams_survive_a_storm() -> Result<()> {
    let seed = seed()?;
    let (net, wans) = Diamond::behind_wans(seed)?;
    let _servers =
        (flow::serve(net.b.host(), 7550, &[])?, flow::serve_datagrams(net.b.host(), 7551)?);
    net.b.expose("storm", 7550, &[])?;
    net.b.expose("spray", 7551, &["--protocol", "udp"])?;
    let to = net.a.endpoint("storm", 7550)?;
    let flows = flow::start_open(net.a.host(), to, 100, &["--rate", "5000"])?;
    let to = net.a.endpoint_of("spray", 7551, "udp")?;
    let args = ["--flows", "20", "--rate", "50", "--sizes", "200,1420,4000"];
    let datagrams = flow::start(net.a.host(), "udp-duplex", to, &args)?;
    let mut rng = StdRng::seed_from_u64(seed);
    // Buffers and tables reach their size first.
    let mut before = None;
    let end = Deadline::after(Duration::from_secs(scaled(40, 1_800)));
    let grown = Deadline::after(Duration::from_secs(scaled(10, 120)));
    let mut rounds = 0;
    while !end.passed() {
        let weather = *WEATHERS.choose(&mut rng).context("invariant: there is weather")?;
        let what = format!("round {rounds}: {weather:?}");
        blow(&net, &wans[rng.random_range(0..2)], weather, &mut rng)
            .with_context(|| what.clone())?;
        recovered(&net).with_context(|| format!("after {what}"))?;
        rounds += 1;
        if before.is_none() && grown.passed() {
            before = Some(usages(&net)?);
        }
    }
    let after = usages(&net)?;
    for site in [&net.a, &net.b] {
        let dropped = site.metrics("skein_datagrams_dropped_total")?;
        figure(&format!("datagrams dropped at {}", site.name()), dropped.join(" "));
    }
    figure("rounds of the storm", rounds);
    let (flows, datagrams) = (flow::stop(flows)?, flow::stop(datagrams)?);
    figure("flows", &flows["flows"]);
    figure("datagrams", &datagrams);
    for ((name, before), (_, after)) in before.context("too short")?.into_iter().zip(after) {
        figure(&format!("{name} before and after"), format!("{before:?} {after:?}"));
        ensure!(after.descriptors <= before.descriptors + 8, "{name}: {before:?} {after:?}");
        ensure!(after.rss_kib <= before.rss_kib * 5 / 4 + 8_192, "{name}: {before:?} {after:?}");
    }
    flow::clean(&flows)?;
    ensure!(flows["flows"] == 100 && datagrams["flows"] == 20, "{flows} {datagrams}");
    ensure!(datagrams["wrong"] == 0, "{datagrams}");
    ensure!(datagrams["received_min"].as_u64() > Some(0), "{datagrams}");
    Ok(())
}

/// Lets the weather last, and be fair again.
fn blow(net: &Diamond, wan: &Wan, weather: Weather, rng: &mut StdRng) -> Result<()> {
    let profile = match weather {
        Weather::Fault => {
            let transit = &net.transits[rng.random_range(0..2)];
            let fault = *FAULTS.choose(rng).context("invariant: there are faults")?;
            return fail(net, transit, fault).with_context(|| format!("{fault:?}"));
        }
        Weather::WithoutUdp => Profile { block_udp: true, ..Profile::default() },
        Weather::Lossy => Profile {
            jitter: Duration::from_millis(rng.random_range(0..10)),
            ..Profile::lossy(
                Duration::from_millis(rng.random_range(1..60)),
                rng.random_range(0.0..0.03),
            )
        },
        Weather::Narrow => {
            let mtu = Mtu { bytes: rng.random_range(1_280..1_500), is_told: rng.random() };
            Profile { mtu: Some(mtu), ..Profile::default() }
        }
    };
    wan.set(&profile);
    std::thread::sleep(WEATHER_LASTS);
    wan.set(&Profile::default());
    Ok(())
}

/// What the routers of the leaves hold: those of the transits are others after a fault.
fn usages(net: &Diamond) -> Result<Vec<(String, Usage)>> {
    [&net.a, &net.b]
        .into_iter()
        .map(|site| {
            let name = format!("router of {}", site.name());
            Ok((name, site.usage(site.processes()?.router)?))
        })
        .collect()
}

#[test]
fn without_any_path_flows_wait_and_then_go_on_or_are_reset() -> Result<()> {
    let net = Diamond::new()?;
    let _server = flow::serve(net.b.host(), 7600, &[])?;
    net.b.expose("paths", 7600, &[])?;
    let to = net.a.endpoint("paths", 7600)?;

    let waiting = flow::start_open(net.a.host(), to, 20, &["--rate", "5000"])?;
    isolate(&net, true)?;
    std::thread::sleep(Duration::from_secs(10));
    isolate(&net, false)?;
    recovered(&net)?;
    carries(&net.a, net.a.endpoint("paths", 7600)?)?;
    flow::clean(&flow::stop(waiting)?)?;

    let doomed = flow::start_open(net.a.host(), to, 20, &["--rate", "5000"])?;
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
