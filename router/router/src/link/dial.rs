//! Dialling: all endpoints at once, the first to answer wins; again and again until the link is up. A link over TLS is moved to
//! UDP when that works.

use super::{
    Inner, Links,
    established::{Established, Neighbour, PATH_TOO_SMALL, Terms},
    hello::{self, REFUSED},
    preference::{Absence, Loss, Plan, Preference, Rest, was_there},
    race::{DialError, Race, Won},
};
use crate::{clock, fabric::FrameLink};
use parking_lot::Mutex;
use skein_core::{LinkId, SiteId};
use skein_wire::proto::control::EndpointAttempt;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{oneshot, watch},
    task::{JoinError, JoinHandle},
    time,
};
use tokio_util::sync::CancellationToken;

/// Back-off after refusals.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Back-off after losses, however often: a network that comes and goes is used while it is there.
const LOST_BACKOFF_MAX: Duration = Duration::from_millis(500);
/// A link that lasted this long was a good one: its loss is redialled without back-off.
const GOOD_AFTER: Duration = Duration::from_secs(1);
/// How long two links to a neighbour are in service when one replaces the other: until every router has heard of the new one.
const OVERLAP: Duration = Duration::from_secs(2);
/// Why a link does not use UDP over which others died young.
const DIES_YOUNG: &str = "UDP comes up, and falls silent soon after";
/// What the neighbour is told of a link over TLS that another one has replaced.
const MOVED: &str = "moved to udp";

/// What a dialled link tells about itself.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) attempts: BTreeMap<String, String>,
    pub(super) error: String,
    /// The link while it is up.
    pub(super) up: Option<LinkId>,
    pub(super) since_unix_ms: i64,
    /// Why the link that is up does not use UDP; empty if it does.
    pub(super) not_udp: String,
}

impl Progress {
    pub(super) fn attempts(&self) -> Vec<EndpointAttempt> {
        let attempt = |(endpoint, outcome): (&String, &String)| EndpointAttempt {
            endpoint: endpoint.clone(),
            outcome: outcome.clone(),
        };
        self.attempts.iter().map(attempt).collect()
    }
}

/// One link to be dialled for as long as it is configured.
pub(super) struct Dialler {
    pub(super) inner: Arc<Inner>,
    pub(super) name: String,
    pub(super) site: SiteId,
    pub(super) cost: u32,
    pub(super) endpoints: watch::Receiver<Vec<String>>,
    pub(super) progress: Arc<Mutex<Progress>>,
    pub(super) preference: Preference,
    /// Who was there until the last link was lost; none once a dial has failed since.
    pub(super) lost: Option<Neighbour>,
    pub(super) stop: CancellationToken,
}

/// A link in the care of a task of its own.
struct Running {
    id: LinkId,
    neighbour: Neighbour,
    is_tls: bool,
    frames: Arc<FrameLink>,
    since: Instant,
    in_service: oneshot::Receiver<()>,
    /// Ends with the reason.
    task: JoinHandle<String>,
}

