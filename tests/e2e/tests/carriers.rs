//! Where UDP does not get through, and where it comes and goes.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::flow::clean;
use skein_e2e::topology::{internet, reachable};
use skein_e2e::{Processes, Shown, Site, clients, figure, flow, scaled, servers};
use skein_lab::{Command, Lab, Lan, Output, Process, eventually, require_programs};

/// A link is moved to UDP within this.
const MOVE_MAX: Duration = Duration::from_secs(30);
/// A link that has lost UDP is back over TLS within this, as seen from outside.
const RETURN_MAX: Duration = Duration::from_secs(6);
/// The same after which a stream of datagrams goes on.
const SILENCE_MAX: Duration = RETURN_MAX;
/// Nothing here takes this long unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A reachable site, and one behind a NAT that lets no UDP pass.
struct Blocked {
    lab: Lab,
    internet: Lan,
    hub: Site,
    branch: Site,
}

impl Blocked {
    fn new() -> Result<Self> {
        let (lab, internet) = internet()?;
        let hub = reachable(&lab, &internet, "hub")?;
        let host = lab.host_behind_nat("branch", &internet)?;
        host.block_udp(true)?;
        let branch = Site::init(&host, &["--no-listen"])?;
        Ok(Self { lab, internet, hub, branch })
    }

    fn link(&self) -> Result<Value> {
        self.branch.first_link()
    }

    /// Waits until the link is over `carrier`, which must be within `limit`.
    fn wait_carrier(&self, carrier: &str, limit: Duration) -> Result<Shown> {
        let what = format!("a link over {carrier}");
        let shown = self.branch.watch_link(&what, PATIENCE, |link| {
            link["state"] == "up" && link["carrier"] == carrier
        })?;
        ensure!(shown.after < shown.extended(limit), "{what}: {shown:?}");
        Ok(shown)
    }
}

impl Blocked {
    /// PostgreSQL and a download, as applications at the branch see them.
    fn use_real_programs(&self) -> Result<()> {
        if !require_programs(&["pgbench", "psql", "nginx", "curl", "sha256sum"]) {
            return Ok(());
        }
        let (hub, branch) = (self.hub.host(), self.branch.host());
        if !Lab::rootless() {
            let _server = servers::postgres(hub, 5432)?;
            self.hub.expose("postgres", 5432, &[])?;
            let to = self.branch.endpoint("postgres", 5432)?;
            figure("pgbench -c 8 over TLS", clients::pgbench(branch, to, scaled(3, 20))?);
        }
        let (_nginx, dir) = servers::nginx(hub, 8080)?;
        let sum = clients::make_file(hub, &dir, "carried over TLS", scaled(32, 200))?;
        self.hub.expose("files", 8080, &[])?;
        let from = self.branch.endpoint("files", 8080)?;
        let took = eventually("downloaded", Duration::ZERO, || {
            let got = clients::download(branch, from)?;
            ensure!(got == sum, "the checksums differ: {got} {sum}");
            Ok(true)
        })?;
        figure("downloaded over TLS in", format!("{took:?}"));
        Ok(())
    }
}

#[test]
fn without_udp_a_link_works_over_tls_and_moves_when_udp_is_back() -> Result<()> {
    let net = Blocked::new()?;
    net.branch.link_to(&net.hub, &[])?;
    net.branch.wait_links_up(1)?;
    let link = net.link()?;
    ensure!(link["carrier"] == "tls", "{link}");
    let reason = link["carrierReason"].as_str().unwrap_or_default();
    ensure!(reason.starts_with("UDP to ") && reason.ends_with(":7443 unanswered"), "{link}");
    let wide = net.branch.skctl(&["link", "list", "-o", "wide"]).check()?.stdout;
    ensure!(wide.contains(reason), "{wide}");
    let doctor = net.branch.skctl(&["doctor"]).run()?.stdout;
    ensure!(doctor.contains("unanswered") && doctor.contains("TLS over TCP: ok"), "{doctor}");

    let _server = flow::serve(net.hub.host(), 8300, &[])?;
    net.hub.expose("walled", 8300, &[])?;
    let to = net.branch.endpoint("walled", 8300)?;
    let bulk = flow::run(net.branch.host(), "bulk", to, &["--flows", "2", "--seconds", "3"])?;
    clean(&bulk)?;
    figure("bulk over TLS", &bulk);

    let running = flow::start_open(net.branch.host(), to, 100, &[])?;
    net.branch.host().block_udp(false)?;
    let shown = net.wait_carrier("udp", MOVE_MAX)?;
    figure("moved to UDP", format!("{shown:?}"));
    ensure!(net.link()?["carrierReason"] == "", "{:?}", net.link());
    for _ in 0..scaled(1, 20) {
        net.branch.host().block_udp(true)?;
        let shown = net.wait_carrier("tls", RETURN_MAX)?;
        figure("back to TLS", format!("{shown:?}"));
        net.branch.host().block_udp(false)?;
    }
    let report = flow::stop(running)?;
    figure("flows meanwhile", &report);
    clean(&report)
}

