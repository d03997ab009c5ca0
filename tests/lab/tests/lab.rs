//! The lab proves itself before anything is proved with it.

use std::io::BufRead as _;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skein_lab::{Host, Lab, Process, Signal, eventually};

const BIN: &str = env!("CARGO_BIN_EXE_skein-lab");
const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 0);

fn sink(host: &Host) -> Result<Process> {
    let address = format!("{}:7000", host.address());
    let server = host.command(BIN).args(["sink", &address]).spawn()?;
    server.wait_for("listening", Duration::from_secs(5))?;
    Ok(server)
}

fn reaches(from: &Host, to: Ipv4Addr, bytes: usize) -> Result<bool> {
    let address = format!("{to}:7000");
    let output = from.command(BIN).args(["say", &address, &bytes.to_string()]).run()?;
    Ok(output.code == Some(0))
}

#[test]
fn nat_lets_out_and_not_in() -> Result<()> {
    let lab = Lab::new()?;
    let internet = lab.lan("internet", PUBLIC)?;
    let hub = lab.host("hub")?;
    hub.join(&internet)?;
    let branch = lab.host_behind_nat("branch", &internet)?;
    let at_hub = sink(&hub)?;
    let _at_branch = sink(&branch)?;

    assert!(reaches(&branch, hub.address(), 1000)?);
    let gateway = branch.gateway().context("a gateway")?;
    at_hub.wait_for(&format!("1000 from {}", gateway.address()), Duration::from_secs(5))?;
    assert!(!reaches(&hub, branch.address(), 1)?, "a private address was reached");
    assert!(!reaches(&hub, gateway.address(), 1)?, "the gateway let something in");
    assert_eq!(branch.command("hostname").check()?.stdout.trim(), "branch");
    Ok(())
}

#[test]
fn cuts_go_one_way_or_both_and_heal() -> Result<()> {
    let lab = Lab::new()?;
    let internet = lab.lan("internet", PUBLIC)?;
    let (a, b, c) = (lab.host("a")?, lab.host("b")?, lab.host("c")?);
    for host in [&a, &b, &c] {
        host.join(&internet)?;
    }
    let _servers = [sink(&a)?, sink(&b)?];

    lab.cut(&a, &b)?;
    assert!(!reaches(&a, b.address(), 1)?);
    assert!(reaches(&c, b.address(), 1)?, "a cut between two hosts hit a third");
    lab.heal(&a, &b)?;
    assert!(reaches(&a, b.address(), 1)?);

    // One way means that packets still arrive where no answer can come from.
    lab.cut_one_way(&b, &a)?;
    assert!(!reaches(&a, b.address(), 1)?);
    let dropped = a.command("iptables").args(["-t", "raw", "-nvxL", "PREROUTING"]).check()?.stdout;
    assert!(dropped_packets(&dropped) > 0, "{dropped}");
    let at_b = b.command("iptables").args(["-t", "raw", "-nvxL", "PREROUTING"]).check()?.stdout;
    assert!(!at_b.contains("DROP"), "{at_b}");
    lab.heal(&a, &b)?;
    assert!(reaches(&a, b.address(), 1)?);
    Ok(())
}

fn dropped_packets(listing: &str) -> u64 {
    let rule = listing.lines().find(|line| line.contains("DROP")).unwrap_or_default();
    rule.split_whitespace().next().and_then(|count| count.parse().ok()).unwrap_or(0)
}

#[test]
fn a_limit_limits_and_an_unplugged_host_is_silent() -> Result<()> {
    let lab = Lab::new()?;
    let internet = lab.lan("internet", PUBLIC)?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    a.join(&internet)?;
    b.join(&internet)?;
    let _server = sink(&b)?;
    b.limit(&internet, 20)?;
    let mut done = Ok(false);
    let took = eventually("sent", Duration::from_secs(30), || {
        done = reaches(&a, b.address(), 5_000_000);
        Ok(true)
    })?;
    assert!(done?);
    // 5 MB are 2 s at 20 Mbit/s.
    assert!(took > Duration::from_millis(1500), "{took:?}");

    b.unplug(&internet)?;
    assert!(!reaches(&a, b.address(), 1)?);
    b.plug(&internet)?;
    eventually("plugged in again", Duration::from_secs(10), || reaches(&a, b.address(), 1))?;
    Ok(())
}

#[test]
fn processes_freeze_thaw_and_die() -> Result<()> {
    let lab = Lab::new()?;
    let internet = lab.lan("internet", PUBLIC)?;
    let host = lab.host("a")?;
    host.join(&internet)?;
    let state = |process: &str| -> Result<String> {
        let script = format!("cat /proc/[0-9]*/stat | grep '({process})' | cut -d' ' -f1,3");
        Ok(host.command("sh").args(["-c", &script]).run()?.stdout.trim().to_owned())
    };
    let mut sleeper = host.command("sleep").arg("1000").spawn()?;
    eventually("sleeps", Duration::from_secs(5), || Ok(state("sleep")?.ends_with('S')))?;
    sleeper.freeze()?;
    eventually("frozen", Duration::from_secs(5), || Ok(state("sleep")?.ends_with('T')))?;
    sleeper.thaw()?;
    eventually("thawed", Duration::from_secs(5), || Ok(state("sleep")?.ends_with('S')))?;
    let pid = state("sleep")?.split(' ').next().context("a pid")?.parse()?;
    host.signal(pid, Signal::Kill)?;
    assert!(sleeper.wait(Duration::from_secs(5))?.is_some());

    let mut other = host.command("sleep").arg("1000").spawn()?;
    host.power_cut()?;
    assert!(other.wait(Duration::from_secs(5))?.is_some());
    assert_eq!(host.command("true").run()?.code, Some(0), "the host is gone");

    host.command("sh").args(["-c", "(sleep 0.1 &)"]).check()?;
    eventually("the orphan is reaped", Duration::from_secs(5), || Ok(state("sleep")?.is_empty()))?;
    Ok(())
}

#[test]
fn nothing_is_left_when_the_lab_is_dropped_or_its_process_killed() -> Result<()> {
    let lab = Lab::new()?;
    let dir = lab.dir().to_owned();
    let host = lab.host("a")?;
    host.command("sh").args(["-c", "setsid sleep 1000 & setsid sleep 1000 &"]).check()?;
    let marker = dir.to_str().context("a path")?.to_owned();
    assert!(processes_of(&marker) >= 4, "the search finds nothing");
    drop((host, lab));
    assert_eq!(processes_of(&marker), 0);
    assert!(!dir.exists());

    let mut child =
        std::process::Command::new(BIN).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let stdout = std::io::BufReader::new(child.stdout.take().context("stdout")?);
    let ready = stdout.lines().map_while(Result::ok).find(|line| line.starts_with("ready in "));
    let ready = ready.context("no ready line")?;
    let (dir, _) = ready["ready in ".len()..].split_once(';').context("a directory")?;
    assert!(processes_of(dir) > 0);
    child.kill()?;
    child.wait()?;
    eventually("all gone", Duration::from_secs(10), || {
        Ok(processes_of(dir) == 0 && !std::path::Path::new(dir).exists())
    })?;
    Ok(())
}

/// Processes with the directory of a lab in their command line or environment.
fn processes_of(marker: &str) -> usize {
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    let numbers = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()));
    let mentions = |path: std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).contains(marker)
    };
    numbers
        .filter(|entry| {
            let path = entry.path();
            mentions(path.join("cmdline")) || mentions(path.join("environ"))
        })
        .count()
}
