//! The measurements, each of one column at a time.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::flow;
use skein_lab::Host;

use crate::column::Column;

/// What `/proc/PID/stat` counts CPU time in, on every Linux there is.
const TICKS_PER_S: f64 = 100.0;

/// Bulk with so many flows for `seconds`: Gbit/s, and CPU seconds of the processes in between per GB.
///
/// # Errors
/// When iperf3 fails.
pub fn bulk(client: &Host, column: &Column, flows: u32, seconds: u32) -> Result<(f64, f64)> {
    let before = cpu_s(column)?;
    let (host, port) = (column.iperf3.ip().to_string(), column.iperf3.port().to_string());
    let args =
        ["-c", &host, "-p", &port, "-t", &seconds.to_string(), "-P", &flows.to_string(), "-J"];
    let args = args.map(str::to_owned);
    let output = client.command("iperf3").args(args).timeout(Duration::from_secs(120)).check()?;
    let report: Value = serde_json::from_str(&output.stdout)?;
    let bytes = report["end"]["sum_received"]["bytes"].as_f64().context("bytes")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64().context("rate")?;
    Ok((bits / 1e9, (cpu_s(column)? - before) / (bytes / 1e9)))
}

/// HTTP latency and rate.
#[derive(Clone, Copy, Debug)]
pub struct Http {
    /// Median, ms.
    pub p50_ms: f64,
    /// 99th percentile, ms.
    pub p99_ms: f64,
    /// Requests a second.
    pub rate: f64,
}

/// Requests for 1 KiB over so many connections, kept or new each time.
///
/// # Errors
/// When `ab` fails or any request does.
pub fn http(
    client: &Host,
    column: &Column,
    connections: u32,
    requests: u32,
    keep: bool,
) -> Result<Http> {
    let csv = client.dir().join("tmp/ab.csv");
    let url = format!("http://{}/small", column.http);
    let mut ab = client.command("ab").args(["-q", "-r"]);
    if keep {
        ab = ab.arg("-k");
    }
    let (c, n) = (connections.to_string(), requests.to_string());
    let output = ab.args(["-c", &c, "-n", &n, "-e"]).arg(&csv).arg(&url).check()?.stdout;
    let field = |name: &str| -> Result<f64> {
        let line = output.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        Ok(word.with_context(|| format!("{name} in {output}"))?.parse()?)
    };
    let failed = field("Failed requests:")?;
    ensure!(failed == 0.0, "{}: {failed} requests failed", column.way.name());
    let table = std::fs::read_to_string(&csv)?;
    let percentile = |p: &str| -> Result<f64> {
        let value = table.lines().find_map(|line| line.strip_prefix(p)?.strip_prefix(','));
        Ok(value.context("a percentile")?.parse()?)
    };
    Ok(Http {
        p50_ms: percentile("50")?,
        p99_ms: percentile("99")?,
        rate: field("Requests per second:")?,
    })
}

/// Resident memory of the processes in between together, MB, before and while `flows` idle flows are
/// open.
///
/// # Errors
/// When the flows cannot be opened.
pub fn memory(client: &Host, column: &Column, flows: u32) -> Result<(f64, f64)> {
    let idle = rss_mb(column)?;
    let args = ["--flows", &flows.to_string()].map(str::to_owned);
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let held = flow::start(client, "hold", column.flowgen, &args)?;
    held.wait_for("holding", Duration::from_secs(120))?;
    let loaded = rss_mb(column)?;
    flow::stop(held)?;
    Ok((idle, loaded))
}

fn cpu_s(column: &Column) -> Result<f64> {
    let mut ticks = 0.0;
    for (host, pid) in &column.processes {
        let stat = host.read(format!("/proc/{pid}/stat"))?;
        // The name of the program is in parentheses and may contain anything.
        let (_, rest) = stat.rsplit_once(')').context("stat")?;
        let fields: Vec<_> = rest.split_whitespace().collect();
        for index in [11, 12] {
            ticks += fields.get(index).context("utime and stime")?.parse::<f64>()?;
        }
    }
    Ok(ticks / TICKS_PER_S)
}

fn rss_mb(column: &Column) -> Result<f64> {
    let mut kib = 0.0;
    for (host, pid) in &column.processes {
        let status = host.read(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        kib += line.split_whitespace().next().context("VmRSS")?.parse::<f64>()?;
    }
    Ok(kib / 1024.0)
}
