//! Deleted connectors whose flows run on: they outlive the controller that deleted them.

use serde::{Deserialize, Serialize};
use skein_api::{ConnectorSpec, Manifest};
use skein_site_core::Draining;

use super::{SetAside, Store, StoreError};
use crate::controller::DrainingUntil;

const DRAINING: &str = "draining.json";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    connector: Manifest<ConnectorSpec>,
    reset: bool,
    until_unix_s: i64,
}

impl Store {
    /// Stores what drains.
    pub(crate) fn save_draining(&self, draining: &[DrainingUntil]) -> Result<(), StoreError> {
        let stored = |one: &DrainingUntil| Stored {
            connector: one.draining.connector.clone(),
            reset: one.draining.reset,
            until_unix_s: one.until_unix_s,
        };
        self.save_json(DRAINING, &draining.iter().map(stored).collect::<Vec<_>>())
    }

    /// What drained when the last controller ended.
    pub(crate) fn load_draining(
        &self,
        problems: &mut Vec<SetAside>,
    ) -> Result<Vec<DrainingUntil>, StoreError> {
        let stored: Vec<Stored> = self.optional(DRAINING, problems)?;
        let until = |one: Stored| DrainingUntil {
            draining: Draining { connector: one.connector, reset: one.reset },
            until_unix_s: one.until_unix_s,
        };
        Ok(stored.into_iter().map(until).collect())
    }
}
