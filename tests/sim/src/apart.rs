//! Each run in a process of its own.
//!
//! A process has state that outlives a run, such as tables made when they are first needed and the counter from which tokio seeds its
//! runtimes. Runs that share it are not the same twice. And a run whose time stands still can be ended from outside.

use crate::{run::Outcome, scenario::Scenario};
use anyhow::{Context as _, Result, ensure};
use std::{
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    time::Duration,
};

/// A run takes a second or two, one of a hundred sites half a minute; on a busy machine a few times that.
const RUN_MAX: Duration = Duration::from_secs(300);

/// Ends when nobody waits for it any more.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a scenario in a process of `program`, which is this package's.
///
/// # Errors
/// The scenario cannot be set up, or the process says nothing. What goes wrong in the run is in the outcome, as is that it does not end.
pub fn run_apart(program: &Path, scenario: &Scenario) -> Result<Outcome> {
    let child = Command::new(program)
        .args(["--scenario", "-", "--report"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Ctrl-C ends whoever waits for it, in order.
        .process_group(0)
        .spawn()
        .context("a process for the run")?;
    let mut child = Reaped(child);
    let mut stdin = child.0.stdin.take().context("invariant: it is a pipe")?;
    stdin.write_all(&serde_json::to_vec(scenario)?)?;
    drop(stdin);
    let mut stdout = child.0.stdout.take().context("invariant: it is a pipe")?;
    let (report, reported) = channel();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let read = stdout.read_to_string(&mut text).map(|_| text);
        // Nobody waits for it any more if this fails.
        let _ = report.send(read);
    });
    let text = match reported.recv_timeout(RUN_MAX) {
        Ok(text) => text?,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            let failure = format!("stuck: no end after {} s", RUN_MAX.as_secs());
            return Ok(Outcome { failures: vec![failure], ..Outcome::default() });
        }
    };
    let status = child.0.wait()?;
    ensure!(reader.join().is_ok(), "invariant: reading does not panic");
    serde_json::from_str(&text).with_context(|| format!("{status}: {text}"))
}
