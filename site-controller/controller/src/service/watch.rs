//! Follows resources: first what is there, then every change.

use std::{collections::BTreeMap, sync::Arc};

use skein_wire::proto::site::{GetRequest, Resource, ResourceEvent};
use tokio::sync::mpsc;
use tonic::Status;

use crate::controller::Controller;

type Key = (String, String);

/// Sends events until the reader has gone. A reader that is slow sees fewer events, never a wrong state.
///
/// # Cancel safety
/// Dropping it ends the watch.
pub(super) async fn run(
    controller: Arc<Controller>,
    request: GetRequest,
    events: mpsc::Sender<Result<ResourceEvent, Status>>,
) {
    let mut changes = controller.changes();
    let mut known: BTreeMap<Key, Resource> = BTreeMap::new();
    let mut is_synced = false;
    loop {
        changes.mark_unchanged();
        let current = match controller.get_resources(&request.kind, "") {
            Ok(resources) => resources,
            Err(status) => {
                // The reader may have gone.
                let _ = events.send(Err(status)).await;
                return;
            }
        };
        let current: BTreeMap<Key, Resource> = current
            .into_iter()
            .filter(|resource| request.name.is_empty() || resource.name == request.name)
            .map(|resource| ((resource.kind.clone(), resource.name.clone()), resource))
            .collect();
        let mut out = difference(&known, &current);
        if !is_synced {
            out.push(ResourceEvent { event: "synced".to_owned(), resource: None });
            is_synced = true;
        }
        for event in out {
            if events.send(Ok(event)).await.is_err() {
                return;
            }
        }
        known = current;
        tokio::select! {
            () = events.closed() => return, // cancel-safe
            changed = changes.changed() => if changed.is_err() { return }, // cancel-safe
        }
    }
}

fn difference(
    before: &BTreeMap<Key, Resource>,
    after: &BTreeMap<Key, Resource>,
) -> Vec<ResourceEvent> {
    let event = |event: &str, resource: &Resource| ResourceEvent {
        event: event.to_owned(),
        resource: Some(resource.clone()),
    };
    let mut out = Vec::new();
    for (key, resource) in after {
        match before.get(key) {
            None => out.push(event("added", resource)),
            Some(known) if known != resource => out.push(event("modified", resource)),
            Some(_) => {}
        }
    }
    out.extend(
        before
            .iter()
            .filter(|(key, _)| !after.contains_key(*key))
            .map(|(_, gone)| event("deleted", gone)),
    );
    out
}
