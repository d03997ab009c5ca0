//! Connectors that were deleted while flows ran through them.

use skein_api::Kind;
use skein_site_core::Draining;
use skein_wire::proto::site::DeleteRequest;
use tonic::Status;

use crate::{
    clock,
    controller::{Controller, DrainingUntil, State},
    service::resources::RESET_S,
};

impl Controller {
    /// Stops serving an address: deletes its connectors, and with `now` resets what drains of earlier ones.
    pub(crate) fn unserve(&self, request: &DeleteRequest) -> Result<Vec<String>, Status> {
        let address = request.address.as_str();
        let names: Vec<String> = {
            let state = self.state();
            let all = state.resources.connectors.values();
            let serving = all.filter(|connector| connector.spec.address == address);
            serving.map(|connector| connector.metadata.name.clone()).collect()
        };
        let mut notes = Vec::new();
        for name in &names {
            let (kind, name) = (Kind::Connector.to_string(), name.clone());
            let address = String::new();
            notes.extend(self.delete(&DeleteRequest { kind, name, address, ..request.clone() })?);
        }
        let of_address = |draining: &Draining| draining.connector.spec.address == address;
        let has_reset = request.now && self.reset_draining(&mut self.state(), of_address);
        if names.is_empty() && !has_reset {
            return Err(Status::not_found(format!(
                "{address:?} is not served from here; see `skctl get connector`"
            )));
        }
        Ok(notes)
    }

    /// Resets the flows of draining connectors; whether there were any.
    pub(crate) fn reset_draining(
        &self,
        state: &mut State,
        is_meant: impl Fn(&Draining) -> bool,
    ) -> bool {
        let until_unix_s = clock::unix_s() + RESET_S;
        let mut found = false;
        for DrainingUntil { draining, until_unix_s: until } in &mut state.draining {
            if is_meant(draining) {
                found = true;
                if !draining.reset {
                    (draining.reset, *until) = (true, until_unix_s);
                }
            }
        }
        if found {
            self.refresh(state);
        }
        found
    }

    /// Keeps what drains for the next controller; what cannot be kept now is tried again at the next change.
    pub(crate) fn keep_draining(&self, state: &mut State) {
        if state.draining == state.draining_kept {
            return;
        }
        match self.store.save_draining(&state.draining) {
            Ok(()) => state.draining_kept.clone_from(&state.draining),
            Err(error) => tracing::error!(%error, "draining connectors are not saved"),
        }
    }
}
