//! Congestion control of sessions: CUBIC that bears with losses which are no congestion ([`Tolerant`]), and that does not wait for what was
//! lost with the old path when a connection has a new one.
//!
//! While a path is broken, what is in flight fills the congestion window. From then on QUIC sends nothing but probes, twice as far apart
//! each time, and not even acknowledgements: those of the peer's probes leave with our own next probe. So after an outage both ends would
//! wait for up to as long as it took. When a session has a new path, [`Relief`] lets a few packets more into flight. They are acknowledged
//! at once, with everything lost known by that and the round-trip time measured by packets that have not waited for a path.

mod judge;
#[cfg(test)]
mod line;
mod tolerant;

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;
use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};
use tolerant::Tolerant;

/// As many as the first flight of a careful connection (RFC 6928).
const PACKETS: u64 = 10;

/// Shared by a connection's congestion controller and whoever knows of its paths.
#[derive(Debug, Default)]
pub(super) struct Relief {
    /// Times it was asked for.
    wanted: AtomicU64,
    /// Something was acknowledged since.
    is_heard: AtomicBool,
}

impl Relief {
    /// Lets a few packets more into flight. Whoever calls this wakes the connection.
    pub(super) fn grant(&self) {
        self.is_heard.store(false, Ordering::Relaxed);
        self.wanted.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the peer has acknowledged something since.
    pub(super) fn is_heard(&self) -> bool {
        self.is_heard.load(Ordering::Relaxed)
    }

    /// That of a connection made with [`Factory`].
    pub(super) fn of(connection: &quinn::Connection) -> Option<Arc<Self>> {
        let state = connection.congestion_state().into_any().downcast::<Relieved>().ok()?;
        Some(state.relief)
    }
}

/// Makes controllers that can be relieved.
#[derive(Debug)]
pub(super) struct Factory(pub(super) Arc<CubicConfig>);

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Relieved {
            inner: Tolerant::new(&self.0, now, current_mtu),
            relief: Arc::default(),
            mtu: current_mtu.into(),
            in_flight: 0,
            granted: 0,
            floor: 0,
        })
    }
}

struct Relieved {
    inner: Tolerant,
    relief: Arc<Relief>,
    mtu: u64,
    /// Bytes; a little too much between acknowledgements, since what needs none counts as well.
    in_flight: u64,
    /// How often a relief has been used.
    granted: u64,
    /// What may be in flight until something is acknowledged, whatever the window.
    floor: u64,
}

impl Relieved {
    fn relieved(&self) -> u64 {
        self.in_flight + PACKETS * self.mtu
    }
}

impl Controller for Relieved {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        let wanted = self.relief.wanted.load(Ordering::Relaxed);
        if wanted != self.granted {
            self.granted = wanted;
            self.floor = self.relieved();
            self.inner.path_changed(now);
        }
        self.in_flight += bytes;
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.in_flight = in_flight;
        self.floor = 0;
        self.relief.is_heard.store(true, Ordering::Relaxed);
        self.inner.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.in_flight = self.in_flight.saturating_sub(lost_bytes);
        self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        let is_wanted = self.relief.wanted.load(Ordering::Relaxed) != self.granted;
        self.inner.window().max(if is_wanted { self.relieved() } else { self.floor })
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { inner: self.inner.clone(), relief: Arc::clone(&self.relief), ..*self })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_window_opens_for_a_few_packets_until_something_is_acknowledged() {
        let now = crate::clock::now();
        let mut cubic = CubicConfig::default();
        cubic.initial_window(100_000);
        let mut controller = Arc::new(Factory(Arc::new(cubic))).build(now, 1_200);
        for number in 0..100 {
            controller.on_sent(now, 1_000, number);
        }
        let relief = controller.clone_box().into_any().downcast::<Relieved>().unwrap().relief;
        assert_eq!(controller.window(), 100_000);
        relief.grant();
        assert_eq!(controller.window(), 112_000);
        for number in 100..110 {
            controller.on_sent(now, 1_200, number);
            assert_eq!(controller.window(), 112_000, "what is sent does not open it further");
        }
        relief.grant();
        assert_eq!(controller.window(), 124_000, "again, if nothing came of it");
        assert!(!relief.is_heard());
        controller.on_end_acks(now, 90_000, false, Some(109));
        assert!(relief.is_heard());
        // Used up or not, there is no need for it any more once the next packet has left.
        controller.on_sent(now, 1_200, 110);
        controller.on_end_acks(now, 90_000, false, Some(110));
        assert_eq!(controller.window(), 100_000);
    }
}
