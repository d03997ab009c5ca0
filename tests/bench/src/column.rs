//! The ways from client to server that are compared.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use skein_e2e::{Site, flow, servers};
use skein_lab::{Host, Lab, Process, eventually};

/// Ports of the servers, on the server's loopback and its LAN address alike.
const FLOWGEN: u16 = 7000;
const IPERF3: u16 = 5201;
const HTTP: u16 = 8080;
/// What HAProxy at the client listens on; its partner listens on the same plus 1,000.
const HAPROXY: [(u16, u16); 3] = [(17_000, FLOWGEN), (15_201, IPERF3), (18_080, HTTP)];

/// What can stand between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// Nothing
    Direct,
    /// HAProxy at either end, mutual TLS between the two
    Haproxy,
    /// Skein, the sites linked to each other
    Skein,
    /// Skein, with a site in between
    Transit,
}

impl Way {
    /// The heading of its column.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Haproxy => "HAProxy pair, mTLS",
            Self::Skein => "Skein, 0 transits",
            Self::Transit => "Skein, 1 transit",
        }
    }
}

/// One way from client to server.
#[derive(Debug)]
pub struct Column {
    /// Which.
    pub way: Way,
    /// Where the client reaches flowgen.
    pub flowgen: SocketAddr,
    /// Where it reaches iperf3.
    pub iperf3: SocketAddr,
    /// Where it reaches nginx.
    pub http: SocketAddr,
    /// The processes in between.
    pub processes: Vec<(Host, u32)>,
}

/// The network with its columns set up; dropping it ends all.
#[derive(Debug)]
pub struct Setup {
    /// The columns.
    pub columns: Vec<Column>,
    /// Where load is made.
    pub client: Host,
    _processes: Vec<Process>,
    _lab: Lab,
}

impl Setup {
    /// Builds network and servers, and `ways` between them, in this order.
    ///
    /// # Errors
    /// When anything of it fails.
    pub fn new(ways: &[Way]) -> Result<Self> {
        let lab = Lab::new()?;
        let lan = lab.lan("lan", Ipv4Addr::new(203, 0, 113, 0))?;
        let host = |name: &str| -> Result<Host> {
            let host = lab.host(name)?;
            host.join(&lan)?;
            Ok(host)
        };
        let (client, transit, server) = (host("client")?, host("transit")?, host("server")?);
        let mut processes = serve(&server)?;
        let mut columns = Vec::new();
        for &way in ways {
            columns.push(match way {
                Way::Direct => direct(&server),
                Way::Haproxy => haproxy(&lab, &client, &server, &mut processes)?,
                Way::Skein => skein(way, "zero", 7443, &[&client, &server])?,
                Way::Transit => skein(way, "one", 7444, &[&client, &transit, &server])?,
            });
        }
        Ok(Self { columns, client, _processes: processes, _lab: lab })
    }
}

fn serve(server: &Host) -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    for ip in [Ipv4Addr::LOCALHOST, server.address()] {
        processes.push(flow::serve_on(server, SocketAddr::from((ip, FLOWGEN)), &[])?);
        let args = ["-s", "-B", &ip.to_string(), "-p", &IPERF3.to_string()].map(str::to_owned);
        processes.push(server.command("iperf3").args(args).spawn()?);
        let (nginx, dir) = servers::nginx_on(server, &ip.to_string(), HTTP)?;
        std::fs::write(dir.join("small"), [b'x'; 1024])?;
        processes.push(nginx);
    }
    Ok(processes)
}

fn direct(server: &Host) -> Column {
    let at = |port| SocketAddr::from((server.address(), port));
    Column {
        way: Way::Direct,
        flowgen: at(FLOWGEN),
        iperf3: at(IPERF3),
        http: at(HTTP),
        processes: Vec::new(),
    }
}

