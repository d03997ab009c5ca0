//! `Connector`: an address served from here.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    invalid::Invalids,
    listener::{PORTS_MAX, check_address, check_port},
    manifest::Spec,
    resource::Kind,
    value::{Duration, Protocol, valid_host},
};

/// Targets of one connector: each is checked for health.
pub const CONNECTOR_TARGETS_MAX: usize = 64;
const DEFAULT_TARGET: &str = "127.0.0.1";
/// Highest weight, priority and cost: sums over all providers of an address fit 32 bits.
const WEIGHT_MAX: u32 = 65_535;

/// The wanted state of a served address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConnectorSpec {
    /// The address it serves.
    pub address: String,
    /// Where the workload is; default 127.0.0.1. Not together with `hosts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Several workloads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Ports served.
    pub ports: Vec<ConnectorPort>,
    /// How other sites choose among the sites that serve the address.
    #[serde(default)]
    pub strategy: Strategy,
    /// Under `priority`: lower is taken first.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: u32,
    /// Under `weighted`: the share.
    #[serde(default = "default_weight", skip_serializing_if = "is_one")]
    pub weight: u32,
    /// Added to the metric of paths to this connector.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cost: u32,
    /// Whether a flow may be sent again elsewhere after bytes of it were sent.
    #[serde(default)]
    pub retry: Retry,
    /// Flows that carry nothing for this long are ended. Absent: never; on UDP ports after 60 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Duration>,
    /// How long a target may take to accept. Absent: the router's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<Duration>,
    /// Which source address targets see.
    #[serde(default)]
    pub source: SourceAddress,
    /// Whether targets are told the client's address first.
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
}

impl ConnectorSpec {
    /// A connector to a port of this host, everything else as by default.
    #[must_use]
    pub fn new(address: impl Into<String>, ports: Vec<ConnectorPort>) -> Self {
        Self {
            address: address.into(),
            host: None,
            hosts: Vec::new(),
            ports,
            strategy: Strategy::default(),
            priority: 0,
            weight: default_weight(),
            cost: 0,
            retry: Retry::default(),
            idle_timeout: None,
            connect_timeout: None,
            source: SourceAddress::default(),
            proxy_protocol: ProxyProtocol::default(),
        }
    }

    /// The hosts to connect to, with the default filled in.
    #[must_use]
    pub fn targets(&self) -> Vec<String> {
        match (&self.host, self.hosts.is_empty()) {
            (_, false) => self.hosts.clone(),
            (Some(host), true) => vec![host.clone()],
            (None, true) => vec![DEFAULT_TARGET.to_owned()],
        }
    }
}

/// One port of a connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConnectorPort {
    /// Port of the service, as other sites see it.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u32,
    /// Port of the workload. Absent: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub target_port: Option<u32>,
    /// What it carries.
    #[serde(default)]
    pub protocol: Protocol,
}

/// How other sites choose among the sites that serve an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Strategy {
    /// The smallest path metric.
    Closest,
    /// The fewest outstanding flows, path metric added.
    #[default]
    Balanced,
    /// The lowest priority that is reachable.
    Priority,
    /// In proportion to weights.
    Weighted,
}

impl From<Strategy> for skein_core::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Closest => Self::Closest,
            Strategy::Balanced => Self::Balanced,
            Strategy::Priority => Self::Priority,
            Strategy::Weighted => Self::Weighted,
        }
    }
}

/// When a flow that was lost is tried again elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Retry {
    /// Only while none of its bytes were sent.
    #[default]
    Safe,
    /// Also afterwards: the service must stand seeing the same bytes twice.
    AtLeastOnce,
}

/// Which source address targets see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum SourceAddress {
    /// What the kernel picks: 127.0.0.1 for targets on loopback.
    #[default]
    Host,
    /// An address of 127.128.0.0/9 for each remote site (loopback targets only).
    Site,
}

/// Whether targets are told the client's address first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ProxyProtocol {
    /// They are not.
    #[default]
    None,
    /// By a PROXY protocol version 2 header.
    V2,
}

const fn default_weight() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
const fn is_zero(value: &u32) -> bool {
    *value == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
const fn is_one(value: &u32) -> bool {
    *value == 1
}

impl Spec for ConnectorSpec {
    const KIND: Kind = Kind::Connector;

    fn validate(&self, invalids: &mut Invalids) {
        check_address(&self.address, invalids);
        let both = self.host.is_some() && !self.hosts.is_empty();
        invalids.check(!both, "spec.host", "must be absent when hosts is given");
        let rule = "must be an IP address or a host name, without a port";
        if let Some(host) = &self.host {
            invalids.check(valid_host(host), "spec.host", rule);
        }
        let at_most = format!("must have at most {CONNECTOR_TARGETS_MAX} entries");
        invalids.check(self.hosts.len() <= CONNECTOR_TARGETS_MAX, "spec.hosts", at_most);
        for (index, host) in self.hosts.iter().enumerate().take(CONNECTOR_TARGETS_MAX) {
            invalids.check(valid_host(host), format!("spec.hosts[{index}]"), rule);
            let first = self.hosts.iter().position(|other| other == host) == Some(index);
            invalids.check(first, format!("spec.hosts[{index}]"), "must not be listed twice");
        }
        self.validate_ports(invalids);
        let has_udp = self.ports.iter().any(|port| port.protocol == Protocol::Udp);
        invalids.check(
            !has_udp || self.proxy_protocol == ProxyProtocol::None,
            "spec.proxyProtocol",
            "must be none on a connector with a udp port: datagrams have no beginning to put it in front of",
        );
        for (field, value) in [
            ("spec.priority", self.priority),
            ("spec.weight", self.weight),
            ("spec.cost", self.cost),
        ] {
            invalids.check(value <= WEIGHT_MAX, field, format!("must be at most {WEIGHT_MAX}"));
        }
        for (field, timeout) in
            [("spec.idleTimeout", self.idle_timeout), ("spec.connectTimeout", self.connect_timeout)]
        {
            let zero = timeout.is_some_and(|timeout| timeout.0.is_zero());
            invalids.check(!zero, field, "must be longer than 0");
        }
    }
}

impl ConnectorSpec {
    fn validate_ports(&self, invalids: &mut Invalids) {
        let holds = (1..=PORTS_MAX).contains(&self.ports.len());
        invalids.check(holds, "spec.ports", format!("must have 1 to {PORTS_MAX} entries"));
        let mut seen = Vec::new();
        for (index, port) in self.ports.iter().enumerate().take(PORTS_MAX) {
            check_port(port.port, format!("spec.ports[{index}].port"), invalids);
            if let Some(target) = port.target_port {
                check_port(target, format!("spec.ports[{index}].targetPort"), invalids);
            }
            let key = (port.port, port.protocol);
            invalids.check(
                !seen.contains(&key),
                format!("spec.ports[{index}]"),
                "must not be listed twice",
            );
            seen.push(key);
        }
    }
}
