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
/// UDP over which so many links in a row died young, while the neighbour was there all the time, is killed by something on the way. Fewer may
/// be chance: what ends while the next attempt begins looks the same.
const DEATHS_MAX: u32 = 3;
/// A neighbour that was never away is back this soon, and some round trips for both handshakes.
const THERE_WITHIN: Duration = Duration::from_millis(100);
const THERE_WITHIN_RTTS: u32 = 4;
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

/// Whether the first dial after a loss took so short a time that the neighbour was there all along, over a path with this round-trip time.
pub(super) fn was_there(took: Duration, rtt: Duration) -> bool {
    took <= THERE_WITHIN + THERE_WITHIN_RTTS * rtt
}

/// Where a neighbour was between a loss and the next link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Absence {
    /// There, all the time.
    None,
    /// Away, or restarted.
    Away,
    /// It has not restarted.
    Unknown,
}

/// How a link was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Loss {
    /// Nothing came any more, here or there.
    Silence,
    /// For another reason, which the neighbour told, or this router.
    Told,
}

/// Why UDP is left alone for now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rest {
    /// It does not carry frames.
    Unfit,
    /// Links over it die young.
    Dying,
    /// It came and went.
    Failed,
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
    /// The last link was one over UDP, died young, and of silence.
    died_young: bool,
    /// So many such deaths in a row were followed at once by the next link to the same neighbour.
    deaths: u32,
    /// UDP has just failed again: until then it comes second.
    udp_rests: Option<(Rest, Instant)>,
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
            died_young: false,
            deaths: 0,
            udp_rests: None,
        }
    }

    /// How to dial now.
    pub(super) fn plan(&self, now: Instant) -> Plan {
        if self.resting(now).is_some() {
            return Plan { udp_after: UDP_AFTER, tls_after: Some(Duration::ZERO) };
        }
        let tls_after = if self.last_tls { Duration::ZERO } else { TLS_AFTER };
        Plan { udp_after: Duration::ZERO, tls_after: Some(tls_after) }
    }

    /// How long to wait until UDP is tried beside a link over TLS.
    pub(super) fn interval(&self, now: Instant) -> Duration {
        if self.has_looked || self.resting(now).is_some() { self.interval } else { LOOK_AFTER }
    }

    /// Why UDP is left alone, if it is.
    pub(super) fn resting(&self, now: Instant) -> Option<Rest> {
        self.udp_rests.and_then(|(why, until)| (now < until).then_some(why))
    }

    /// The link is about to come up, dialled.
    pub(super) fn redialled(&mut self, absence: Absence) {
        if std::mem::take(&mut self.died_young) {
            self.deaths = match absence {
                Absence::None => self.deaths + 1,
                Absence::Away => 0,
                Absence::Unknown => self.deaths,
            };
        }
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
            self.rest(now, Rest::Failed);
        }
    }

    /// A link over UDP was lost, or turned out to be of no use, while one over TLS was up, and stays so.
    pub(super) fn fell_back(&mut self, now: Instant, why: Rest) {
        self.last_tls = true;
        self.has_looked = true;
        self.rest(now, why);
    }

    /// A link over UDP came up at a place that is of no use for frames.
    pub(super) fn unfit(&mut self, now: Instant) {
        self.rest(now, Rest::Unfit);
    }

    fn rest(&mut self, now: Instant, why: Rest) {
        let longest = self.interval_min * INTERVALS_MAX;
        self.interval = match why {
            // That does not change often.
            Rest::Unfit => longest,
            Rest::Dying | Rest::Failed => (self.interval * 2).min(longest),
        };
        self.udp_rests = Some((why, now + self.interval));
    }

    /// A link that came up was lost, having lasted for `lasted`.
    pub(super) fn lost(&mut self, now: Instant, tls: bool, lasted: Duration, how: Loss) {
        if tls {
            return;
        }
        if let Some((why @ Rest::Unfit, _)) = &mut self.udp_rests {
            // It was of use after all.
            *why = Rest::Failed;
        }
        if lasted >= GOOD_AFTER {
            self.interval = self.interval_min;
            self.deaths = 0;
            return;
        }
        self.is_suspect = true;
        self.died_young = how == Loss::Silence;
        if !self.died_young {
            self.deaths = 0;
        } else if self.deaths >= DEATHS_MAX {
            self.rest(now, Rest::Dying);
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
        preference.lost(now, true, SECOND, Loss::Silence);
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
        assert_eq!(preference.resting(now), Some(Rest::Unfit));
        assert_eq!(preference.interval(now), 30 * INTERVAL);
        let later = now + 30 * INTERVAL;
        assert_eq!(preference.resting(later), None);
        assert_eq!(preference.plan(later).udp_after, Duration::ZERO);
    }

    #[test]
    fn udp_that_comes_and_goes_is_tried_ever_less_until_it_stays() {
        let (mut preference, mut now) = (Preference::new(INTERVAL), crate::clock::now());
        let mut intervals = Vec::new();
        for _ in 0..7 {
            preference.up(false);
            preference.lost(now, false, SECOND, Loss::Silence);
            assert_eq!(preference.plan(now).udp_after, Duration::ZERO, "it may have been anything");
            preference.up(true);
            preference.still_fails(now);
            intervals.push(preference.interval(now).as_secs());
            assert_eq!(preference.plan(now).udp_after, UDP_AFTER);
            now += preference.interval(now);
        }
        assert_eq!(intervals, [20, 40, 80, 160, 300, 300, 300]);
        preference.up(false);
        preference.lost(now, false, 60 * SECOND, Loss::Silence);
        assert_eq!(preference.interval, INTERVAL);
    }

    #[test]
    fn udp_that_is_lost_beside_tls_rests_as_well() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        preference.up(true);
        preference.up(false);
        preference.fell_back(now, Rest::Failed);
        assert_eq!(preference.interval(now), 2 * INTERVAL);
    }

    #[test]
    fn tls_is_not_forgotten_when_the_way_to_udp_is_of_no_use() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        preference.up(true);
        preference.up(false);
        preference.fell_back(now, Rest::Unfit);
        assert_eq!(preference.resting(now), Some(Rest::Unfit));
        let later = now + 30 * INTERVAL;
        assert_eq!(preference.interval(later), 30 * INTERVAL);
        assert_eq!(preference.plan(later).tls_after, Some(Duration::ZERO));
    }

    /// Dialled, and lost after a second.
    fn life(preference: &mut Preference, now: Instant, absence: Absence) {
        preference.redialled(absence);
        preference.up(false);
        preference.lost(now, false, SECOND, Loss::Silence);
    }

    #[test]
    fn udp_that_dies_young_again_and_again_rests_though_it_comes_up_at_once() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        life(&mut preference, now, Absence::Away);
        for _ in 0..DEATHS_MAX {
            assert_eq!(preference.resting(now), None, "it may have been anything");
            life(&mut preference, now, Absence::None);
        }
        assert_eq!(preference.resting(now), Some(Rest::Dying));
        assert_eq!(preference.plan(now).tls_after, Some(Duration::ZERO));
        preference.redialled(Absence::None);
        preference.up(true);
        // When it is over, UDP gets one more chance, until it has been good for long.
        let later = now + preference.interval(now);
        assert_eq!(preference.resting(later), None);
        preference.up(false);
        preference.lost(later, false, SECOND, Loss::Silence);
        assert_eq!(preference.resting(later + 3 * INTERVAL), Some(Rest::Dying), "for longer");
        preference.redialled(Absence::None);
        preference.lost(later, false, 60 * SECOND, Loss::Silence);
        life(&mut preference, later, Absence::None);
        assert_eq!(preference.resting(later + 4 * INTERVAL), None);
    }

    #[test]
    fn deaths_of_the_neighbour_are_not_held_against_udp() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        for _ in 0..10 {
            // It was away in between, once in a while.
            life(&mut preference, now, Absence::Away);
            for _ in 0..DEATHS_MAX {
                life(&mut preference, now, Absence::None);
                // It has said so itself, over UDP.
                preference.redialled(Absence::None);
                preference.up(false);
                preference.lost(now, false, SECOND, Loss::Told);
            }
            life(&mut preference, now, Absence::None);
            life(&mut preference, now, Absence::None);
            assert_eq!(preference.resting(now), None);
        }
    }

    #[test]
    fn what_took_long_over_tls_tells_nothing() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        life(&mut preference, now, Absence::Away);
        for _ in 0..DEATHS_MAX {
            life(&mut preference, now, Absence::None);
        }
        let later = now + preference.interval(now);
        preference.redialled(Absence::Unknown);
        preference.up(true);
        life(&mut preference, later, Absence::Unknown);
        assert_eq!(preference.resting(later), Some(Rest::Dying), "no four lives again");
        let later = later + preference.interval(later);
        life(&mut preference, later, Absence::Away);
        assert_eq!(preference.resting(later), None, "the neighbour was away");
    }

    #[test]
    fn a_neighbour_was_there_if_it_answers_within_some_round_trips() {
        let (quick, slow) = (Duration::from_millis(1), Duration::from_millis(600));
        assert!(was_there(Duration::from_millis(100), quick));
        assert!(!was_there(Duration::from_millis(300), quick));
        assert!(was_there(3 * slow, slow) && !was_there(6 * slow, slow));
    }

    #[test]
    fn what_was_lost_together_with_tls_is_looked_for_at_once_and_not_held_against_udp() {
        let (mut preference, now) = (Preference::new(INTERVAL), crate::clock::now());
        for _ in 0..3 {
            preference.up(true);
            assert_eq!(preference.interval(now), LOOK_AFTER);
            preference.up(false);
            preference.lost(now, false, SECOND, Loss::Silence);
        }
        preference.up(true);
        preference.still_fails(now + 60 * SECOND);
        assert_eq!(preference.interval(now + 60 * SECOND), 2 * INTERVAL);
    }
}
