//! Running `flowgen` on hosts.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::{Host, Process};

/// Verifying takes time on a busy machine, and `duplex` waits 45 s for what is missing. Long runs churn for minutes.
fn finish_timeout() -> Duration {
    Duration::from_secs(crate::scaled(120, 1_200))
}

/// Flows open at once; the machine may be busy, and a way long.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// Of a `probe` that is repeated until it succeeds: one that hangs does not keep the others from being made.
pub const ONE_PROBE: [&str; 4] = ["--count", "1", "--timeout-ms", "1000"];

/// Starts the server of the client commands on the host's loopback.
///
/// # Errors
/// When it does not listen.
pub fn serve(host: &Host, port: u16, args: &[&str]) -> Result<Process> {
    serve_on(host, SocketAddr::from(([127, 0, 0, 1], port)), args)
}

/// Starts the server on one address of the host.
///
/// # Errors
/// When it does not listen.
pub fn serve_on(host: &Host, listen: SocketAddr, args: &[&str]) -> Result<Process> {
    let server = host
        .command(crate::flowgen())
        .args(["serve", "--listen", &listen.to_string()])
        .args(args)
        .spawn()?;
    server.wait_for("listening", Duration::from_secs(10))?;
    Ok(server)
}

/// Starts the server of `udp-duplex` and `udp-hold` on every address of the host.
///
/// # Errors
/// When it does not listen.
pub fn serve_datagrams(host: &Host, port: u16) -> Result<Process> {
    let listen = format!("0.0.0.0:{port}");
    let server = host.command(crate::flowgen()).args(["udp-serve", "--listen", &listen]).spawn()?;
    server.wait_for("listening", Duration::from_secs(10))?;
    Ok(server)
}

/// Starts a client command.
///
/// # Errors
/// When it cannot be started.
pub fn start(host: &Host, command: &str, to: SocketAddr, args: &[&str]) -> Result<Process> {
    let connect = ["--connect", &to.to_string()].map(str::to_owned);
    host.command(crate::flowgen()).arg(command).args(connect).args(args).spawn()
}

/// Starts `duplex` with so many flows, and waits until something has arrived on each: what befalls the network
/// from then on befalls open flows.
///
/// # Errors
/// With its report, when one of them does not open in time.
pub fn start_open(host: &Host, to: SocketAddr, flows: u32, args: &[&str]) -> Result<Process> {
    let flows = flows.to_string();
    let process = start(host, "duplex", to, &[&["--flows", &flows], args].concat())?;
    match process.wait_for(&format!("{{\"open\":{flows}}}"), OPEN_TIMEOUT) {
        Ok(()) => Ok(process),
        Err(error) => Err(error.context(stop(process)?)),
    }
}

/// Runs a client command that ends by itself.
///
/// # Errors
/// When it fails.
pub fn run(host: &Host, command: &str, to: SocketAddr, args: &[&str]) -> Result<Value> {
    finish(start(host, command, to, args)?)
}

/// Ends a client command that runs until told, and gives its report.
///
/// # Errors
/// When it gives none.
pub fn stop(process: Process) -> Result<Value> {
    process.terminate()?;
    finish(process)
}

/// Waits for the end of a client command that ends by itself, and gives its report.
///
/// # Errors
/// When it fails.
pub fn finish(process: Process) -> Result<Value> {
    let output = process.finish(finish_timeout())?;
    let line = output.stdout.lines().last().with_context(|| output.to_string())?;
    serde_json::from_str(line).with_context(|| output.to_string())
}

/// That no flow of a report of `duplex` or `bulk` failed, and none brought anything but what was sent, whole.
///
/// # Errors
/// With the report, when one did.
pub fn clean(report: &Value) -> Result<()> {
    // A flow of `bulk`, whose report has shares, has failed when it ends early.
    let whole = report["shares"].is_array() || report["truncated"] == 0;
    ensure!(report["failed"] == 0 && report["wrong"] == 0 && whole, "{report}");
    Ok(())
}

/// The longest silence of any flow of a report.
#[must_use]
pub fn gap_max(report: &Value) -> Duration {
    let gaps = report["gaps"].as_array().into_iter().flatten();
    let longest = gaps.filter_map(|gap| gap["length_ms"].as_u64()).max();
    Duration::from_millis(longest.unwrap_or(0))
}

/// Starts a server that plays a script with every connection, on the host's loopback; [`stop`] gives what it saw, as
/// `connections`.
///
/// # Errors
/// When it does not listen.
pub fn serve_script(host: &Host, port: u16, script: &str) -> Result<Process> {
    let listen = format!("127.0.0.1:{port}");
    let server = host
        .command(crate::flowgen())
        .args(["play", "--listen", &listen, "--script", script])
        .spawn()?;
    server.wait_for("listening", Duration::from_secs(10))?;
    Ok(server)
}
