//! The one task that drives the routing engine: link events, messages and configuration go in; records, forwarding snapshots and trust
//! come out.
//!
//! It never waits for a peer: messages to neighbours are sent by tasks of their own, one at a time per link, and the engine is asked for the next
//! one only when the last has left.

mod boot;
mod drain;
mod hello;
mod settings;
mod status;
mod trace;

use crate::{
    api::{Controller, LearnedRecords, Order},
    claims::Claims,
    clock,
    config::Config,
    data::DataPlane,
    key::KeyStore,
    link::{LinkEvent, LinkEvents, LinkGone, LinkUp},
    metrics::{RoutingGauges, Sources},
    router::Runtimes,
};
use boot::Booted;
pub(crate) use drain::DrainRequest;
use drain::{Draining, poll_drain};
use hello::HelloBook;
use settings::MetricsServer;
use skein_core::{Engine, Fib, Input, LinkId, Output, Record, TrustView};
use skein_trust::{IdentityCell, RouterIdentity, RouterNotary, TrustCell};
use skein_wire::{
    convert,
    proto::{
        control::{ProbeReply, RouterConfig, from_router},
        routing::LinkMessage,
    },
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_util::sync::CancellationToken;

/// How often the status is compared with the last one sent: rates and round-trip times move all the time.
const STATUS_TICK: Duration = Duration::from_secs(1);
/// Changes of state are reported after this; a burst of them becomes one report.
const STATUS_SOON: Duration = Duration::from_millis(50);
/// A certificate that was asked for and has not come is asked for again after this.
const CERTIFICATE_RETRY: Duration = Duration::from_secs(60);

/// Statements a neighbour introduces itself with: its own, its endorsement of us, and room for what may come.
const STATEMENTS_MAX: usize = 4;

/// What the task is made of.
#[derive(Debug)]
pub(crate) struct ControlConfig {
    pub(crate) config: Config,
    pub(crate) controller: Controller,
    pub(crate) key: KeyStore,
    pub(crate) runtimes: Runtimes,
    pub(crate) drains: mpsc::Receiver<DrainRequest>,
    pub(crate) cancel: CancellationToken,
}

/// Runs a router's control half: waits for its controller to say who it is, then drives the engine until drained or cancelled.
///
/// # Cancel safety
/// Dropping it leaves the data plane's tasks to end with their runtime.
pub(crate) async fn run(config: ControlConfig) {
    let cancel = config.cancel.clone();
    let booted = tokio::select! {
        () = cancel.cancelled() => return, // cancel-safe
        booted = boot::boot(config) => booted, // dropped only at the end
    };
    match booted {
        Ok(Some(booted)) => Box::pin(Control::new(booted).run()).await,
        Ok(None) => {}
        Err(error) => tracing::error!(%error, "the data plane cannot be built"),
    }
}

struct LinkEntry {
    cost: u16,
    /// A message is on its way to the neighbour.
    sending: bool,
}

struct Control {
    controller: Controller,
    key: KeyStore,
    runtimes: Runtimes,
    drains: mpsc::Receiver<DrainRequest>,
    cancel: CancellationToken,
    identity: Arc<IdentityCell>,
    trust: Arc<TrustCell>,
    hello: Arc<HelloBook>,
    engine: Engine<RouterNotary>,
    data: DataPlane,
    events: LinkEvents,
    entries: watch::Receiver<Vec<skein_core::AddressEntry>>,
    links: BTreeMap<LinkId, LinkEntry>,
    sends: JoinSet<(LinkId, Result<(), LinkGone>)>,
    jobs: JoinSet<()>,
    claims: Claims,
    claim_socket: Option<PathBuf>,
    config: Arc<RouterConfig>,
    config_version: u64,
    site: status::LocalSite,
    fib: Arc<Fib>,
    view: Arc<TrustView>,
    learned: LearnedRecords,
    gauges: Arc<RoutingGauges>,
    metrics: MetricsServer,
    problems: Vec<String>,
    network: status::Network,
    network_stale: bool,
    /// The database of which that is the view.
    network_edition: (u64, usize),
    status_due: Option<Instant>,
    draining: bool,
    /// When a certificate was asked for that has not come.
    certificate_asked: Option<Instant>,
}

/// Why the loop turned.
enum Turn {
    Order(Option<Order>),
    Link(Option<LinkEvent>),
    Sent(LinkId, Result<(), LinkGone>),
    Addresses,
    EngineDue(&'static str),
    StatusDue,
    Drain(DrainRequest),
    Drained(u64),
    Nothing,
    Cancelled,
}

impl Control {
    fn new(booted: Booted) -> Self {
        let Booted { config, first, welcome, identity, trust, hello, engine, data, events, router } =
            booted;
        let ControlConfig { config: _, controller, key, runtimes, drains, cancel } = config;
        let gauges = Arc::<RoutingGauges>::default();
        let sources = Sources {
            data: data.clone(),
            routing: Arc::clone(&gauges),
            data_runtime: runtimes.data.clone(),
            control_runtime: runtimes.control.clone(),
        };
        let mut control = Self {
            entries: data.egress.entries(),
            metrics: MetricsServer::new(sources),
            site: status::LocalSite { router, boot_epoch: welcome.boot_epoch },
            view: trust.view(),
            controller,
            key,
            runtimes,
            drains,
            cancel,
            identity,
            trust,
            hello,
            engine,
            data,
            events,
            links: BTreeMap::new(),
            sends: JoinSet::new(),
            jobs: JoinSet::new(),
            claims: Claims::new(),
            claim_socket: None,
            config: Arc::default(),
            config_version: 0,
            fib: Arc::default(),
            learned: LearnedRecords::default(),
            gauges,
            problems: Vec::new(),
            network: status::Network::default(),
            network_stale: true,
            network_edition: (0, 0),
            status_due: None,
            draining: false,
            certificate_asked: None,
        };
        if let Some((version, config)) = first {
            control.configure(version, config);
        }
        control
    }

    async fn run(mut self) {
        let mut status_tick = time::interval(STATUS_TICK);
        status_tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut draining: Draining = None;
        loop {
            self.take_outputs();
            let turn = self.turn(&mut status_tick, &mut draining).await;
            match turn {
                Turn::Order(Some(order)) => self.obey(order, &mut draining),
                Turn::Link(Some(event)) => self.handle_link_event(event),
                Turn::Sent(id, outcome) => self.sent(id, outcome),
                Turn::Addresses => {
                    let entries = self.entries.borrow_and_update().clone();
                    self.input(Input::Addresses(entries));
                    self.status_soon();
                }
                Turn::EngineDue(task) => {
                    let started = clock::now();
                    self.engine.handle_timeout(started, clock::unix_s());
                    self.gauges.ran(task, clock::now().saturating_duration_since(started));
                }
                Turn::StatusDue => {
                    self.renew_certificate();
                    self.report_status();
                }
                Turn::Drain(request) => self.start_drain(request, &mut draining),
                Turn::Drained(flows_reset) => {
                    let request = draining.take().map(|(_, request)| request);
                    self.finish(flows_reset, request).await;
                    return;
                }
                Turn::Nothing => {}
                Turn::Order(None) | Turn::Link(None) | Turn::Cancelled => break,
            }
        }
        self.data.links.shutdown().await;
    }

    /// Waits for the next thing to do. Every arm is cancel-safe.
    async fn turn(&mut self, status_tick: &mut time::Interval, draining: &mut Draining) -> Turn {
        let (engine_due, task) = self.engine.poll_timeout().unzip();
        let status_due = self.status_due;
        tokio::select! {
            () = self.cancel.cancelled() => Turn::Cancelled,
            order = self.controller.orders.recv() => Turn::Order(order),
            event = self.events.recv() => Turn::Link(event),
            Some(sent) = self.sends.join_next() => match sent {
                Ok((id, outcome)) => Turn::Sent(id, outcome),
                Err(_panicked) => Turn::Nothing, // Its link's queue stays closed until the link goes.
            },
            Some(_ended) = self.jobs.join_next() => Turn::Nothing,
            Ok(()) = self.entries.changed() => Turn::Addresses,
            () = sleep_until(engine_due) => Turn::EngineDue(task.unwrap_or_default()),
            () = sleep_until(status_due) => Turn::StatusDue,
            _ = status_tick.tick() => Turn::StatusDue,
            Some(request) = self.drains.recv() => Turn::Drain(request),
            flows_reset = poll_drain(draining) => Turn::Drained(flows_reset),
        }
    }

    fn input(&mut self, input: Input) {
        let started = clock::now();
        self.engine.handle_input(input, started, clock::unix_s());
        self.gauges.ran("input", clock::now().saturating_duration_since(started));
    }

    fn status_soon(&mut self) {
        self.status_due.get_or_insert_with(|| clock::now() + STATUS_SOON);
    }

    fn obey(&mut self, order: Order, draining: &mut Draining) {
        match order {
            Order::Attached(welcome) => {
                self.renew_certificate();
                if welcome.boot_epoch != self.site.boot_epoch {
                    tracing::warn!(
                        ours = self.site.boot_epoch,
                        theirs = welcome.boot_epoch,
                        "the controller counts another boot; it counts from the next start"
                    );
                }
            }
            Order::Certificate(certificate) => match self.key.accept(&certificate) {
                Ok(identity) => {
                    self.controller.facts.csr.send_replace(None);
                    self.certificate_asked = None;
                    self.identity.replace(Arc::new(identity));
                    self.input(Input::IdentityRenewed);
                    tracing::info!("certificate renewed");
                }
                Err(error) => tracing::error!(%error, "the new certificate cannot be used"),
            },
            Order::Configure { version, config } => self.configure(version, config),
            Order::Trace(request) => {
                let reply = self.trace(&request);
                self.controller.reply(from_router::Message::Trace(reply));
            }
            Order::Probe(request) => {
                let (links, replies) = (self.data.links.clone(), self.controller.replier());
                self.jobs.spawn(async move {
                    let results = links.probe(request.endpoints).await;
                    let reply = ProbeReply { id: request.id, results };
                    // Nobody waits for it any more when this fails.
                    let _ = replies.try_send(from_router::Message::Probe(reply));
                });
            }
            Order::Drain(drain) => {
                let deadline = clock::now() + Duration::from_millis(drain.deadline_ms);
                let request = DrainRequest { deadline, farewell: drain.farewell, done: None };
                self.start_drain(request, draining);
            }
        }
    }

    fn handle_link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up(up) => self.link_up(*up),
            LinkEvent::Changed { id, rtt, mtu } => {
                if let Some(entry) = self.links.get(&id) {
                    let cost = entry.cost;
                    self.input(Input::LinkChanged { link: id, cost, rtt_us: micros(rtt), mtu });
                }
            }
            LinkEvent::Message(id, message, _turn) => self.link_message(id, &message),
            LinkEvent::Down { id, reason } => {
                if self.links.remove(&id).is_some() {
                    tracing::debug!(link = %id, reason, "link down");
                    self.input(Input::LinkDown { link: id });
                    self.status_soon();
                }
            }
            LinkEvent::Claim(claim) => match self.claim_socket.clone() {
                Some(socket) => {
                    let claims = self.claims.clone();
                    self.jobs.spawn(async move { claims.pass_on(claim, socket).await });
                }
                None => tracing::info!("a claim arrived, but this site takes none"),
            },
        }
    }

    fn link_up(&mut self, up: LinkUp) {
        let cost = u16::try_from(up.cost.max(1)).unwrap_or(u16::MAX);
        let statements = up.hello.statements.iter().take(STATEMENTS_MAX).filter_map(|record| {
            Record::try_from(record)
                .inspect_err(
                    |error| tracing::warn!(%error, "a statement in the hello is malformed"),
                )
                .ok()
        });
        let input = Input::LinkUp(skein_core::LinkUp {
            link: up.id,
            peer: up.peer.router,
            peer_site: up.peer.site,
            cost,
            rtt_us: micros(up.rtt),
            mtu: up.mtu,
            statements: statements.collect(),
        });
        tracing::debug!(
            link = %up.id, name = up.name, incoming = up.incoming,
            peer = %up.peer.router, peer_site = up.hello.site_name, rtt_us = micros(up.rtt), "link up"
        );
        self.links.insert(up.id, LinkEntry { cost, sending: false });
        self.input(input);
        self.status_soon();
    }

    fn link_message(&mut self, id: LinkId, message: &LinkMessage) {
        match convert::parse_message(message) {
            Ok(Some(message)) => self.input(Input::Message { link: id, message }),
            Ok(None) => {} // For the link itself, or from a later version.
            Err(error) => {
                tracing::warn!(link = %id, %error, "the neighbour breaks the protocol");
                self.data.links.close(id, "malformed database message");
            }
        }
    }

    /// The engine's rule: after every input, drain every output.
    fn take_outputs(&mut self) {
        while let Some(output) = self.engine.poll_output() {
            match output {
                Output::SendReady(link) => self.send_next(link),
                Output::Publish(fib) => {
                    self.gauges.fib_publications.fetch_add(1, Ordering::Relaxed);
                    self.data.publish(&fib);
                    self.hello.set_handle(self.engine.handle());
                    self.fib = fib;
                    self.network_stale = true;
                    self.update_endpoints();
                    self.status_soon();
                }
                Output::Trust(view) => {
                    self.trust.publish(Arc::clone(&view));
                    self.data.publish_trust(&view);
                    self.view = view;
                    self.network_stale = true;
                    self.update_endpoints();
                    self.status_soon();
                }
                Output::Learned(records) => self.keep(&records),
                Output::LinkRefused { link, why } => {
                    tracing::warn!(%link, why, "link refused");
                    self.data.links.close(link, &why);
                }
            }
        }
    }

    /// Hands the engine's next message for a link to it, unless one is still on its way.
    fn send_next(&mut self, id: LinkId) {
        let Some(entry) = self.links.get_mut(&id).filter(|entry| !entry.sending) else { return };
        let Some(message) = self.engine.poll_send(id, clock::now()) else { return };
        entry.sending = true;
        let links = self.data.links.clone();
        self.sends.spawn(async move {
            let outcome = links.send(id, LinkMessage::from(&message)).await;
            (id, outcome)
        });
    }

    fn sent(&mut self, id: LinkId, outcome: Result<(), LinkGone>) {
        if let Some(entry) = self.links.get_mut(&id) {
            // A dead link's queue stays shut; its down event is on the way.
            entry.sending = outcome.is_err();
        }
        self.send_next(id);
    }

    /// Keeps statements for the controller, as long as the database does.
    fn keep(&mut self, records: &[Arc<Record>]) {
        self.learned.extend(records.iter().map(|record| (record.key, (&**record).into())));
        self.learned.retain(|key, _| self.engine.lsdb().get(key).is_some());
        self.controller.facts.learned.send_replace(Arc::new(self.learned.clone()));
    }

    /// Asks for another certificate when it is time to. Looked at all the time and by the wall clock: a host that slept may wake with one
    /// that has expired, and timers do not count sleep.
    fn renew_certificate(&mut self) {
        let now = clock::now();
        let waits = self.certificate_asked.is_some_and(|asked| now < asked + CERTIFICATE_RETRY);
        let unix_s = clock::unix_s();
        if !waits && self.identity.current().is_none_or(|current| is_due(&current, unix_s)) {
            self.certificate_asked = Some(now);
            self.controller.facts.csr.send_replace(Some(self.key.csr().to_vec()));
        }
    }
}

