//! Which egress takes a flow: candidates are tried until one accepts.

use super::{Ingress, Outstanding};
use crate::{
    clock,
    egress::{Egress, Local, Refusal},
    flows::{FlowRecord, Outcome, may_provide},
    session::{Class, DialError, Flow, FlowError},
};
use bytes::Bytes;
use skein_core::{
    Address, Fib, Pin, Port, Protocol, Provider, RouterId, SiteId, Verdict, Wanted, choose,
};
use skein_wire::proto::{
    routing,
    session::{FlowOpen, refused::Reason},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::watch,
    time::{sleep, sleep_until, timeout},
};

/// An accepted client waits so long for a path to come back.
const NO_PATH_MAX: Duration = Duration::from_secs(5);
/// An egress tries several targets before it answers; beyond this, which includes the flow's turn in the session, it is taken for lost.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Candidates that were lost, not refused, are tried again after so long.
const LOST_RETRY: Duration = Duration::from_millis(250);

/// What a client that has just been accepted wants.
#[derive(Clone, Debug)]
pub(super) struct Opening {
    pub(super) address: Address,
    pub(super) service: Port,
    pub(super) client_address: SocketAddr,
    /// The number of the flow among those of its listener.
    pub(super) turn: u64,
}

/// A flow that an egress has accepted.
pub(super) enum Opened<L> {
    /// Elsewhere, with what was read from the client and its target has not got yet.
    Remote(Box<Flow>, Bytes),
    /// Here. An earlier candidate may have been elsewhere, so bytes may have been read as well.
    Local(L, Bytes),
}

/// What clients of one protocol do in their own way while an egress is chosen.
pub(super) trait Client: Sync {
    /// A local target that took the flow.
    type Local: Send;
    const CLASS: Class;

    /// What the client has said so far, to go along with an open; `before` is what this gave last.
    ///
    /// # Errors
    /// How the client has ended.
    fn first(&self, ingress: &Ingress, before: Bytes) -> Result<Bytes, Outcome>;

    /// Whether it may be said to several targets, as the network itself does with a datagram.
    fn is_repeatable(&self) -> bool;

    /// The flow was opened towards a candidate, which has not answered yet.
    fn began(&self, flow: &Flow);

    /// Opens the flow towards a local target.
    ///
    /// # Errors
    /// Why it was refused.
    fn open_local(
        &self,
        egress: &Egress,
        local: Local<'_>,
    ) -> impl Future<Output = Result<Self::Local, Refusal>> + Send;
}

/// Why a candidate did not take a flow.
enum Failure {
    /// It said no: nothing reached its target.
    Refused(Reason),
    /// It could not be reached, and payload was not handed over: another may be tried.
    Lost,
    /// The whole flow fails.
    Fatal(Outcome),
}

/// One candidate.
struct Candidate {
    router: RouterId,
    site: SiteId,
    /// Whether others are left if this one fails.
    has_alternative: bool,
    at_least_once: bool,
    is_local: bool,
}

/// What every attempt of one flow shares.
pub(super) struct Attempt<'a, C> {
    pub(super) ingress: &'a Ingress,
    pub(super) opening: &'a Opening,
    pub(super) client: &'a C,
    pub(super) flow_id: [u8; 16],
}

