//! From what is wanted and what is seen to what the routers are told.

use std::collections::BTreeSet;

use skein_api::{
    ConnectorSpec, Manifest, ProxyProtocol, Retry, Role, SiteSpec, SourceAddress, Strategy,
};
use skein_core::{Address, Port, Protocol, Room, SiteId};
use skein_wire::{
    config::canonicalise,
    proto::{
        control::{
            self, AutoListen, ConnectorConfig, ConnectorPort, LinkConfig, ListenerConfig,
            ListenerPort, ProxyConfig, RouterConfig, RouterSettings,
        },
        routing::{self, Record},
    },
};

use crate::{
    admission::{LeftOut, Services, admit},
    endpoint::{AutoEndpoint, AutoEndpoints, AutoPort, LocalPorts, assign},
    resources::Resources,
};

/// Metrics of the router listen here unless the site says otherwise: any free port, reported in the status.
const METRICS_LISTEN: &str = "127.0.0.1:0";
const MIB: u64 = 1 << 20;

/// A connector that was deleted while flows ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Draining {
    /// What it was.
    pub connector: Manifest<ConnectorSpec>,
    /// Running flows are reset now.
    pub reset: bool,
}

/// Everything a plan depends on.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// This site.
    pub site: SiteId,
    /// What is wanted.
    pub resources: &'a Resources,
    /// Deleted connectors with running flows.
    pub draining: &'a [Draining],
    /// Addresses served anywhere in the network, this site included.
    pub services: &'a Services,
    /// How much of it may open by itself.
    pub automatic: Room,
    /// Automatic endpoints handed out so far.
    pub endpoints: &'a AutoEndpoints,
    /// Ports of this host.
    pub host: &'a LocalPorts,
    /// `host:port` under which others reach this site.
    pub advertise: &'a [String],
    /// Statements, endorsements and revocations the site stands on.
    pub records: Vec<Record>,
    /// Unix socket to which routers splice claims.
    pub claim_socket: &'a str,
    /// Sites whose revocations count.
    pub authorities: &'a [SiteId],
}

/// What follows from the [`Inputs`].
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// For every router, in canonical form.
    pub config: RouterConfig,
    /// To be kept: includes the endpoints handed out before.
    pub endpoints: AutoEndpoints,
    /// What would have an automatic endpoint if there were room.
    pub left_out: LeftOut,
}

/// Name of the automatic listener of an address. The colon keeps it apart from every listener a user can name.
#[must_use]
pub fn listener_name(address: &Address) -> String {
    format!("auto:{address}")
}

/// Plans. The same inputs give the same plan, byte for byte, and the plan's own endpoints change nothing.
#[must_use]
pub fn plan(inputs: Inputs<'_>) -> Plan {
    let spec = inputs.resources.site.as_ref().map_or_else(closed, |site| site.spec.clone());
    let (automatic, left_out) = admit(inputs.services, &spec.auto_listen, inputs.automatic);
    let host = host_ports(&spec, &inputs);
    let endpoints = assign(inputs.site, &automatic, inputs.endpoints, &host);
    let mut listeners: Vec<_> =
        inputs.resources.listeners.values().filter_map(|l| explicit(l, inputs.services)).collect();
    let open = automatic
        .iter()
        .filter_map(|(address, ports)| automatic_listener(address, ports, endpoints.get(address)?));
    listeners.extend(open);
    let draining = inputs
        .draining
        .iter()
        .filter(|gone| !inputs.resources.connectors.contains_key(&gone.connector.metadata.name));
    let connectors = inputs
        .resources
        .connectors
        .values()
        .map(|connector| connector_config(connector, false, false))
        .chain(draining.map(|gone| connector_config(&gone.connector, true, gone.reset)))
        .collect();
    let mut config = RouterConfig {
        settings: Some(settings(&spec, &inputs)),
        links: links(inputs.resources, inputs.site),
        listeners,
        connectors,
        records: inputs.records,
    };
    canonicalise(&mut config);
    Plan { config, endpoints, left_out }
}

/// A site whose document is lost opens nothing: no socket, no transit, no local endpoint that its owner may have ruled out.
fn closed() -> SiteSpec {
    SiteSpec {
        listen: Vec::new(),
        role: Some(Role::Edge),
        auto_listen: skein_api::AutoListen("none".to_owned()),
        ..SiteSpec::default()
    }
}

