//! A host: namespaces that look like a machine to what runs in them.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};

use crate::lan::Lan;
use crate::namespace::Holder;
use crate::wan::{Ends, Wan};
use crate::{Command, Inner};

/// A machine of the lab. Handles are cheap to clone.
#[derive(Clone, Debug)]
pub struct Host {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    // Before `lab`: what runs on the host ends before its directory goes.
    pub(crate) holder: Holder,
    pub(crate) lab: Arc<Inner>,
    pub(crate) dir: PathBuf,
    name: String,
    index: u8,
    ports: Mutex<Vec<Port>>,
    gateway: Mutex<Option<Host>>,
    wans: Mutex<Vec<Wan>>,
}

/// Where a host meets a LAN.
#[derive(Clone, Debug)]
struct Port {
    lan: u8,
    /// Interface in the host.
    inner: String,
    /// The other end, on the bridge.
    outer: String,
    address: Ipv4Addr,
}

/// What can be sent to a process of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM.
    Terminate,
    /// SIGINT.
    Interrupt,
    /// SIGKILL.
    Kill,
    /// SIGSTOP: the process stays, and does nothing.
    Freeze,
    /// SIGCONT.
    Thaw,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Self::Terminate => "TERM",
            Self::Interrupt => "INT",
            Self::Kill => "KILL",
            Self::Freeze => "STOP",
            Self::Thaw => "CONT",
        }
    }
}