impl Dialler {
    /// Dials, serves the link, and dials again until stopped.
    ///
    /// # Cancel safety
    /// End it through `stop`.
    pub(super) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        while !self.stop.is_cancelled() {
            let stop = self.stop.clone();
            let established = tokio::select! {
                established = self.dial() => established, // dropped, its sockets close
                () = stop.cancelled() => return,
            };
            match established {
                Ok((link, mut not_udp)) => {
                    let began = clock::now();
                    if !not_udp.is_empty() {
                        match self.preference.resting(began) {
                            Some(Rest::Unfit) => not_udp = format!("UDP: {PATH_TOO_SMALL}"),
                            Some(Rest::Dying) => DIES_YOUNG.clone_into(&mut not_udp),
                            Some(Rest::Failed) | None => {}
                        }
                    }
                    let reason = self.serve(link, not_udp).await;
                    self.progress.lock().link_down(reason);
                    if clock::now().saturating_duration_since(began) >= GOOD_AFTER {
                        backoff = BACKOFF_MIN;
                        continue;
                    }
                    backoff = backoff.min(LOST_BACKOFF_MAX);
                }
                Err(DialError::EndpointsChanged) => {
                    backoff = BACKOFF_MIN;
                    continue;
                }
                Err(error) => self.progress.lock().failed(&error),
            }
            tokio::select! {
                () = time::sleep(self.inner.jittered(backoff)) => {} // cancel-safe
                changed = self.endpoints.changed() => { // cancel-safe
                    backoff = BACKOFF_MIN;
                    if changed.is_err() {
                        return;
                    }
                    continue;
                }
                () = stop.cancelled() => return, // cancel-safe
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// A link, and why it does not use UDP if it does not.
    async fn dial(&mut self) -> Result<(Established, String), DialError> {
        let endpoints = self.endpoints.borrow_and_update().clone();
        self.progress.lock().attempts.retain(|endpoint, _| endpoints.contains(endpoint));
        let plan = self.preference.plan(clock::now());
        let race = Race { inner: &self.inner, endpoints: &endpoints, site: self.site, plan };
        let progress = Arc::clone(&self.progress);
        let note = |endpoint, error: &DialError| {
            progress.lock().attempts.insert(endpoint, error.to_string());
        };
        let won = tokio::select! {
            won = race.run(note) => won, // dropped, its sockets close
            _ = self.endpoints.changed() => return Err(DialError::EndpointsChanged), // cancel-safe
        };
        let lost = self.lost.take();
        let won = won?;
        let began = won.began;
        let (link, not_udp) = self.greet(won).await?;
        self.preference.redialled(absence(&link, lost, began));
        Ok((link, not_udp))
    }

    async fn greet(&self, won: Won) -> Result<(Established, String), DialError> {
        let Won { connection, port, peer, not_udp, began: _ } = won;
        let mut mine = (self.inner.hello)(self.site);
        mine.protocol_min = hello::PROTOCOL_MIN;
        mine.protocol_max = hello::PROTOCOL_MAX;
        mine.sent_unix_ms = clock::unix_ms();
        mine.cost = self.cost;
        mine.link_name.clone_from(&self.name);
        mine.link_nonce = self.inner.link_nonce();
        let greeted = hello::dial(&connection, peer, mine, &self.inner.tls).await;
        let terms = Terms { name: self.name.clone(), cost: self.cost, incoming: false };
        let link = greeted.and_then(|greeted| {
            Established::new(&self.inner, connection.clone(), port, greeted, terms)
        });
        let link = link.inspect_err(|error| {
            connection.close(REFUSED, error.to_string().as_bytes());
        })?;
        Ok((link, not_udp))
    }

    /// Serves a link, and whatever replaces it, until there is none; returns why.
    async fn serve(&mut self, link: Established, not_udp: String) -> String {
        let mut current = self.start(link, not_udp);
        loop {
            let better = tokio::select! {
                ended = &mut current.task => { // cancel-safe
                    self.lost(&current);
                    return reason(ended);
                }
                better = self.better(), if current.is_tls => better, // dropped, its sockets close
            };
            current = self.replace(current, better).await;
        }
    }

    /// Takes note of how a link has ended.
    fn lost(&mut self, link: &Running) {
        let now = clock::now();
        self.lost = Some(link.neighbour);
        if link.frames.is_too_small() {
            self.preference.unfit(now);
        } else {
            let lasted = now.saturating_duration_since(link.since);
            let how = if link.frames.is_silent() { Loss::Silence } else { Loss::Told };
            self.preference.lost(now, link.is_tls, lasted, how);
        }
    }

    /// Puts a link into service.
    fn start(&mut self, mut link: Established, not_udp: String) -> Running {
        let (id, is_tls, in_service) = (link.id(), link.is_tls(), link.in_service());
        let (neighbour, frames) = (link.neighbour(), link.frames());
        let (inner, stop) = (Arc::clone(&self.inner), self.stop.clone());
        let task = self.inner.spawn(async move { link.run(&inner, &stop).await });
        self.preference.up(is_tls);
        self.progress.lock().link_up(id, not_udp);
        Running { id, neighbour, is_tls, frames, since: clock::now(), in_service, task }
    }

    /// Waits until UDP works; while it does not, says why.
    async fn better(&mut self) -> Established {
        loop {
            let interval = self.preference.interval(clock::now());
            time::sleep(self.inner.jittered(interval)).await;
            let endpoints = self.endpoints.borrow().clone();
            let race = Race {
                inner: &self.inner,
                endpoints: &endpoints,
                site: self.site,
                plan: Plan::BETTER,
            };
            let mut not_udp = String::new();
            let note = |endpoint: String, error: &DialError| not_udp = error.not_udp(&endpoint);
            match race.run(note).await {
                Ok(won) => match self.greet(won).await {
                    Ok((link, _)) => return link,
                    Err(error) => self.progress.lock().not_udp = format!("UDP: {error}"),
                },
                Err(_) if not_udp.is_empty() => {}
                Err(_) => self.progress.lock().not_udp = not_udp,
            }
            self.preference.still_fails(clock::now());
        }
    }

    /// Moves from one link to another without a moment between them; returns the one that is there then.
    async fn replace(&mut self, old: Running, better: Established) -> Running {
        let mut new = self.start(better, String::new());
        let settled = async {
            // Without an answer the link has ended before it was in service.
            if (&mut new.in_service).await.is_ok() {
                time::sleep(OVERLAP).await;
            }
        };
        let failed = tokio::select! {
            ended = &mut new.task => Some(ended), // cancel-safe
            () = settled => None, // cancel-safe
        };
        if let Some(ended) = failed {
            let why = if new.frames.is_too_small() { Rest::Unfit } else { Rest::Failed };
            self.preference.fell_back(clock::now(), why);
            self.progress.lock().fell_back(old.id, &reason(ended));
            return old;
        }
        Links(Arc::clone(&self.inner)).close(old.id, MOVED);
        // Its end is no loss: whatever the reason, it is told in the log.
        drop(old.task.await);
        tracing::info!(name = self.name, "link moved to UDP");
        new
    }
}

/// What the first dial since a loss tells of the neighbour, whose answer to the handshake begun then is this link.
fn absence(link: &Established, lost: Option<Neighbour>, began: Instant) -> Absence {
    if lost != Some(link.neighbour()) {
        return Absence::Away;
    }
    // Over TLS, and a proxy perhaps, anything may have taken long.
    if link.is_tls() {
        return Absence::Unknown;
    }
    let took = clock::now().saturating_duration_since(began);
    if was_there(took, link.rtt()) { Absence::None } else { Absence::Away }
}

fn reason(ended: Result<String, JoinError>) -> String {
    ended.unwrap_or_else(|_| "the link's task failed".to_owned())
}

impl Progress {
    fn link_up(&mut self, id: LinkId, not_udp: String) {
        self.up = Some(id);
        self.error.clear();
        self.attempts.clear();
        self.not_udp = not_udp;
        self.since_unix_ms = clock::unix_ms();
    }

    /// Another link, over UDP, was lost beside this one over TLS.
    fn fell_back(&mut self, to: LinkId, reason: &str) {
        self.link_up(to, format!("UDP came up and was lost: {reason}"));
    }

    fn link_down(&mut self, reason: String) {
        self.up = None;
        self.error = reason;
        self.not_udp.clear();
        self.since_unix_ms = clock::unix_ms();
    }

    fn failed(&mut self, error: &DialError) {
        self.error = error.to_string();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_are_told_of_udp_is_the_last_that_became_of_it() {
        let mut progress = Progress::default();
        progress.link_up(LinkId(1), "UDP to example.net:7443 unanswered".to_owned());
        for _ in 0..3 {
            progress.fell_back(LinkId(1), "no sign of life for 900 ms");
            assert_eq!(progress.not_udp, "UDP came up and was lost: no sign of life for 900 ms");
        }
    }
}
