//! One connector: an address, and the targets that serve it here.

use super::target::{ConnectError, Place, Target};
use crate::net::{self, TargetSocket, TcpStream};
use parking_lot::Mutex;
use skein_core::{Address, AddressEntry, Port, Protocol, SiteId, Strategy};
use skein_wire::proto::{
    control::{ConnectorConfig, ConnectorStatus, SourceAddress},
    routing,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Where the configuration does not say: long enough for a SYN to be sent again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A flow that nobody closes after its service was withdrawn is reset after so long.
const DRAIN_MAX: Duration = Duration::from_secs(60 * 60);

/// The running flows of a service port. They outlive changes of its targets and settings: only its end is theirs too.
#[derive(Debug, Default)]
pub(super) struct Flows {
    count: AtomicU64,
    abort: CancellationToken,
    /// Stops the clock of an end that was taken back.
    ending: Mutex<Option<DropGuard>>,
}

impl Flows {
    /// Counts a flow until the guard is dropped.
    fn count_one(self: &Arc<Self>) -> FlowGuard {
        self.count.fetch_add(1, Ordering::Relaxed);
        FlowGuard(Arc::clone(self))
    }

    /// Resets them.
    pub(super) fn reset(&self) {
        self.abort.cancel();
    }

    /// Whether they were reset, and so would be every flow that joins them.
    fn is_reset(&self) -> bool {
        self.abort.is_cancelled()
    }

    /// Begins their last [`DRAIN_MAX`], to be run by the caller; `None` when there are none, or it has begun, or they were reset.
    pub(super) fn end(self: &Arc<Self>) -> Option<impl Future<Output = ()> + Send + 'static> {
        let mut ending = self.ending.lock();
        if ending.is_some() || self.is_reset() || self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let taken_back = CancellationToken::new();
        *ending = Some(taken_back.clone().drop_guard());
        let flows = Arc::clone(self);
        Some(async move {
            tokio::select! {
                () = tokio::time::sleep(DRAIN_MAX) => flows.reset(), // cancel-safe
                () = taken_back.cancelled() => {} // cancel-safe
            }
        })
    }

    /// They may go on after all.
    fn go_on(&self) {
        drop(self.ending.lock().take());
    }
}

#[derive(Debug)]
struct Service {
    targets: Vec<Arc<Target>>,
    flows: Arc<Flows>,
    /// Advertised by the predecessor: stays so until the first check of a new target says otherwise.
    is_presumed_up: bool,
}

impl Service {
    fn is_up(&self) -> bool {
        self.targets.iter().any(|target| target.is_up())
            || self.is_presumed_up && self.targets.iter().any(|target| target.is_unknown())
    }
}

#[derive(Debug)]
pub(super) struct Connector {
    /// Without `draining` and `reset`, which are no property of the connector but its end.
    pub(super) config: ConnectorConfig,
    address: Option<Address>,
    /// By service port.
    services: BTreeMap<Port, Service>,
    next: AtomicUsize,
    /// Ends the checks: the connector was withdrawn or replaced.
    pub(super) withdrawn: CancellationToken,
}

impl Connector {
    /// Takes over from `before`, the connector of the same name: targets that stay keep their health, and flows of a port of the address
    /// that stays keep going. Flows that were reset have ended: the port begins anew.
    pub(super) fn new(config: ConnectorConfig, before: Option<&Self>) -> Arc<Self> {
        let connect_timeout = duration_ms(config.connect_timeout_ms).unwrap_or(CONNECT_TIMEOUT);
        let address: Option<Address> = config.address.parse().ok();
        let mut services = BTreeMap::<Port, Service>::new();
        for port in &config.ports {
            let ports = (u16::try_from(port.port), u16::try_from(port.target_port));
            let (Ok(service @ 1..), Ok(target @ 1..)) = ports else { continue };
            let protocol = match port.protocol() {
                routing::Protocol::Udp => Protocol::Udp,
                routing::Protocol::Tcp | routing::Protocol::Unspecified => Protocol::Tcp,
            };
            let service = Port { port: service, protocol };
            let place = |host: &str| Place { host: host.to_owned(), port: target, protocol };
            let old = before.and_then(|before| before.services.get(&service));
            let targets = config.targets.iter().map(|host| {
                let same = |known: &&Arc<Target>| known.is(&place(host), connect_timeout);
                let kept = old.and_then(|old| old.targets.iter().find(same)).cloned();
                kept.unwrap_or_else(|| Target::new(place(host), connect_timeout))
            });
            let targets: Vec<_> = targets.collect();
            let old = old.filter(|_| before.is_some_and(|before| before.address == address));
            let is_draining = before.is_some_and(Self::is_draining);
            let served = services.entry(service).or_insert_with(|| Service {
                targets: Vec::new(),
                flows: old
                    .filter(|old| !old.flows.is_reset())
                    .map(|old| Arc::clone(&old.flows))
                    .unwrap_or_default(),
                is_presumed_up: !is_draining && old.is_some_and(Service::is_up),
            });
            served.targets.extend(targets);
            served.flows.go_on();
        }
        Arc::new(Self {
            address,
            services,
            config,
            next: AtomicUsize::new(0),
            withdrawn: CancellationToken::new(),
        })
    }

