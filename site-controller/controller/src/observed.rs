//! What this host shows: interfaces, ports.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use skein_api::{DEFAULT_PORT, HostPort, SiteSpec};
use skein_core::Protocol;
use skein_site_core::LocalPorts;

/// Addresses a site advertises by itself; more only slow down whoever dials them all.
const INTERFACES_MAX: usize = 8;

/// `host:port` under which others reach a site with this specification on a host with these addresses.
pub(crate) fn advertised(spec: &SiteSpec, interfaces: &[IpAddr]) -> Vec<String> {
    let sockets: Vec<SocketAddr> =
        spec.listen.iter().filter_map(|text| text.parse().ok()).collect();
    let Some(first) = sockets.first() else { return Vec::new() };
    let port = if first.port() == 0 { DEFAULT_PORT } else { first.port() };
    if !spec.advertise.is_empty() {
        return spec
            .advertise
            .iter()
            .filter_map(|text| Some(text.parse::<HostPort>().ok()?.with_default(port)))
            .collect();
    }
    let mut out = BTreeSet::new();
    for socket in sockets {
        if !socket.ip().is_unspecified() {
            out.insert(socket.to_string());
            continue;
        }
        for ip in interfaces.iter().filter(|ip| socket.is_ipv6() || ip.is_ipv4()) {
            out.insert(SocketAddr::new(*ip, socket.port()).to_string());
        }
    }
    out.into_iter().take(INTERFACES_MAX).collect()
}

/// Global and private addresses of interfaces that lead somewhere: never loopback, bridges or link-local. Interfaces with a default route
/// count; where there is none, all do.
pub(crate) fn interfaces() -> Vec<IpAddr> {
    let all = match if_addrs::get_if_addrs() {
        Ok(all) => all,
        Err(error) => {
            tracing::warn!(%error, "cannot list the addresses of this host");
            return Vec::new();
        }
    };
    let routed = default_route_interfaces();
    let usable = |interface: &&if_addrs::Interface| {
        is_usable(interface.ip())
            && !Path::new("/sys/class/net").join(&interface.name).join("bridge").exists()
    };
    let on_route: BTreeSet<IpAddr> = all
        .iter()
        .filter(usable)
        .filter(|interface| routed.contains(&interface.name))
        .map(if_addrs::Interface::ip)
        .collect();
    if !on_route.is_empty() {
        return on_route.into_iter().collect();
    }
    let any: BTreeSet<IpAddr> = all.iter().filter(usable).map(if_addrs::Interface::ip).collect();
    any.into_iter().collect()
}

fn is_usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
    }
}

/// Names of interfaces with a default route, from the kernel's tables (proc(5)).
fn default_route_interfaces() -> BTreeSet<String> {
    let v4 = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let v4 = v4.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (name, destination) = (fields.next()?, fields.next()?);
        let mask = fields.nth(5)?;
        (destination == "00000000" && mask == "00000000").then(|| name.to_owned())
    });
    let v6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let v6 = v6.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [destination, length, .., name] = fields.as_slice() else { return None };
        let default = destination.bytes().all(|b| b == b'0') && *length == "00" && *name != "lo";
        default.then(|| (*name).to_owned())
    });
    v4.chain(v6).collect()
}

/// Ports bound on the wildcard by anybody, and those the kernel was told to reserve.
pub(crate) fn local_ports() -> LocalPorts {
    let mut out = LocalPorts::default();
    for (file, protocol) in [
        ("/proc/net/tcp", Protocol::Tcp),
        ("/proc/net/tcp6", Protocol::Tcp),
        ("/proc/net/udp", Protocol::Udp),
        ("/proc/net/udp6", Protocol::Udp),
    ] {
        // Without IPv6 there is no such file.
        let Ok(table) = fs::File::open(file) else { continue };
        let ports = wildcard_ports(BufReader::new(table), protocol);
        out.wildcard.extend(ports.map(|port| (port, protocol)));
    }
    let reserved =
        fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    out.reserved = reserved_ports(&reserved);
    out
}

/// Local ports of sockets bound to the wildcard, from a table of proc(5): listening ones for TCP, all for UDP.
fn wildcard_ports(table: impl BufRead, protocol: Protocol) -> impl Iterator<Item = u16> {
    const LISTEN: &str = "0A";
    let local_and_state = |line: String| {
        let mut fields = line.split_ascii_whitespace();
        let (ip, port) = fields.nth(1)?.split_once(':')?;
        let is_listening = fields.nth(1)? == LISTEN;
        let is_wildcard = ip.bytes().all(|b| b == b'0');
        Some((is_wildcard, u16::from_str_radix(port, 16).ok()?, is_listening))
    };
    table
        .lines()
        .map_while(Result::ok)
        .skip(1)
        .filter_map(local_and_state)
        // Listeners come first in a table of TCP, and then there may be hundreds of thousands of connections.
        .take_while(move |(.., is_listening)| protocol == Protocol::Udp || *is_listening)
        .filter_map(|(is_wildcard, port, _)| is_wildcard.then_some(port))
}

/// `8080,9148-9150`
fn reserved_ports(text: &str) -> BTreeSet<u16> {
    text.trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse::<u16>().ok()?..=last.parse::<u16>().ok()?)
        })
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_endpoints_follow_the_sockets() {
        let spec = |listen: &[&str], advertise: &[&str]| SiteSpec {
            listen: listen.iter().map(|s| (*s).to_owned()).collect(),
            advertise: advertise.iter().map(|s| (*s).to_owned()).collect(),
            ..SiteSpec::default()
        };
        let hosts: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let of = |spec: SiteSpec| advertised(&spec, &hosts);
        assert_eq!(of(spec(&["[::]:7000"], &[])), ["10.0.0.1:7000", "[2001:db8::1]:7000"]);
        assert_eq!(of(spec(&["0.0.0.0:7000"], &[])), ["10.0.0.1:7000"]);
        assert_eq!(of(spec(&["127.0.0.1:7000"], &[])), ["127.0.0.1:7000"]);
        assert_eq!(of(spec(&["[::]:7000"], &["h.example", "h2:1"])), ["h.example:7000", "h2:1"]);
        assert!(of(spec(&[], &["h.example"])).is_empty());
    }

    #[test]
    fn tables_of_the_kernel_are_read() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 00000000:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0
   1: 0100007F:1539 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0
   2: 00000000:153A 0100007F:1539 01 00000000:00000000 00:00000000 00000000 0
";
        assert_eq!(wildcard_ports(table.as_bytes(), Protocol::Tcp).collect::<Vec<_>>(), [5432]);
        assert_eq!(
            wildcard_ports(table.as_bytes(), Protocol::Udp).collect::<Vec<_>>(),
            [5432, 5434]
        );
        let reserved: Vec<u16> = reserved_ports("8080,9148-9150\n").into_iter().collect();
        assert_eq!(reserved, [8080, 9148, 9149, 9150]);
        assert!(reserved_ports("\n").is_empty());
    }

    #[test]
    fn a_wildcard_listener_is_seen() {
        let holder = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        assert!(local_ports().wildcard.contains(&(port, Protocol::Tcp)));
    }

    #[test]
    fn loopback_is_not_advertised() {
        assert!(interfaces().iter().all(|ip| is_usable(*ip)));
        assert!(!is_usable("127.0.0.1".parse().unwrap()) && !is_usable("fe80::1".parse().unwrap()));
    }
}
