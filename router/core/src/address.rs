//! Application addresses and what routers advertise about them.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

/// Longest address in bytes, as for DNS names.
pub const ADDRESS_LEN_MAX: usize = 253;
/// Longest label of an address in bytes, as for DNS names.
const LABEL_LEN_MAX: usize = 63;

/// Names a service, never a host: DNS labels with dots, lower case, e.g. `payments.prod`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(Arc<str>);

/// Why a text is not an [`Address`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No characters at all.
    #[error("an address cannot be empty")]
    Empty,
    /// More than [`ADDRESS_LEN_MAX`] bytes.
    #[error("an address has at most {ADDRESS_LEN_MAX} characters")]
    TooLong,
    /// A part between dots is empty or over 63 bytes.
    #[error("each part of an address between dots has 1 to {LABEL_LEN_MAX} characters")]
    LabelLength,
    /// Something other than `a-z 0-9 -`, or a leading or trailing hyphen.
    #[error("an address consists of a-z, 0-9, '-' and '.', and no part begins or ends with '-'")]
    Character,
}

impl Address {
    /// The text of the address.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        if text.len() > ADDRESS_LEN_MAX {
            return Err(AddressError::TooLong);
        }
        for label in text.split('.') {
            if label.is_empty() || label.len() > LABEL_LEN_MAX {
                return Err(AddressError::LabelLength);
            }
            let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !label.bytes().all(legal) || label.starts_with('-') || label.ends_with('-') {
                return Err(AddressError::Character);
            }
        }
        Ok(Self(text.into()))
    }
}

impl Borrow<str> for Address {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a flow of this port carries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// A byte stream with half-close and reset.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Port {
    /// The service's port, 1 to 65535.
    pub port: u16,
    /// What it carries.
    pub protocol: Protocol,
}

/// How an ingress chooses among the routers that serve an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Strategy {
    /// The smallest path metric.
    Closest,
    /// The fewest outstanding flows, path metric added.
    #[default]
    Balanced,
    /// The lowest priority number that is reachable.
    Priority,
    /// In proportion to weights.
    Weighted,
}

/// What one router advertises about one address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct AddressEntry {
    /// The address served.
    pub address: Address,
    /// Ports served, sorted.
    pub ports: Vec<Port>,
    /// How ingresses should choose; the most common one among providers wins, ties to the smallest.
    pub strategy: Strategy,
    /// Added to the path metric.
    pub cost: u32,
    /// Lower is better.
    pub priority: u32,
    /// Share under [`Strategy::Weighted`].
    pub weight: u32,
    /// Flows may be retried on another provider after payload was sent.
    pub at_least_once: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepts_names_and_refuses_the_rest() {
        for good in ["a", "backend", "payments.prod", "x-1.y2", &"a".repeat(63)] {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "-a", "a-", "A", "ä", "a b", "../x", "😀", "a_b"]
        {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        assert_eq!("a".repeat(64).parse::<Address>(), Err(AddressError::LabelLength));
        assert_eq!("a.".repeat(127).parse::<Address>(), Err(AddressError::TooLong));
    }

    proptest! {
        #[test]
        fn what_parses_prints_the_same(text in "[a-z0-9.-]{0,80}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string(), text);
            }
        }
    }
}
