//! How many flows there may be, and how many of one site. Each takes a descriptor, of which links must find some left.

use super::Edge;
use parking_lot::Mutex;
use skein_core::{Protocol, SiteId};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// One site may have so many times what is left for everybody else, as with memory: in streams, and in associations.
const SHARE: usize = 3;

/// Associations may be one flow in so many: a datagram from a forged address begins one, which then lasts for a minute.
const ASSOCIATIONS_SHARE: usize = 2;

/// Room for flows at both edges of a router.
#[derive(Debug)]
pub struct FlowLimit {
    local: SiteId,
    flows_max: AtomicUsize,
    descriptors_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    /// By edge.
    flows: [usize; 2],
    /// Those of them that are associations.
    associations: [usize; 2],
    /// Those that leave here and share the room, see [`FlowLimit::is_shared`].
    by_site: HashMap<(SiteId, Protocol), usize>,
}

/// One flow, until it is dropped.
#[derive(Debug)]
pub(crate) struct FlowSlot {
    limit: Arc<FlowLimit>,
    edge: Edge,
    protocol: Protocol,
    site: SiteId,
}

impl FlowLimit {
    /// Room for `flows_max` flows at each edge of a router of the site `local`, and for `descriptors_max` at both.
    #[must_use]
    pub fn new(local: SiteId, flows_max: usize, descriptors_max: usize) -> Arc<Self> {
        Arc::new(Self {
            local,
            flows_max: AtomicUsize::new(flows_max),
            descriptors_max,
            taken: Mutex::default(),
        })
    }

    /// Changes the number of flows at each edge; those that run go on.
    pub fn set_flows_max(&self, flows_max: usize) {
        self.flows_max.store(flows_max, Ordering::Relaxed);
    }

    /// Room for one more flow that comes from `site`; `None` when there is none, or none for that site.
    pub(crate) fn enter(
        self: &Arc<Self>,
        edge: Edge,
        protocol: Protocol,
        site: SiteId,
    ) -> Option<FlowSlot> {
        let mut taken = self.taken.lock();
        let left = self.left(&taken, edge, protocol).checked_sub(1)?;
        if self.is_shared(edge, protocol, site) {
            let used = taken.by_site.get(&(site, protocol)).copied().unwrap_or(0);
            // The first may take all there is.
            if used > 0 && used >= left.saturating_mul(SHARE) {
                return None;
            }
            taken.by_site.insert((site, protocol), used + 1);
        }
        taken.flows[edge as usize] += 1;
        taken.associations[edge as usize] += usize::from(protocol == Protocol::Udp);
        Some(FlowSlot { limit: Arc::clone(self), edge, protocol, site })
    }

    /// Room for flows of this protocol at this edge.
    fn left(&self, taken: &Taken, edge: Edge, protocol: Protocol) -> usize {
        let flows_max = self.flows_max.load(Ordering::Relaxed);
        let of_flows = flows_max.saturating_sub(taken.flows[edge as usize]);
        let of_descriptors = self.descriptors_max.saturating_sub(taken.flows.iter().sum());
        let left = of_flows.min(of_descriptors);
        match protocol {
            Protocol::Tcp => left,
            Protocol::Udp => {
                let part = flows_max / ASSOCIATIONS_SHARE;
                left.min(part.saturating_sub(taken.associations[edge as usize]))
            }
        }
    }

    /// Whether flows of `site` leave other sites their part. None enters here but our own; and where they leave, our own come first, but not
    /// with what anybody near could have forged.
    fn is_shared(&self, edge: Edge, protocol: Protocol, site: SiteId) -> bool {
        edge == Edge::Egress && (site != self.local || protocol == Protocol::Udp)
    }
}

