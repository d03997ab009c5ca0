//! `skctl init`

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use clap::{Args, ValueEnum};
use serde::Serialize;
use skein_api::{
    AutoListen, DEFAULT_PORT, HostPort, Platform, Resource, Role, Service, status::SiteStatus,
};
use skein_controller::{
    Paths,
    site::{self, Created, InitOptions},
};

use crate::{
    args::Global,
    client::{self, Client},
    error::Failure,
    host, input,
    output::{self, Show, note, printable},
    progress::Progress,
};

/// Creates and starts a site
///
/// Makes the site's identity and certificate authority, and starts its controller and router. Running it again changes
/// what the options say, live where that is possible.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl init hub --advertise 203.0.113.7          others can link to it
  skctl init branch                               behind NAT: links outwards, may be linked to from its own networks
  skctl init laptop --no-listen                   never listens, never carries traffic of others
  skctl init edge -n test --listen '[::]:7500'    a second site on the same machine
  skctl init hub --identity hub.identity          rebuilds a lost site")]
pub(crate) struct Init {
    /// Name of the site; default: the host name
    name: Option<String>,
    /// Socket for links, UDP and TCP; a port that is taken makes it the next free one. Default: [::]:7443
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    listen: Vec<SocketAddr>,
    /// Listens nowhere; links outwards still work
    #[arg(long, conflicts_with_all = ["listen", "advertise"])]
    no_listen: bool,
    /// Where others reach the site; may be given several times. Default: addresses of interfaces with a default route
    #[arg(long, value_name = "HOST[:PORT]", value_parser = parse_advertise)]
    advertise: Vec<String>,
    /// Whether traffic of others may pass through. Default: interior if it listens, else edge
    #[arg(long, value_enum)]
    role: Option<RoleArg>,
    /// Which addresses get a local endpoint by themselves: all, none, or a pattern such as 'payments.*'
    #[arg(long, value_name = "all|none|PATTERN")]
    auto_listen: Option<String>,
    /// What the site runs on
    #[arg(long, value_enum)]
    platform: Option<PlatformArg>,
    /// What keeps the processes running. Default: systemd where it runs this machine, else none
    #[arg(long, value_enum)]
    service: Option<ServiceArg>,
    /// Keeps a block with the local endpoints in /etc/hosts (needs root)
    #[arg(long)]
    manage_hosts: bool,
    /// Rebuilds the site whose identity was exported to this file
    #[arg(long, value_name = "FILE")]
    identity: Option<String>,
    /// Reads the passphrase of --identity from the first line of this file
    #[arg(long, value_name = "FILE", requires = "identity")]
    passphrase_file: Option<String>,
    /// Runs the site under this command instead of in the background; Ctrl-C stops it
    #[arg(long)]
    foreground: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleArg {
    /// Carries traffic of others
    Interior,
    /// Never does
    Edge,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PlatformArg {
    /// Found out
    Auto,
    /// Processes on a Linux host
    Linux,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ServiceArg {
    /// systemd where it is PID 1 of this machine and this network namespace, else none
    Auto,
    /// systemd units
    Systemd,
    /// Detached processes that restart each other
    None,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Ok(addr) = text.parse() {
        return Ok(addr);
    }
    // A port, or an address, alone is understood.
    if let Ok(port) = text.parse::<u16>() {
        return Ok((Ipv6Addr::UNSPECIFIED, port).into());
    }
    text.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| (ip, DEFAULT_PORT).into()).map_err(
        |_| "must be ADDRESS:PORT with an IP address, e.g. [::]:7443 or 0.0.0.0:7443".to_owned(),
    )
}

fn parse_advertise(text: &str) -> Result<String, String> {
    text.parse::<HostPort>().map(|parsed| parsed.to_string()).map_err(|error| error.to_string())
}

impl Init {
    /// Whether it goes on until it is told to end, and then has something to do.
    pub(crate) fn is_foreground(&self) -> bool {
        self.foreground
    }

    fn options(&self) -> InitOptions {
        let listen = if self.no_listen { Some(Vec::new()) } else { given(&self.listen) };
        InitOptions {
            name: self.name.clone(),
            listen,
            advertise: given(&self.advertise),
            role: self.role.map(|role| match role {
                RoleArg::Interior => Role::Interior,
                RoleArg::Edge => Role::Edge,
            }),
            auto_listen: self.auto_listen.clone().map(AutoListen),
            platform: self.platform.map(|platform| match platform {
                PlatformArg::Auto => Platform::Auto,
                PlatformArg::Linux => Platform::Linux,
            }),
            service: self.service.map(|service| match service {
                ServiceArg::Auto => Service::Auto,
                ServiceArg::Systemd => Service::Systemd,
                ServiceArg::None => Service::None,
            }),
            manage_hosts: self.manage_hosts.then_some(true),
            ..InitOptions::default()
        }
    }
}

fn given<T: Clone>(values: &[T]) -> Option<Vec<T>> {
    if values.is_empty() { None } else { Some(values.to_vec()) }
}

pub(crate) async fn run(global: &Global, args: Init) -> Result<(), Failure> {
    let paths = client::paths(global)?;
    let mut progress = Progress::start(global, "creating the site");
    let created = create(&paths, &args).await?;
    for text in &created.notes {
        note(global, format_args!("note: {text}"));
    }
    if args.foreground {
        progress.finish();
        return host::run_here(&paths).await;
    }
    if Client::connect_to(&paths).await.is_err() {
        progress.step("starting");
        for text in host::start(&paths).await? {
            note(global, format_args!("note: {text}"));
        }
    }
    let mut status = host::ready(&paths, &mut progress).await?;
    let mut changes = Vec::new();
    if !created.is_new {
        progress.step("applying");
        let mut client = Client::connect_to(&paths).await?;
        changes = client.apply(&[Resource::Site(created.site.clone())], false).await?;
        status = client.query("status").await?;
    }
    progress.finish();
    let detail = |change: skein_wire::proto::site::Change| match change.action.as_str() {
        "unchanged" => None,
        _ => Some(change.detail),
    };
    let changes = changes.into_iter().filter_map(detail).collect();
    output::show(global, &Outcome { new: created.is_new, changes, status })
}

async fn create(paths: &Paths, args: &Init) -> Result<Created, Failure> {
    let options = args.options();
    let paths = paths.clone();
    let refused = |error: site::CreateError| match error {
        site::CreateError::Invalid(invalids) => Failure::usage(invalids),
        other => Failure::new(other),
    };
    let Some(file) = args.identity.clone() else {
        // Keys and files: nothing for the thread that waits for Ctrl-C.
        return input::blocking(move || site::create(&paths, &options).map_err(refused)).await;
    };
    let archive = {
        let file = file.clone();
        input::blocking(move || input::read(&file, IDENTITY_LEN_MAX)).await?
    };
    let passphrase = input::passphrase(args.passphrase_file.clone(), false).await?;
    input::blocking(move || {
        let rebuilt = skein_controller::open_identity(&archive, &passphrase)
            .map_err(|error| Failure::new(error).within(&file))?;
        site::create_with(&paths, &options, Some(rebuilt)).map_err(refused)
    })
    .await
}

/// Most bytes of an exported identity: two keys, a certificate and a few ids.
const IDENTITY_LEN_MAX: usize = 1024 * 1024;

#[derive(Serialize)]
struct Outcome {
    new: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changes: Vec<String>,
    #[serde(flatten)]
    status: SiteStatus,
}

impl Show for Outcome {
    fn table(&self, _: bool) -> String {
        let status = &self.status;
        let verb = if self.new { "Created site" } else { "Site" };
        let mut out = format!("{verb} {} ({}), {}.\n", status.name, status.site_id, status.role);
        for change in self.changes.iter().filter(|change| !change.is_empty()) {
            out += &format!("Changed: {change}.\n");
        }
        let sockets = status.routers.iter().flat_map(|router| &router.sockets);
        let sockets: Vec<String> = sockets
            .map(|socket| match socket.error.as_str() {
                "" => socket.address.clone(),
                error => format!("{} ({error})", socket.address),
            })
            .collect();
        if sockets.is_empty() {
            out += "It listens nowhere; it can link to others.\n";
        } else {
            out += &format!("Listens at {} (UDP and TCP).\n", sockets.join(", "));
        }
        if !status.advertise.is_empty() {
            out += &format!("Others are told {}.\n", status.advertise.join(", "));
        }
        for problem in &status.problems {
            out += &format!("Problem: {}; {}; {}\n", problem.what, problem.why, problem.fix);
        }
        out += if sockets.is_empty() {
            "Next: skctl link TOKENFILE\n"
        } else {
            "Next: skctl token create FILE to let others in, or skctl link TOKENFILE to join them.\n"
        };
        printable(&out)
    }

    fn names(&self) -> Vec<String> {
        vec![self.status.name.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_parse() {
        let parse = |text: &str| parse_listen(text).map(|addr| addr.to_string());
        assert_eq!(parse("7500").unwrap(), "[::]:7500");
        assert_eq!(parse("127.0.0.1:0").unwrap(), "127.0.0.1:0");
        assert_eq!(parse("[::1]").unwrap(), "[::1]:7443");
        for bad in ["", "70000", "host:1", "1.2.3.4:70000"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