/// What the proxy wants to hear, and what nobody else may.
const SECRET: &str = "s3cret-0f-the-proxy";

/// [`Blocked`], where nothing but a proxy leads out.
struct BehindProxy {
    net: Blocked,
    _proxy: Process,
    url: String,
    /// The file with name and password.
    credentials: String,
}

impl BehindProxy {
    fn new() -> Result<Self> {
        let net = Blocked::new()?;
        let host = net.branch.host();
        host.block_outbound("tcp", 7443)?;
        let proxy = net.lab.host("proxy")?;
        let url = format!("http://{}:3128", proxy.join(&net.internet)?);
        let _proxy = servers::tinyproxy(&proxy, 3128, ("branch", SECRET))?;
        let credentials = host.dir().join("credentials").to_str().context("a path")?.to_owned();
        Ok(Self { net, _proxy, url, credentials })
    }

    /// Puts a password into the file.
    fn write(&self, password: &str) -> Result<()> {
        std::fs::write(&self.credentials, format!("branch:{password}\n"))?;
        let private = std::fs::Permissions::from_mode(0o600);
        Ok(std::fs::set_permissions(&self.credentials, private)?)
    }

    /// Links to the hub, after everything that is refused.
    fn link(&self) -> Result<()> {
        let Self { net: Blocked { hub, branch, .. }, url, credentials, .. } = self;
        self.write("wrong")?;
        let token = hub.token("by-proxy", &[])?;
        let token = token.to_str().context("a path")?;
        let in_argv = url.replace("//", "//branch:x@");
        branch.refuses(&["link", token, "--proxy", &in_argv], 2, &["--proxy-credentials"])?;
        branch.refuses(&["link", token, "--proxy", url], 1, &["wants credentials"])?;
        let link = ["link", token, "--proxy", url, "--proxy-credentials", credentials];
        branch.refuses(&link, 1, &["refuses the credentials"])?;
        self.write(SECRET)?;
        branch.skctl(&link).check()?;
        self.net.wait_carrier("tls", RETURN_MAX)?;
        let link = self.net.link()?;
        let reason = link["carrierReason"].as_str().unwrap_or_default();
        let through = format!("unanswered, through the proxy {url}");
        ensure!(reason.ends_with(&through), "{link}");
        ensure!(link["remote"] == format!("{}:7443", hub.host().address()), "{link}");
        let doctor = branch.skctl(&["doctor"]).run()?.stdout;
        ensure!(doctor.contains("TLS over TCP: ok"), "{doctor}");
        Ok(())
    }

    fn skctl_init(&self) -> Command {
        self.net.branch.skctl(&["init", self.net.branch.name(), "--service", "none"])
    }

    /// The same from the environment, whose password is kept in a file of the site's. Not while the site has a proxy: it is for another.
    fn take_from_the_environment(&self) -> Result<()> {
        let Blocked { branch, .. } = &self.net;
        let host = branch.host();
        let kept =
            || host.command("find").arg(host.dir()).args(["-name", "proxy-credentials"]).run();
        self.skctl_init().env("HTTPS_PROXY", "http://me:x@192.0.2.1:1").check()?;
        ensure!(kept()?.stdout.is_empty(), "a password for another proxy was kept");
        self.skctl_init().args(["--proxy", "none"]).check()?;
        ensure!(branch.json(&["get", "site"])?.to_string().find("3128").is_none());
        host.block_udp(true)?;
        let in_environment = self.url.replace("//", &format!("//branch:{SECRET}@"));
        self.skctl_init().env("HTTPS_PROXY", &in_environment).check()?;
        self.net.wait_carrier("tls", MOVE_MAX)?;
        ensure!(self.secrets()? == 1, "the password is not kept");
        // Nor is it in what others may read of the processes, also of those that are started with it.
        branch.skctl(&["stop"]).check()?;
        branch.skctl(&["start"]).env("HTTPS_PROXY", &in_environment).check()?;
        self.net.wait_carrier("tls", MOVE_MAX)?;
        let Processes { controller, router } = branch.processes()?;
        for pid in [controller, router] {
            let environment = host.read(format!("/proc/{pid}/environ"))?;
            ensure!(environment.contains("PATH="), "unreadable: {environment}");
            ensure!(!environment.contains(SECRET), "the password is in a process's environment");
        }
        self.skctl_init().args(["--proxy", "none"]).check()?;
        ensure!(self.secrets()? == 0, "the password is still kept");
        Ok(())
    }