impl<C: Client> Attempt<'_, C> {
    /// Tries candidates until one accepts.
    pub(super) async fn open(
        &self,
        record: &mut FlowRecord,
        turn: u64,
    ) -> Result<(Opened<C::Local>, Outstanding), Outcome> {
        let deadline = clock::now() + NO_PATH_MAX;
        let mut fib = self.ingress.0.config.surroundings.fib.clone();
        let (mut refused, mut lost) = (Vec::new(), Vec::new());
        let mut first = Bytes::new();
        loop {
            let snapshot = Arc::clone(&fib.borrow_and_update());
            let excluded = [&refused[..], &lost[..]].concat();
            let Some(candidate) = self.candidate(&snapshot, &excluded, turn) else {
                self.wait_for_candidates(&mut fib, &refused, &mut lost, deadline).await?;
                continue;
            };
            record.egress_site = Some(candidate.site);
            let counted = self.ingress.count_towards(candidate.router);
            let failure = if candidate.is_local {
                self.open_local(&first).await
            } else {
                first = self.client.first(self.ingress, first)?;
                self.open_remote(&candidate, &first).await
            };
            match failure {
                Ok(opened) => return Ok((opened, counted)),
                Err(Failure::Fatal(outcome)) => return Err(outcome),
                Err(Failure::Refused(reason)) => {
                    tracing::debug!(router = %candidate.router, ?reason, "candidate refused");
                    refused.push(candidate.router);
                }
                Err(Failure::Lost) => {
                    tracing::debug!(router = %candidate.router, "candidate lost");
                    lost.push(candidate.router);
                }
            }
            self.ingress.0.config.surroundings.counters.retries.add(1);
        }
    }

    fn candidate(&self, fib: &Fib, excluded: &[RouterId], turn: u64) -> Option<Candidate> {
        let address = &self.opening.address;
        let mut excluded = excluded.to_vec();
        excluded.extend(self.not_allowed(fib));
        let wanted = Wanted { address, port: Some(self.opening.service), excluded: &excluded };
        let choice = choose(fib, wanted, &|router| self.ingress.outstanding(router), turn);
        let chosen = choice.chosen()?;
        let could_serve = |(provider, verdict): &&(&Provider, Verdict)| {
            !matches!(verdict, Verdict::PortNotServed | Verdict::Excluded)
                && provider.router != chosen.router
        };
        Some(Candidate {
            router: chosen.router,
            site: chosen.site,
            has_alternative: choice.candidates.iter().find(could_serve).is_some(),
            at_least_once: chosen.entry.at_least_once || self.client.is_repeatable(),
            is_local: fib.is_local(chosen.router),
        })
    }

    /// Providers that advertise the address but may not serve it to this site.
    fn not_allowed(&self, fib: &Fib) -> Vec<RouterId> {
        let address = &self.opening.address;
        let trust = self.ingress.0.config.surroundings.trust.borrow();
        let allowed = |site: SiteId| may_provide(&trust, site, address);
        let providers = fib.addresses.get(address).map_or(&[][..], |providers| providers);
        providers.iter().filter(|p| !allowed(p.site)).map(|p| p.router).collect()
    }

    /// Waits until there may be a candidate; those that were lost get another chance.
    async fn wait_for_candidates(
        &self,
        fib: &mut watch::Receiver<Arc<Fib>>,
        refused: &[RouterId],
        lost: &mut Vec<RouterId>,
        deadline: Instant,
    ) -> Result<(), Outcome> {
        let retry = !lost.is_empty();
        if !refused.is_empty() && !retry {
            return Err(Outcome::Refused);
        }
        lost.clear();
        tokio::select! {
            biased;
            () = sleep_until(deadline.into()) => Err(Outcome::Unreachable),
            changed = fib.changed() => changed.map_err(|_closed| Outcome::Aborted),
            () = sleep(LOST_RETRY), if retry => Ok(()),
        }
    }

    async fn open_local(&self, first: &Bytes) -> Result<Opened<C::Local>, Failure> {
        let local = Local {
            address: &self.opening.address,
            port: self.opening.service.port,
            client: Some(self.opening.client_address),
            flow_id: self.flow_id,
        };
        match self.client.open_local(&self.ingress.0.config.egress, local).await {
            Ok(flow) => Ok(Opened::Local(flow, first.clone())),
            Err(refusal) => Err(Failure::Refused(refusal.reason)),
        }
    }

    /// Opens the flow at another router.
    ///
    /// What the client has sent goes along with the open unless that would forfeit the retry at an alternative: once handed over, the
    /// target may have seen it.
    async fn open_remote(
        &self,
        candidate: &Candidate,
        first: &Bytes,
    ) -> Result<Opened<C::Local>, Failure> {
        let goes_along = candidate.at_least_once || !candidate.has_alternative;
        let (along, later) =
            if goes_along { (first.clone(), Bytes::new()) } else { (Bytes::new(), first.clone()) };
        let handed_over = AtomicBool::new(false);
        let opened = tokio::select! {
            opened = self.exchange(candidate, &along, &handed_over) => opened,
            () = self.path_gone(candidate, &handed_over) => Err(FlowError::SessionLost),
        };
        match opened {
            Ok(Ok(flow)) => Ok(Opened::Remote(Box::new(flow), later)),
            Ok(Err(failure)) => Err(failure),
            Err(error) if handed_over.load(Ordering::Relaxed) && !candidate.at_least_once => {
                Err(Failure::Fatal(Outcome::from(&error)))
            }
            // Asked again it would say the same.
            Err(error @ FlowError::Malformed(_)) if !candidate.has_alternative => {
                Err(Failure::Fatal(Outcome::from(&error)))
            }
            Err(_lost) => Err(Failure::Lost),
        }
    }

    async fn exchange(
        &self,
        candidate: &Candidate,
        along: &Bytes,
        handed_over: &AtomicBool,
    ) -> Result<Result<Flow, Failure>, FlowError> {
        let router = candidate.router;
        let overloaded = || match candidate.has_alternative {
            true => Failure::Refused(Reason::Overloaded),
            false => Failure::Fatal(Outcome::Overloaded),
        };
        let sessions = &self.ingress.0.config.sessions;
        let session = match sessions.session(router, Pin(0), C::CLASS).await {
            Ok(session) => session,
            Err(DialError::Overloaded) => return Ok(Err(overloaded())),
            Err(error) => {
                tracing::debug!(%router, %error, "no session");
                return Ok(Err(Failure::Lost));
            }
        };
        // Only now: a dial that takes long, or fails, must not use up the memory of flows that go elsewhere.
        let Some(window) = session.window() else { return Ok(Err(overloaded())) };
        let head = self.head();
        let handed_over = || handed_over.store(true, Ordering::Relaxed);
        // Also while it waits for its turn: a peer that acknowledges nothing lets nobody have one.
        let replied = timeout(REPLY_TIMEOUT, async {
            let mut flow = Flow::open(&session, window, &head, along.clone(), handed_over).await?;
            self.client.began(&flow);
            let reply = flow.reply().await?;
            Ok::<_, FlowError>((flow, reply))
        });
        match replied.await.map_err(|_elapsed| FlowError::SessionLost)?? {
            (flow, Ok(())) => Ok(Ok(flow)),
            (_, Err(refused)) => Ok(Err(Failure::Refused(refused.reason()))),
        }
    }

    fn head(&self) -> FlowOpen {
        FlowOpen {
            address: self.opening.address.to_string(),
            port: self.opening.service.port.into(),
            protocol: match self.opening.service.protocol {
                Protocol::Tcp => routing::Protocol::Tcp.into(),
                Protocol::Udp => routing::Protocol::Udp.into(),
            },
            flow_id: self.flow_id.to_vec(),
            client: self.opening.client_address.to_string(),
            ..FlowOpen::default()
        }
    }

    /// Completes when no path leads to the candidate any more: at once when another can be tried, else after a while.
    async fn path_gone(&self, candidate: &Candidate, handed_over: &AtomicBool) {
        let mut fib = self.ingress.0.config.surroundings.fib.clone();
        let reachable = |fib: &Arc<Fib>| fib.routes.contains_key(&candidate.router);
        loop {
            if fib.wait_for(|fib| !reachable(fib)).await.is_err() {
                return;
            }
            let is_free = candidate.at_least_once || !handed_over.load(Ordering::Relaxed);
            if candidate.has_alternative && is_free {
                return;
            }
            if timeout(NO_PATH_MAX, fib.wait_for(reachable)).await.is_err() {
                return;
            }
        }
    }
}
