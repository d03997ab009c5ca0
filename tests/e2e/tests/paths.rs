//! What flows make of a path, beside the kernel's TCP which a proxy passes on over the same one. The choice of congestion control rests on
//! the figures of the long run (ADR 12):
//!
//! ```text
//! SKEIN_LONG=1 cargo test --release -p skein-e2e --test paths -- --test-threads=1 --nocapture
//! ```
//!
//! Figures are printed and not judged: they are the machine's as well. What is judged is that every byte arrives as it was sent, over the
//! path and by the way that are meant.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::flow::clean;
use skein_e2e::topology::Away;
use skein_e2e::{Site, figure, flow, scaled, servers};
use skein_lab::{Counters, Direction, Host, Lab, Loss, Process, Profile, Rate, alone, eventually};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A longer way is known within this: it may cost the link, which is then made anew.
const KNOWN_MAX: Duration = Duration::from_secs(30);

/// Of targets and endpoints. All flows go towards the branch, so that what is queued at their end is not waited for.
const SKEIN: u16 = 8500;
const PLAIN: u16 = 8501;
const PROXY: u16 = 8502;
const DATAGRAMS: u16 = 8503;

/// 50 ms at this rate.
const LONG_QUEUE_BYTES: u64 = 312_500;
const BITS_PER_SECOND: u64 = 50_000_000;

/// How bytes get from the hub to the branch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Skein,
    /// Through a second site of the branch's host, which has sessions of its own.
    SecondSkein,
    /// Through a proxy, with this congestion control of the kernel.
    Tcp(&'static str),
}

const ALL: [Way; 3] = [Way::Skein, Way::Tcp("bbr"), Way::Tcp("cubic")];

impl Way {
    /// Whether it can be gone here, and said if not. Elsewhere than in the machine's own network the kernel uses nothing but what is in
    /// `net.ipv4.tcp_allowed_congestion_control`.
    fn is_open(self) -> bool {
        let Self::Tcp(control) = self else { return true };
        let allowed = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
        let is_open = allowed.is_ok_and(|all| all.split_whitespace().any(|one| one == control));
        if !is_open {
            figure(&format!("{self:?}"), "net.ipv4.tcp_allowed_congestion_control is without it");
        }
        is_open
    }
}

/// A hub with targets, a branch behind a WAN box with ways to them.
struct Paths {
    net: Away,
    second: Option<Site>,
    _processes: [Process; 4],
}

/// What has been counted so far.
struct Seen {
    down: Counters,
    /// Flows at the hub's router.
    flows: f64,
    /// Since when the link is up, over UDP.
    since: Value,
}

impl Paths {
    fn new(profile: &Profile) -> Result<Self> {
        let paths = Self::short()?;
        paths.set(profile)?;
        Ok(paths)
    }

    fn with_second(profile: &Profile) -> Result<Self> {
        let mut paths = Self::short()?;
        let second = Site::init_in(paths.net.branch.host(), "second", &["--no-listen"])?;
        second.link_to(&paths.net.hub, &[])?;
        second.wait_links_up(1)?;
        paths.second = Some(second);
        paths.set(profile)?;
        Ok(paths)
    }

    /// With a WAN box that passes everything at once.
    fn short() -> Result<Self> {
        let net = Away::new(9)?;
        let (hub, host) = (net.hub.host(), net.branch.host());
        let plain = SocketAddr::new(hub.address().into(), PLAIN);
        let processes = [
            flow::serve(hub, SKEIN, &[])?,
            flow::serve_on(hub, plain, &[])?,
            flow::serve_datagrams(hub, DATAGRAMS)?,
            servers::tcp_proxy(host, PROXY, plain)?,
        ];
        net.hub.expose("path", SKEIN, &[])?;
        net.hub.expose("datagrams", DATAGRAMS, &["--protocol", "udp"])?;
        Ok(Self { net, second: None, _processes: processes })
    }