fn settings(spec: &SiteSpec, inputs: &Inputs<'_>) -> RouterSettings {
    let role = match spec.effective_role() {
        Role::Interior => routing::Role::Interior,
        Role::Edge => routing::Role::Edge,
    };
    let site_name = inputs.resources.site.as_ref().map(|site| site.metadata.name.clone());
    RouterSettings {
        role: role.into(),
        listen: spec.listen.clone(),
        advertise: if spec.listen.is_empty() { Vec::new() } else { inputs.advertise.to_vec() },
        claim_socket: inputs.claim_socket.to_owned(),
        memory_bytes: spec.limits.memory_mib.unwrap_or(0).saturating_mul(MIB),
        flows_max: spec.limits.flows.unwrap_or(0),
        site_name: site_name.unwrap_or_default(),
        auto_listen: Some(AutoListen { patterns: vec![spec.auto_listen.0.clone()] }),
        metrics_listen: spec.metrics_listen.clone().unwrap_or_else(|| METRICS_LISTEN.to_owned()),
        network_authorities: inputs.authorities.iter().map(|site| site.0.to_vec()).collect(),
        proxy: spec.proxy.as_ref().map(|proxy| ProxyConfig {
            url: proxy.url.clone(),
            credentials_file: proxy.credentials_file.clone().unwrap_or_default(),
            no_proxy: proxy.no_proxy.clone(),
        }),
    }
}

/// The site's own sockets are no place for automatic endpoints. Its targets are: an endpoint has an address of its own.
fn host_ports(spec: &SiteSpec, inputs: &Inputs<'_>) -> LocalPorts {
    let mut host = inputs.host.clone();
    let sockets = spec.listen.iter().chain(&spec.metrics_listen);
    host.reserved.extend(
        sockets
            .filter_map(|text| text.parse::<std::net::SocketAddr>().ok())
            .map(|addr| addr.port()),
    );
    host
}

fn links(resources: &Resources, site: SiteId) -> Vec<LinkConfig> {
    resources
        .links
        .values()
        .filter_map(|link| {
            let peer = SiteId::parse(&link.spec.peer).filter(|peer| *peer != site)?;
            Some(LinkConfig {
                name: link.metadata.name.clone(),
                peer_site_id: peer.0.to_vec(),
                endpoints: link.spec.endpoints.clone(),
                cost: link.spec.cost,
            })
        })
        .collect()
}

fn explicit(
    listener: &Manifest<skein_api::ListenerSpec>,
    services: &Services,
) -> Option<ListenerConfig> {
    let spec = &listener.spec;
    let ports = if spec.ports.is_empty() {
        let served = services.get(spec.address.as_str())?;
        served.keys().map(|port| listener_port(port.port, port.port, 0, port.protocol)).collect()
    } else {
        let port = |port: &skein_api::ListenerPort| {
            let number = u16::try_from(port.port).ok()?;
            let local = u16::try_from(port.local_port.unwrap_or(port.port)).ok()?;
            Some(listener_port(number, local, 0, port.protocol.into()))
        };
        spec.ports.iter().filter_map(port).collect()
    };
    Some(ListenerConfig {
        name: listener.metadata.name.clone(),
        address: spec.address.clone(),
        host: spec.host.clone(),
        ports,
        automatic: false,
    })
}

fn automatic_listener(
    address: &Address,
    ports: &BTreeSet<Port>,
    endpoint: &AutoEndpoint,
) -> Option<ListenerConfig> {
    let port = |port: &AutoPort| {
        let fallback = if port.fallback == port.local { 0 } else { port.fallback };
        listener_port(port.port, port.local, fallback, port.service().protocol)
    };
    let is_open = |known: &&AutoPort| ports.contains(&known.service());
    let ports: Vec<_> = endpoint.ports.iter().filter(is_open).map(port).collect();
    (!ports.is_empty()).then(|| ListenerConfig {
        name: listener_name(address),
        address: address.to_string(),
        host: endpoint.ip.to_string(),
        ports,
        automatic: true,
    })
}

fn listener_port(port: u16, local: u16, fallback: u16, protocol: Protocol) -> ListenerPort {
    ListenerPort {
        port: port.into(),
        local_port: local.into(),
        fallback_port: fallback.into(),
        protocol: protocol_number(protocol),
    }
}

