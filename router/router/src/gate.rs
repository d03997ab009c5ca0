//! Room for strangers: what has not shown yet who it is may be so many at a time, and so many from one place.
//!
//! A newcomer is never turned away for want of room. The oldest of whoever takes the most gives way, so that filling every slot
//! costs an attacker more than one network, and costs others no more than a repetition.

use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};
use tokio_util::sync::CancellationToken;

/// Slots, shared out by the network that connections come from.
#[derive(Debug)]
pub(crate) struct Gate {
    slots_max: usize,
    per_source_max: usize,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// Ascending by age.
    taken: BTreeMap<u64, Taken>,
    by_source: HashMap<Source, usize>,
    last: u64,
}

#[derive(Debug)]
struct Taken {
    source: Source,
    evicted: CancellationToken,
}

/// What one party usually has of the address space: a /24 or a /64.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Source {
    V4([u8; 3]),
    V6([u8; 8]),
}

impl From<IpAddr> for Source {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => {
                let [a, b, c, _] = ip.octets();
                Self::V4([a, b, c])
            }
            IpAddr::V6(ip) => {
                let [a, b, c, d, e, f, g, h, ..] = ip.octets();
                Self::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

/// A slot, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    gate: Arc<Gate>,
    number: u64,
    evicted: CancellationToken,
}

impl Gate {
    pub(crate) fn new(slots_max: usize, per_source_max: usize) -> Arc<Self> {
        Arc::new(Self { slots_max, per_source_max, slots: Mutex::default() })
    }

    /// Slots taken in all and from where `ip` is.
    pub(crate) fn taken(&self, ip: IpAddr) -> (usize, usize) {
        let slots = self.slots.lock();
        (slots.taken.len(), slots.by_source.get(&ip.into()).copied().unwrap_or(0))
    }

    /// Takes a slot; if need be somebody is evicted.
    pub(crate) fn enter(self: &Arc<Self>, ip: IpAddr) -> Slot {
        let source = Source::from(ip);
        let mut slots = self.slots.lock();
        if slots.by_source.get(&source).is_some_and(|&taken| taken >= self.per_source_max) {
            slots.evict(source);
        } else if slots.taken.len() >= self.slots_max
            && let Some(heaviest) = slots.heaviest()
        {
            slots.evict(heaviest);
        }
        slots.last += 1;
        let (number, evicted) = (slots.last, CancellationToken::new());
        slots.taken.insert(number, Taken { source, evicted: evicted.clone() });
        *slots.by_source.entry(source).or_default() += 1;
        Slot { gate: Arc::clone(self), number, evicted }
    }
}

impl Slots {
    /// Who takes the most; of several the one with the oldest slot.
    fn heaviest(&self) -> Option<Source> {
        let most = self.by_source.values().max()?;
        let mut oldest_first = self.taken.values().map(|taken| taken.source);
        oldest_first.find(|source| self.by_source.get(source) == Some(most))
    }

    fn evict(&mut self, source: Source) {
        let oldest = self.taken.iter().find(|(_, taken)| taken.source == source);
        if let Some(number) = oldest.map(|(&number, _)| number)
            && let Some(taken) = self.remove(number)
        {
            taken.evicted.cancel();
        }
    }

    fn remove(&mut self, number: u64) -> Option<Taken> {
        let taken = self.taken.remove(&number)?;
        if let Some(count) = self.by_source.get_mut(&taken.source) {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&taken.source);
            }
        }
        Some(taken)
    }
}

impl Slot {
    /// Waits until the slot was given to somebody else.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.gate.slots.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_network_evicts_only_itself() {
        let gate = Gate::new(8, 2);
        let other = gate.enter(ip("198.51.100.1"));
        let first = gate.enter(ip("192.0.2.1"));
        let second = gate.enter(ip("::ffff:192.0.2.200"));
        let third = gate.enter(ip("192.0.2.3"));
        assert!(first.evicted.is_cancelled());
        assert!(![&other, &second, &third].iter().any(|slot| slot.evicted.is_cancelled()));
        assert_eq!(gate.taken(ip("192.0.2.9")), (3, 2));
        drop((first, second, third));
        assert_eq!(gate.taken(ip("192.0.2.9")), (1, 0));
    }

    #[test]
    fn when_all_is_taken_whoever_takes_most_gives_way() {
        let gate = Gate::new(4, 3);
        let alone = gate.enter(ip("2001:db8:1::1"));
        let crowd: Vec<Slot> = ["2001:db8:2::1", "2001:db8:2::2", "2001:db8:2:0:9::3"]
            .map(|text| gate.enter(ip(text)))
            .into();
        let newcomer = gate.enter(ip("203.0.113.1"));
        assert!(crowd[0].evicted.is_cancelled());
        assert!(!alone.evicted.is_cancelled() && !newcomer.evicted.is_cancelled());
        assert_eq!(gate.taken(ip("2001:db8:2::")), (4, 2));
    }
}
