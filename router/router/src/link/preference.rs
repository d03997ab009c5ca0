//! Which carrier a dialled link tries first, and when UDP is worth another try. Pure: time is an argument.

use std::time::{Duration, Instant};

/// UDP is tried for this long before TLS is: long enough for most handshakes, too short to be noticed.
const TLS_AFTER: Duration = Duration::from_millis(250);
/// UDP that keeps failing waits this long while TLS is tried.
const UDP_AFTER: Duration = Duration::from_secs(1);
/// A link over UDP that lasted this long was a good one.
const GOOD_AFTER: Duration = Duration::from_secs(60);
/// UDP is tried so soon after a link has come up over TLS. What both were lost for, as when the neighbour was started again, is over by
/// then, and which of them was back first is chance.
const LOOK_AFTER: Duration = Duration::from_millis(200);
/// UDP that comes and goes is left alone for at most this many intervals: 5 minutes.
const INTERVALS_MAX: u32 = 30;

/// When the attempts of a race begin; those without a time are not made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    pub(super) udp_after: Duration,
    pub(super) tls_after: Option<Duration>,
}

impl Plan {
    /// Looks for a better carrier than TLS.
    pub(super) const BETTER: Self = Self { udp_after: Duration::ZERO, tls_after: None };

    /// Whether UDP is tried once more where TLS has worked first: not when there is reason to think that it does not work.
    pub(super) fn udp_anew(self) -> bool {
        self.tls_after.is_some_and(|tls_after| self.udp_after < tls_after)
    }
}

/// What has worked for one link.
#[derive(Debug)]
pub(super) struct Preference {
    interval_min: Duration,
    interval: Duration,
    /// The last link was one over TLS.
    last_tls: bool,
    /// A link over UDP was lost that was not a good one. Nobody knows yet whether it was for UDP.
    is_suspect: bool,
    /// UDP was tried since the link has come up.
    has_looked: bool,
    /// UDP has just failed again: until then it comes second.
    udp_rests_until: Option<Instant>,
    is_unfit: bool,
}

impl Preference {
    /// Nothing is known; UDP is tried every `interval` while a link is up over TLS.
    pub(super) fn new(interval: Duration) -> Self {
        Self {
            interval_min: interval,
            interval,
            last_tls: false,
            is_suspect: false,
            has_looked: false,
            udp_rests_until: None,
            is_unfit: false,
        }
    }

    /// How to dial now.
    pub(super) fn plan(&self, now: Instant) -> Plan {
        if self.udp_rests_until.is_some_and(|until| now < until) {
            return Plan { udp_after: UDP_AFTER, tls_after: Some(Duration::ZERO) };
        }
        let tls_after = if self.last_tls { Duration::ZERO } else { TLS_AFTER };
        Plan { udp_after: Duration::ZERO, tls_after: Some(tls_after) }
    }

    /// How long to wait until UDP is tried beside a link over TLS.
    pub(super) fn interval(&self, now: Instant) -> Duration {
        let is_resting = self.udp_rests_until.is_some_and(|until| now < until);
        if self.has_looked || is_resting { self.interval } else { LOOK_AFTER }
    }

    /// A link has come up.
    pub(super) fn up(&mut self, tls: bool) {
        self.last_tls = tls;
        self.has_looked = false;
        self.is_suspect &= tls;
    }

    /// UDP was tried beside a link over TLS, and does not work.
    pub(super) fn still_fails(&mut self, now: Instant) {
        self.has_looked = true;
        if std::mem::take(&mut self.is_suspect) {
            self.rest(now);
        }
    }

    /// A link over UDP was lost while one over TLS was up, and stays so.
    pub(super) fn fell_back(&mut self, now: Instant) {
        self.last_tls = true;
        self.has_looked = true;
        self.is_unfit = false;
        self.rest(now);
    }

    fn rest(&mut self, now: Instant) {
        self.interval = (self.interval * 2).min(self.interval_min * INTERVALS_MAX);
        self.udp_rests_until = Some(now + self.interval);
    }

    /// A link over UDP came up at a place that is of no use for frames, which does not change often.
    pub(super) fn unfit(&mut self, now: Instant) {
        self.interval = self.interval_min * INTERVALS_MAX;
        self.udp_rests_until = Some(now + self.interval);
        self.is_unfit = true;
    }

    /// Whether that is why UDP was not used.
    pub(super) fn is_unfit(&self, now: Instant) -> bool {
        self.is_unfit && self.udp_rests_until.is_some_and(|until| now < until)
    }

    /// A link that came up was lost, having lasted for `lasted`.
    pub(super) fn lost(&mut self, tls: bool, lasted: Duration) {
        if tls {
            return;
        }
        self.is_unfit = false;
        if lasted >= GOOD_AFTER {
            self.interval = self.interval_min;
        } else {
            self.is_suspect = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn udp_goes_first_until_tls_was_what_worked() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        assert_eq!(preference.plan(now).tls_after, Some(TLS_AFTER));
        assert!(preference.plan(now).udp_anew());
        preference.up(true);
        preference.lost(true, SECOND);
        assert!(!preference.plan(now).udp_anew());
        let plan = preference.plan(now);
        assert_eq!(plan, Plan { udp_after: Duration::ZERO, tls_after: Some(Duration::ZERO) });
        preference.up(false);
        assert_eq!(preference.plan(now).tls_after, Some(TLS_AFTER));
    }

    #[test]
    fn udp_that_is_of_no_use_comes_second_for_minutes() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        preference.unfit(now);
        assert_eq!(preference.plan(now).udp_after, UDP_AFTER);
        assert!(!preference.plan(now).udp_anew());
        preference.up(true);
        assert!(preference.is_unfit(now));
        assert_eq!(preference.interval(now), 30 * INTERVAL);
        let later = now + 30 * INTERVAL;
        assert!(!preference.is_unfit(later));
        assert_eq!(preference.plan(later).udp_after, Duration::ZERO);
    }

    #[test]
    fn udp_that_comes_and_goes_is_tried_ever_less_until_it_stays() {
        let (mut preference, mut now) = (Preference::new(INTERVAL), crate::clock::now());
        let mut intervals = Vec::new();
        for _ in 0..7 {
            preference.up(false);
            preference.lost(false, SECOND);
            assert_eq!(preference.plan(now).udp_after, Duration::ZERO, "it may have been anything");
            preference.up(true);
            preference.still_fails(now);
            intervals.push(preference.interval(now).as_secs());
            assert_eq!(preference.plan(now).udp_after, UDP_AFTER);
            now += preference.interval(now);
        }
        assert_eq!(intervals, [20, 40, 80, 160, 300, 300, 300]);
        preference.up(false);
        preference.lost(false, 60 * SECOND);
        assert_eq!(preference.interval, INTERVAL);
    }

    #[test]
    fn udp_that_is_lost_beside_tls_rests_as_well() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        preference.up(true);
        preference.up(false);
        preference.fell_back(now);
        assert_eq!(preference.interval(now), 2 * INTERVAL);
    }

    #[test]
    fn what_was_lost_together_with_tls_is_looked_for_at_once_and_not_held_against_udp() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        for _ in 0..3 {
            preference.up(true);
            assert_eq!(preference.interval(now), LOOK_AFTER);
            preference.up(false);
            preference.lost(false, SECOND);
        }
        preference.up(true);
        preference.still_fails(now + 60 * SECOND);
        assert_eq!(preference.interval(now + 60 * SECOND), 2 * INTERVAL);
    }
}
