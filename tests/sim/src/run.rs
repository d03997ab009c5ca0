//! A run: builds the network of a scenario, lets time pass and things go wrong, and judges.

use crate::{
    association::Talks,
    controller::{self, Brain},
    entropy,
    fault::Leaving,
    flow::{Desk, Ledger},
    oracle,
    passage::Passages,
    scenario::{Fault, Scenario},
    site::Site,
    stall::Stalls,
};
use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use skein_api::{
    AutoListen, ConnectorPort, ConnectorSpec, LinkSpec, ListenerPort, ListenerSpec, Manifest,
    Protocol, SiteSpec,
};
use skein_netsim::{Host, LATENCY_US_MIN, Net, Process, TcpListener, UdpSocket};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Once, mpsc},
    time::Duration,
};
use tempfile::TempDir;
use tracing_subscriber::fmt::{format::Writer, time::FormatTime};

/// A step of time at most: processes run in turn, each for so long.
const TICK_US_MAX: u64 = 5_000;
const LINK_PORT: u16 = 7_443;
const SERVICE_PORT: u16 = 1_000;
const ENTRANCE_PORT: u16 = 20_000;
const TARGET_PORT: u16 = 10_000;
/// After the last fault, everything has so long to end. Longer than a session that nobody answers any more takes to notice.
const SETTLE_MS: u64 = 60_000;
/// After the last fault, links are up and databases equal within this: a dial and the longest wait between two, twice.
const CONVERGES_MS: u64 = 20_000;
/// A link that moves to a better carrier is up twice for a moment, which not everybody learns of at once.
const MOVES_MS: u64 = 5_000;
/// Between looks whether everything has ended.
const LOOK_MS: u64 = 1_000;
/// While a site leaves, between looks whether it has left.
const LEFT_CHECK_MS: u64 = 100;
/// An association over which nothing passes ends after this.
const ASSOCIATION_IDLE: Duration = Duration::from_secs(3);
/// So many looks in a row must find all well.
const CONTENT_LOOKS: u32 = 3;
const STACK_BYTES: usize = 8 << 20;

/// How a run went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// What the oracles object to; empty is good.
    pub failures: Vec<String>,
    /// Hash and number of everything that happened on the network.
    pub trace: (u64, u64),
    /// Virtual time, in milliseconds.
    pub virtual_ms: u64,
    /// Tries to open a flow, and flows that were opened.
    pub attempts: usize,
    /// Flows that were opened.
    pub opened: usize,
}

/// Tells logs the time of the simulation, and whose they are.
#[derive(Clone, Copy, Debug)]
pub struct VirtualTime;

impl FormatTime for VirtualTime {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        match skein_netsim::current() {
            Some(host) => {
                let now_us = host.net().now_us();
                write!(
                    w,
                    "{:>4}.{:03} {:<10}",
                    now_us / 1_000_000,
                    now_us / 1_000 % 1_000,
                    host.ip()
                )
            }
            None => write!(w, "{:19}", ""),
        }
    }
}

/// Runs a scenario on a thread of its own. Only the first run of a process can be repeated: see [`run_apart`](crate::run_apart).
///
/// # Errors
/// The scenario cannot be set up. What goes wrong in it is in the outcome, panics included.
pub fn run(scenario: &Scenario) -> Result<Outcome> {
    report_panics();
    let scenario = scenario.clone();
    let thread = std::thread::Builder::new().name(format!("seed-{}", scenario.seed));
    let (report, outcome) = mpsc::channel();
    let reporter = report.clone();
    thread.stack_size(STACK_BYTES).spawn(move || {
        entropy::seed_thread(scenario.seed);
        PANICS.set(Some(report));
        let outcome = Run::new(&scenario).and_then(Run::finish);
        // Nobody waits for it any more if this fails.
        let _ = reporter.send(outcome);
    })?;
    outcome.recv()?
}

