//! Running `flowgen` on hosts.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use skein_lab::{Host, Process};

/// Verifying takes time on a busy machine, and `duplex` waits 45 s for what is missing.
const FINISH_TIMEOUT: Duration = Duration::from_secs(120);

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

/// Starts a client command.
///
/// # Errors
/// When it cannot be started.
pub fn start(host: &Host, command: &str, to: SocketAddr, args: &[&str]) -> Result<Process> {
    let connect = ["--connect", &to.to_string()].map(str::to_owned);
    host.command(crate::flowgen()).arg(command).args(connect).args(args).spawn()
}

/// Runs a client command that ends by itself.
///
/// # Errors
/// When it fails.
pub fn run(host: &Host, command: &str, to: SocketAddr, args: &[&str]) -> Result<Value> {
    report(start(host, command, to, args)?)
}

/// Ends a client command that runs until told, and gives its report.
///
/// # Errors
/// When it gives none.
pub fn stop(process: Process) -> Result<Value> {
    process.terminate()?;
    report(process)
}

fn report(process: Process) -> Result<Value> {
    let output = process.finish(FINISH_TIMEOUT)?;
    let line = output.stdout.lines().last().with_context(|| output.to_string())?;
    serde_json::from_str(line).with_context(|| output.to_string())
}

/// Plays a conversation: the server's script on one host at one port, the client's on another against
/// `to`. Gives what client and server saw.
///
/// # Errors
/// When either side gives no report.
pub fn play(
    [client, server]: [&Host; 2],
    port: u16,
    to: SocketAddr,
    scripts: [&str; 2],
) -> Result<[Value; 2]> {
    let listen = format!("127.0.0.1:{port}");
    let serving = server
        .command(crate::flowgen())
        .args(["play", "--listen", &listen, "--script", scripts[1]])
        .spawn()?;
    serving.wait_for("listening", Duration::from_secs(10))?;
    let client = run(client, "play", to, &["--script", scripts[0]])?;
    Ok([client, report(serving)?])
}
