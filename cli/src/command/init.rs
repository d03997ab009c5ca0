//! `skctl init`

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use skein_api::{AutoListen, DEFAULT_PORT, HostPort, Platform, Role, Service, status::SiteStatus};
use skein_controller::{
    LockError, Paths,
    platform::linux,
    site::{self, Created, InitOptions},
};

use crate::{
    args::Global,
    client::{self, Client},
    clock,
    command::proxy::{self, ProxyArgs},
    error::Failure,
    host, input,
    output::{self, Show, note, printable},
    progress::Progress,
};

/// How long a router may take to listen elsewhere before what it says is shown as it is.
const SOCKETS_MAX: Duration = Duration::from_secs(5);

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
    /// Keeps a block with the local endpoints in /etc/hosts (needs root): names without dots or under no existing domain
    /// that lead nowhere else by this host's resolver, and those of this site; `service list -o hosts` has all.
    /// `--manage-hosts=false` takes it out again
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    manage_hosts: Option<bool>,
    #[command(flatten)]
    proxy: ProxyArgs,
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

    fn options(&self, paths: &Paths) -> Result<InitOptions, Failure> {
        Ok(self.proxy.wanted()?.into_options(paths, self.options_of_site()))
    }

    fn options_of_site(&self) -> InitOptions {
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
            manage_hosts: self.manage_hosts,
            ..InitOptions::default()
        }
    }
}

fn given<T: Clone>(values: &[T]) -> Option<Vec<T>> {
    if values.is_empty() { None } else { Some(values.to_vec()) }
}

pub(crate) async fn run(global: &Global, args: Init) -> Result<(), Failure> {
    let paths = client::paths(global)?;
    if matches!(args.service, Some(ServiceArg::Systemd)) && !linux::has_systemd() {
        // Before anything changes: a running site goes on as it is.
        return Err(Failure::new("systemd does not run here")
            .because("there is no /run/systemd/system")
            .next("use --service none"));
    }
    if args.manage_hosts == Some(true) && !rustix::process::geteuid().is_root() {
        return Err(Failure::new("--manage-hosts needs root")
            .because("/etc/hosts is root's")
            .next("run the site as root, or take the lines of `skctl service list -o hosts`"));
    }
    if let Some(text) = args.proxy.note() {
        note(global, format_args!("note: {text}"));
    }
    let first = if paths.has_site() { "changing the site" } else { "creating the site" };
    let mut progress = Progress::start(global, first);
    let found = find_or_create(&paths, &args, &mut progress).await?;
    let (created, client) = match found {
        Found::Running(client) if !args.foreground => (None, Some(client)),
        Found::Running(_) => {
            return Err(
                Failure::new("the site is running already").next("stop it first with `skctl stop`")
            );
        }
        Found::Stopped(created) => (Some(created), None),
    };
    let mut changes = Vec::new();
    let mut notes = Vec::new();
    if let Some(client) = client {
        progress.step("applying");
        (changes, notes) = apply(client, &paths, &args).await?;
    }
    notes.extend(created.iter().flat_map(|created| created.notes.clone()));
    if let Some(proxy) = created.iter().find_map(|created| created.site.spec.proxy.as_ref()) {
        notes.push(format!("connections over TCP go through the proxy {}", proxy.url));
    }
    for text in notes {
        note(global, format_args!("note: {text}"));
    }
    if args.foreground {
        return host::run_here(&paths, &mut progress).await;
    }
    let is_new = created.as_ref().is_some_and(|created| created.is_new);
    let of_site = paths.clone();
    if created.is_none() && input::blocking(move || host::is_under_other_service(&of_site)).await? {
        progress.step("restarting under another service manager");
        host::stop(&paths, &mut progress).await?;
    }
    if Client::connect_to(&paths).await.is_err() {
        progress.step("starting");
        for text in host::start(&paths).await? {
            note(global, format_args!("note: {text}"));
        }
    }
    let status = listening(&paths, &mut progress).await?;
    progress.finish();
    if global.quiet && !global.structured() {
        return Ok(());
    }
    output::show(global, &Outcome { new: is_new, changes, status })
}

/// Waits until a router is there, and then, not for long, until it has the sockets that the site shall listen on; how things are then.
async fn listening(paths: &Paths, progress: &mut Progress) -> Result<SiteStatus, Failure> {
    let mut last = host::ready(paths, progress).await?;
    let has_ipv6 = Path::new("/proc/net/if_inet6").exists();
    let deadline = clock::instant() + SOCKETS_MAX;
    loop {
        // What was changed stands, also when the controller restarts just now: then the last that was heard is told.
        if let Ok((wanted, status)) = heard(paths).await
            && status.routers.iter().any(|router| router.state == "attached")
        {
            last = status;
            if wanted.is_none_or(|wanted| listens_at(&last, &wanted, has_ipv6)) {
                return Ok(last);
            }
        }
        if clock::instant() >= deadline {
            return Ok(last);
        }
        progress.step("waiting for the router to listen");
        clock::sleep(host::POLL).await;
    }
}

/// The sockets that the site shall have, and how things are, of the controller that is there now.
async fn heard(paths: &Paths) -> Result<(Option<Vec<String>>, SiteStatus), Failure> {
    let mut client = Client::connect_to(paths).await?;
    let wanted = proxy::site_of(&mut client).await?.map(|site| site.spec.listen);
    Ok((wanted, client.query("status").await?))
}

