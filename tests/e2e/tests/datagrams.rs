//! UDP services with real programs: directly linked and through a transit.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use skein_e2e::faults::recovered;
use skein_e2e::topology::{Diamond, Hub};
use skein_e2e::{Shown, Site, figure, flow, scaled, servers};
use skein_lab::{Host, Process, Signal, eventually};

/// A TXT record of several kilobytes, which no DNS client takes over plain UDP.
const BIG_LEN: usize = 3_000;

/// What `dig` prints of a question.
fn dig(host: &Host, at: SocketAddr, question: &[&str]) -> Result<String> {
    let server = [format!("@{}", at.ip()), "-p".into(), at.port().to_string()];
    let dig = host.command("dig").args(server).args(question);
    Ok(dig.args(["+time=3", "+tries=3"]).check()?.stdout)
}

#[test]
fn dns_over_both_protocols_of_one_port() -> Result<()> {
    let net = Hub::new()?;
    let _server = servers::dnsmasq(net.dc.host(), 5353, BIG_LEN)?;
    net.dc
        .skctl(&["expose", "dns", "--port", "53:5353/udp", "--port", "53:5353/tcp"])
        .check()
        .map(drop)?;
    // The hub is linked to the service's site, the branch behind it is not.
    for site in [&net.hub, &net.branch] {
        let udp = site.endpoint_of("dns", 53, "udp")?;
        ensure!(udp == site.endpoint_of("dns", 53, "tcp")?, "one number for both");
        let host = site.host();
        let short = dig(host, udp, &["host.example", "A", "+short"])?;
        ensure!(short.trim() == "192.0.2.7", "{short}");
        let cut = dig(host, udp, &["big.example", "TXT", "+noedns", "+ignore"])?;
        ensure!(cut.lines().any(|line| line.contains("flags:") && line.contains(" tc")), "{cut}");
        let whole = dig(host, udp, &["big.example", "TXT", "+noedns"])?;
        ensure!(whole.contains("(TCP)") && whole.len() > BIG_LEN, "{whole}");
        let large = dig(host, udp, &["big.example", "TXT", "+bufsize=4096", "+ignore"])?;
        ensure!(large.contains("(UDP)") && large.len() > BIG_LEN, "{large}");
        for _ in 0..scaled(20, 500) {
            // Each from a port of its own.
            let short = dig(host, udp, &["host.example", "A", "+short"])?;
            ensure!(short.trim() == "192.0.2.7", "{short}");
        }
        let trace = site.skctl(&["trace", "dns:53/udp"]).check()?.stdout;
        ensure!(trace.contains("dc"), "{trace}");
    }
    // Listening on every address, it answers from the one that was asked: dig takes no other answer.
    net.branch.skctl(&["listen", "dns", "--host", "0.0.0.0", "--port", "53:5300/udp"]).check()?;
    let at = SocketAddr::new(net.branch.host().address().into(), 5300);
    let short = dig(net.branch.host(), at, &["host.example", "A", "+short"])?;
    ensure!(short.trim() == "192.0.2.7", "{short}");
    let services = net.branch.skctl(&["service", "list"]).check()?.stdout;
    ensure!(services.contains("53/udp"), "{services}");
    let doctor = net.dc.skctl(&["doctor"]).run()?.stdout;
    ensure!(doctor.contains("cannot be checked"), "{doctor}");
    Ok(())
}

#[test]
fn http_3_over_a_client_and_server_of_others() -> Result<()> {
    let net = Hub::new()?;
    let (_server, root) = servers::gtlsserver(net.dc.host(), 4433)?;
    let bytes: Vec<u8> = (0..8_u32 << 20).map(|i| i.to_be_bytes()[(i % 3) as usize + 1]).collect();
    std::fs::write(root.join("large"), &bytes)?;
    net.dc.expose("h3", 4433, &["--protocol", "udp"])?;
    for site in [&net.hub, &net.branch] {
        let to = site.endpoint_of("h3", 4433, "udp")?;
        let into = site.host().dir().join("h3");
        std::fs::create_dir_all(&into)?;
        download(site.host(), to, &into)?;
        ensure!(std::fs::read(into.join("large"))? == bytes, "damaged at {}", site.name());
    }
    Ok(())
}

