//! One flow at its ingress: choose an egress, open, try another if that fails, splice.

use super::{Ingress, Outstanding};
use crate::{
    clock,
    egress::{Local, LocalFlow},
    flows::{FlowRecord, Outcome, Progress, may_provide},
    net,
    session::{DialError, Flow, FlowError},
    splice::{self, Terms},
};
use bytes::Bytes;
use skein_core::{Address, Fib, Pin, Port, Provider, RouterId, SiteId, Verdict, Wanted, choose};
use skein_wire::proto::{
    routing::Protocol,
    session::{FlowOpen, refused::Reason},
};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep, sleep_until, timeout},
};

/// An accepted client waits so long for a path to come back.
const NO_PATH_MAX: Duration = Duration::from_secs(5);
/// An egress tries several targets before it answers; beyond this, which includes the flow's turn in the session, it is taken for lost.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Candidates that were lost, not refused, are tried again after so long.
const LOST_RETRY: Duration = Duration::from_millis(250);

/// Of what a client says first, so much is read before an egress has accepted: a request, and what a flow that waits may hold.
const FIRST_LEN_MAX: usize = 16 << 10;

/// What a client that has just been accepted wants.
#[derive(Clone, Debug)]
pub(super) struct Opening {
    pub(super) address: Address,
    pub(super) service: Port,
    pub(super) client_address: SocketAddr,
    /// The number of the flow among those of its listener.
    pub(super) turn: u64,
}

/// A flow that an egress has accepted, with what was read from the client and its target has not got yet.
enum Opened {
    /// Elsewhere.
    Remote(Box<Flow>, Bytes),
    /// Here. An earlier candidate may have been elsewhere, so bytes may have been read as well.
    Local(Box<LocalFlow>, Bytes),
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

/// Serves a client from its acceptance to its end.
pub(super) async fn serve(
    ingress: Ingress,
    opening: Opening,
    client: TcpStream,
    mut record: FlowRecord,
    turn: u64,
) {
    let surroundings = &ingress.0.config.surroundings;
    let progress = record.progress();
    let opening_counted = ingress.count_opening(&opening.address);
    let attempt = Attempt {
        ingress: &ingress,
        opening: &opening,
        client: &client,
        flow_id: record.flow_id,
        progress: &progress,
    };
    let opened = match net::tcp_flow_options(&client) {
        Ok(()) if opening_counted.is_none() => Err(Outcome::Overloaded),
        Ok(()) => tokio::select! {
            opened = attempt.open(&mut record, turn) => opened,
            () = splice::reset_of(&client) => Err(Outcome::NearReset),
            () = ingress.0.abort.cancelled() => Err(Outcome::Aborted),
        },
        Err(_gone) => Err(Outcome::NearReset),
    };
    drop(opening_counted);
    record.outcome = match opened {
        Ok((Opened::Remote(flow, first), _counted)) => {
            let buffer = &surroundings.buffer;
            let abort = &ingress.0.abort;
            let terms = Terms { buffer, progress: &progress, idle_timeout: None, abort };
            let (egress_site, address) = (record.egress_site, &opening.address);
            let allowed =
                |trust: &_| egress_site.is_some_and(|site| may_provide(trust, site, address));
            tokio::select! {
                // Polled first, because only then does dropping it reset both sides.
                biased;
                outcome = splice::with_flow(client, *flow, first, terms) => outcome,
                () = surroundings.revoked(allowed) => {
                    tracing::debug!("flow reset: its egress may not serve the address any more");
                    Outcome::Aborted
                }
            }
        }
        Ok((Opened::Local(flow, first), _counted)) => {
            flow.splice(client, first, &progress, &ingress.0.abort).await
        }
        Err(outcome) => {
            splice::reset(client);
            outcome
        }
    };
}

/// What every attempt of one flow shares.
struct Attempt<'a> {
    ingress: &'a Ingress,
    opening: &'a Opening,
    client: &'a TcpStream,
    flow_id: [u8; 16],
    progress: &'a Progress,
}

impl Attempt<'_> {
    /// Tries candidates until one accepts.
    async fn open(
        &self,
        record: &mut FlowRecord,
        turn: u64,
    ) -> Result<(Opened, Outstanding), Outcome> {
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
                self.read_first(&mut first)?;
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
            at_least_once: chosen.entry.at_least_once,
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

    async fn open_local(&self, first: &Bytes) -> Result<Opened, Failure> {
        let local = Local {
            address: &self.opening.address,
            port: self.opening.service.port,
            client: Some(self.opening.client_address),
            flow_id: self.flow_id,
        };
        match self.ingress.0.config.egress.connect_local(local).await {
            Ok(flow) => Ok(Opened::Local(Box::new(flow), first.clone())),
            Err(refusal) => Err(Failure::Refused(refusal.reason)),
        }
    }

    /// Takes what the client has sent already, without waiting for it.
    fn read_first(&self, first: &mut Bytes) -> Result<(), Outcome> {
        if !first.is_empty() {
            return Ok(());
        }
        match self.ingress.0.config.surroundings.buffer.try_read(self.client, FIRST_LEN_MAX) {
            Ok(read) => *first = read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_reset) => return Err(Outcome::NearReset),
        }
        Ok(())
    }

    /// Opens the flow at another router.
    ///
    /// What the client has sent goes along with the open unless that would forfeit the retry at an alternative: once handed over, the
    /// target may have seen it.
    async fn open_remote(&self, candidate: &Candidate, first: &Bytes) -> Result<Opened, Failure> {
        let goes_along = candidate.at_least_once || !candidate.has_alternative;
        let (along, later) =
            if goes_along { (first.clone(), Bytes::new()) } else { (Bytes::new(), first.clone()) };
        let handed_over = AtomicBool::new(false);
        let opened = tokio::select! {
            opened = self.exchange(candidate, &along, &handed_over) => opened,
            () = self.path_gone(candidate, &handed_over) => Err(FlowError::SessionLost),
        };
        match opened {
            Ok(Ok(flow)) => {
                // Counted here what the splice does not see.
                self.progress.add_from_socket(flow.send.sent_bytes());
                Ok(Opened::Remote(Box::new(flow), later))
            }
            Ok(Err(failure)) => Err(failure),
            Err(_lost) if handed_over.load(Ordering::Relaxed) && !candidate.at_least_once => {
                Err(Failure::Fatal(Outcome::SessionLost))
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
        let session = match self.ingress.0.config.sessions.session(router, Pin(0)).await {
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
            protocol: Protocol::Tcp.into(),
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
