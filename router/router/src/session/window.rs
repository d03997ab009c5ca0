//! The send window follows the path: small enough that the ring of writers, not quinn's queue, decides who sends.

use super::{Account, Reservation, transport::SEND_WINDOW_BYTES_IDLE};
use crate::clock;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// Floor of the send window while a session writes.
const SEND_WINDOW_BYTES_MIN: u64 = 1 << 20;
/// Above the bandwidth-delay product of 10 Gbit/s over 200 ms.
const SEND_WINDOW_BYTES_MAX: u64 = 256 << 20;
/// The window is looked at once per round trip, within these bounds: shorter measures noise, longer reacts late.
const STEP_MIN: Duration = Duration::from_millis(10);
const STEP_MAX: Duration = Duration::from_millis(200);
/// Down by a sixteenth per step: a short pause of the application must not cost the window.
const DECAY_DIVISOR: u64 = 16;
/// After so many idle steps at the floor, a second, a session pays for no more than an idle one. The next write takes the floor back.
const QUIET_STEPS: u32 = 5;

/// More than the send window for a moment: a message on the control stream.
const SIGN_OF_LIFE_BYTES: u64 = 64;

/// Counts what a session writes, and wakes the follower after idleness, so that sessions idle for long have no timer.
#[derive(Debug, Default)]
pub(super) struct WriteMeter {
    written_bytes: AtomicU64,
    resumed: Notify,
    path_changed: Notify,
}

impl WriteMeter {
    pub(super) fn add(&self, bytes: usize) {
        self.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.resumed.notify_one();
    }

    /// Makes room for a message on the control stream, should the send window be full of what the old path has lost.
    pub(super) fn path_changed(&self) {
        self.path_changed.notify_one();
    }

    pub(super) fn total(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }
}

/// Adjusts the send window of `connection` for as long as it is polled. What is above that of an idle session comes out of `account`; at
/// the ceiling a session goes on with what it has.
pub(super) async fn follow(
    connection: &quinn::Connection,
    meter: &WriteMeter,
    account: &Arc<Account>,
) {
    let mut paid = account.nothing();
    let (mut seen, mut quiet_steps) = (0, 0);
    loop {
        if meter.total() == seen && paid.bytes() == 0 {
            meter.resumed.notified().await;
        }
        let is_idle = meter.total() == seen;
        let started = clock::now();
        if paid.bytes() == 0 && resize(&mut paid, SEND_WINDOW_BYTES_MIN) {
            connection.set_send_window(window(&paid));
        }
        let rtt = connection.rtt();
        let step = if is_idle { STEP_MAX } else { rtt.clamp(STEP_MIN, STEP_MAX) };
        let sleep = tokio::time::sleep(step);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => break, // cancel-safe
                () = meter.path_changed.notified() => { // cancel-safe
                    connection.set_send_window(window(&paid) + SIGN_OF_LIFE_BYTES);
                }
            }
        }
        let written = meter.total() - seen;
        seen += written;
        quiet_steps = if written == 0 { quiet_steps + 1 } else { 0 };
        let next = if quiet_steps >= QUIET_STEPS && window(&paid) <= SEND_WINDOW_BYTES_MIN {
            SEND_WINDOW_BYTES_IDLE
        } else {
            let elapsed = clock::now().saturating_duration_since(started);
            next_window(window(&paid), written, elapsed, connection.rtt())
        };
        if resize(&mut paid, next) {
            connection.set_send_window(window(&paid));
        }
    }
}

fn window(paid: &Reservation) -> u64 {
    SEND_WINDOW_BYTES_IDLE + paid.bytes()
}

/// Pays for the `next` window or takes back what was paid too much; whether there is a change. At the ceiling there is no growth.
fn resize(paid: &mut Reservation, next: u64) -> bool {
    let (before, needed) = (paid.bytes(), next.saturating_sub(SEND_WINDOW_BYTES_IDLE));
    if needed > before {
        return paid.try_grow(needed - before);
    }
    paid.shrink(before - needed);
    needed < before
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
    use crate::session::{Budget, Class};

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

    #[test]
    fn growth_is_paid_for_and_decay_gives_back() {
        let budget = Budget::new(8 << 20);
        let mut paid = Account::new(Arc::clone(&budget), Class::Streams).nothing();
        assert!(resize(&mut paid, 4 << 20));
        assert_eq!(budget.used_bytes(), (4 << 20) - SEND_WINDOW_BYTES_IDLE);
        assert!(!resize(&mut paid, 200 << 20));
        assert_eq!(window(&paid), 4 << 20);
        assert!(resize(&mut paid, SEND_WINDOW_BYTES_IDLE));
        assert!(!resize(&mut paid, SEND_WINDOW_BYTES_IDLE));
        assert_eq!(budget.used_bytes(), 0);
    }
}
