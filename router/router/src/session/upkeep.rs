//! Which sessions stay: those that the network's view no longer supports are closed, as are unused ones, and those whose path has come to
//! carry packets of another size get a successor, or make way for one that had that size before. Sessions with a new path are told so.

use super::{
    connection::{Close, Session},
    pool::{Pool, is_current},
    transport::{self, Role},
};
use crate::clock;
use skein_core::{Label, LinkId, Path};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::sleep_until;

/// Running flows wait so long for a path to come back.
const NO_PATH_MAX: Duration = Duration::from_secs(30);
/// A session without flows is kept so long for the next: a new one costs a round trip, an old one a probe every few seconds.
const UNUSED_MAX: Duration = Duration::from_secs(120);
/// The end that opens no flows waits for longer, since a flow may be on its way.
const UNUSED_MAX_RESPONDER: Duration = Duration::from_secs(150);
/// A session for which nothing may be opened any more goes as soon as what was about to be opened is.
const UNUSED_MAX_DRAINING: Duration = Duration::from_secs(5);
/// A session is so old before it gets a successor: a path that flaps must not make us dial all the time.
const SUCCESSION_AGE_MIN: Duration = Duration::from_secs(2);
/// The end that opens no flows leaves the other so long to see by itself that the packets have another size, and to dial while the old
/// session still takes flows.
const OUTGROWN_MAX_RESPONDER: Duration = Duration::from_secs(2);
/// A session with a new path says something on it at once, and after this and twice this and so on, until it is answered: the peer may
/// not have a path yet, and the first packets may get lost.
const SAY_AGAIN_MIN: Duration = Duration::from_millis(100);
const SAY_MAX: u32 = 6;
/// Sessions are looked at so often when nothing changes: uses and packet sizes tell nobody when they change.
const ROUND_MAX: Duration = Duration::from_secs(30);

/// What earlier rounds saw of a session.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// The last way there was.
    way: Option<(LinkId, Vec<Label>)>,
    /// How often it has been said that the path has changed, and when to say it again.
    say: Option<(u32, Instant)>,
    pathless_since: Option<Instant>,
    /// And how often it had been used by then.
    unused_since: Option<(Instant, u64)>,
    outgrown_since: Option<Instant>,
}

impl Seen {
    /// When a session that is `unused` has been so for as long as it may.
    fn unused_until(
        &mut self,
        (uses, is_unused): (u64, bool),
        unused_max: Duration,
        now: Instant,
    ) -> Option<Instant> {
        let before = self.unused_since.filter(|&(_, before)| before == uses);
        self.unused_since = if is_unused { before.or(Some((now, uses))) } else { None };
        self.unused_since.map(|(since, _)| since + unused_max)
    }

    /// Whether to say something on the path because it is a new one and nothing has come back yet.
    fn is_to_say(&mut self, path: Option<&Path>, is_heard: bool, now: Instant) -> bool {
        let Some(path) = path else {
            self.say = None;
            return false;
        };
        let way = (path.first_link, &path.labels);
        let before = self.way.as_ref().map(|(link, labels)| (*link, labels));
        if before != Some(way) || self.pathless_since.is_some() {
            let is_first = before.is_none();
            self.way = Some((path.first_link, path.labels.clone()));
            // A new session is saying something anyway.
            self.say = (!is_first).then_some((0, now));
        } else if is_heard {
            self.say = None;
        }
        let Some((said, _)) = self.say.filter(|(_, due)| *due <= now) else { return false };
        let again = (said + 1 < SAY_MAX).then_some((said + 1, now + SAY_AGAIN_MIN * (1 << said)));
        self.say = again;
        true
    }

    /// When a session that has a path, or has none, has had none for as long as it may.
    fn pathless_until(&mut self, has_path: bool, now: Instant) -> Option<Instant> {
        self.pathless_since = if has_path { None } else { self.pathless_since.or(Some(now)) };
        self.pathless_since.map(|since| since + NO_PATH_MAX)
    }

    /// When new flows should have a session other than this one, `established` then, which is outgrown or is not.
    fn outgrown_until(
        &mut self,
        is_outgrown: bool,
        role: Role,
        established: Instant,
        now: Instant,
    ) -> Option<Instant> {
        self.outgrown_since = if is_outgrown { self.outgrown_since.or(Some(now)) } else { None };
        let since = self.outgrown_since?.max(established + SUCCESSION_AGE_MIN);
        Some(match role {
            Role::Initiator => since,
            Role::Responder => since + OUTGROWN_MAX_RESPONDER,
        })
    }
}

impl Pool {
    /// Looks at the sessions whenever the view of the network changes, and now and then.
    pub(super) async fn upkeep(self: Arc<Self>) {
        let mut fib = self.config.surroundings.fib.clone();
        let mut trust = self.config.surroundings.trust.clone();
        let mut seen = BTreeMap::new();
        loop {
            let due = self.round(&mut seen);
            tokio::select! {
                changed = fib.changed() => if changed.is_err() { return }, // cancel-safe
                changed = trust.changed() => if changed.is_err() { return }, // cancel-safe
                () = sleep_until(due.into()) => {} // cancel-safe
                () = self.stop.cancelled() => return,
            }
        }
    }