fn download(host: &Host, from: SocketAddr, into: &Path) -> Result<()> {
    let client = host
        .command("gtlsclient")
        .args(["-q", "--no-quic-dump", "--no-http-dump", "--exit-on-all-streams-close"])
        .arg(format!("--download={}", into.display()))
        .args([from.ip().to_string(), from.port().to_string()])
        .arg(format!("https://{from}/large"));
    client.timeout(Duration::from_secs(120)).check().map(drop)
}

/// Long enough to see what a stream of datagrams meets.
fn let_it_stream() {
    std::thread::sleep(Duration::from_secs(scaled(6, 60)));
}

/// What a stream of datagrams sees in a few seconds.
fn stream(host: &Host, to: SocketAddr, args: &[&str]) -> Result<Value> {
    let running = flow::start(host, "udp-duplex", to, args)?;
    let_it_stream();
    flow::stop(running)
}

/// The same stream to several places at once.
struct Beside<'a> {
    from: &'a Host,
    /// The first one is what the others are compared with.
    ways: [(&'a str, SocketAddr); 3],
}

/// More than one in ten of the first way: the machine is too busy to tell.
const TOO_BUSY: f64 = 0.1;
/// That one way loses more than the first one: a share of what was sent, and of few as many.
const MORE_SHARE: f64 = 0.01;
const MORE_COUNT: f64 = 2.0;

impl Beside<'_> {
    /// Whether no way loses noticeably more datagrams than the first one, which shares with them what the machine does meanwhile.
    fn is_carried(&self, kind: &str, rate: u64, size: u64) -> Result<bool> {
        let args = ["--rate", &rate.to_string(), "--sizes", &size.to_string()];
        let running = self.ways.map(|(_, to)| flow::start(self.from, "udp-duplex", to, &args));
        let running: Vec<_> = running.into_iter().collect::<Result<_>>()?;
        let_it_stream();
        running.iter().try_for_each(Process::terminate)?;
        let mut counts = Vec::new();
        for ((way, _), running) in self.ways.into_iter().zip(running) {
            let seen = flow::finish(running)?;
            figure(&format!("datagrams {kind}, {rate}/s, {way}"), &seen);
            ensure!(seen["wrong"] == 0 && seen["duplicates"] == 0, "{way}: {seen}");
            let (sent, lost) = (seen["sent"].as_f64(), seen["lost"].as_f64());
            let (sent, lost) = sent.zip(lost).with_context(|| seen.to_string())?;
            ensure!(sent > 0.0, "{way}: {seen}");
            counts.push((sent, lost));
        }
        let share = counts[0].1 / counts[0].0;
        let is_alike =
            |(sent, lost): &(f64, f64)| lost - sent * share <= (sent * MORE_SHARE).max(MORE_COUNT);
        Ok(share < TOO_BUSY && counts.iter().all(is_alike))
    }
}

#[test]
fn steady_streams_beside_the_same_without_skein() -> Result<()> {
    let _alone = skein_lab::alone();
    let net = Hub::new()?;
    let mut servers = Vec::new();
    for site in [&net.hub, &net.dc] {
        // On every address, so that the branch reaches the hub's without Skein.
        servers.push(flow::serve_datagrams(site.host(), 7600)?);
    }
    net.hub.expose("direct", 7600, &["--protocol", "udp"])?;
    net.dc.expose("transit", 7600, &["--protocol", "udp"])?;
    let plain = SocketAddr::new(net.hub.host().address().into(), 7600);
    let direct = net.branch.endpoint_of("direct", 7600, "udp")?;
    let transit = net.branch.endpoint_of("transit", 7600, "udp")?;
    let ways = [("without Skein", plain), ("direct", direct), ("one transit", transit)];
    let beside = Beside { from: net.branch.host(), ways };
    for (kind, rate, size) in [("like WireGuard", 500, 1_420), ("like RTP", 50, 200)] {
        // The kernel carries the first stream, processes the others: a machine that is too busy for them is asked for less. Who loses
        // datagrams by himself loses as large a share of few as of many.
        let mut rates = [rate, rate / 2, rate / 4, rate / 8].into_iter();
        let is_carried = |rate| beside.is_carried(kind, rate, size);
        while !is_carried(rates.next().with_context(|| format!("{kind}: lost at every rate"))?)? {}
    }
    Ok(())
}

