//! The only reader of time in this crate.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// Seconds since 1970, as the system clock has them.
#[expect(clippy::disallowed_methods, reason = "this is the reader")]
pub(crate) fn unix_s() -> i64 {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // A clock before 1970 is reported by everything that checks an expiry.
    elapsed.map_or(0, |elapsed| i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX))
}

/// A time for people and documents: RFC 3339, seconds.
pub(crate) fn rfc3339(unix_s: i64) -> String {
    Timestamp::from_second(unix_s).map_or_else(|_| format!("@{unix_s}"), |time| time.to_string())
}

/// The monotonic clock of the runtime.
pub(crate) fn instant() -> Instant {
    Instant::now()
}

/// A wall clock that runs apart from the monotonic one by more than this was set, or the host slept.
const JUMP_MIN_S: i64 = 60;
/// How long a clock that was set must run on before it is believed: a wrong one is usually set right within minutes.
const STEADY_AFTER: Duration = Duration::from_secs(3600);

/// Tells whether the wall clock can be relied on where a mistake cannot be made good.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SteadyClock {
    last: (i64, Instant),
    since: Instant,
}

impl SteadyClock {
    /// Begins to watch.
    pub(crate) fn new(unix_s: i64, now: Instant) -> Self {
        Self { last: (unix_s, now), since: now }
    }

    /// Takes the time in; returns whether the clock has run on steadily for a while.
    pub(crate) fn observe(&mut self, unix_s: i64, now: Instant) -> bool {
        let (last_unix_s, last) = self.last;
        let passed_s = i64::try_from(now.duration_since(last).as_secs()).unwrap_or(i64::MAX);
        let shown_s = unix_s.saturating_sub(last_unix_s);
        if shown_s.saturating_sub(passed_s).saturating_abs() > JUMP_MIN_S {
            tracing::warn!(
                by_s = shown_s.saturating_sub(passed_s),
                "the clock was set, or the host slept"
            );
            self.since = now;
        }
        self.last = (unix_s, now);
        now.duration_since(self.since) >= STEADY_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_is_not_believed_at_once() {
        let start = instant();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut clock = SteadyClock::new(1_000, start);
        assert!(!clock.observe(1_010, at(10)), "it was just switched on");
        assert!(clock.observe(4_600, at(3_600)));
        assert!(!clock.observe(4_601 + 14 * 86_400, at(3_601)), "two weeks in a second");
        assert!(!clock.observe(4_602, at(3_602)), "and back");
        assert!(clock.observe(8_202, at(7_202)));
    }
}