fn connector_config(
    connector: &Manifest<ConnectorSpec>,
    draining: bool,
    reset: bool,
) -> ConnectorConfig {
    let spec = &connector.spec;
    let millis = |duration: Option<skein_api::Duration>| {
        duration.map_or(0, |duration| u64::try_from(duration.0.as_millis()).unwrap_or(u64::MAX))
    };
    let strategy = match spec.strategy {
        Strategy::Closest => routing::Strategy::Closest,
        Strategy::Balanced => routing::Strategy::Balanced,
        Strategy::Priority => routing::Strategy::Priority,
        Strategy::Weighted => routing::Strategy::Weighted,
    };
    let source = match spec.source {
        SourceAddress::Host => control::SourceAddress::Unspecified,
        SourceAddress::Site => control::SourceAddress::Site,
    };
    let port = |port: &skein_api::ConnectorPort| ConnectorPort {
        port: port.port,
        target_port: port.target_port.unwrap_or(port.port),
        protocol: protocol_number(port.protocol.into()),
    };
    ConnectorConfig {
        name: connector.metadata.name.clone(),
        address: spec.address.clone(),
        targets: spec.targets(),
        ports: spec.ports.iter().map(port).collect(),
        strategy: strategy.into(),
        priority: spec.priority,
        weight: spec.weight,
        cost: spec.cost,
        at_least_once: spec.retry == Retry::AtLeastOnce,
        idle_timeout_ms: millis(spec.idle_timeout),
        connect_timeout_ms: millis(spec.connect_timeout),
        source: source.into(),
        proxy_protocol: if spec.proxy_protocol == ProxyProtocol::V2 { 2 } else { 0 },
        draining,
        reset,
    }
}

