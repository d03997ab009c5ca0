//! Whether a target answers, with hysteresis: an advert that flaps costs the whole network. Pure.

use std::time::Duration;

/// Failures in a row until a target counts as down.
const FALL: u32 = 2;
/// Successes in a row until a target that was down counts as up again.
const RISE: u32 = 2;
/// Between checks of a target that is up. Flows are checks as well, so a busy target is asked rarely.
const INTERVAL_UP: Duration = Duration::from_secs(10);
/// Between checks while a target is down, or the last two checks disagree.
const INTERVAL_DOWN: Duration = Duration::from_secs(1);

/// What is known of one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Health {
    state: State,
    /// Results in a row that contradict the state.
    against: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
enum State {
    #[default]
    Unknown,
    Up,
    Down,
}

impl Health {
    /// Whether flows should go there.
    pub(super) fn is_up(self) -> bool {
        self.state == State::Up
    }

    /// Whether nothing has been observed yet.
    pub(super) fn is_unknown(self) -> bool {
        self.state == State::Unknown
    }

    /// Takes the result of a connect.
    pub(super) fn observe(&mut self, connected: bool) {
        let observed = if connected { State::Up } else { State::Down };
        if self.state == observed {
            self.against = 0;
            return;
        }
        self.against += 1;
        let needed = match self.state {
            State::Unknown => 1,
            State::Up => FALL,
            State::Down => RISE,
        };
        if self.against >= needed {
            *self = Self { state: observed, against: 0 };
        }
    }

    /// When to look again.
    pub(super) fn interval(self) -> Duration {
        if self.state == State::Up && self.against == 0 { INTERVAL_UP } else { INTERVAL_DOWN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_result_counts_and_later_ones_need_confirmation() {
        let mut health = Health::default();
        assert!(!health.is_up());
        health.observe(true);
        assert!(health.is_up());
        health.observe(false);
        assert!(health.is_up());
        assert_eq!(health.interval(), INTERVAL_DOWN);
        health.observe(true);
        health.observe(false);
        assert!(health.is_up(), "failures that are not in a row do not add up");
        health.observe(false);
        assert!(!health.is_up());
        health.observe(true);
        assert!(!health.is_up());
        health.observe(true);
        assert!(health.is_up());
        assert_eq!(health.interval(), INTERVAL_UP);
    }
}
