//! Which endpoints need no proxy, as `NO_PROXY` has it.

use std::net::IpAddr;

/// A list of exceptions: `*`, `host`, `.suffix`, `host:port`, addresses and networks (`10.0.0.0/8`).
///
/// A name stands for itself and everything below it, with or without a leading dot. Networks are compared with addresses as they
/// are written in endpoints; names are not looked up for that, since whoever needs a proxy often cannot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bypass(Vec<Rule>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    hosts: Hosts,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hosts {
    All,
    /// In lower case, without dots at either end.
    Below(String),
    Network {
        address: IpAddr,
        prefix_len: u8,
    },
}

impl Bypass {
    /// Reads entries as they stand between the commas of `NO_PROXY`; what makes no sense matches nothing.
    #[must_use]
    pub fn new<'a>(entries: impl IntoIterator<Item = &'a str>) -> Self {
        Self(entries.into_iter().filter_map(Rule::parse).collect())
    }

    /// Whether `host`, a name or an address without brackets, is reached directly at `port`.
    #[must_use]
    pub fn matches(&self, host: &str, port: u16) -> bool {
        let name = host.trim_end_matches('.').to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        self.0.iter().any(|rule| {
            rule.port.is_none_or(|only| only == port)
                && match &rule.hosts {
                    Hosts::All => true,
                    Hosts::Below(domain) => {
                        let rest = name.strip_suffix(domain.as_str());
                        address.is_none()
                            && rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                    }
                    Hosts::Network { address: network, prefix_len } => {
                        address.is_some_and(|address| is_within(address, *network, *prefix_len))
                    }
                }
        })
    }
}

impl Rule {
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim();
        if entry == "*" {
            return Some(Self { hosts: Hosts::All, port: None });
        }
        if let Some(hosts) = Hosts::network(entry) {
            return Some(Self { hosts, port: None });
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let hosts = Hosts::network(bare).or_else(|| {
            let domain = host.trim_start_matches('*').trim_matches('.').to_ascii_lowercase();
            (!domain.is_empty()).then_some(Hosts::Below(domain))
        })?;
        Some(Self { hosts, port })
    }
}

impl Hosts {
    /// An address, or a network as CIDR.
    fn network(text: &str) -> Option<Self> {
        let (address, prefix_len) = match text.split_once('/') {
            Some((address, prefix_len)) => (address, Some(prefix_len.parse::<u8>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix_len = prefix_len.unwrap_or(bits);
        (prefix_len <= bits).then_some(Self::Network { address, prefix_len })
    }
}

fn is_within(address: IpAddr, network: IpAddr, prefix_len: u8) -> bool {
    let (address, network, bits) = match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            (u128::from(address.to_bits()), u128::from(network.to_bits()), 32)
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => (address.to_bits(), network.to_bits(), 128),
        _ => return false,
    };
    (address ^ network).checked_shr(u32::from(bits - prefix_len)).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_match_as_everywhere_else() {
        for (entry, host, port, expected) in [
            ("*", "anything.example", 1, true),
            ("example.com", "example.com", 443, true),
            ("example.com", "HUB.Example.com.", 443, true),
            (".example.com", "hub.example.com", 443, true),
            ("*.example.com", "hub.example.com", 443, true),
            ("example.com", "notexample.com", 443, false),
            ("example.com:7443", "example.com", 7443, true),
            ("example.com:7443", "example.com", 443, false),
            ("10.0.0.0/8", "10.200.0.1", 443, true),
            ("10.0.0.0/8", "11.0.0.1", 443, false),
            ("0.0.0.0/0", "11.0.0.1", 443, true),
            ("0.0.0.0/0", "2001:db8::1", 443, false),
            ("192.0.2.1", "192.0.2.1", 443, true),
            ("192.0.2.1:80", "192.0.2.1", 443, false),
            ("2001:db8::/32", "2001:db8:1::1", 443, true),
            ("[2001:db8::1]:7443", "2001:db8::1", 7443, true),
            ("::/0", "2001:db8::1", 443, true),
            ("1", "192.0.2.1", 443, false),
            ("10.0.0.0/33", "10.0.0.1", 443, false),
            ("", "example.com", 443, false),
            (".", "example.com", 443, false),
            ("example.com:x", "example.com", 443, false),
        ] {
            assert_eq!(Bypass::new([entry]).matches(host, port), expected, "{entry} {host}:{port}");
        }
        assert!(Bypass::new(" a.example , b.example".split(',')).matches("b.example", 1));
    }
}
