//! One connector: an address, and the targets that serve it here.

use super::target::{ConnectError, Target};
use crate::net;
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
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// Where the configuration does not say: long enough for a SYN to be sent again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A flow that nobody closes after its service was withdrawn is reset after so long.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(60 * 60);

#[derive(Debug)]
pub(super) struct Connector {
    /// Without `draining` and `reset`, which are no property of the connector but its end.
    pub(super) config: ConnectorConfig,
    address: Option<Address>,
    /// By service port.
    targets: BTreeMap<u16, Vec<Arc<Target>>>,
    next: AtomicUsize,
    flows: AtomicU64,
    /// Resets the flows.
    pub(super) abort: CancellationToken,
    /// Ends the checks: the connector was withdrawn.
    pub(super) withdrawn: CancellationToken,
}

impl Connector {
    pub(super) fn new(config: ConnectorConfig) -> Arc<Self> {
        let connect_timeout = duration_ms(config.connect_timeout_ms).unwrap_or(CONNECT_TIMEOUT);
        let mut targets = BTreeMap::<u16, Vec<_>>::new();
        for port in &config.ports {
            let ports = (u16::try_from(port.port), u16::try_from(port.target_port));
            let (Ok(service @ 1..), Ok(target @ 1..)) = ports else { continue };
            if port.protocol() == routing::Protocol::Udp {
                continue;
            }
            let hosts = config.targets.iter();
            let hosts = hosts.map(|host| Target::new(host.clone(), target, connect_timeout));
            targets.entry(service).or_default().extend(hosts);
        }
        Arc::new(Self {
            address: config.address.parse().ok(),
            targets,
            config,
            next: AtomicUsize::new(0),
            flows: AtomicU64::new(0),
            abort: CancellationToken::new(),
            withdrawn: CancellationToken::new(),
        })
    }

    pub(super) fn is_draining(&self) -> bool {
        self.withdrawn.is_cancelled()
    }

    /// Whether it serves this port of this address; its targets may be down.
    pub(super) fn serves(&self, address: &Address, port: u16) -> bool {
        self.address.as_ref() == Some(address) && self.targets.contains_key(&port)
    }

    pub(super) fn targets(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.targets.values().flatten()
    }

    /// Connects to one of the targets of `port`, in turn; those that are down come last.
    ///
    /// # Errors
    /// That of the last target; `None` without any.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(super) async fn connect(
        &self,
        port: u16,
        site: SiteId,
    ) -> Result<TcpStream, Option<ConnectError>> {
        let Some(targets) = self.targets.get(&port) else { return Err(None) };
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let mut order: Vec<_> =
            (0..targets.len()).map(|i| &targets[(first.wrapping_add(i)) % targets.len()]).collect();
        order.sort_by_key(|target| !target.is_up());
        let source = (self.config.source() == SourceAddress::Site).then_some(site);
        let mut last = None;
        for target in order {
            match target.connect(source).await {
                Ok(stream) => match net::tcp_flow_options(&stream) {
                    Ok(()) => return Ok(stream),
                    Err(error) => last = Some(error.into()),
                },
                Err(error) => last = Some(error),
            }
        }
        Err(last)
    }

    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        duration_ms(self.config.idle_timeout_ms)
    }

    /// Counts a flow until the guard is dropped.
    pub(super) fn count_flow(self: &Arc<Self>) -> FlowGuard {
        self.flows.fetch_add(1, Ordering::Relaxed);
        FlowGuard(Arc::clone(self))
    }

    pub(super) fn flows(&self) -> u64 {
        self.flows.load(Ordering::Relaxed)
    }

    /// The ports of which a target answers.
    fn ports_up(&self) -> Vec<Port> {
        let up = self.targets.iter().filter(|(_, targets)| targets.iter().any(|t| t.is_up()));
        up.map(|(&port, _)| Port { port, protocol: Protocol::Tcp }).collect()
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
            flows_active: self.flows(),
        }
    }
}

#[derive(Debug)]
pub(super) struct FlowGuard(Arc<Connector>);

impl Drop for FlowGuard {
    fn drop(&mut self) {
        self.0.flows.fetch_sub(1, Ordering::Relaxed);
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
