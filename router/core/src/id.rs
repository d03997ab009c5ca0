//! Names of sites, routers, links and boots.

use std::{
    fmt,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
};

/// Identity of a site: SHA-256 of its inception record, shown as lower-case base32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId(pub [u8; 32]);

/// Identity of a router: the first 16 bytes of SHA-256 over its site id and name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouterId(pub [u8; 16]);

/// Names one boot of a router in frame headers; drawn anew at every boot, never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Handle(pub u32);

/// Identity of an established link, agreed in its handshake and the same at both ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// A router's number for one of its links, as written into frame headers; never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Label(pub u16);

/// Which of the disjoint paths to a router a session is pinned to; 0 is the shortest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Pin(pub u8);

/// How many paths to a router are kept; three bits of the frame header hold a pin.
pub const PINS_MAX: u8 = 4;

const VADDR_PREFIX: [u8; 4] = [0xfd, 0x5e, 0x1e, 0x17];
/// A port of 0 is refused by QUIC stacks, so pin 0 is port 1.
const VADDR_PORT_BASE: u16 = 1;

/// The virtual address of a peer router's boot under a pin: what the end-to-end endpoint believes to be its remote.
///
/// Every boot has another handle, hence another address: packets of an old boot cannot reach a new one.
#[must_use]
pub fn vaddr(handle: Handle, pin: Pin) -> SocketAddr {
    let mut octets = [0; 16];
    octets[..4].copy_from_slice(&VADDR_PREFIX);
    octets[12..].copy_from_slice(&handle.0.to_be_bytes());
    let port = VADDR_PORT_BASE + u16::from(pin.0);
    SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, 0))
}

/// The inverse of [`vaddr`]; `None` for any other address.
#[must_use]
pub fn parse_vaddr(addr: &SocketAddr) -> Option<(Handle, Pin)> {
    let SocketAddr::V6(v6) = addr else { return None };
    let octets = v6.ip().octets();
    let (head, tail) = octets.split_at(12);
    if head[..4] != VADDR_PREFIX || head[4..].iter().any(|&b| b != 0) {
        return None;
    }
    let handle = u32::from_be_bytes(tail.try_into().ok()?);
    let pin = u8::try_from(v6.port().checked_sub(VADDR_PORT_BASE)?).ok()?;
    (handle != 0 && pin < PINS_MAX).then_some((Handle(handle), Pin(pin)))
}

const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Lower-case base32 without padding (RFC 4648 §6).
fn base32(bytes: &[u8]) -> String {
    let mut out = String::with_capacity((bytes.len() * 8).div_ceil(5));
    let (mut buffer, mut bits) = (0_u32, 0_u32);
    for &byte in bytes {
        buffer = (buffer << 8) | u32::from(byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            out.push(char::from(BASE32[(buffer >> bits) as usize & 31]));
        }
        buffer &= (1 << bits) - 1;
    }
    if bits > 0 {
        out.push(char::from(BASE32[(buffer << (5 - bits)) as usize & 31]));
    }
    out
}

impl SiteId {
    /// The first characters of the id: enough for people to tell sites apart.
    #[must_use]
    pub fn short(&self) -> String {
        base32(&self.0[..5])
    }

    /// Parses the 52-character form written by `Display`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut out = [0_u8; 32];
        let (mut buffer, mut bits, mut at) = (0_u32, 0_u32, 0_usize);
        if text.len() != 52 {
            return None;
        }
        for c in text.bytes() {
            let value = BASE32.iter().position(|&b| b == c)?;
            buffer = (buffer << 5) | u32::try_from(value).ok()?;
            bits += 5;
            if bits >= 8 {
                bits -= 8;
                *out.get_mut(at)? = u8::try_from((buffer >> bits) & 0xff).ok()?;
                at += 1;
            }
            buffer &= (1 << bits) - 1;
        }
        (at == 32 && buffer == 0).then_some(Self(out))
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32(&self.0))
    }
}

impl fmt::Debug for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl fmt::Display for RouterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32(&self.0[..10]))
    }
}

impl fmt::Debug for RouterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32(&self.0[..5]))
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn site_id_text_round_trips(bytes: [u8; 32]) {
            let id = SiteId(bytes);
            prop_assert_eq!(SiteId::parse(&id.to_string()), Some(id));
        }

        #[test]
        fn parse_never_panics(text in ".*") {
            let _ = SiteId::parse(&text);
        }

        #[test]
        fn vaddr_round_trips(handle in 1_u32.., pin in 0..PINS_MAX) {
            let addr = vaddr(Handle(handle), Pin(pin));
            prop_assert_eq!(parse_vaddr(&addr), Some((Handle(handle), Pin(pin))));
        }
    }

    #[test]
    fn foreign_addresses_are_not_virtual() {
        assert_eq!(parse_vaddr(&"127.0.0.1:1".parse().unwrap()), None);
        assert_eq!(parse_vaddr(&"[fd00::1]:1".parse().unwrap()), None);
        assert_eq!(parse_vaddr(&"[fd5e:1e17::1]:9".parse().unwrap()), None);
    }
}
