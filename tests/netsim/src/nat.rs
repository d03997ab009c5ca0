//! Network address translation: a host that others see under another address.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

/// First port that a translation uses.
const PORT_MIN: u16 = 20_000;
/// Ports it hands out before it begins anew.
const PORTS: u16 = 30_000;

/// Translates for one host: one port for each of its own, whomever it talks to; lets in only whom the host has sent to.
#[derive(Clone, Debug)]
pub(crate) struct Nat {
    pub(crate) public: IpAddr,
    expiry_us: u64,
    next: u16,
    /// Counts rebindings: connections from before one are dead.
    pub(crate) epoch: u64,
    by_inner: BTreeMap<u16, Mapping>,
}

#[derive(Clone, Debug)]
struct Mapping {
    outer: u16,
    used_us: u64,
    /// Whom the host has sent to.
    peers: BTreeMap<SocketAddr, u64>,
}

impl Nat {
    pub(crate) fn new(public: IpAddr, expiry_us: u64) -> Self {
        Self { public, expiry_us, next: 0, epoch: 0, by_inner: BTreeMap::new() }
    }

    /// Where a datagram from `inner` to `to` seems to come from.
    pub(crate) fn outward(&mut self, now_us: u64, inner: u16, to: SocketAddr) -> SocketAddr {
        let expired = |mapping: &Mapping| now_us - mapping.used_us > self.expiry_us;
        if self.by_inner.get(&inner).is_some_and(expired) {
            self.by_inner.remove(&inner);
        }
        if !self.by_inner.contains_key(&inner) {
            let outer = self.free_port();
            self.by_inner.insert(inner, Mapping { outer, used_us: now_us, peers: BTreeMap::new() });
        }
        let mapping = self.by_inner.get_mut(&inner).expect("invariant: it was just made");
        mapping.used_us = now_us;
        mapping.peers.insert(to, now_us);
        SocketAddr::new(self.public, mapping.outer)
    }

    /// The port of the host that a datagram from `from` to `outer` is for.
    pub(crate) fn inward(&self, now_us: u64, outer: u16, from: SocketAddr) -> Option<u16> {
        let (inner, mapping) = self.by_inner.iter().find(|(_, mapping)| mapping.outer == outer)?;
        let used_us = mapping.peers.get(&from)?;
        (now_us - used_us <= self.expiry_us).then_some(*inner)
    }

    /// Forgets everything; what is sent from now on seems to come from elsewhere.
    pub(crate) fn rebind(&mut self) {
        self.epoch += 1;
        self.by_inner.clear();
    }

    pub(crate) fn set_expiry(&mut self, expiry_us: u64) {
        self.expiry_us = expiry_us;
    }

    pub(crate) fn free_port(&mut self) -> u16 {
        self.next = (self.next + 1) % PORTS;
        PORT_MIN + self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_in_whom_the_host_has_sent_to_until_it_forgets() {
        let mut nat = Nat::new([198, 51, 100, 1].into(), 30_000_000);
        let (peer, stranger) = (([10, 0, 0, 2], 7_443).into(), ([10, 0, 0, 3], 7_443).into());
        let seen = nat.outward(0, 5_000, peer);
        assert_eq!(nat.inward(1, seen.port(), peer), Some(5_000));
        assert_eq!(nat.inward(1, seen.port(), stranger), None);
        assert_eq!(nat.outward(1, 5_000, stranger), seen, "one port whomever it is for");
        assert_eq!(nat.inward(30_000_001, seen.port(), peer), None);
        assert_ne!(nat.outward(60_000_000, 5_000, peer), seen, "it has expired");
        nat.rebind();
        assert_ne!(nat.outward(60_000_001, 5_000, peer), seen);
    }
}