#[test]
fn the_largest_and_the_smallest_datagrams_arrive_whole() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve_datagrams(net.dc.host(), 7610)?;
    net.dc.expose("sizes", 7610, &["--protocol", "udp"])?;
    let to = net.branch.endpoint_of("sizes", 7610, "udp")?;
    let sizes = "52,200,1200,1420,1472,3000,9000,65507";
    // As above: fewer are asked for where the machine is too busy. Of a size that is not carried more are lost at every rate.
    for rate in ["40", "20", "10"] {
        let seen = stream(net.branch.host(), to, &["--rate", rate, "--sizes", sizes])?;
        figure(&format!("datagrams of 52 to 65,507 bytes, {rate}/s"), &seen);
        ensure!(seen["wrong"] == 0 && seen["received"].as_u64() > Some(0), "{seen}");
        if seen["lost"].as_u64() <= Some(2) {
            return Ok(());
        }
    }
    bail!("some are lost at every rate");
}

#[test]
fn ten_thousand_associations_are_held() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve_datagrams(net.dc.host(), 7620)?;
    net.dc.expose("many", 7620, &["--protocol", "udp", "--idle-timeout", "10m"])?;
    let router = net.dc.processes()?.router;
    let before = net.dc.usage(router)?.rss_kib;
    // From two sites: one alone has no more than three quarters of the files that flows may have, which need not be 10,000.
    let hold = |site: &Site, seed| {
        let to = site.endpoint_of("many", 7620, "udp")?;
        let args = ["--flows", "5000", "--seed", seed];
        let holding = flow::start(site.host(), "udp-hold", to, &args)?;
        holding.wait_for("holding", Duration::from_secs(120))?;
        Ok::<_, anyhow::Error>(holding)
    };
    let holding = [hold(&net.branch, "1")?, hold(&net.hub, "2")?];
    ensure!(net.dc.metric("skein_associations")? >= 10_000.0);
    let promised = net.dc.metric("skein_memory_used_bytes")?;
    figure("budget of 10,000 associations at their egress, MiB", promised / 1_048_576.0);
    let grown = net.dc.usage(router)?.rss_kib.saturating_sub(before) / 1024;
    figure("memory of 10,000 associations at their egress, MiB", grown);
    ensure!(grown < 400, "{grown} MiB");
    for holding in holding {
        let seen = flow::stop(holding)?;
        figure("5,000 associations of one site", &seen);
        ensure!(seen["answered"] == 5_000, "{seen}");
    }
    Ok(())
}

/// Long enough for the flood of a router's restart to be over.
const OUTAGE_MAX: Duration = Duration::from_secs(3);
/// Whatever streams then has something to show for it.
const STREAM_FOR: Duration = Duration::from_secs(2);

#[test]
fn streams_go_on_when_a_transit_dies() -> Result<()> {
    let net = Diamond::new()?;
    let _server = flow::serve_datagrams(net.b.host(), 7630)?;
    net.b.expose("moved", 7630, &["--protocol", "udp"])?;
    let to = net.a.endpoint_of("moved", 7630, "udp")?;
    let args = ["--flows", "20", "--rate", "50", "--sizes", "200,1420,4000"];
    let running = flow::start(net.a.host(), "udp-duplex", to, &args)?;
    let opened = || net.b.metric("skein_flows_opened_total");
    eventually("the streams run", Duration::from_secs(10), || Ok(opened()? >= 20.0))?;
    let before = opened()?;
    let mut outage_max = OUTAGE_MAX;
    for transit in &net.transits {
        outage_max = outage_max.max(kill(&net, transit)?.extended(OUTAGE_MAX));
    }
    std::thread::sleep(STREAM_FOR);
    ensure!(opened()? <= before, "associations were opened anew");
    let seen = flow::stop(running)?;
    figure("20 streams while two transits die, one after the other", &seen);
    ensure!(seen["wrong"] == 0 && seen["flows"] == 20, "{seen}");
    ensure!(seen["received_min"].as_u64() > Some(0), "{seen}");
    let silence = |name: &str| seen[name].as_u64().map(Duration::from_millis).context("a silence");
    ensure!(silence("gap_max_ms")? < outage_max, "{outage_max:?} {seen}");
    ensure!(silence("last_gap_max_ms")? < STREAM_FOR, "silent at the end: {seen}");
    Ok(())
}