    /// Returns when the next round is due at the latest.
    fn round(self: &Arc<Self>, seen: &mut BTreeMap<u64, Seen>) -> Instant {
        let (fib, trust, now) = (self.fib(), self.trust(), clock::now());
        let sessions = self.numbered_sessions();
        seen.retain(|id, _| sessions.iter().any(|(running, _)| running == id));
        let mut due = now + ROUND_MAX;
        for (id, session) in sessions {
            let seen = seen.entry(id).or_default();
            if !is_current(&session.peer, &fib, &trust) {
                session.close(Close::Stale);
                continue;
            }
            let path = fib.path(session.peer.handle, session.peer.pin);
            let uses = session.uses();
            let unused = seen.unused_until(uses, unused_max(&session), now);
            if seen.is_to_say(path, session.is_heard(), now) {
                session.path_changed();
            }
            let say = seen.say.map(|(_, due)| due);
            let pathless = seen.pathless_until(path.is_some(), now);
            let is_outgrown = session.is_usable()
                && path.is_some_and(|p| session.is_outgrown(transport::mtu(Some(p))));
            let (role, established) = (session.terms.role, session.established);
            let outgrown = seen.outgrown_until(is_outgrown, role, established, now);
            if unused.is_some_and(|until| until <= now) {
                session.close(Close::Unused);
            } else if pathless.is_some_and(|until| until <= now) {
                session.close(Close::NoPath);
            } else if let (Some(path), Some(_)) = (path, outgrown.filter(|&at| at <= now)) {
                due = due.min(self.outgrown(session, path, uses.1, now));
            }
            let later = [say, unused, pathless, outgrown].into_iter().flatten();
            due = later.filter(|&at| at > now).fold(due, Ord::min);
        }
        due
    }

    /// Lets new flows have a session with packets of the right size; returns when to look again.
    fn outgrown(
        self: &Arc<Self>,
        session: Arc<Session>,
        path: &Path,
        is_unused: bool,
        now: Instant,
    ) -> Instant {
        match session.terms.role {
            // The peer opens flows, so it dials, unless it has done so.
            Role::Responder if self.wants_another(&session, transport::mtu(Some(path))) => {
                session.drain();
            }
            Role::Responder => {}
            // The next flow dials.
            Role::Initiator if is_unused => session.set_draining(),
            Role::Initiator => {
                self.replace(session);
                return now + SUCCESSION_AGE_MIN;
            }
        }
        now + UNUSED_MAX_DRAINING
    }
}

fn unused_max(session: &Session) -> Duration {
    match session.terms.role {
        Role::Initiator if !session.is_usable() => UNUSED_MAX_DRAINING,
        Role::Initiator => UNUSED_MAX,
        Role::Responder => UNUSED_MAX_RESPONDER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_between_rounds_count_as_well() {
        let (mut seen, start) = (Seen::default(), clock::now());
        let at = |s: u64| start + Duration::from_secs(s);
        let max = Duration::from_secs(120);
        assert_eq!(seen.unused_until((0, true), max, at(0)), Some(at(120)));
        assert_eq!(seen.unused_until((0, true), max, at(30)), Some(at(120)));
        assert_eq!(seen.unused_until((1, true), max, at(60)), Some(at(180)), "used since");
        assert_eq!(seen.unused_until((2, false), max, at(90)), None);
        assert_eq!(seen.unused_until((2, true), max, at(100)), Some(at(220)));
    }

    #[test]
    fn the_end_that_dials_is_the_first_to_find_a_session_outgrown() {
        let (mut initiator, mut responder) = (Seen::default(), Seen::default());
        let start = clock::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut both = |is_outgrown, now| {
            let at = |seen: &mut Seen, role| seen.outgrown_until(is_outgrown, role, start, now);
            (at(&mut initiator, Role::Initiator), at(&mut responder, Role::Responder))
        };
        assert_eq!(both(true, at(0)), (Some(at(2)), Some(at(4))), "too young");
        assert_eq!(both(false, at(1)), (None, None));
        assert_eq!(both(true, at(9)), (Some(at(9)), Some(at(11))));
        assert_eq!(both(true, at(10)), (Some(at(9)), Some(at(11))));
    }

    #[test]
    fn a_path_that_comes_back_starts_the_wait_anew() {
        let (mut seen, now) = (Seen::default(), clock::now());
        let later = now + NO_PATH_MAX / 2;
        assert_eq!(seen.pathless_until(false, now), Some(now + NO_PATH_MAX));
        assert_eq!(seen.pathless_until(false, later), Some(now + NO_PATH_MAX));
        assert_eq!(seen.pathless_until(true, later), None);
        assert_eq!(seen.pathless_until(false, later), Some(later + NO_PATH_MAX));
    }
}
