//! Each run in a process of its own.
//!
//! A process has state that outlives a run, such as tables made when they are first needed and the counter from which tokio seeds its
//! runtimes. Runs that share it are not the same twice. And a run whose time stands still can be ended from outside.

use crate::{run::Outcome, scenario::Scenario};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    time::Duration,
};

/// Time of the processor that a run takes at most: most take a second or two, those of a hundred sites half a minute. It is not what the clock on
/// the wall shows, of which there is no end on a busy machine.
const CPU_MAX: Duration = Duration::from_secs(300);
/// A run that does nothing at all for so long waits for what never comes. However busy the machine, whoever can run gets some of it in that time.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// Between looks at how far it has come.
const LOOK: Duration = Duration::from_secs(1);
/// In such parts of a second Linux says what processes take, on all machines that we build for.
const USER_HZ: u64 = 100;

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
    let mut patience = Patience::default();
    let text = loop {
        match reported.recv_timeout(LOOK) {
            Ok(text) => break text?,
            Err(RecvTimeoutError::Disconnected) => bail!("invariant: reading does not panic"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        // It has ended just now if this fails; then its report is there.
        let Ok(cpu) = cpu_time(child.0.id()) else { continue };
        if let Some(failure) = patience.look(cpu) {
            return Ok(Outcome { failures: vec![failure], ..Outcome::default() });
        }
    };
    let status = child.0.wait()?;
    ensure!(reader.join().is_ok(), "invariant: reading does not panic");
    serde_json::from_str(&text).with_context(|| format!("{status}: {text}"))
}

/// Watches whether a run that has not ended comes on.
#[derive(Debug, Default)]
struct Patience {
    cpu: Duration,
    idle_looks: u32,
}

impl Patience {
    /// To be called every [`LOOK`] with what the run has taken of the processor so far; says why it is not waited for any longer.
    fn look(&mut self, cpu: Duration) -> Option<String> {
        self.idle_looks = if cpu > self.cpu { 0 } else { self.idle_looks + 1 };
        self.cpu = cpu;
        if cpu >= CPU_MAX {
            return Some(format!("stuck: no end after {} s of the processor", CPU_MAX.as_secs()));
        }
        let idle = LOOK * self.idle_looks;
        (idle >= IDLE_MAX).then(|| format!("stuck: nothing done for {} s", IDLE_MAX.as_secs()))
    }
}

/// What all threads of a process have taken of the processor.
fn cpu_time(process: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name of the program, in parentheses, may be anything.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || -> Result<u64> { Ok(fields.next().context("too short")?.parse()?) };
    Ok(Duration::from_millis((ticks()? + ticks()?) * 1_000 / USER_HZ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]
    use super::*;

    /// After how many looks a run is given up that takes so much of the processor between two of them.
    fn looks(cpu_of_look: Duration) -> (u32, String) {
        let mut patience = Patience::default();
        let mut look = |n: u32| Some((n, patience.look(cpu_of_look * n)?));
        (1..).find_map(&mut look).unwrap()
    }

    #[test]
    fn a_run_is_given_up_for_what_it_takes_itself_and_not_for_what_others_take() {
        assert_eq!(looks(Duration::from_secs(1)).0, 300, "alone");
        assert_eq!(looks(Duration::from_millis(10)).0, 30_000, "one of a hundred");
        let (idle_looks, failure) = looks(Duration::ZERO);
        assert_eq!((idle_looks, failure.as_str()), (120, "stuck: nothing done for 120 s"));
    }

    #[test]
    fn a_process_that_works_takes_time() {
        let process = std::process::id();
        let before = cpu_time(process).unwrap();
        assert!((0..1_000_000).any(|_| cpu_time(process).unwrap() > before));
    }
}
