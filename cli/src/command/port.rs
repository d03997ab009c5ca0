//! Ports as arguments have them.

use std::str::FromStr;

use clap::ValueEnum;
use skein_api::Protocol;

/// `P[:LOCAL][/PROTOCOL]` of `expose` and `listen`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortPair {
    pub(crate) port: u32,
    pub(crate) local: Option<u32>,
    /// Where it is said with the port.
    pub(crate) protocol: Option<Protocol>,
}

/// `--protocol` of `expose` and `listen`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ProtocolArg {
    /// Connections
    Tcp,
    /// Datagrams
    Udp,
}

impl From<ProtocolArg> for Protocol {
    fn from(protocol: ProtocolArg) -> Self {
        match protocol {
            ProtocolArg::Tcp => Self::Tcp,
            ProtocolArg::Udp => Self::Udp,
        }
    }
}

/// The protocol after the last slash, and what is in front of it.
pub(crate) fn split_protocol(text: &str) -> Result<(&str, Option<Protocol>), String> {
    match text.rsplit_once('/') {
        None => Ok((text, None)),
        Some((rest, "tcp")) => Ok((rest, Some(Protocol::Tcp))),
        Some((rest, "udp")) => Ok((rest, Some(Protocol::Udp))),
        Some((_, other)) => Err(format!("{other:?} is no protocol; tcp and udp are")),
    }
}

impl FromStr for PortPair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (numbers, protocol) = split_protocol(text)?;
        let number = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(u32::from(port)),
            _ => Err(format!("{text:?} is not a port of 1 to 65535")),
        };
        let (port, local) = match numbers.split_once(':') {
            None => (number(numbers)?, None),
            Some((port, local)) => (number(port)?, Some(number(local)?)),
        };
        Ok(Self { port, local, protocol })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_pairs_parse() {
        let parse = |text: &str| text.parse::<PortPair>();
        let pair = |port, local, protocol| Ok(PortPair { port, local, protocol });
        assert_eq!(parse("80"), pair(80, None, None));
        assert_eq!(parse("80:8080/tcp"), pair(80, Some(8080), Some(Protocol::Tcp)));
        assert_eq!(parse("53/udp"), pair(53, None, Some(Protocol::Udp)));
        for bad in ["", "0", "70000", "80:", ":80", "80:0", "80/sctp", "a", "-1", "80:80:80"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
