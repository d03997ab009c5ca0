//! Real clients from Debian packages.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::Host;

use crate::scaled;

/// Fills a database and runs pgbench with eight connections on it; returns the line with its transactions per second.
///
/// # Errors
/// When a transaction fails.
pub fn pgbench(host: &Host, to: SocketAddr, seconds: u32) -> Result<String> {
    let (address, port) = (to.ip().to_string(), to.port().to_string());
    let pgbench = |args: &[&str]| {
        let target = ["-h", &address, "-p", &port, "-U", "postgres"];
        let command = host.command("pgbench").args(target).args(args);
        command.arg("postgres").timeout(Duration::from_secs(120)).check()
    };
    pgbench(&["-i", "-q"])?;
    let report = pgbench(&["-c", "8", "-T", &seconds.to_string()])?.stdout;
    ensure!(report.contains("number of failed transactions: 0"), "{report}");
    Ok(report.lines().find(|line| line.starts_with("tps")).context("tps")?.to_owned())
}

/// Makes `file` in a web server's directory, of lines that begin with `marker`; returns its checksum.
///
/// # Errors
/// When there is no room for it.
pub fn make_file(host: &Host, dir: &Path, marker: &str, size_mib: u64) -> Result<String> {
    let path = dir.join("file");
    // Every KiB begins with the marker and goes on with its own number, so that no block is like another.
    let script = format!(
        "seq {} | awk '{{ printf \"%s %-1000s\\n\", \"{marker}\", $0 }}' > \"$1\"; sha256sum < \"$1\"",
        size_mib * 1024
    );
    Ok(host.command("sh").args(["-c", &script, "sh"]).arg(&path).check()?.stdout)
}

/// Downloads `file`; returns its checksum.
///
/// # Errors
/// When it does not arrive whole.
pub fn download(host: &Host, from: SocketAddr) -> Result<String> {
    let script = format!("set -o pipefail; curl -sSf http://{from}/file | sha256sum");
    let command = host.command("bash").args(["-c", &script]);
    Ok(command.timeout(scaled(Duration::from_secs(60), Duration::from_secs(300))).check()?.stdout)
}
