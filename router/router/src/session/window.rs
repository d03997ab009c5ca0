//! The send window follows the path: small enough that the ring of writers, not quinn's queue, decides who sends.

use super::transport::SEND_WINDOW_BYTES_MIN;
use crate::clock;
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::sync::Notify;

/// Above the bandwidth-delay product of 10 Gbit/s over 200 ms.
const SEND_WINDOW_BYTES_MAX: u64 = 256 << 20;
/// The window is looked at once per round trip, within these bounds: shorter measures noise, longer reacts late.
const STEP_MIN: Duration = Duration::from_millis(10);
const STEP_MAX: Duration = Duration::from_millis(200);
/// Down by a sixteenth per step: a pause of the application must not cost the window.
const DECAY_DIVISOR: u64 = 16;

/// Counts what a session writes, and wakes the follower after idleness, so that idle sessions have no timer.
#[derive(Debug, Default)]
pub(super) struct WriteMeter {
    written_bytes: AtomicU64,
    resumed: Notify,
}

impl WriteMeter {
    pub(super) fn add(&self, bytes: usize) {
        self.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.resumed.notify_one();
    }

    fn total(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }
}

/// Adjusts the send window of `connection` for as long as it is polled.
pub(super) async fn follow(connection: &quinn::Connection, meter: &WriteMeter) {
    let mut window = SEND_WINDOW_BYTES_MIN;
    let mut seen = 0;
    loop {
        if meter.total() == seen {
            meter.resumed.notified().await;
        }
        let (started, rtt) = (clock::now(), connection.rtt());
        tokio::time::sleep(rtt.clamp(STEP_MIN, STEP_MAX)).await;
        let total = meter.total();
        let elapsed = clock::now().saturating_duration_since(started);
        let next = next_window(window, total - seen, elapsed, rtt);
        seen = total;
        if next != window {
            window = next;
            connection.set_send_window(window);
        }
    }
}

/// Twice what was written per round trip, up at once and down slowly.
fn next_window(window: u64, written_bytes: u64, elapsed: Duration, rtt: Duration) -> u64 {
    let elapsed_us = elapsed.as_micros().max(1);
    let wanted = 2 * u128::from(written_bytes) * rtt.as_micros() / elapsed_us;
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
    wanted.max(window - window / DECAY_DIVISOR).clamp(SEND_WINDOW_BYTES_MIN, SEND_WINDOW_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_bandwidth_delay_product() {
        let (rtt, step) = (Duration::from_millis(50), Duration::from_millis(100));
        // 100 MB/s over 50 ms are 5 MB in flight.
        assert_eq!(next_window(1 << 20, 10_000_000, step, rtt), 10_000_000);
        assert_eq!(next_window(16 << 20, 10_000_000, step, rtt), 15 << 20);
        assert_eq!(next_window(1 << 20, 10, step, rtt), SEND_WINDOW_BYTES_MIN);
        assert_eq!(next_window(1 << 20, u64::MAX / 4, step, rtt), SEND_WINDOW_BYTES_MAX);
        assert_eq!(next_window(1 << 20, 10, Duration::ZERO, rtt), SEND_WINDOW_BYTES_MIN);
    }
}