    /// The flows of its ports that `successor` does not serve.
    pub(super) fn flows_without<'a>(
        &'a self,
        successor: Option<&'a Self>,
    ) -> impl Iterator<Item = &'a Arc<Flows>> {
        let goes_on = move |flows: &Arc<Flows>| {
            let mut kept = successor.into_iter().flat_map(|s| s.services.values());
            kept.any(|service| Arc::ptr_eq(&service.flows, flows))
        };
        self.services.values().map(|service| &service.flows).filter(move |flows| !goes_on(flows))
    }

    pub(super) fn is_draining(&self) -> bool {
        self.withdrawn.is_cancelled()
    }

    /// Whether it serves this port of this address; its targets may be down.
    pub(super) fn serves(&self, address: &Address, port: Port) -> bool {
        self.address.as_ref() == Some(address) && self.services.contains_key(&port)
    }

    pub(super) fn targets(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.services.values().flat_map(|service| &service.targets)
    }

    /// Connects to one of the targets of `port`, in turn; those that are down come last. The flow counts until the guard is dropped.
    ///
    /// # Errors
    /// That of the last target; `None` without any.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(super) async fn connect(
        &self,
        port: Port,
        site: SiteId,
    ) -> Result<(TcpStream, FlowGuard), Option<ConnectError>> {
        let (order, counted) = self.in_turn(port).ok_or(None)?;
        let source = self.source(site);
        let mut last = None;
        for target in order {
            match target.connect(source).await {
                Ok(stream) => match net::tcp_flow_options(&stream) {
                    Ok(()) => return Ok((stream, counted)),
                    Err(error) => last = Some(error.into()),
                },
                Err(error) => last = Some(error),
            }
        }
        Err(last)
    }

    /// Opens a socket towards one of the targets of `port`, in turn; those that have refused datagrams lately come last. The flow counts
    /// until the guard is dropped.
    ///
    /// # Errors
    /// That of the last target; `None` without any.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(super) async fn open_datagrams(
        &self,
        port: Port,
        site: SiteId,
    ) -> Result<(TargetSocket, Arc<Target>, FlowGuard), Option<ConnectError>> {
        let (order, counted) = self.in_turn(port).ok_or(None)?;
        let mut last = None;
        for target in order {
            match target.open_datagrams(self.source(site)).await {
                Ok(socket) => return Ok((socket, Arc::clone(target), counted)),
                Err(error) => last = Some(error),
            }
        }
        Err(last)
    }

    /// The targets of `port` in the order in which they are to be tried, for a flow that counts from now on.
    fn in_turn(&self, port: Port) -> Option<(Vec<&Arc<Target>>, FlowGuard)> {
        let Service { targets, flows, .. } = self.services.get(&port)?;
        // Counted before it is one, so that an end that begins in the meantime includes it.
        let counted = flows.count_one();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let mut order: Vec<_> =
            (0..targets.len()).map(|i| &targets[(first.wrapping_add(i)) % targets.len()]).collect();
        order.sort_by_key(|target| (!target.is_up(), target.is_refusing()));
        Some((order, counted))
    }

    /// The site from whose source address a target is reached, where the connector wants that.
    fn source(&self, site: SiteId) -> Option<SiteId> {
        (self.config.source() == SourceAddress::Site).then_some(site)
    }

    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        duration_ms(self.config.idle_timeout_ms)
    }

    /// Flows that run, also those that targets and settings of before have taken.
    pub(super) fn flow_count(&self) -> u64 {
        self.services.values().map(|service| service.flows.count.load(Ordering::Relaxed)).sum()
    }

    /// The ports of which a target answers.
    fn ports_up(&self) -> Vec<Port> {
        let up = self.services.iter().filter(|(_, service)| service.is_up());
        up.map(|(&port, _)| port).collect()
    }

    /// What it adds to what this router advertises; `None` while nothing answers.
    fn entry(&self) -> Option<AddressEntry> {
        let ports = self.ports_up();
        if self.is_draining() || ports.is_empty() {
            return None;
        }
        Some(AddressEntry {
            address: self.address.clone()?,
            ports,
            strategy: strategy(self.config.strategy()),
            cost: self.config.cost,
            priority: self.config.priority,
            weight: self.config.weight,
            at_least_once: self.config.at_least_once,
        })
    }

    pub(super) fn status(&self) -> ConnectorStatus {
        ConnectorStatus {
            name: self.config.name.clone(),
            address: self.config.address.clone(),
            targets: self.targets().map(|target| target.status()).collect(),
            advertised: self.entry().is_some(),
            flows_active: self.flow_count(),
        }
    }
}