impl Host {
    pub(crate) fn new(lab: Arc<Inner>, name: &str, index: u8) -> Result<Self> {
        let dir = lab.dir.path().join(name);
        for sub in ["", "log", "tmp", "skein"] {
            make_dir(&dir.join(sub))?;
        }
        std::fs::write(dir.join("hosts"), format!("127.0.0.1 localhost {name}\n"))?;
        let holder = lab.core.host(name, &dir)?;
        let shared = Shared {
            holder,
            lab,
            dir,
            name: name.to_owned(),
            index,
            ports: Mutex::new(Vec::new()),
            gateway: Mutex::new(None),
            wans: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Its host name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// A directory of its own: `log/` has the output of every command, `skein/` is `SKEIN_HOME`, `tmp/`
    /// is `TMPDIR`, `hosts` is `/etc/hosts`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Its first address.
    ///
    /// # Panics
    /// When it is on no LAN yet.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.ports().first().expect("the host is on a LAN").address
    }

    /// Its address on one LAN.
    #[must_use]
    pub fn address_on(&self, lan: &Lan) -> Option<Ipv4Addr> {
        self.port(lan).ok().map(|port| port.address)
    }

    /// The gateway in front of it, if it was made behind one.
    #[must_use]
    pub fn gateway(&self) -> Option<Self> {
        self.shared.gateway.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Plugs the host into a LAN; the first LAN gives it its default route.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn join(&self, lan: &Lan) -> Result<Ipv4Addr> {
        let address = lan.next_address();
        self.join_as(lan, address)?;
        Ok(address)
    }

    /// Plugs the host into a LAN through a WAN box, which at first passes everything at once; `seed` decides what it drops when
    /// told to. Only root can.
    ///
    /// # Errors
    /// When the kernel has no TUN devices or `ip` fails.
    pub fn join_through_wan(&self, lan: &Lan, seed: u64) -> Result<Wan> {
        let port = self.new_port(lan, lan.next_address());
        let name = format!("h{}w{}", self.shared.index, port.lan);
        let ends = Ends { host: &name, lan: &port.outer };
        let wan = Wan::start(seed, self.shared.lab.core.network()?, ends)?;
        self.shared.lab.core.network_script(&format!(
            "ip link set {name} netns {pid}
             ip link set {outer} master br{lan_index} up",
            pid = self.shared.holder.pid(),
            outer = port.outer,
            lan_index = port.lan,
        ))?;
        self.shared.holder.network_script(&format!("ip link set {name} name {}", port.inner))?;
        self.shared.wans.lock().unwrap_or_else(PoisonError::into_inner).push(wan.clone());
        self.plugged(lan, port)?;
        Ok(wan)
    }

    fn join_as(&self, lan: &Lan, address: Ipv4Addr) -> Result<()> {
        let port = self.new_port(lan, address);
        self.shared.lab.core.network_script(&format!(
            "ip link add {outer} type veth peer name {inner} netns {pid}
             ip link set {outer} master br{lan_index} up",
            outer = port.outer,
            inner = port.inner,
            pid = self.shared.holder.pid(),
            lan_index = port.lan,
        ))?;
        self.plugged(lan, port)
    }

    fn new_port(&self, lan: &Lan, address: Ipv4Addr) -> Port {
        let n = self.ports().len();
        Port {
            lan: lan.index(),
            inner: format!("eth{n}"),
            outer: format!("h{}p{n}", self.shared.index),
            address,
        }
    }

    fn plugged(&self, lan: &Lan, port: Port) -> Result<()> {
        let (mut ports, address) = (self.ports(), port.address);
        let mut script =
            format!("ip address add {address}/24 dev {0}; ip link set {0} up", port.inner);
        if ports.is_empty() && lan.router_address() != address {
            write!(script, "; ip route add default via {}", lan.router_address())?;
        }
        self.shared.holder.network_script(&script)?;
        ports.push(port);
        Ok(())
    }

    /// Makes this host the masquerading router of `inside` towards `outside`, letting nothing in.
    pub(crate) fn route_for(&self, inside: &Lan, outside: &Lan) -> Result<()> {
        self.join_as(inside, inside.router_address())?;
        let (wan, lan) = (self.port(outside)?.inner, self.port(inside)?.inner);
        self.shared.holder.network_script(&format!(
            "echo 1 > /proc/sys/net/ipv4/ip_forward
             iptables -w -t nat -A POSTROUTING -o {wan} -j MASQUERADE
             iptables -w -P FORWARD DROP
             iptables -w -A FORWARD -i {lan} -o {wan} -j ACCEPT
             iptables -w -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
        ))?;
        self.drop_inbound()
    }

    pub(crate) fn set_gateway(&self, gateway: Self) {
        *self.shared.gateway.lock().unwrap_or_else(PoisonError::into_inner) = Some(gateway);
    }

    /// What the outside sees of this host: its gateway, or itself.
    pub(crate) fn edge(&self) -> Self {
        self.gateway().unwrap_or_else(|| self.clone())
    }

    /// A firewall on the host: nothing comes in that was not asked for.
    ///
    /// # Errors
    /// When `iptables` fails.
    pub fn drop_inbound(&self) -> Result<()> {
        self.shared.holder.network_script(
            "iptables -w -P INPUT DROP
             iptables -w -A INPUT -i lo -j ACCEPT
             iptables -w -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        )
    }

    /// Drops all traffic of one protocol and destination port on its way out, as a strict network does.
    ///
    /// # Errors
    /// When `iptables` fails.
    pub fn block_outbound(&self, protocol: &str, port: u16) -> Result<()> {
        self.shared.holder.network_script(&format!(
            "iptables -w -A OUTPUT ! -o lo -p {protocol} --dport {port} -j DROP"
        ))
    }

    /// Drops all UDP that reaches the host, or for one behind a gateway all that the gateway would pass in either direction, until
    /// told otherwise. Senders do not notice.
    ///
    /// # Errors
    /// When `iptables` fails.
    pub fn block_udp(&self, on: bool) -> Result<()> {
        // Before connection tracking, so that it holds for what is established as well.
        let rule = "PREROUTING ! -i lo -p udp -j DROP";
        self.edge().shared.holder.network_script(&switched(rule, on))
    }

    /// Limits both directions between the host and a LAN with a token bucket.
    ///
    /// # Errors
    /// When the host is not on the LAN or `tc` fails.
    pub fn limit(&self, lan: &Lan, rate_mbit: u32) -> Result<()> {
        let port = self.port(lan)?;
        let bucket = |interface: &str| {
            format!(
                "tc qdisc replace dev {interface} root tbf rate {rate_mbit}mbit burst 64kb latency 50ms"
            )
        };
        self.shared.holder.network_script(&bucket(&port.inner))?;
        self.shared.lab.core.network_script(&bucket(&port.outer))
    }

    /// Sets the largest packet the host sends on a LAN and takes from it, IP header included.
    ///
    /// # Errors
    /// When the host is not on the LAN or `ip` fails.
    pub fn set_mtu(&self, lan: &Lan, bytes: u16) -> Result<()> {
        let port = self.port(lan)?;
        let set = |interface: &str| format!("ip link set {interface} mtu {bytes}");
        self.shared.lab.core.network_script(&set(&port.outer))?;
        self.shared.holder.network_script(&set(&port.inner))
    }

    /// Takes a new address on a LAN and loses the old one, as a gateway does whose provider renumbers it. A
    /// gateway forgets its translations with the address.
    ///
    /// # Errors
    /// When the host is not on the LAN or `ip` fails.
    pub fn renumber(&self, lan: &Lan) -> Result<Ipv4Addr> {
        let port = self.port(lan)?;
        let (old, new) = (port.address, lan.next_address());
        let route = format!("ip route replace default via {}", lan.router_address());
        self.shared.holder.network_script(&format!(
            "ip address add {new}/24 dev {0}; ip address del {old}/24 dev {0}
             ip address show dev {0} | grep -q {new} || ip address add {new}/24 dev {0}
             {route}",
            port.inner
        ))?;
        for port in self.ports().iter_mut().filter(|port| port.lan == lan.index()) {
            port.address = new;
        }
        Ok(new)
    }

    /// Gives the host an address of IPv6 on a LAN, besides what it has.
    ///
    /// # Errors
    /// When the host is not on the LAN or `ip` fails.
    pub fn add_ipv6(&self, lan: &Lan, address: Ipv6Addr) -> Result<()> {
        let port = self.port(lan)?;
        self.shared
            .holder
            .network_script(&format!("ip address add {address}/64 dev {} nodad", port.inner))
    }

    /// Pulls the cable: the interface loses its carrier, unlike with a cut.
    ///
    /// # Errors
    /// When the host is not on the LAN or `ip` fails.
    pub fn unplug(&self, lan: &Lan) -> Result<()> {
        let outer = self.port(lan)?.outer;
        self.shared.lab.core.network_script(&format!("ip link set {outer} down"))
    }

    /// Ends [`Host::unplug`].
    ///
    /// # Errors
    /// As [`Host::unplug`].
    pub fn plug(&self, lan: &Lan) -> Result<()> {
        let outer = self.port(lan)?.outer;
        self.shared.lab.core.network_script(&format!("ip link set {outer} up"))
    }

    /// A command to run on the host.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        Command::new(self.clone(), program.as_ref())
    }

    /// The command line that opens a shell on the host from outside of the lab.
    #[must_use]
    pub fn shell_line(&self) -> String {
        let user = if crate::Lab::rootless() { " --user --preserve-credentials" } else { "" };
        let (pid, home) = (self.shared.holder.pid(), self.dir().join("skein"));
        format!(
            "SKEIN_HOME={} nsenter --target {pid}{user} --net --mount --pid --uts",
            home.display()
        )
    }

    /// Signals a process by the number it has on the host (as in a status or pid file).
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, pid: u32, signal: Signal) -> Result<()> {
        let pid = pid.to_string();
        self.command("kill").args(["-s", signal.name(), &pid]).check()?;
        Ok(())
    }

