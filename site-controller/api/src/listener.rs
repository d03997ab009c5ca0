//! `Listener`: an explicit local endpoint of an address.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use skein_core::Address;

use crate::{invalid::Invalids, manifest::Spec, resource::Kind, value::Protocol};

/// Ports of one listener or connector: each is a socket or a health check.
pub const PORTS_MAX: usize = 64;
const PORT_RULE: &str = "must be 1 to 65535";

/// The wanted state of a local endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerSpec {
    /// The address it leads to.
    pub address: String,
    /// IP address to listen on.
    #[serde(default = "default_host")]
    pub host: String,
    /// Ports. Empty: every port the address has, under its own number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ListenerPort>,
}

/// One port of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerPort {
    /// Port of the service.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u32,
    /// Port to listen on. Absent: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub local_port: Option<u32>,
    /// What it carries.
    #[serde(default)]
    pub protocol: Protocol,
}

fn default_host() -> String {
    "127.0.0.1".to_owned()
}

pub(crate) fn check_address(address: &str, invalids: &mut Invalids) {
    if let Err(why) = address.parse::<Address>() {
        invalids.add("spec.address", format!("is not an address: {why}"));
    }
}

pub(crate) fn check_port(port: u32, field: String, invalids: &mut Invalids) {
    invalids.check((1..=65_535).contains(&port), field, PORT_RULE);
}

impl Spec for ListenerSpec {
    const KIND: Kind = Kind::Listener;

    fn validate(&self, invalids: &mut Invalids) {
        check_address(&self.address, invalids);
        invalids.check(self.host.parse::<IpAddr>().is_ok(), "spec.host", "must be an IP address");
        let rule = format!("must have at most {PORTS_MAX} entries");
        invalids.check(self.ports.len() <= PORTS_MAX, "spec.ports", rule);
        let mut locals = Vec::new();
        for (index, port) in self.ports.iter().enumerate().take(PORTS_MAX) {
            check_port(port.port, format!("spec.ports[{index}].port"), invalids);
            if let Some(local) = port.local_port {
                check_port(local, format!("spec.ports[{index}].localPort"), invalids);
            }
            let local = (port.local_port.unwrap_or(port.port), port.protocol);
            let field = format!("spec.ports[{index}]");
            invalids.check(!locals.contains(&local), field, "must have a local port of its own");
            locals.push(local);
        }
    }
}