    /// How many files the site keeps the password in, which is nowhere else but where it came from.
    fn secrets(&self) -> Result<usize> {
        let host = self.net.branch.host();
        let grep = host.command("grep").args(["-rl", "--exclude-dir=bin", SECRET]).arg(host.dir());
        let Output { code, stdout: found, stderr } = grep.run()?;
        // A file that is replaced in the meantime is not there any more.
        let is_searched = stderr.lines().all(|line| line.ends_with("No such file or directory"));
        ensure!(code == Some(0) || code == Some(2) && is_searched, "{code:?} {found} {stderr}");
        let others = || found.lines().filter(|path| *path != self.credentials);
        ensure!(others().all(|path| path.ends_with("/proxy-credentials")), "it is in {found}");
        ensure!(others().count() < found.lines().count(), "it is not in {}", self.credentials);
        Ok(others().count())
    }
}

#[test]
fn where_only_a_proxy_leads_out_a_link_goes_through_it() -> Result<()> {
    let behind = BehindProxy::new()?;
    behind.link()?;
    let net = &behind.net;
    let host = net.branch.host();
    let _server = flow::serve(net.hub.host(), 8310, &[])?;
    net.hub.expose("beyond", 8310, &[])?;
    let to = net.branch.endpoint("beyond", 8310)?;
    let bulk = flow::run(host, "bulk", to, &["--flows", "2", "--seconds", "2"])?;
    clean(&bulk)?;
    figure("bulk through the proxy", &bulk);
    net.use_real_programs()?;

    let running = flow::start_open(host, to, 100, &[])?;
    host.block_udp(false)?;
    figure("moved to UDP", format!("{:?}", net.wait_carrier("udp", MOVE_MAX)?));
    clean(&flow::stop(running)?)?;
    behind.take_from_the_environment()
}

#[test]
fn a_bulk_flow_over_tls_leaves_room_for_others() -> Result<()> {
    let net = Blocked::new()?;
    net.branch.link_to(&net.hub, &[])?;
    net.branch.wait_links_up(1)?;
    let gateway = net.branch.host().gateway().context("a gateway")?;
    gateway.limit(&net.internet, 50)?;
    let _server = flow::serve(net.hub.host(), 8320, &[])?;
    net.hub.expose("narrow", 8320, &[])?;
    let (host, to) = (net.branch.host(), net.branch.endpoint("narrow", 8320)?);
    let echo = || flow::run(host, "echo", to, &["--seconds", scaled("2", "10")]);
    let alone = (flow::run(host, "probe", to, &["--count", "100"])?, echo()?);
    let seconds = scaled("10", "30");
    let bulk = flow::start(host, "bulk", to, &["--flows", "1", "--seconds", seconds])?;
    let beside = (flow::run(host, "probe", to, &["--count", "200"])?, echo()?);
    let bulk = flow::finish(bulk)?;
    for (when, (new, open)) in [("alone", &alone), ("beside a bulk flow", &beside)] {
        figure(&format!("new connections at 50 Mbit/s, {when}"), new);
        figure(&format!("one byte there and back on an open flow, {when}"), open);
    }
    figure("the bulk flow", &bulk);
    clean(&bulk)?;
    ensure!(alone.0["ok"] == 100 && beside.0["ok"] == 200, "{alone:?} {beside:?}");
    ensure!(net.link()?["carrier"] == "tls", "{:?}", net.link());
    Ok(())
}

/// Long enough to see what streams of datagrams meet.
const STREAM_FOR: Duration = Duration::from_secs(2);

fn let_it_stream() {
    std::thread::sleep(scaled(STREAM_FOR, 10 * STREAM_FOR));
}