impl Drop for FlowSlot {
    fn drop(&mut self) {
        let mut taken = self.limit.taken.lock();
        taken.flows[self.edge as usize] -= 1;
        taken.associations[self.edge as usize] -= usize::from(self.protocol == Protocol::Udp);
        if !self.limit.is_shared(self.edge, self.protocol, self.site) {
            return;
        }
        let key = (self.site, self.protocol);
        if let Some(used) = taken.by_site.get_mut(&key) {
            *used -= 1;
            if *used == 0 {
                taken.by_site.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(n: u8) -> SiteId {
        SiteId([n; 32])
    }

    #[test]
    fn a_site_leaves_room_for_others_and_gives_it_back() {
        let limit = FlowLimit::new(site(0), 100, usize::MAX);
        let leave = |n: u8| limit.enter(Edge::Egress, Protocol::Tcp, site(n));
        let greedy: Vec<_> = std::iter::from_fn(|| leave(1)).collect();
        assert_eq!(greedy.len(), 75);
        let late: Vec<_> = std::iter::from_fn(|| leave(2)).collect();
        assert!(late.len() >= 18, "{}", late.len());
        assert!(leave(1).is_none());
        drop((greedy, late));
        let taken = limit.taken.lock();
        assert!(taken.flows == [0, 0] && taken.by_site.is_empty());
    }

    #[test]
    fn both_edges_share_the_descriptors() {
        let limit = FlowLimit::new(site(0), 100, 120);
        let entering: Vec<_> =
            std::iter::from_fn(|| limit.enter(Edge::Ingress, Protocol::Tcp, site(0))).collect();
        assert_eq!(entering.len(), 100, "its own clients may have all of it");
        let leaving: Vec<_> =
            std::iter::from_fn(|| limit.enter(Edge::Egress, Protocol::Tcp, site(1))).collect();
        assert_eq!(leaving.len(), 15);
        drop(entering);
        limit.set_flows_max(15);
        assert!(limit.enter(Edge::Egress, Protocol::Tcp, site(0)).is_none());
    }

    #[test]
    fn a_refusal_leaves_nothing_behind() {
        let limit = FlowLimit::new(site(0), 0, usize::MAX);
        assert!(limit.enter(Edge::Egress, Protocol::Tcp, site(1)).is_none());
        limit.set_flows_max(1);
        let held = limit.enter(Edge::Egress, Protocol::Tcp, site(1)).unwrap();
        assert!(limit.enter(Edge::Egress, Protocol::Tcp, site(2)).is_none());
        drop(held);
        let taken = limit.taken.lock();
        assert!(taken.flows == [0, 0] && taken.by_site.is_empty());
    }

    #[test]
    fn associations_leave_half_of_the_room() {
        let limit = FlowLimit::new(site(0), 100, usize::MAX);
        let enter = |protocol| limit.enter(Edge::Ingress, protocol, site(0));
        let associations: Vec<_> = std::iter::from_fn(|| enter(Protocol::Udp)).collect();
        let streams: Vec<_> = std::iter::from_fn(|| enter(Protocol::Tcp)).collect();
        assert_eq!((associations.len(), streams.len()), (50, 50));
        drop(associations);
        assert!(enter(Protocol::Udp).is_some());
    }

    #[test]
    fn a_site_leaves_others_their_part_of_the_associations() {
        let limit = FlowLimit::new(site(0), 100, usize::MAX);
        let leave = |protocol, n: u8| limit.enter(Edge::Egress, protocol, site(n));
        let streams: Vec<_> = std::iter::from_fn(|| leave(Protocol::Tcp, 1)).collect();
        assert_eq!(streams.len(), 75);
        assert!(leave(Protocol::Udp, 1).is_some(), "it has another part of these");
        drop(streams);
        let greedy: Vec<_> = std::iter::from_fn(|| leave(Protocol::Udp, 1)).collect();
        assert_eq!(greedy.len(), 37);
        let late: Vec<_> = std::iter::from_fn(|| leave(Protocol::Udp, 2)).collect();
        assert!(late.len() >= 9, "{}", late.len());
        assert!(leave(Protocol::Udp, 0).is_some(), "its own clients");
        assert!(leave(Protocol::Udp, 1).is_none());
        let streams: Vec<_> = std::iter::from_fn(|| leave(Protocol::Tcp, 1)).collect();
        assert!(streams.len() >= 30, "{}", streams.len());
        drop((greedy, late, streams));
        let taken = limit.taken.lock();
        assert!(taken.flows == [0, 0] && taken.by_site.is_empty());
    }
}