/// Whether the routers tell of `wanted` and of nothing else, be it that they cannot bind it. Without IPv6 they take 0.0.0.0 for [::].
fn listens_at(status: &SiteStatus, wanted: &[String], has_ipv6: bool) -> bool {
    let becomes = |wanted: IpAddr| match wanted {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) if !has_ipv6 => Ipv4Addr::UNSPECIFIED.into(),
        other => other,
    };
    let is = |socket: &str, wanted: &str| match (
        socket.parse::<SocketAddr>(),
        wanted.parse::<SocketAddr>(),
    ) {
        (Ok(socket), Ok(wanted)) => {
            // One that could not be bound is told as it was asked for.
            (socket.ip() == wanted.ip() || socket.ip() == becomes(wanted.ip()))
                && (wanted.port() == 0 || socket.port() == wanted.port())
        }
        _ => socket == wanted,
    };
    status.routers.iter().filter(|router| router.state == "attached").all(|router| {
        let sockets = || router.sockets.iter().map(|socket| socket.address.as_str());
        sockets().all(|socket| wanted.iter().any(|wanted| is(socket, wanted)))
            && wanted.iter().all(|wanted| sockets().any(|socket| is(socket, wanted)))
    })
}

/// What there is of the site before it is started.
enum Found {
    /// A controller, which changes its state itself.
    Running(Client),
    /// Files, with the options merged in.
    Stopped(Box<Created>),
}

async fn find_or_create(
    paths: &Paths,
    args: &Init,
    progress: &mut Progress,
) -> Result<Found, Failure> {
    let deadline = clock::instant() + host::START_TIMEOUT;
    loop {
        if let Ok(client) = Client::connect_to(paths).await {
            if args.identity.is_some() {
                return Err(Failure::new("this namespace already has a site, which is running")
                    .next("use another namespace (-n NS), or `skctl delete` first"));
            }
            return Ok(Found::Running(client));
        }
        match create(paths, args).await? {
            Ok(created) => return Ok(Found::Stopped(Box::new(created))),
            // A controller that starts or ends; in a moment it answers or is gone.
            Err(site::CreateError::Lock(LockError::Held(_))) if clock::instant() < deadline => {
                progress.step("waiting for the controller");
                clock::sleep(host::POLL).await;
            }
            Err(site::CreateError::Invalid(invalids)) => return Err(Failure::usage(invalids)),
            Err(other) => return Err(Failure::new(other)),
        }
    }
}

/// Changes a running site; what changed and what the user should know.
async fn apply(
    mut client: Client,
    paths: &Paths,
    args: &Init,
) -> Result<(Vec<String>, Vec<String>), Failure> {
    let before = proxy::site_of(&mut client).await?;
    let options = args.options(paths)?;
    let changed = proxy::change(&mut client, before, options).await?;
    let changed = changed.map_err(|error| match error {
        site::CreateError::Invalid(invalids) => Failure::usage(invalids),
        other => Failure::new(other),
    })?;
    let changes = changed.changes.into_iter().filter(|change| change.action != "unchanged");
    Ok((changes.map(|change| change.detail).collect(), changed.notes))
}

async fn create(paths: &Paths, args: &Init) -> Result<Result<Created, site::CreateError>, Failure> {
    let options = args.options(paths)?;
    let paths = paths.clone();
    let Some(file) = args.identity.clone() else {
        // Keys and files: nothing for the thread that waits for Ctrl-C.
        return input::blocking(move || Ok(site::create(&paths, &options))).await;
    };
    let archive = {
        let file = file.clone();
        input::blocking(move || input::read(&file, skein_controller::ARCHIVE_LEN_MAX)).await?
    };
    let passphrase = input::passphrase(args.passphrase_file.clone(), false).await?;
    input::blocking(move || {
        let rebuilt = skein_controller::open_identity(&archive, &passphrase)
            .map_err(|error| Failure::new(error).within(&file))?;
        Ok(site::create_with(&paths, &options, Some(rebuilt)))
    })
    .await
}

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
    use skein_api::status::{RouterStatus, SocketStatus};

    #[test]
    fn sockets_of_before_are_told_from_those_wanted() {
        let status = |sockets: &[&str]| SiteStatus {
            routers: vec![RouterStatus {
                state: "attached".into(),
                sockets: sockets
                    .iter()
                    .map(|address| SocketStatus {
                        address: (*address).into(),
                        ..SocketStatus::default()
                    })
                    .collect(),
                ..RouterStatus::default()
            }],
            ..SiteStatus::default()
        };
        for (sockets, wanted, has_ipv6, there) in [
            (&["0.0.0.0:7444"][..], &["0.0.0.0:7444"][..], true, true),
            (&["[::]:7443"], &["0.0.0.0:7444"], true, false),
            (&["0.0.0.0:7444", "[::]:7443"], &["0.0.0.0:7444"], true, false),
            (&[], &["0.0.0.0:7444"], true, false),
            (&[], &[], true, true),
            (&["[::]:7443"], &[], true, false),
            (&["[::]:41234"], &["[::]:0"], true, true),
            (&["0.0.0.0:7443"], &["[::]:7443"], true, false),
            (&["0.0.0.0:7443"], &["[::]:7443"], false, true),
            (&["[::]:7443"], &["[::]:7443"], false, true),
            (&["0.0.0.0:7444"], &["[::]:7443"], false, false),
        ] {
            let listed: Vec<String> = wanted.iter().map(|&address| address.to_owned()).collect();
            let found = listens_at(&status(sockets), &listed, has_ipv6);
            assert_eq!(found, there, "{sockets:?} {wanted:?} {has_ipv6}");
        }
    }

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