    /// Sets what the WAN box does, and waits until links and sessions know the way.
    fn set(&self, profile: &Profile) -> Result<()> {
        self.net.wan.set(profile);
        let known_us = u64::try_from(profile.delay.as_micros())?;
        let ways = [Way::Skein, Way::SecondSkein];
        for (way, site) in ways.into_iter().zip([&self.net.branch].into_iter().chain(&self.second))
        {
            eventually("the length of the way is known", KNOWN_MAX, || {
                // Under traffic a link is probed more often.
                self.echo(way, 1)?;
                let link = site.first_link()?;
                // Half of the round trip: it is smoothed.
                Ok(link["state"] == "up" && link["rttUs"].as_u64() >= Some(known_us))
            })?;
        }
        Ok(())
    }

    /// Where clients at the branch begin a way.
    fn to(&self, way: Way) -> Result<SocketAddr> {
        match way {
            Way::Skein => self.net.branch.endpoint("path", SKEIN),
            Way::SecondSkein => {
                self.second.as_ref().context("a second site")?.endpoint("path", SKEIN)
            }
            Way::Tcp(control) => {
                // Connections take what is set when they begin.
                let set = format!("net.ipv4.tcp_congestion_control={control}");
                self.net.hub.host().command("sysctl").args(["-w", &set]).check()?;
                Ok(([127, 0, 0, 1], PROXY).into())
            }
        }
    }

    /// A flow as fast as it goes.
    fn bulk(&self, way: Way, seconds: u64) -> Result<Process> {
        let seconds = seconds.to_string();
        let args = ["--direction", "down", "--flows", "1", "--seconds", &seconds];
        flow::start(self.net.branch.host(), "bulk", self.to(way)?, &args)
    }

    /// Round trips of single bytes for a time.
    fn echo(&self, way: Way, seconds: u64) -> Result<Value> {
        let args = ["--seconds", &seconds.to_string()];
        flow::run(self.net.branch.host(), "echo", self.to(way)?, &args)
    }

    fn seen(&self) -> Result<Seen> {
        let flows = self.net.hub.metric("skein_flows_opened_total")?;
        let mut since = Value::Null;
        eventually("a link over UDP", KNOWN_MAX, || {
            let link = self.net.link()?;
            since = link["since"].clone();
            Ok(link["state"] == "up" && link["carrier"] == "udp")
        })?;
        Ok(Seen { down: self.net.wan.counters(Direction::Down), flows, since })
    }

    /// That all that arrived has come over the WAN box, by Skein over UDP or without it as was meant, and that the box did what it was told.
    fn ensure_crossed(&self, before: &Seen, bytes: u64, is_skein: bool) -> Result<Seen> {
        let after = self.seen()?;
        let crossed = after.down.delivered_bytes - before.down.delivered_bytes;
        ensure!(bytes > 0 && crossed >= bytes, "{bytes} bytes arrived, {crossed} crossed");
        let flows = after.flows - before.flows;
        ensure!((flows > 0.0) == is_skein, "{flows} flows at the hub's router");
        ensure!(after.down.unheld == 0, "too much for the WAN box: {:?}", after.down);
        ensure!(after.since == before.since, "the link was lost: {:?}", self.net.link());
        Ok(after)
    }
}

/// What arrived whole.
fn bytes(report: &Value) -> Result<u64> {
    clean(report)?;
    report["bytes"].as_u64().with_context(|| report.to_string())
}

fn narrow(queue_bytes: u64) -> Profile {
    let rate = Rate { bits_per_second: BITS_PER_SECOND, queue_bytes };
    Profile { delay: 10 * MS, rate: Some(rate), ..Profile::default() }
}

/// That a line was the one that is meant: more than it takes cannot have arrived. A tenth more may come out of queues.
fn ensure_within(profile: &Profile, bytes: u64, seconds: u64) -> Result<()> {
    let Some(rate) = profile.rate else { return Ok(()) };
    let most = rate.bits_per_second / 8 * seconds * 11 / 10;
    ensure!(bytes <= most, "{bytes} bytes in {seconds} s are more than {rate:?}");
    Ok(())
}