#[test]
fn datagrams_go_over_tls_and_on_when_the_link_moves() -> Result<()> {
    const FLOWS: f64 = 5.0;
    let net = Blocked::new()?;
    net.branch.link_to(&net.hub, &[])?;
    net.wait_carrier("tls", MOVE_MAX)?;
    let _server = flow::serve_datagrams(net.hub.host(), 8340)?;
    net.hub.expose("datagrams", 8340, &["--protocol", "udp"])?;
    let (host, to) = (net.branch.host(), net.branch.endpoint_of("datagrams", 8340, "udp")?);
    let opened = || net.hub.metric("skein_flows_opened_total");
    let args = ["--flows", &FLOWS.to_string(), "--rate", "100", "--sizes", "200,1420,4000"];
    let running = flow::start(host, "udp-duplex", to, &args)?;
    eventually("the streams run", MOVE_MAX, || Ok(opened()? >= FLOWS))?;
    let_it_stream();
    ensure!(net.link()?["carrier"] == "tls", "{:?}", net.link());
    let seen = flow::stop(running)?;
    figure("datagrams over TLS", &seen);
    ensure!(is_whole(&seen), "{seen}");
    let counts = seen["lost"].as_u64().zip(seen["sent"].as_u64());
    ensure!(counts.is_some_and(|(lost, sent)| lost * 10 < sent), "{seen}");

    let before = opened()?;
    let running = flow::start(host, "udp-duplex", to, &args)?;
    eventually("the streams run", MOVE_MAX, || Ok(opened()? >= before + FLOWS))?;
    host.block_udp(false)?;
    let moved = net.wait_carrier("udp", MOVE_MAX)?;
    let_it_stream();
    host.block_udp(true)?;
    let returned = net.wait_carrier("tls", RETURN_MAX)?;
    let_it_stream();
    ensure!(opened()? <= before + FLOWS, "associations were opened anew");
    let seen = flow::stop(running)?;
    figure("datagrams while the link moves to UDP and back to TLS", &seen);
    // How much is lost follows from how long it takes.
    ensure!(is_whole(&seen) && seen["flows"] == FLOWS, "{seen}");
    let silence_max = moved.extended(SILENCE_MAX).max(returned.extended(SILENCE_MAX));
    let silence = |name: &str| seen[name].as_u64().map(Duration::from_millis).context("a silence");
    ensure!(silence("gap_max_ms")? < silence_max, "{silence_max:?} {seen}");
    ensure!(silence("last_gap_max_ms")? < STREAM_FOR, "silent over TLS: {seen}");
    Ok(())
}

/// Whether every stream brought something, and nothing was damaged or repeated.
fn is_whole(seen: &Value) -> bool {
    let has_run = seen["received_min"].as_u64() > Some(0);
    has_run && seen["wrong"] == 0 && seen["duplicates"] == 0
}

/// The site is known by name only, and its name leads to a balancer that looks at no more than the name in a TLS handshake.
#[test]
fn a_balancer_that_passes_tls_through_leads_to_the_site_by_name() -> Result<()> {
    const NAME: &str = "hub.skein.example";
    if !require_programs(&["haproxy"]) {
        return Ok(());
    }
    let (lab, internet) = internet()?;
    let (front, back) = (lab.host("balancer")?, lab.host("hub")?);
    let (front_address, back_address) = (front.join(&internet)?, back.join(&internet)?);
    let _balancer = servers::sni_balancer(&front, 7443, NAME, &format!("{back_address}:7443"))?;
    let hub = Site::init(&back, &["--advertise", NAME])?;
    let host = lab.host_behind_nat("branch", &internet)?;
    let hosts = host.dir().join("hosts");
    let names = std::fs::read_to_string(&hosts)?;
    std::fs::write(&hosts, format!("{names}{front_address} {NAME}\n"))?;
    let branch = Site::init(&host, &["--no-listen"])?;
    branch.link_to(&hub, &[])?;
    branch.wait_links_up(1)?;
    let link = branch.json(&["link", "list"])?;
    ensure!(link[0]["carrier"] == "tls", "{link}");
    let remote = format!("{front_address}:7443");
    ensure!(link[0]["remote"] == remote.as_str(), "{link}");
    let _server = flow::serve(&back, 8330, &[])?;
    hub.expose("balanced", 8330, &[])?;
    let to = branch.endpoint("balanced", 8330)?;
    clean(&flow::run(&host, "bulk", to, &["--flows", "2", "--seconds", "2"])?)
}