/// A chain of sites, each linked to the next; the last serves, the first is the client's.
fn skein(way: Way, namespace: &str, port: u16, hosts: &[&Host]) -> Result<Column> {
    let mut sites: Vec<Site> = Vec::new();
    for host in hosts {
        let address = format!("{}:{port}", host.address());
        let listen = format!("[::]:{port}");
        let site = Site::init_in(host, namespace, &["--listen", &listen, "--advertise", &address])?;
        if let Some(previous) = sites.last() {
            site.link_to(previous, &[])?;
        }
        sites.push(site);
    }
    let (first, last) = (&sites[0], sites.last().context("invariant: there are hosts")?);
    let expose = |address: &str, port| -> Result<SocketAddr> {
        last.expose(address, port, &[])?;
        first.endpoint(address, port)
    };
    let (flowgen, iperf3, http) =
        (expose("flowgen", FLOWGEN)?, expose("iperf3", IPERF3)?, expose("http", HTTP)?);
    let mut processes = Vec::new();
    for site in &sites {
        processes.push((site.host().clone(), site.processes()?.router));
    }
    Ok(Column { way, flowgen, iperf3, http, processes })
}

/// HAProxy at the client takes TCP and speaks mutual TLS with HAProxy at the server.
fn haproxy(
    lab: &Lab,
    client: &Host,
    server: &Host,
    processes: &mut Vec<Process>,
) -> Result<Column> {
    let keys = keys(lab, client)?;
    let (pem, ca) = (keys.join("pair.pem"), keys.join("ca.crt"));
    let tls = format!("ssl crt {} ca-file {}", pem.display(), ca.display());
    let (mut near, mut far) = (String::new(), String::new());
    for (port, target) in HAPROXY {
        let (remote, outside) = (server.address(), port + 1000);
        near += &format!(
            "listen l{port}\n bind 127.0.0.1:{port}\n \
             server s {remote}:{outside} {tls} verify required sni str(pair)\n"
        );
        far += &format!(
            "listen l{port}\n bind {remote}:{outside} {tls} verify required\n \
             server s 127.0.0.1:{target}\n"
        );
    }
    let start = |host: &Host, listeners: &str| -> Result<Process> {
        let config = host.dir().join("haproxy.cfg");
        let text = format!(
            "global\n maxconn 8000\n nbthread 1\n tune.ssl.default-dh-param 2048\n\
             ssl-default-bind-options ssl-min-ver TLSv1.3\n\
             defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n{listeners}"
        );
        std::fs::write(&config, text)?;
        let script = "ulimit -n \"$(ulimit -Hn)\"; exec haproxy -db -f \"$1\"";
        let process = host.command("sh").args(["-c", script, "sh"]).arg(&config).spawn()?;
        eventually("haproxy runs", Duration::from_secs(10), || Ok(pid_of(host, "haproxy").is_ok()))
            .with_context(|| process.stderr())?;
        Ok(process)
    };
    processes.extend([start(server, &far)?, start(client, &near)?]);
    let [flowgen, iperf3, http] =
        HAPROXY.map(|(port, _)| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let between = [client, server].map(|host| Ok((host.clone(), pid_of(host, "haproxy")?)));
    let between = between.into_iter().collect::<Result<_>>()?;
    Ok(Column { way: Way::Haproxy, flowgen, iperf3, http, processes: between })
}

/// A throw-away authority and one certificate for both ends.
fn keys(lab: &Lab, host: &Host) -> Result<PathBuf> {
    let dir: &Path = lab.dir();
    let script = "set -e; cd \"$1\"
        ec='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
        openssl req -x509 $ec -keyout ca.key -out ca.crt -days 2 -subj /CN=bench
        openssl req $ec -keyout pair.key -out pair.csr -subj /CN=pair
        openssl x509 -req -in pair.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out pair.crt -days 2
        cat pair.crt pair.key > pair.pem";
    host.command("sh").args(["-c", script, "sh"]).arg(dir).check()?;
    Ok(dir.to_owned())
}

fn pid_of(host: &Host, program: &str) -> Result<u32> {
    let output = host.command("pgrep").args(["-x", program]).check()?.stdout;
    Ok(output.lines().last().context("no such process")?.trim().parse()?)
}
