//! `skctl expose`, `skctl unexpose`

use clap::{Args, ValueEnum};
use skein_api::{
    ConnectorPort, ConnectorSpec, Duration, Manifest, Phase, ProxyProtocol, Resource, Retry,
    SourceAddress, Strategy,
};

use crate::{
    args::Global,
    client::Client,
    command::{
        port::{PortPair, ProtocolArg},
        resource::{self, free_name},
    },
    error::Failure,
    output::note,
};

/// Serves an address of the network from here
///
/// Every other site gets a local endpoint for the address and flows end at the targets named here. Exposing an address
/// again changes it. Connections to a target on this machine come from 127.0.0.1, as if a local program made them: a
/// target that trusts localhost trusts the whole network (see --source and --proxy-protocol).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl expose postgres --port 5432
  skctl expose web.prod --port 80:8080 --port 443:8443
  skctl expose db --port 5432 --target 10.0.0.5 --target 10.0.0.6 --strategy balanced
  skctl expose ldap --port 389 --target 10.0.0.53
  skctl expose redis --port 6379 --source site
  skctl expose dns --port 53/udp --port 53/tcp
  skctl expose game --port 27015 --protocol udp --idle-timeout 5m")]
pub(crate) struct Expose {
    /// Name of the service: lower-case DNS labels with dots
    address: String,
    /// Port of the service and, after a colon, of the target
    #[arg(short, long = "port", value_name = "P[:TARGETPORT][/udp]", required = true)]
    ports: Vec<PortPair>,
    /// What ports carry that do not say it themselves
    #[arg(long, value_enum, default_value = "tcp")]
    protocol: ProtocolArg,
    /// Where the workload is
    #[arg(long = "target", value_name = "HOST", default_value = "127.0.0.1")]
    targets: Vec<String>,
    /// How other sites choose among the sites that serve the address
    #[arg(long, value_enum, default_value = "balanced")]
    strategy: StrategyArg,
    /// Under --strategy priority: lower goes first
    #[arg(long, value_name = "N", default_value_t = 0)]
    priority: u32,
    /// Under --strategy weighted: the share
    #[arg(long, value_name = "N", default_value_t = 1)]
    weight: u32,
    /// Added to the cost of paths to this site
    #[arg(long, value_name = "N", default_value_t = 0)]
    cost: u32,
    /// Whether a lost flow may be sent again elsewhere after bytes of it were sent
    #[arg(long, value_enum, default_value = "safe")]
    retry: RetryArg,
    /// Ends flows that carry nothing for this long; default: never, on UDP ports after 60s
    #[arg(long, value_name = "DURATION")]
    idle_timeout: Option<Duration>,
    /// How long a target may take to accept
    #[arg(long, value_name = "DURATION")]
    connect_timeout: Option<Duration>,
    /// What targets on this machine see as the client: this host, or an address for each remote site
    #[arg(long, value_enum, default_value = "host")]
    source: SourceArg,
    /// Tells targets the client's address in front of the flow
    #[arg(long, value_enum, default_value = "none", value_name = "VERSION")]
    proxy_protocol: ProxyArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StrategyArg {
    /// The shortest path
    Closest,
    /// The fewest outstanding flows
    Balanced,
    /// The lowest priority that is reachable
    Priority,
    /// In proportion to weights
    Weighted,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RetryArg {
    /// Only while nothing was sent
    Safe,
    /// The service stands seeing the same bytes twice
    AtLeastOnce,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SourceArg {
    /// As the kernel picks: 127.0.0.1
    Host,
    /// An address of 127.128.0.0/9 for each remote site
    Site,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProxyArg {
    /// No header
    None,
    /// PROXY protocol version 2
    V2,
}

/// Stops serving an address from here
///
/// New flows go elsewhere at once. Running ones are left alone until the last one ends, for at most an hour.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl unexpose postgres\n  skctl unexpose postgres --now")]
pub(crate) struct Unexpose {
    /// The address
    address: String,
    /// Resets running flows, also those left from an earlier `unexpose`
    #[arg(long)]
    now: bool,
}

impl Expose {
    fn spec(&self) -> ConnectorSpec {
        let ports = self.ports.iter().map(|pair| ConnectorPort {
            port: pair.port,
            target_port: pair.local,
            protocol: pair.protocol.unwrap_or_else(|| self.protocol.into()),
        });
        let mut spec = ConnectorSpec::new(self.address.clone(), ports.collect());
        match self.targets.as_slice() {
            [one] => spec.host = Some(one.clone()),
            several => spec.hosts = several.to_vec(),
        }
        spec.strategy = match self.strategy {
            StrategyArg::Closest => Strategy::Closest,
            StrategyArg::Balanced => Strategy::Balanced,
            StrategyArg::Priority => Strategy::Priority,
            StrategyArg::Weighted => Strategy::Weighted,
        };
        spec.priority = self.priority;
        spec.weight = self.weight;
        spec.cost = self.cost;
        spec.retry = match self.retry {
            RetryArg::Safe => Retry::Safe,
            RetryArg::AtLeastOnce => Retry::AtLeastOnce,
        };
        spec.idle_timeout = self.idle_timeout;
        spec.connect_timeout = self.connect_timeout;
        spec.source = match self.source {
            SourceArg::Host => SourceAddress::Host,
            SourceArg::Site => SourceAddress::Site,
        };
        spec.proxy_protocol = match self.proxy_protocol {
            ProxyArg::None => ProxyProtocol::None,
            ProxyArg::V2 => ProxyProtocol::V2,
        };
        spec
    }
}

pub(crate) async fn run(global: &Global, args: Expose) -> Result<(), Failure> {
    let spec = args.spec();
    // The name comes later; every other rule is checked before anything is asked of the controller.
    resource::check(&Resource::Connector(Manifest::new("new", spec.clone())))?;
    let mut client = Client::connect(global).await?;
    let connectors = client.get("Connector", "").await?;
    let name = connectors
        .iter()
        .find(|connector| matches!(connector, Resource::Connector(c) if c.spec.address == args.address))
        .map_or_else(|| free_name(&args.address, &connectors), |found| found.name().to_owned());
    let targets = spec.targets();
    let wanted = Resource::Connector(Manifest::new(name.clone(), spec));
    let changes = client.apply(&[wanted], false).await?;
    resource::show_changes(global, changes, |change| match change.action.as_str() {
        "unchanged" => format!("{} is already served like this.", args.address),
        "changed" => format!("Changed how {} is served.", args.address),
        _ => format!("Serving {} to the network.", args.address),
    })?;
    if matches!(args.source, SourceArg::Host) && targets.iter().any(|host| is_loopback(host)) {
        note(
            global,
            "note: the target sees connections from 127.0.0.1; if it trusts localhost, it now trusts every \
                      site that may reach the address (see --source and --proxy-protocol)",
        );
    }
    warn_of_targets(global, &mut client, &name).await
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Waits for the first check of the targets. A target that is down is no failure: it may come up later.
async fn warn_of_targets(global: &Global, client: &mut Client, name: &str) -> Result<(), Failure> {
    let (phase, message) = resource::settled(global, client, "Connector", name).await?;
    if phase == Phase::Error {
        note(global, format_args!("warning: {message}"));
    }
    Ok(())
}

pub(crate) async fn unexpose(global: &Global, args: Unexpose) -> Result<(), Failure> {
    let mut client = Client::connect(global).await?;
    for text in client.unserve(&args.address, args.now).await? {
        note(global, text);
    }
    note(global, format_args!("No longer serving {}.", args.address));
    Ok(())
}