/// A flow that counts.
#[derive(Debug)]
pub(super) struct FlowGuard(Arc<Flows>);

impl FlowGuard {
    /// Completes when the flow is to be reset.
    pub(super) fn abort(&self) -> &CancellationToken {
        &self.0.abort
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One entry per address: connectors of the same address add their ports, and the most inviting settings count.
pub(super) fn entries<'a>(
    connectors: impl Iterator<Item = &'a Arc<Connector>>,
) -> Vec<AddressEntry> {
    let mut merged = BTreeMap::<Address, AddressEntry>::new();
    for entry in connectors.filter_map(|connector| connector.entry()) {
        merged
            .entry(entry.address.clone())
            .and_modify(|sum| {
                sum.ports.extend(&entry.ports);
                sum.ports.sort_unstable();
                sum.ports.dedup();
                sum.cost = sum.cost.min(entry.cost);
                sum.priority = sum.priority.min(entry.priority);
                sum.weight = sum.weight.max(entry.weight);
                sum.at_least_once &= entry.at_least_once;
            })
            .or_insert(entry);
    }
    merged.into_values().collect()
}

fn strategy(strategy: routing::Strategy) -> Strategy {
    match strategy {
        routing::Strategy::Closest => Strategy::Closest,
        routing::Strategy::Priority => Strategy::Priority,
        routing::Strategy::Weighted => Strategy::Weighted,
        routing::Strategy::Balanced | routing::Strategy::Unspecified => Strategy::Balanced,
    }
}

fn duration_ms(ms: u64) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_wire::proto::control::ConnectorPort;

    #[tokio::test(start_paused = true)]
    async fn an_end_resets_flows_after_an_hour_unless_it_is_taken_back() {
        let flows = Arc::<Flows>::default();
        assert!(flows.end().is_none(), "nothing to end");
        let flow = flows.count_one();
        let ending = flows.end().unwrap();
        assert!(flows.end().is_none(), "begun already");
        flows.go_on();
        ending.await;
        assert!(!flow.abort().is_cancelled());
        let begun = crate::clock::now();
        flows.end().unwrap().await;
        assert!(flow.abort().is_cancelled());
        assert!(crate::clock::now() - begun >= DRAIN_MAX);
    }
    #[tokio::test]
    async fn what_was_reset_can_be_served_again() {
        let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let target_port = listener.local_addr().unwrap().port().into();
        let config = ConnectorConfig {
            name: "db".into(),
            address: "db".into(),
            targets: vec!["127.0.0.1".into()],
            ports: vec![ConnectorPort { port: 5432, target_port, ..ConnectorPort::default() }],
            ..ConnectorConfig::default()
        };
        let first = Connector::new(config.clone(), None);
        let site = SiteId([1; 32]);
        let port = Port { port: 5432, protocol: Protocol::Tcp };
        let (_stream, running) = first.connect(port, site).await.unwrap();
        let changed = Connector::new(ConnectorConfig { cost: 5, ..config.clone() }, Some(&first));
        assert_eq!(changed.flow_count(), 1, "flows go on while the service does");
        changed.flows_without(None).for_each(|flows| flows.reset());
        assert!(running.abort().is_cancelled());
        let again = Connector::new(config, Some(&changed));
        let (_stream, fresh) = again.connect(port, site).await.unwrap();
        assert!(!fresh.abort().is_cancelled());
    }
}
