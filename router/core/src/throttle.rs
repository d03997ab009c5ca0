//! Holds back repetitions: the first change acts at once, more of them ever more slowly up to a limit.

use std::time::{Duration, Instant};

/// Back-off between repetitions of one action.
#[derive(Debug)]
pub(crate) struct Throttle {
    min: Duration,
    max: Duration,
    hold: Duration,
    not_before: Option<Instant>,
}

impl Throttle {
    pub(crate) const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, hold: min, not_before: None }
    }

    /// Whether the action may run now.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| at <= now)
    }

    /// When the action may run; `None` for at once.
    pub(crate) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// The action ran. Twice the hold without a repetition counts as quiet.
    pub(crate) fn ran(&mut self, now: Instant) {
        let quiet = self.not_before.is_none_or(|at| now >= at + self.hold);
        self.hold = if quiet { self.min } else { (self.hold * 2).min(self.max) };
        self.not_before = Some(now + self.hold);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test is its own clock")]
    use super::*;

    #[test]
    fn the_first_is_at_once_and_storms_slow_down() {
        let ms = Duration::from_millis;
        let (start, mut throttle) = (Instant::now(), Throttle::new(ms(50), ms(200)));
        assert!(throttle.is_open(start));
        let mut now = start;
        let mut gaps = Vec::new();
        for _ in 0..5 {
            throttle.ran(now);
            let next = throttle.not_before().unwrap();
            gaps.push(next - now);
            now = next;
        }
        assert_eq!(gaps, [ms(50), ms(100), ms(200), ms(200), ms(200)]);
        throttle.ran(now + ms(1_000));
        assert_eq!(throttle.not_before(), Some(now + ms(1_050)));
    }
}