/// A panic anywhere ends the run, as it ends a router's process. What is left of it stays where it is: unwinding would go through code
/// that expects the world to be whole.
fn report_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let Some(report) = PANICS.take() else { return print(info) };
            let failures = vec![format!("panic: {info}").replace('\n', " ")];
            let outcome =
                Outcome { failures, trace: (0, 0), virtual_ms: 0, attempts: 0, opened: 0 };
            // Nobody waits for it any more if this fails.
            let _ = report.send(Ok(outcome));
            loop {
                std::thread::park();
            }
        }));
    });
}

thread_local! {
    static PANICS: RefCell<Option<mpsc::Sender<Result<Outcome>>>> = const { RefCell::new(None) };
}

pub(crate) struct Run<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) net: Net,
    /// Clients, targets and controllers: they never die by accident.
    pub(crate) desk_process: Process,
    pub(crate) desk: Desk,
    pub(crate) passages: Arc<Passages>,
    /// No path between hosts is faster, so what is sent in a step arrives after it.
    pub(crate) tick_us: u64,
    pub(crate) sites: Vec<Site>,
    /// Routers that ended with all they knew, and when.
    pub(crate) kills_ms: Vec<(usize, u64)>,
    /// What goes wrong now.
    pub(crate) active: Vec<Fault>,
    pub(crate) leaving: Vec<Leaving>,
    pub(crate) gone: Vec<bool>,
    /// Sites that serve nothing any more.
    pub(crate) withdrawn: Vec<bool>,
    stalls: Stalls,
    _dir: TempDir,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario) -> Result<Self> {
        let net = Net::new(scenario.seed);
        let dir = tempfile::Builder::new().prefix("skein-sim").tempdir_in(memory_dir())?;
        let outside = net.host(Ipv4Addr::new(192, 0, 2, 1).into());
        let scripts = scenario.flows.iter().map(|f| (f.client.clone(), f.server.clone())).collect();
        let ledger = Arc::<Ledger>::default();
        let desk = Desk {
            net: net.clone(),
            ledger,
            scripts: Arc::new(scripts),
            talks: Arc::new(Talks::new(scenario.associations.len(), scenario.healed_ms())),
            associations: Arc::new(scenario.associations.clone()),
        };
        let passages = Arc::<Passages>::default();
        net.watch({
            let passages = Arc::clone(&passages);
            move |now_us, from, to, datagram| passages.note(now_us, from, to, datagram)
        });
        let mut run = Self {
            scenario,
            passages,
            tick_us: scenario.fastest_us().clamp(LATENCY_US_MIN, TICK_US_MAX),
            desk_process: Process::new(&outside)?,
            net,
            desk,
            sites: Vec::new(),
            kills_ms: Vec::new(),
            active: Vec::new(),
            leaving: Vec::new(),
            gone: vec![false; scenario.sites.len()],
            withdrawn: vec![false; scenario.sites.len()],
            stalls: Stalls::default(),
            _dir: dir,
        };
        run.build()?;
        Ok(run)
    }

    fn build(&mut self) -> Result<()> {
        let mut brains = Vec::new();
        let mut founder = None;
        for (index, plan) in self.scenario.sites.iter().enumerate() {
            let host = self.net.host(host_ip(index).into());
            if let Some(expiry_ms) = plan.nat_expiry_ms {
                let [_, _, high, low] = host_ip(index).octets();
                host.put_behind_nat(Ipv4Addr::new(198, 51, high, low).into(), expiry_ms * 1_000);
            }
            host.set_wall_offset_ms(plan.clock_ahead_ms);
            if plan.is_later {
                skein_wire_later::speak_later(host.ip());
            }
            let identity = controller::identity(self.scenario.seed, index)?;
            let founder = *founder.get_or_insert_with(|| identity.site_id());
            // Signed when every clock agreed.
            let unix_s = host.unix_ms() / 1_000 - plan.clock_ahead_ms / 1_000;
            brains.push((host, Brain::new(identity, format!("site-{index}"), founder, unix_s)?));
        }
        for link in &self.scenario.links {
            let pair = brains.get_disjoint_mut([link.from, link.to]);
            let [(from_host, from), (to_host, to)] = pair.ok().context("a link to itself")?;
            from.befriend(to);
            to.befriend(from);
            for (a, b) in [(&*from_host, &*to_host), (to_host, from_host)] {
                self.net.change_path(a, b, |path| path.clone_from(&link.path));
            }
        }
        let ids: Vec<_> = brains.iter().map(|(_, brain)| brain.identity.site_id()).collect();
        for (index, (host, mut brain)) in brains.into_iter().enumerate() {
            self.want(index, &mut brain, &ids);
            let dir = self._dir.path().join(index.to_string());
            self.sites.push(Site::new(index, self.scenario.seed, host, brain, dir));
        }
        for index in 0..self.sites.len() {
            self.start_targets(index)?;
            let site = &mut self.sites[index];
            self.desk_process.run(|| site.start_controller())?;
            site.start_router()?;
        }
        self.start_clients();
        Ok(())
    }

    /// The resources that a user of the site would have applied.
    fn want(&self, index: usize, brain: &mut Brain, ids: &[skein_core::SiteId]) {
        let scenario = self.scenario;
        let is_interior = scenario.sites[index].is_interior;
        let listen = is_interior.then(|| format!("0.0.0.0:{LINK_PORT}"));
        let spec = SiteSpec {
            listen: listen.into_iter().collect(),
            auto_listen: AutoListen("none".into()),
            ..SiteSpec::default()
        };
        if is_interior {
            brain.advertise = vec![format!("{}:{LINK_PORT}", host_ip(index))];
        }
        let resources = &mut brain.resources;
        resources.site = Some(Manifest::new(format!("site-{index}"), spec));
        for link in scenario.links.iter().filter(|link| link.from == index) {
            let name = format!("to-{}", link.to);
            let spec = LinkSpec {
                peer: ids[link.to].to_string(),
                endpoints: vec![format!("{}:{LINK_PORT}", host_ip(link.to))],
                cost: 1,
            };
            resources.links.insert(name.clone(), Manifest::new(name, spec));
        }
        for (kind, protocol) in scenario.kinds_of_services() {
            for service in scenario.services.iter().filter(|service| service.site == index) {
                let name = format!("{kind}-{}", service.address);
                let port = ConnectorPort {
                    port: SERVICE_PORT.into(),
                    target_port: Some(u32::from(TARGET_PORT) + service.address as u32),
                    protocol,
                };
                let mut spec = ConnectorSpec::new(name.clone(), vec![port]);
                let ends = protocol == Protocol::Udp;
                spec.idle_timeout = ends.then_some(skein_api::Duration(ASSOCIATION_IDLE));
                resources.connectors.insert(name.clone(), Manifest::new(name, spec));
            }
            for address in 0..scenario.addresses() {
                let name = format!("{kind}-{address}");
                let port = ListenerPort {
                    port: SERVICE_PORT.into(),
                    local_port: Some(u32::from(ENTRANCE_PORT) + address as u32),
                    protocol,
                };
                let host = Ipv4Addr::LOCALHOST.to_string();
                let spec = ListenerSpec { address: name.clone(), host, ports: vec![port] };
                resources.listeners.insert(name.clone(), Manifest::new(name, spec));
            }
        }
    }

    pub(crate) fn start_targets(&self, index: usize) -> Result<()> {
        for service in self.scenario.services.iter().filter(|service| service.site == index) {
            let port = TARGET_PORT + u16::try_from(service.address)?;
            let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let listener = match TcpListener::bind(&self.sites[index].host, addr) {
                // The power came back twice.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => continue,
                outcome => outcome?,
            };
            let socket = UdpSocket::bind(&self.sites[index].host, addr)?;
            let (desk, address) = (self.desk.clone(), service.address);
            self.desk_process.handle().spawn(async move { desk.serve(index, listener).await });
            let desk = self.desk.clone();
            let answering = async move { desk.answer(index, address, socket).await };
            self.desk_process.handle().spawn(answering);
        }
        Ok(())
    }

    fn start_clients(&self) {
        let give_up_ms = self.scenario.healed_ms() + SETTLE_MS / 2;
        for (index, flow) in self.scenario.flows.iter().enumerate() {
            let port = ENTRANCE_PORT + flow.address as u16;
            let entrance: (Host, SocketAddr) =
                (self.sites[flow.site].host.clone(), (Ipv4Addr::LOCALHOST, port).into());
            let (desk, wait) = (self.desk.clone(), Duration::from_millis(flow.at_ms));
            self.desk_process.handle().spawn(async move {
                tokio::time::sleep(wait).await;
                desk.client(index, entrance, give_up_ms).await;
            });
        }
        for (index, association) in self.scenario.associations.iter().enumerate() {
            let host = self.sites[association.site].host.clone();
            let port = ENTRANCE_PORT + association.address as u16;
            let (desk, entrance) = (self.desk.clone(), (Ipv4Addr::LOCALHOST, port).into());
            let conversing = async move { desk.converse(index, host, entrance).await };
            self.desk_process.handle().spawn(conversing);
        }
    }

    /// Lets time pass, and watches.
    pub(crate) fn pass_until(&mut self, until_ms: u64) {
        loop {
            let now_ms = self.net.now_us() / 1_000;
            if now_ms >= until_ms {
                return;
            }
            let look_ms = if self.leaving.is_empty() { LOOK_MS } else { LEFT_CHECK_MS };
            self.step_until(until_ms.min(now_ms + look_ms));
            self.forget_left();
            let mut stalls = std::mem::take(&mut self.stalls);
            stalls.look(self);
            self.stalls = stalls;
        }
    }

    fn step_until(&mut self, until_ms: u64) {
        let mut processes = vec![&mut self.desk_process];
        processes.extend(self.leaving.iter_mut().map(|leaving| &mut leaving.process));
        processes.extend(self.sites.iter_mut().filter_map(Site::process));
        self.net.run_until(until_ms * 1_000, self.tick_us, &mut processes);
    }

    /// Lets everything happen, and judges.
    fn finish(mut self) -> Result<Outcome> {
        // Ends of faults come before beginnings at the same time.
        let mut changes = BTreeMap::<(u64, bool), Vec<&Fault>>::new();
        for fault in &self.scenario.faults {
            changes.entry((fault.at_ms, true)).or_default().push(fault);
            if !fault.is_for_good() {
                changes.entry((fault.at_ms + fault.for_ms, false)).or_default().push(fault);
            }
        }
        for ((at_ms, begins), faults) in changes {
            self.pass_until(at_ms);
            for fault in faults {
                tracing::info!(at_ms, begins, ?fault, "fault");
                self.change(fault, begins).with_context(|| format!("{fault:?}"))?;
            }
        }
        let healed_ms = self.scenario.healed_ms();
        self.pass_until(self.scenario.judged_from_ms());
        let (mut failures, mut content) = (Vec::new(), 0);
        let mut converged_by_ms = healed_ms + CONVERGES_MS;
        while content < CONTENT_LOOKS {
            let now_ms = self.net.now_us() / 1_000;
            failures = oracle::unconverged(&self);
            if failures.is_empty() {
                converged_by_ms = converged_by_ms.max(now_ms + MOVES_MS);
            } else if now_ms >= converged_by_ms {
                break;
            }
            failures.extend(oracle::open_matters(&self, now_ms));
            if !failures.is_empty() && now_ms >= healed_ms + SETTLE_MS {
                break;
            }
            content = if failures.is_empty() { content + 1 } else { 0 };
            self.pass_until(now_ms + LOOK_MS);
        }
        failures.extend(oracle::flows(&self));
        failures.extend(oracle::associations(&self));
        failures.extend(self.passages.first_loop());
        failures.extend_from_slice(self.stalls.failures());
        let attempts = self.desk.ledger.attempts();
        Ok(Outcome {
            failures,
            trace: self.net.trace(),
            virtual_ms: self.net.now_us() / 1_000,
            attempts: attempts.len(),
            opened: attempts.values().filter(|attempt| attempt.client.read > 0).count(),
        })
    }
}

fn host_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, (index / 250) as u8, (index % 250) as u8 + 1)
}

/// Where files cost nothing, if there is such a place.
fn memory_dir() -> std::path::PathBuf {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}
