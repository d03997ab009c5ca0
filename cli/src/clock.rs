//! The only reader of time.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// The time of day.
pub(crate) fn now() -> Timestamp {
    Timestamp::now()
}

/// A monotonic instant.
#[expect(clippy::disallowed_methods, reason = "this is the one reader")]
pub(crate) fn instant() -> Instant {
    Instant::now()
}

/// `text` (RFC 3339) as an age: `3m`, `2h`, `5d`; empty when it is not a time.
pub(crate) fn age(text: &str, now: Timestamp) -> String {
    text.parse::<Timestamp>()
        .map_or_else(|_| String::new(), |then| short(now.as_second() - then.as_second()))
}

/// `text` (RFC 3339) as the time left until then: `3m`; `0s` when it has passed.
pub(crate) fn left(text: &str, now: Timestamp) -> String {
    text.parse::<Timestamp>()
        .map_or_else(|_| String::new(), |then| short(then.as_second() - now.as_second()))
}

fn short(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Waits.
///
/// # Cancel safety
/// Nothing is lost when the future is dropped.
pub(crate) async fn sleep(duration: Duration) {
    tokio::time::sleep(duration).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_one_unit() {
        let now: Timestamp = "2026-01-02T00:00:00Z".parse().unwrap();
        assert_eq!(age("2026-01-01T23:59:01Z", now), "59s");
        assert_eq!(age("2026-01-01T23:00:00Z", now), "60m");
        assert_eq!(age("2025-12-30T00:00:00Z", now), "3d");
        assert_eq!(age("2026-01-03T00:00:00Z", now), "0s");
        assert_eq!(left("2026-01-02T00:15:00Z", now), "15m");
        assert_eq!(age("", now), "");
    }
}