/// Whether another certificate is needed: two days before its end, or when a clock that was wrong made it for later.
fn is_due(current: &RouterIdentity, unix_s: i64) -> bool {
    let renewed_until = unix_s + boot::CERTIFICATE_RENEW_BEFORE_S;
    current.not_after_unix_s() < renewed_until || unix_s < current.not_before_unix_s()
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::is_due;
    use aws_lc_rs::rand::SystemRandom;
    use skein_core::SiteId;
    use skein_trust::{KeyRequest, RouterIdentity, SiteCa};

    #[test]
    fn a_certificate_is_renewed_in_time_and_after_a_wrong_clock() {
        const NOW: i64 = 1_800_000_000;
        const HOUR: i64 = 3_600;
        let random = SystemRandom::new();
        let ca = SiteCa::generate(SiteId([1; 32]), &random, NOW).unwrap();
        let key = KeyRequest::generate().unwrap();
        let issued = ca.issue_router(key.csr(), "router", &random, NOW).unwrap();
        let identity = RouterIdentity::new(issued.chain, key.private_key()).unwrap();
        assert!(!is_due(&identity, NOW) && !is_due(&identity, NOW + 23 * HOUR));
        assert!(is_due(&identity, NOW + 25 * HOUR));
        assert!(is_due(&identity, NOW + 90 * HOUR), "the host slept");
        assert!(is_due(&identity, NOW - 14 * 24 * HOUR), "it was made by a clock ahead");
    }
}
