//! The main job: two sites behind NATs use each other's services through a third, which sees nothing.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_e2e::topology::Hub;
use skein_e2e::{Site, clients, figure, scaled, servers};
use skein_lab::{eventually, require_programs, require_root};

/// Stands in every line of what is downloaded.
const MARKER: &str = "SKEIN-PLAINTEXT-MARKER";

#[test]
fn postgresql_through_the_hub() -> Result<()> {
    if !require_root("PostgreSQL refuses to run as root of a user namespace")
        || !require_programs(&["pgbench", "psql"])
    {
        return Ok(());
    }
    let net = Hub::new()?;
    let _server = servers::postgres(net.dc.host(), 5432)?;
    net.dc.expose("postgres", 5432, &[])?;
    let to = net.branch.endpoint("postgres", 5432)?;
    figure("pgbench -c 8", clients::pgbench(net.branch.host(), to, scaled(5, 20))?);
    Ok(())
}

#[test]
fn downloads_both_ways_and_the_hub_sees_no_plaintext() -> Result<()> {
    if !require_programs(&["nginx", "tcpdump", "curl", "sha256sum"]) {
        return Ok(());
    }
    let net = Hub::new()?;
    let size_mib = scaled(64_u64, 1024);
    let (_nginx_dc, dir) = servers::nginx(net.dc.host(), 8080)?;
    let dc_sum = clients::make_file(net.dc.host(), &dir, MARKER, size_mib)?;
    let (_nginx_branch, dir) = servers::nginx(net.branch.host(), 8080)?;
    let branch_sum = clients::make_file(net.branch.host(), &dir, MARKER, size_mib)?;
    net.dc.expose("files-dc", 8080, &[])?;
    net.branch.expose("files-branch", 8080, &[])?;
    let from_dc = net.branch.endpoint("files-dc", 8080)?;
    let from_branch = net.dc.endpoint("files-branch", 8080)?;

    let at_hub = capture(&net.hub, "any", "hub.pcap")?;
    let at_dc = capture(&net.dc, "lo", "dc.pcap")?;
    let took = eventually("downloaded", Duration::ZERO, || {
        std::thread::scope(|scope| {
            let there = scope.spawn(|| clients::download(net.branch.host(), from_dc));
            let back = clients::download(net.dc.host(), from_branch)?;
            let there = there.join().map_err(|_| anyhow::anyhow!("the download panicked"))??;
            ensure!(there == dc_sum && back == branch_sum, "the checksums differ");
            Ok(true)
        })
    })?;
    figure(&format!("{size_mib} MiB each way at once"), format!("{took:?}"));
    drop((at_hub, at_dc));
    let pcap = |site: &Site, name: &str| std::fs::read(site.host().dir().join(name));
    let hub = pcap(&net.hub, "hub.pcap")?;
    ensure!(hub.len() > 1 << 20, "the capture missed the traffic: {} bytes", hub.len());
    ensure!(!contains(&hub, MARKER), "the hub sees plaintext");
    ensure!(contains(&pcap(&net.dc, "dc.pcap")?, MARKER), "the marker would not be found at all");
    Ok(())
}

/// Starts capturing up to 20 MB of packets.
fn capture(site: &Site, interface: &str, name: &str) -> Result<skein_lab::Process> {
    let path = site.host().dir().join(name);
    let tcpdump = site.host().command("tcpdump");
    let args = ["-i", interface, "-s", "0", "-U", "-Z", "root", "-c", "20000", "-w"];
    let process = tcpdump.args(args).arg(&path).spawn()?;
    eventually("capturing", Duration::from_secs(10), || {
        Ok(process.stderr().contains("listening"))
    })?;
    Ok(process)
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn redis_ssh_and_iperf3_through_the_hub() -> Result<()> {
    if !require_programs(&["redis-server", "redis-cli", "sshd", "scp", "iperf3"]) {
        return Ok(());
    }
    let net = Hub::new()?;
    let _redis = servers::redis(net.dc.host(), 6379)?;
    let (_sshd, key) = servers::sshd(net.dc.host(), 2222)?;
    let _iperf3 = servers::iperf3(net.dc.host(), 5201)?;
    net.dc.expose("redis", 6379, &[])?;
    net.dc.expose("ssh", 2222, &[])?;
    net.dc.expose("iperf3", 5201, &[])?;
    publish_and_subscribe(&net.branch, net.branch.endpoint("redis", 6379)?)?;
    copy(&net, &key, net.branch.endpoint("ssh", 2222)?)?;
    let to = net.branch.endpoint("iperf3", 5201)?;
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    for direction in [&[][..], &["-R"]] {
        let command = net.branch.host().command("iperf3");
        let report =
            command.args(["-c", &host, "-p", &port, "-t", "3", "-J"]).args(direction).check()?;
        let report: serde_json::Value = serde_json::from_str(&report.stdout)?;
        let rate = &report["end"]["sum_received"]["bits_per_second"];
        ensure!(rate.as_f64().is_some_and(|rate| rate > 1e6), "{report}");
        figure(&format!("iperf3 {direction:?}, bit/s"), rate);
    }
    Ok(())
}

fn publish_and_subscribe(site: &Site, to: SocketAddr) -> Result<()> {
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let client = || site.host().command("redis-cli").args(["-h", &host, "-p", &port]);
    let subscriber = client().args(["SUBSCRIBE", "news"]).spawn()?;
    subscriber.wait_for("subscribe", Duration::from_secs(10))?;
    for number in 0..100 {
        client().args(["PUBLISH", "news", &format!("item-{number}.")]).check()?;
    }
    subscriber.wait_for("item-99.", Duration::from_secs(10))?;
    let heard = subscriber.stdout();
    ensure!((0..100).all(|number| heard.contains(&format!("item-{number}."))), "{heard}");
    Ok(())
}

fn copy(net: &Hub, key: &Path, to: SocketAddr) -> Result<()> {
    let file = net.branch.host().dir().join("to-copy");
    let script = "head -c 20000000 /dev/urandom > \"$1\"";
    net.branch.host().command("sh").args(["-c", script, "sh"]).arg(&file).check()?;
    let target = net.dc.host().dir().join("copied");
    let scp = net.branch.host().command("scp").args(["-q", "-P", &to.port().to_string(), "-i"]);
    let options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"];
    let remote = format!("root@{}:{}", to.ip(), target.display());
    scp.arg(key).args(options).arg(&file).arg(remote).check()?;
    ensure!(std::fs::read(&file)? == std::fs::read(&target)?, "the copy differs");
    Ok(())
}
