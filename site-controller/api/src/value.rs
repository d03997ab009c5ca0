//! Values that occur in several resources: names, hosts, durations, protocols.

use std::{borrow::Cow, fmt, net::IpAddr, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest resource name in bytes, as for DNS labels.
pub const NAME_LEN_MAX: usize = 63;
/// Longest host name in bytes, as for DNS names.
const HOST_LEN_MAX: usize = 253;

/// Whether `name` is a DNS label: 1 to 63 of `a-z 0-9 -`, no hyphen at either end.
#[must_use]
pub fn valid_name(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !name.is_empty()
        && name.len() <= NAME_LEN_MAX
        && name.bytes().all(legal)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Whether `host` is an IP address or a host name (letters, digits, hyphens, underscores, dots).
#[must_use]
pub fn valid_host(host: &str) -> bool {
    if host.parse::<IpAddr>().is_ok() {
        return true;
    }
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let name = host.strip_suffix('.').unwrap_or(host);
    !name.is_empty()
        && name.len() <= HOST_LEN_MAX
        // A name of digits and dots is a mistyped IPv4 address, not a host.
        && !name.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        && name.split('.').all(|label| {
            (1..=NAME_LEN_MAX).contains(&label.len())
                && label.bytes().all(legal)
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// What a port carries.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub enum Protocol {
    /// A byte stream with half-close and reset.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

impl From<Protocol> for skein_core::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A length of time written with units: `500ms`, `90s`, `15m`, `1h30m`, `7d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(pub std::time::Duration);

/// Why a text is not a [`Duration`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// Not numbers with units.
    #[error("must be numbers with the units ms, s, m, h or d, such as 90s, 15m or 1h30m")]
    Syntax,
    /// Beyond what can be represented.
    #[error("is too long")]
    TooLong,
}

impl Duration {
    /// A duration of whole seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(std::time::Duration::from_secs(seconds))
    }
}

impl FromStr for Duration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let mut rest = text.trim();
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(DurationError::Syntax);
        }
        let mut total_ms = 0_u64;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, after) = rest.split_at(digits);
            let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
            let (unit, after) = after.split_at(letters);
            let unit_ms = match unit {
                "ms" => 1,
                "s" => 1_000,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(DurationError::Syntax),
            };
            if number.is_empty() {
                return Err(DurationError::Syntax);
            }
            total_ms = number
                .parse::<u64>()
                .ok()
                .and_then(|number| number.checked_mul(unit_ms))
                .and_then(|ms| total_ms.checked_add(ms))
                .ok_or(DurationError::TooLong)?;
            rest = after;
        }
        Ok(Self(std::time::Duration::from_millis(total_ms)))
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_millis();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, ms) in
            [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)]
        {
            if rest >= ms {
                write!(f, "{}{unit}", rest / ms)?;
                rest %= ms;
            }
        }
        Ok(())
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|why| de::Error::custom(format_args!("duration {text:?} {why}")))
    }
}

impl JsonSchema for Duration {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A length of time with units: 500ms, 90s, 15m, 1h30m, 7d.",
            "pattern": "^(0|([0-9]+(ms|s|m|h|d))+)$"
        })
    }
}

/// A host with an optional port: `203.0.113.7`, `hub.example:7443`, `[2001:db8::1]:7443`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// IP address (without brackets) or host name.
    pub host: String,
    /// 1 to 65535.
    pub port: Option<u16>,
}

/// Why a text is not a [`HostPort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostPortError {
    /// The host is neither an address nor a name.
    #[error("must be HOST or HOST:PORT with an IP address (IPv6 in brackets) or a host name")]
    Host,
    /// The port is not a number of 1 to 65535.
    #[error("must have a port of 1 to 65535")]
    Port,
}

impl HostPort {
    /// The text with `default_port` where none was given.
    #[must_use]
    pub fn with_default(&self, default_port: u16) -> String {
        Self { host: self.host.clone(), port: Some(self.port.unwrap_or(default_port)) }.to_string()
    }
}

impl FromStr for HostPort {
    type Err = HostPortError;

    fn from_str(text: &str) -> Result<Self, HostPortError> {
        if text.contains('/') {
            return Err(HostPortError::Host);
        }
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, after) = rest.split_once(']').ok_or(HostPortError::Host)?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(HostPortError::Host);
            }
            match after {
                "" => (host, None),
                _ => (host, Some(after.strip_prefix(':').ok_or(HostPortError::Host)?)),
            }
        } else if text.parse::<std::net::Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)))
        };
        if !valid_host(host) {
            return Err(HostPortError::Host);
        }
        let port = port.map(|port| match port.parse::<u16>() {
            Ok(number) if number > 0 && port.bytes().all(|b| b.is_ascii_digit()) => Ok(number),
            _ => Err(HostPortError::Port),
        });
        Ok(Self { host: host.to_owned(), port: port.transpose()? })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brackets = self.host.contains(':');
        match (self.port, brackets) {
            (Some(port), true) => write!(f, "[{}]:{port}", self.host),
            (Some(port), false) => write!(f, "{}:{port}", self.host),
            (None, true) => write!(f, "[{}]", self.host),
            (None, false) => f.write_str(&self.host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "hub-1", "9", &"a".repeat(63)] {
            assert!(valid_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "../x", "😀", "a b", &"a".repeat(64)] {
            assert!(!valid_name(bad), "{bad}");
        }
    }

    #[test]
    fn hosts_are_addresses_or_names() {
        for good in ["127.0.0.1", "::1", "db", "db.example.", "my_db.local", "xn--e1afmkfd.example"]
        {
            assert!(valid_host(good), "{good}");
        }
        for bad in ["", "300.1.1.1", "1.2.3", "a..b", "-a", "a b", "http://x", "a:1", "é"] {
            assert!(!valid_host(bad), "{bad}");
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, ms) in
            [("0", 0), ("0s", 0), ("500ms", 500), ("90s", 90_000), ("1h30m", 5_400_000)]
        {
            assert_eq!(text.parse::<Duration>().unwrap().0.as_millis(), ms, "{text}");
        }
        for bad in ["", "15", "m", "1x", "-1s", "1.5s", "1 h", "15min"] {
            assert_eq!(bad.parse::<Duration>(), Err(DurationError::Syntax), "{bad}");
        }
        assert_eq!("99999999999999999999s".parse::<Duration>(), Err(DurationError::TooLong));
        assert_eq!("999999999999999999d".parse::<Duration>(), Err(DurationError::TooLong));
    }

    #[test]
    fn host_ports_name_the_broken_half() {
        let parse = |text: &str| text.parse::<HostPort>().map(|parsed| parsed.to_string());
        assert_eq!(parse("hub.example:7443").unwrap(), "hub.example:7443");
        assert_eq!(parse("::1").unwrap(), "[::1]");
        assert_eq!(parse("[::1]:5").unwrap(), "[::1]:5");
        for bad in ["a:0", "a:70000", "a:", "a:+5", "[::1]:x"] {
            assert_eq!(parse(bad), Err(HostPortError::Port), "{bad}");
        }
        for bad in ["", ":5", "[::1", "[x]:5", "[::1]5", "http://x"] {
            assert_eq!(parse(bad), Err(HostPortError::Host), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn durations_print_what_they_parse(ms in 0_u64..u64::MAX / 4) {
            let duration = Duration(std::time::Duration::from_millis(ms));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn parsers_never_panic(text in ".*") {
            let (_, _) = (text.parse::<Duration>(), text.parse::<HostPort>());
            let (_, _) = (valid_host(&text), valid_name(&text));
        }
    }
}
