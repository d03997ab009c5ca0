//! The only reader of time in this crate.

use jiff::Timestamp;

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
pub(crate) fn instant() -> tokio::time::Instant {
    tokio::time::Instant::now()
}
