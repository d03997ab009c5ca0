//! The only reader of time. Everything else takes it as an argument or asks here.

use std::time::Instant;
#[cfg(not(feature = "sim"))]
use std::time::{SystemTime, UNIX_EPOCH};

/// The monotonic time; follows the runtime's clock where a test has paused that.
#[must_use]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Seconds since the Unix epoch, for comparison with signed expiry dates.
#[must_use]
pub fn unix_s() -> i64 {
    unix_ms() / 1_000
}

/// Milliseconds since the Unix epoch, for people and documents; never for measuring durations.
#[must_use]
pub fn unix_ms() -> i64 {
    #[cfg(feature = "sim")]
    return skein_netsim::unix_ms();
    #[cfg(not(feature = "sim"))]
    os_unix_ms()
}

#[cfg(not(feature = "sim"))]
fn os_unix_ms() -> i64 {
    #[allow(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
    let now = SystemTime::now();
    match now.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_millis()).map_or(i64::MIN, |ms| -ms),
    }
}