/// One flow as fast as it goes, by each way alone, and round trips of a second one beside it.
fn measure(name: &str, profile: &Profile, ways: &[Way], seconds: u64) -> Result<()> {
    for &way in ways.iter().filter(|way| way.is_open()) {
        let paths = Paths::new(profile)?;
        let before = paths.seen()?;
        let bulk = paths.bulk(way, seconds)?;
        // By then it has its speed.
        sleep(SECOND);
        let echo = paths.echo(way, seconds.saturating_sub(2).max(1))?;
        let bytes = bytes(&flow::finish(bulk)?)?;
        let after = paths.ensure_crossed(&before, bytes, way == Way::Skein)?;
        ensure_within(profile, bytes, seconds)?;
        let is_lossy = profile.loss != Loss::None;
        ensure!((after.down.lost > before.down.lost) == is_lossy, "{:?}", after.down);
        let received = (after.down.received - before.down.received).max(1);
        let overflowed = (after.down.overflowed - before.down.overflowed) * 1_000 / received;
        figure(
            &format!("{name}, {seconds} s, {way:?}"),
            format!(
                "{} kB/s, {overflowed} of 1,000 packets overflowed, beside it {echo}",
                bytes / 1_000 / seconds
            ),
        );
    }
    Ok(())
}

/// Two flows as fast as they go, by ways of their own.
fn share(name: &str, profile: &Profile, ways: [Way; 2], seconds: u64) -> Result<()> {
    if !ways.into_iter().all(Way::is_open) {
        return Ok(());
    }
    let paths = Paths::with_second(profile)?;
    let before = paths.seen()?;
    let [one, other] = ways.map(|way| paths.bulk(way, seconds));
    let (one, other) = (bytes(&flow::finish(one?)?)?, bytes(&flow::finish(other?)?)?);
    ensure!(one > 0 && other > 0, "{one} and {other} bytes");
    let is_skein = !ways.iter().all(|way| matches!(way, Way::Tcp(_)));
    paths.ensure_crossed(&before, one + other, is_skein)?;
    ensure_within(profile, one + other, seconds)?;
    let [one, other] = [one, other].map(|bytes| bytes / 1_000 / seconds);
    let [this, that] = ways;
    figure(
        &format!("{name}, {seconds} s, {this:?} beside {that:?}"),
        format!("{one} and {other} kB/s"),
    );
    Ok(())
}

#[test]
fn flows_cross_a_lossy_path_whole() -> Result<()> {
    let _alone = alone();
    let (ways, seconds) = scaled((&ALL[..2], 4), (&ALL[..], 8));
    measure("1 %, 50 ms", &Profile::lossy(25 * MS, 0.01), ways, seconds)?;
    if skein_e2e::long() {
        let radio = Profile::lossy(300 * MS, 0.07);
        measure("7 %, 600 ms", &radio, &ALL[..1], 20)?;
        measure("7 %, 600 ms", &radio, &ALL, 60)?;
    }
    Ok(())
}

#[test]
fn flows_fill_and_share_a_narrow_path() -> Result<()> {
    let _alone = alone();
    let queues = [("50 ms of queue", LONG_QUEUE_BYTES), ("2 ms of queue", 12_500)];
    let pairs = [
        [Way::Skein, Way::SecondSkein],
        [Way::Skein, Way::Tcp("cubic")],
        [Way::Skein, Way::Tcp("bbr")],
        [Way::Tcp("cubic"), Way::Tcp("cubic")],
    ];
    for (name, queue_bytes) in &queues[..scaled(1, 2)] {
        let (name, profile) = (format!("50 Mbit/s, 20 ms, {name}"), narrow(*queue_bytes));
        measure(&name, &profile, &ALL[..scaled(1, 3)], scaled(3, 8))?;
        for ways in &pairs[..scaled(1, 4)] {
            share(&name, &profile, *ways, scaled(3, 12))?;
        }
    }
    Ok(())
}

