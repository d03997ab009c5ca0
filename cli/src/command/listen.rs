//! `skctl listen`, `skctl unlisten`

use std::net::IpAddr;

use clap::Args;
use skein_api::{ListenerPort, ListenerSpec, Manifest, Phase, Resource};

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

/// Makes an explicit local endpoint for an address
///
/// Every address has an automatic endpoint on an address of its own in 127.64.0.0/10 (see `service list`). This makes one
/// more, at a place of your choice. Listening again at the same place changes it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl listen postgres --port 5432:15432
  skctl listen web.prod --host 192.168.1.10 --port 80
  skctl listen dns --port 53/udp --port 53/tcp
  skctl listen web.prod                        every port, on 127.0.0.1")]
pub(crate) struct Listen {
    /// The address
    address: String,
    /// IP address to listen on; one that others can reach lets them in
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port of the service and, after a colon, the local one; default: every port the address has
    #[arg(short, long = "port", value_name = "P[:LOCALPORT][/udp]")]
    ports: Vec<PortPair>,
    /// What ports carry that do not say it themselves
    #[arg(long, value_enum, default_value = "tcp")]
    protocol: ProtocolArg,
}

/// Closes the explicit local endpoints of an address
///
/// Running flows are left alone, UDP ones end with their socket.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  skctl unlisten postgres\n  skctl unlisten postgres --host 192.168.1.10"
)]
pub(crate) struct Unlisten {
    /// The address
    address: String,
    /// Only the endpoint at this IP address
    #[arg(long, value_name = "IP")]
    host: Option<IpAddr>,
}

pub(crate) async fn run(global: &Global, args: Listen) -> Result<(), Failure> {
    let ports = args.ports.iter().map(|pair| ListenerPort {
        port: pair.port,
        local_port: pair.local,
        protocol: pair.protocol.unwrap_or_else(|| args.protocol.into()),
    });
    let spec = ListenerSpec {
        address: args.address.clone(),
        host: args.host.to_string(),
        ports: ports.collect(),
    };
    resource::check(&Resource::Listener(Manifest::new("new", spec.clone())))?;
    let mut client = Client::connect(global).await?;
    let listeners = client.get("Listener", "").await?;
    let name = listeners
        .iter()
        .find(|listener| at(listener, &args.address, Some(args.host)))
        .map_or_else(|| free_name(&args.address, &listeners), |found| found.name().to_owned());
    let changes =
        client.apply(&[Resource::Listener(Manifest::new(name.clone(), spec))], false).await?;
    resource::show_changes(global, changes, |change| match change.action.as_str() {
        "unchanged" => format!("{} already has this endpoint.", args.address),
        "changed" => format!("Changed the endpoint of {} at {}.", args.address, args.host),
        _ => format!("Listening for {} at {}.", args.address, args.host),
    })?;
    let (phase, message) = resource::settled(global, &mut client, "Listener", &name).await?;
    match phase {
        Phase::Ready => note(global, format_args!("{} {message}", args.address)),
        Phase::Error => note(global, format_args!("warning: {message}")),
        Phase::Pending => note(global, format_args!("note: {message}; see `skctl service list`")),
    }
    if !args.host.is_loopback() {
        note(
            global,
            format_args!("note: whoever can reach {} can now reach {}", args.host, args.address),
        );
    }
    Ok(())
}

pub(crate) async fn unlisten(global: &Global, args: Unlisten) -> Result<(), Failure> {
    let mut client = Client::connect(global).await?;
    let listeners = client.get("Listener", "").await?;
    let found: Vec<_> =
        listeners.iter().filter(|listener| at(listener, &args.address, args.host)).collect();
    if found.is_empty() {
        return Err(Failure::new(format_args!("{:?} has no explicit endpoint here", args.address))
            .because("automatic ones follow Site.autoListen")
            .next("see `skctl get listener`"));
    }
    for listener in found {
        for text in client.delete("Listener", listener.name(), false).await? {
            note(global, text);
        }
    }
    note(global, format_args!("Closed the endpoint of {}.", args.address));
    Ok(())
}

fn at(resource: &Resource, address: &str, host: Option<IpAddr>) -> bool {
    let Resource::Listener(listener) = resource else { return false };
    listener.spec.address == address
        && host.is_none_or(|host| listener.spec.host.parse() == Ok(host))
}