fn protocol_number(protocol: Protocol) -> i32 {
    match protocol {
        Protocol::Tcp => routing::Protocol::Tcp.into(),
        Protocol::Udp => routing::Protocol::Udp.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use skein_api::{LinkSpec, ListenerSpec, Resource};
    use std::{collections::BTreeMap, sync::Arc};

    const SITE: SiteId = SiteId([1; 32]);
    const ROOM: Room = Room { per_site: 4, total: 8 };

    /// One address at another site.
    fn served(address: &str, ports: &[u16]) -> (Address, BTreeMap<Port, Arc<BTreeSet<SiteId>>>) {
        let sites = Arc::new(BTreeSet::from([SiteId([2; 32])]));
        let port = |port: &u16| (Port { port: *port, protocol: Protocol::Tcp }, sites.clone());
        (address.parse().unwrap(), ports.iter().map(port).collect())
    }

    fn resources(links: &[u8], connectors: &[(String, u32)], listeners: &[String]) -> Resources {
        let mut out = Resources::default();
        let mut insert = |resource| drop(out.insert(resource).unwrap());
        insert(Resource::Site(Manifest::new("hub", SiteSpec::default())));
        for peer in links {
            let peer_id = SiteId([*peer; 32]).to_string();
            let spec = LinkSpec { peer: peer_id, endpoints: vec!["h:1".into()], cost: 1 };
            insert(Resource::Link(Manifest::new(format!("link-{peer}"), spec)));
        }
        for (name, port) in connectors {
            let port = skein_api::ConnectorPort {
                port: *port,
                target_port: None,
                protocol: skein_api::Protocol::Tcp,
            };
            insert(Resource::Connector(Manifest::new(
                name.clone(),
                ConnectorSpec::new(name.clone(), vec![port]),
            )));
        }
        for name in listeners {
            let spec =
                ListenerSpec { address: name.clone(), host: "127.0.0.1".into(), ports: Vec::new() };
            insert(Resource::Listener(Manifest::new(name.clone(), spec)));
        }
        out
    }

    fn planned(
        resources: &Resources,
        services: &Services,
        endpoints: &AutoEndpoints,
        draining: &[Draining],
    ) -> Plan {
        plan(Inputs {
            site: SITE,
            resources,
            draining,
            services,
            automatic: ROOM,
            endpoints,
            host: &LocalPorts::default(),
            advertise: &["203.0.113.7:7443".to_owned()],
            records: Vec::new(),
            claim_socket: "/run/claim.sock",
            authorities: &[SITE],
        })
    }

    proptest! {
        #[test]
        fn a_plan_is_a_fixed_point(
            links in prop::collection::vec(0_u8..5, 0..4),
            connectors in prop::collection::vec(("[a-d]", 1_u32..65_536), 0..4),
            listeners in prop::collection::vec("[a-f]", 0..3),
            services in prop::collection::btree_map("[a-h]", prop::collection::btree_set(1_u16.., 1..3), 0..6),
        ) {
            let resources = resources(&links, &connectors, &listeners);
            let services: Services = services.iter()
                .map(|(name, ports)| served(name, &ports.iter().copied().collect::<Vec<_>>()))
                .collect();
            let first = planned(&resources, &services, &AutoEndpoints::new(), &[]);
            let second = planned(&resources, &services, &first.endpoints, &[]);
            prop_assert_eq!(&first, &second);
            prop_assert_eq!(
                skein_wire::config::hash(&first.config), skein_wire::config::hash(&second.config));
            let automatic = first.config.listeners.iter().filter(|l| l.automatic);
            let opened: usize = automatic.map(|listener| listener.ports.len()).sum();
            let left_out: usize = first.left_out.values().map(BTreeSet::len).sum();
            let offered: usize = services.values().map(BTreeMap::len).sum();
            prop_assert!(opened == offered.min(ROOM.per_site) && opened + left_out == offered);
            prop_assert!(first.config.links.iter().all(|link| link.peer_site_id != SITE.0));
        }
    }

    #[test]
    fn a_deleted_connector_drains_until_it_is_made_again() {
        let all = resources(&[], &[("db".into(), 5432)], &[]);
        let connector = all.connectors["db"].clone();
        let draining = [Draining { connector, reset: false }];
        let none = resources(&[], &[], &[]);
        let services = BTreeMap::new();
        let config = planned(&none, &services, &AutoEndpoints::new(), &draining).config;
        assert!(config.connectors.len() == 1 && config.connectors[0].draining);
        let config = planned(&all, &services, &AutoEndpoints::new(), &draining).config;
        assert!(config.connectors.len() == 1 && !config.connectors[0].draining);
    }

    #[test]
    fn a_listener_without_ports_takes_those_of_the_address() {
        let all = resources(&[], &[], &["db".into()]);
        let services = Services::from([served("db", &[5432])]);
        let config = planned(&all, &services, &AutoEndpoints::new(), &[]).config;
        let listener = config.listeners.iter().find(|l| l.name == "db").unwrap();
        assert_eq!(listener.ports[0].local_port, 5432);
        let config = planned(&all, &BTreeMap::new(), &AutoEndpoints::new(), &[]).config;
        assert!(config.listeners.is_empty());
    }

    #[test]
    fn without_a_site_document_nothing_is_opened() {
        let mut all = resources(&[1], &[("db".into(), 5432)], &[]);
        all.site = None;
        let services = Services::from([served("web", &[80])]);
        let config = planned(&all, &services, &AutoEndpoints::new(), &[]).config;
        let settings = config.settings.unwrap();
        assert!(settings.listen.is_empty() && settings.advertise.is_empty());
        assert_eq!(settings.role, i32::from(routing::Role::Edge));
        assert!(config.listeners.is_empty());
    }

    #[test]
    fn automatic_endpoints_follow_the_pattern() {
        let mut all = resources(&[], &[], &[]);
        all.site.as_mut().unwrap().spec.auto_listen = skein_api::AutoListen("pay.*".into());
        let services = Services::from([served("pay.a", &[80]), served("other", &[80])]);
        let config = planned(&all, &services, &AutoEndpoints::new(), &[]).config;
        assert_eq!(config.listeners.len(), 1);
        assert_eq!(config.listeners[0].name, "auto:pay.a");
    }

    #[test]
    fn a_site_that_offers_everything_leaves_room_for_the_others() {
        let all = resources(&[], &[], &[]);
        let flood: Vec<_> = (0..64).map(|n| served(&format!("a{n:02}"), &[80, 443])).collect();
        let mut services: Services = flood.into_iter().collect();
        let (backend, mut ports) = served("backend", &[80]);
        ports.values_mut().for_each(|sites| *sites = Arc::new([SiteId([3; 32])].into()));
        services.insert(backend, ports);
        // The flooding site adds a port of its own to it.
        services.extend([("shared".parse().unwrap(), services["backend" as &str].clone())]);
        services.get_mut("shared").unwrap().extend(served("shared", &[80, 81]).1);
        let port = Port { port: 80, protocol: Protocol::Tcp };
        let both = Arc::new([SiteId([2; 32]), SiteId([3; 32])].into());
        services.get_mut("shared").unwrap().insert(port, both);
        let plan = planned(&all, &services, &AutoEndpoints::new(), &[]);
        let names: Vec<_> = plan.config.listeners.iter().map(|l| l.address.as_str()).collect();
        assert_eq!(names, ["a00", "a01", "backend", "shared"]);
        assert_eq!(plan.config.listeners[3].ports.len(), 1);
        assert_eq!(plan.left_out.len(), 63);
        assert_eq!(plan.endpoints.len(), 4, "only what opens is kept");
        // A port the network no longer offers is no socket either.
        let known = plan.endpoints;
        services.get_mut("backend").unwrap().clear();
        let plan = planned(&all, &services, &known, &[]);
        assert!(plan.config.listeners.iter().all(|listener| listener.address != "backend"));
    }
}
