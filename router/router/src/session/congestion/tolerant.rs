//! CUBIC that backs off for congestion and not for whatever else loses packets: see [`Judge`].

use super::judge::Judge;
use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;
use std::{any::Any, sync::Arc, time::Instant};

/// CUBIC behind a [`Judge`].
pub(super) struct Tolerant {
    cubic: Box<dyn Controller>,
    judge: Judge,
}

impl Tolerant {
    pub(super) fn new(config: &Arc<CubicConfig>, now: Instant, mtu: u16) -> Self {
        let cubic = Arc::clone(config).build(now, mtu);
        let judge = Judge::new(now, mtu, cubic.window());
        Self { cubic, judge }
    }

    /// The packets take another path from now on.
    pub(super) fn path_changed(&mut self, now: Instant) {
        self.judge.path_changed(now, self.cubic.window());
    }
}

impl Clone for Tolerant {
    fn clone(&self) -> Self {
        Self { cubic: self.cubic.clone_box(), judge: self.judge.clone() }
    }
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.judge.acked(now, sent, bytes);
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.judge.batch_over(now);
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        // A mark is told as a loss of nothing, and means congestion and nothing else.
        let is_certain = is_persistent_congestion || lost_bytes == 0;
        if is_certain || self.judge.is_congestion(sent, lost_bytes) {
            self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
            self.judge.answered(now, sent, self.cubic.window());
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.judge.set_mtu(new_mtu);
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
