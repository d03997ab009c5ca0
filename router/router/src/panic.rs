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
        tracing::error!(reason, location, %backtrace, "a panic ends this process");
        crate::telemetry::finish();
        // A core file would have every key in it. Where this fails, whoever wants none has switched them off.
        let _ =
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::process::ExitStatusExt as _, process::Command, time::Duration};

    #[test]
    #[ignore = "ends its process: for the test below"]
    fn a_task_panics() {
        abort_the_process();
        crate::telemetry::install(crate::telemetry::LogFormat::Human, "info");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let tasks = tokio_util::task::TaskTracker::new();
            tasks.spawn(async { panic!("an invariant does not hold") });
            // What does not look at the task is still here.
            tokio::time::sleep(Duration::from_secs(60)).await;
        });
    }

    #[test]
    fn a_panic_in_a_task_ends_the_process() {
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "panic::tests::a_task_panics"])
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.signal().is_some() && !ended.status.core_dumped(), "{log}");
        assert!(log.contains("a panic ends this process"), "{log}");
        assert!(log.contains("an invariant does not hold"), "{log}");
    }
}