    /// Kills every process of the host at once, as a power cut does. Disk, addresses and rules stay.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn power_cut(&self) -> Result<()> {
        self.command("sh").args(["-c", "kill -9 -1"]).run()?;
        Ok(())
    }

    /// The text of a file as the host sees it, `/proc` and `/run` included.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        let output = self.command("cat").arg(path.as_ref()).check()?;
        Ok(output.stdout)
    }

    pub(crate) fn drop_from(&self, from: &Self, on: bool) -> Result<()> {
        let mine: Vec<u8> = self.ports().iter().map(|port| port.lan).collect();
        let ports = from.ports();
        let shared: Vec<_> = ports.iter().filter(|port| mine.contains(&port.lan)).collect();
        ensure!(!shared.is_empty(), "{} and {} share no LAN", from.name(), self.name());
        for port in shared {
            let address = port.address;
            // Before routing and connection tracking, so that it holds for forwarded packets as well.
            let rule = format!("PREROUTING -s {address} -j DROP");
            self.shared.holder.network_script(&switched(&rule, on))?;
        }
        Ok(())
    }

    fn port(&self, lan: &Lan) -> Result<Port> {
        let ports = self.ports();
        let port = ports.iter().find(|port| port.lan == lan.index()).cloned();
        port.with_context(|| format!("{} is not on {}", self.name(), lan.name()))
    }

    fn ports(&self) -> std::sync::MutexGuard<'_, Vec<Port>> {
        self.shared.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The commands that put a rule of the raw table in force, once, or take it out.
fn switched(rule: &str, on: bool) -> String {
    if on {
        format!("iptables -w -t raw -C {rule} 2>/dev/null || iptables -w -t raw -A {rule}")
    } else {
        format!("while iptables -w -t raw -D {rule} 2>/dev/null; do :; done")
    }
}

/// Readable and writable by the servers' own users, which a test runs some servers as.
fn make_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(path)?;
    let mode = if path.ends_with("skein") { 0o700 } else { 0o777 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(())
}