/// Kills a transit's router and waits until all links are up again.
fn kill(net: &Diamond, transit: &Site) -> Result<Shown> {
    let router = transit.processes()?.router;
    transit.host().signal(router, Signal::Kill)?;
    let ask = || net.a.status();
    let shown = Shown::watch("a new router", Duration::from_secs(20), ask, |_| {
        Ok(transit.processes()?.router != router)
    })?;
    recovered(net)?;
    Ok(shown)
}

/// Bytes of one flow that sends as fast as it goes.
fn bulk(host: &Host, to: SocketAddr) -> Result<u64> {
    let seen = flow::run(host, "bulk", to, &["--flows", "1", "--seconds", "5"])?;
    ensure!(seen["wrong"] == 0 && seen["failed"] == 0, "{seen}");
    seen["bytes"].as_u64().with_context(|| seen.to_string())
}

#[test]
fn a_flood_over_a_narrow_path_leaves_room_for_the_rest() -> Result<()> {
    let net = Hub::new()?;
    let host = net.branch.host();
    let gateway = host.gateway().context("behind a NAT")?;
    gateway.limit(&net.internet, 20)?;
    let _datagrams = flow::serve_datagrams(net.hub.host(), 7650)?;
    let _streams = flow::serve(net.hub.host(), 7651, &[])?;
    net.hub.expose("flooded", 7650, &["--protocol", "udp"])?;
    net.hub.expose("stream", 7651, &[])?;
    let to = net.branch.endpoint_of("flooded", 7650, "udp")?;
    let stream_to = net.branch.endpoint("stream", 7651)?;
    let alone = bulk(host, stream_to)?;
    // Almost three times what the path takes.
    let flood = flow::start(host, "udp-duplex", to, &["--rate", "5000", "--sizes", "1300"])?;
    std::thread::sleep(Duration::from_secs(3));
    let beside = bulk(host, stream_to)?;
    figure("a stream beside a flood of datagrams, KB of KB alone", {
        format!("{} of {}", beside / 1_000, alone / 1_000)
    });
    ensure!(beside * 8 > alone, "{beside} of {alone}");
    // Associations of the same session, one after the other: each needs its open to get through.
    let holding = flow::start(host, "udp-hold", to, &["--flows", "20", "--seed", "2"])?;
    holding.wait_for("holding", Duration::from_secs(60))?;
    figure("20 associations beside a flood", flow::stop(holding)?);
    let args = ["--rate", "50", "--sizes", "200", "--seed", "3"];
    let voice = stream(host, to, &args)?;
    figure("datagrams like RTP beside a flood", &voice);
    ensure!(voice["wrong"] == 0 && voice["received"].as_u64() > Some(100), "{voice}");
    let seen = flow::stop(flood)?;
    figure("the flood itself", &seen);
    ensure!(seen["wrong"] == 0 && seen["lost"].as_u64() > Some(0), "no flood: {seen}");
    ensure!(net.branch.metric("skein_datagrams_dropped_total")? > 0.0, "every drop is counted");
    Ok(())
}

#[test]
fn what_does_not_fit_datagrams_is_refused() -> Result<()> {
    let net = Hub::new()?;
    let args = ["expose", "dns", "--port", "53/udp", "--proxy-protocol", "v2"];
    net.hub.refuses(&args, 2, &["proxyProtocol", "udp"])?;
    net.hub.refuses(&["expose", "dns", "--port", "53/sctp"], 2, &["tcp and udp"])?;
    net.dc.expose("quiet", 7640, &["--protocol", "udp"])?;
    let to = net.branch.endpoint_of("quiet", 7640, "udp")?;
    // Nobody listens there: that is heard and told.
    let server = [format!("@{}", to.ip()), "-p".into(), to.port().to_string()];
    let asked = net.branch.host().command("dig").args(server).args(["x", "+time=1", "+tries=1"]);
    ensure!(asked.run()?.code != Some(0), "nobody can have answered");
    let told = || Ok(net.dc.skctl(&["doctor"]).run()?.stdout.contains("refused the last datagram"));
    eventually("doctor tells of the refusal", Duration::from_secs(10), told).map(drop)
}