#[test]
fn flows_go_on_when_a_path_becomes_slow() -> Result<()> {
    let _alone = alone();
    let (fast_seconds, slow_seconds) = scaled((2, 3), (4, 10));
    for way in ALL.into_iter().take(scaled(1, 3)).filter(|way| way.is_open()) {
        let paths = Paths::new(&narrow(LONG_QUEUE_BYTES))?;
        let before = paths.seen()?;
        let bulk = paths.bulk(way, fast_seconds + slow_seconds + 1)?;
        sleep(Duration::from_secs(fast_seconds));
        let rate = Rate { bits_per_second: BITS_PER_SECOND / 10, queue_bytes: LONG_QUEUE_BYTES };
        paths.net.wan.change(|profile| profile.rate = Some(rate));
        let fast = paths.net.wan.counters(Direction::Down).delivered_bytes;
        let echo = paths.echo(way, slow_seconds)?;
        let slow = paths.net.wan.counters(Direction::Down).delivered_bytes;
        let report = flow::finish(bulk)?;
        let gap_ms = report["gap_max_ms"].as_u64();
        // One that stands still from then on is silent for longer.
        ensure!(gap_ms.is_some_and(|gap_ms| gap_ms < slow_seconds * 1_000), "{report}");
        paths.ensure_crossed(&before, bytes(&report)?, way == Way::Skein)?;
        figure(
            &format!("50 to 5 Mbit/s, {way:?}"),
            format!("{} bytes in {slow_seconds} s, beside them {echo}", slow - fast),
        );
    }
    Ok(())
}

#[test]
fn datagrams_cross_a_lossy_path() -> Result<()> {
    const SIZE: u64 = 1_200;
    let _alone = alone();
    let paths = Paths::new(&Profile::lossy(25 * MS, 0.01))?;
    let to = paths.net.branch.endpoint_of("datagrams", DATAGRAMS, "udp")?;
    let before = paths.seen()?;
    let args = ["--rate", "1560", "--sizes", &SIZE.to_string()];
    let running = flow::start(paths.net.branch.host(), "udp-duplex", to, &args)?;
    sleep(scaled(3, 12) * SECOND);
    let report = flow::stop(running)?;
    figure("15 Mbit/s of datagrams each way, 1 %, 50 ms", &report);
    ensure!(report["wrong"] == 0 && report["duplicates"] == 0, "{report}");
    let received = report["received"].as_u64().with_context(|| report.to_string())?;
    paths.ensure_crossed(&before, received * SIZE, true).map(drop)
}

/// Sites of one host, each linked to the one before.
fn chain(host: &Host, sites: usize) -> Result<Vec<Site>> {
    let mut chain: Vec<Site> = Vec::new();
    for (name, port) in ["one", "two", "three"].into_iter().zip(7_001..).take(sites) {
        let listen = format!("127.0.0.1:{port}");
        let site = Site::init_in(host, name, &["--advertise", &listen, "--listen", &listen])?;
        if let Some(before) = chain.last() {
            site.link_to(before, &[])?;
            site.wait_links_up(1)?;
        }
        chain.push(site);
    }
    Ok(chain)
}

#[test]
fn flows_between_sites_of_one_host() -> Result<()> {
    let _alone = alone();
    for sites in 2..=scaled(2, 3) {
        let lab = Lab::new()?;
        let host = lab.host("machine")?;
        let chain = chain(&host, sites)?;
        let _server = flow::serve(&host, SKEIN, &[])?;
        chain[0].expose("machine", SKEIN, &[])?;
        let last = chain.last().context("a site")?;
        let to = last.endpoint("machine", SKEIN)?;
        last.wait_link("jumbo frames", 20 * SECOND, |link| link["mtu"].as_u64() >= Some(8_940))?;
        let echo = flow::run(&host, "echo", to, &["--interval-ms", "1", "--seconds", "2"])?;
        figure(&format!("one host, {sites} sites, one byte there and back"), &echo);
        for flows in ["1", "8"] {
            let args = ["--direction", "down", "--flows", flows, "--seconds", scaled("1", "5")];
            let bulk = flow::run(&host, "bulk", to, &args)?;
            clean(&bulk)?;
            ensure!(bulk["bytes_min"].as_u64() > Some(0), "{bulk}");
            figure(&format!("one host, {sites} sites, bytes a second of {flows} flows"), {
                &bulk["bytes_per_s"]
            });
        }
        for site in &chain {
            let flows = site.metric("skein_flows_opened_total")?;
            let is_edge = site.name() == chain[0].name() || site.name() == last.name();
            // The middle one passes frames on, and has no flows.
            ensure!((flows >= 10.0) == is_edge, "{}: {flows} flows", site.name());
        }
    }
    Ok(())
}
