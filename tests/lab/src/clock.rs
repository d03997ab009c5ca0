//! The one reader of time in this crate.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition outside of this process is looked at again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A moment after which waiting has failed.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// `timeout` from now.
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        Self(now() + timeout)
    }

    /// Whether it is over.
    #[must_use]
    pub fn passed(self) -> bool {
        now() >= self.0
    }
}

/// Polls `check` until it is true and says how long that took.
///
/// # Errors
/// The last error of `check`, or that it was never true, once `timeout` is over.
pub fn eventually(
    what: &str,
    timeout: Duration,
    mut check: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let start = now();
    loop {
        let outcome = check();
        if matches!(outcome, Ok(true)) {
            return Ok(now() - start);
        }
        if now() - start >= timeout {
            return match outcome {
                Ok(_) => bail!("not within {timeout:?}: {what}"),
                Err(error) => Err(error.context(format!("not within {timeout:?}: {what}"))),
            };
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[allow(clippy::disallowed_methods, reason = "the one reader of time of this crate")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
