//! What a panic does to the process.

/// Makes a panic anywhere end the whole process, after it was logged, so that its supervisor starts it anew.
///
/// A task that panics would otherwise be gone without a word, and the process, which lacks a part then, look well: a port that nobody
/// reads, sessions that nobody accepts. For the entry of an executable; tests keep Rust's way.
pub(crate) fn abort_the_process() {
    std::panic::set_hook(Box::new(|panic| {
        let reason = panic.payload_as_str().unwrap_or("no reason given");
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::capture();
        crate::telemetry::finish();
        // Past the queue, which drops lines when it is full.
        crate::telemetry::write_now(
            "a panic ends this process",
            &[("reason", reason), ("location", &location), ("backtrace", &backtrace.to_string())],
        );
        // A core file would have every key in it. Where this fails, whoever wants none has switched them off.
        let _ =
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::process::ExitStatusExt as _,
        process::{Command, Stdio},
        time::Duration,
    };

    const QUEUE_FULL: &str = "the queue is full";

    #[test]
    #[ignore = "ends its process: for the test below"]
    fn a_task_panics() {
        abort_the_process();
        crate::telemetry::install(crate::telemetry::LogFormat::Human, "info");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let tasks = tokio_util::task::TaskTracker::new();
            tasks.spawn(async {
                // Nobody reads yet: until the queue is full as well.
                while crate::telemetry::lines_dropped() == 0 {
                    tracing::info!("flow ended");
                }
                writeln!(std::io::stdout(), "{QUEUE_FULL}").unwrap();
                panic!("an invariant does not hold")
            });
            // What does not look at the task is still here.
            tokio::time::sleep(Duration::from_secs(60)).await;
        });
    }

    #[test]
    fn a_panic_in_a_task_ends_the_process() {
        let mut running = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "panic::tests::a_task_panics"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(running.stdout.take().unwrap()).lines();
        assert!(stdout.any(|line| line.unwrap() == QUEUE_FULL));
        // A slow reader, for whom the queue is still full when the task panics.
        std::thread::sleep(Duration::from_millis(300));
        let ended = running.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.signal().is_some() && !ended.status.core_dumped(), "{log}");
        assert!(log.contains("a panic ends this process"), "{log}");
        assert!(log.contains("an invariant does not hold"), "{log}");
    }
}
