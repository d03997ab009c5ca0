//! The orderly end, in numbered steps: 1 stop accepting, 2 withdraw the addresses, 3 let flows end until the deadline and reset the rest,
//! 4 say farewell if the site leaves for good, 5 say goodbye to the neighbours, 6 report.

use super::{Control, sleep_until};
use crate::clock;
use skein_core::Input;
use skein_wire::proto::control::{Drained, from_router};
use std::{
    pin::Pin,
    time::{Duration, Instant},
};
use tokio::{sync::oneshot, time};

/// The farewell reaches the neighbours within this, or not at all.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Ask for an orderly end.
#[derive(Debug)]
pub(crate) struct DrainRequest {
    /// Flows that have not ended by then are reset.
    pub(crate) deadline: Instant,
    /// The site leaves the network for good.
    pub(crate) farewell: bool,
    /// Told how many flows were reset.
    pub(crate) done: Option<oneshot::Sender<u64>>,
}

/// Step 3, under way, and who asked for it.
pub(super) type Draining = Option<(DrainJob, DrainRequest)>;
type DrainJob = Pin<Box<dyn Future<Output = u64> + Send>>;

impl Control {
    /// Steps 1 and 2 of an orderly end: accept nothing new, withdraw the addresses. The rest waits for the flows.
    pub(super) fn start_drain(&mut self, request: DrainRequest, draining: &mut Draining) {
        if self.draining {
            return;
        }
        tracing::info!(farewell = request.farewell, "draining");
        self.draining = true;
        self.data.egress.withdraw();
        let (data, deadline) = (self.data.clone(), request.deadline);
        let job = self.runtimes.data.spawn(async move { data.drain(deadline).await });
        *draining = Some((Box::pin(async move { job.await.unwrap_or(0) }), request));
    }

    /// Steps 4 to 6: farewell, goodbye to the neighbours, report.
    pub(super) async fn finish(mut self, flows_reset: u64, request: Option<DrainRequest>) {
        if request.as_ref().is_some_and(|request| request.farewell) {
            self.input(Input::Leave);
            if time::timeout(FAREWELL_MAX, self.flush_farewell()).await.is_err() {
                tracing::warn!("the farewell did not reach every neighbour");
            }
        }
        self.controller.reply(from_router::Message::Drained(Drained { flows_reset }));
        self.data.links.shutdown().await;
        tracing::info!(flows_reset, "drained");
        if let Some(done) = request.and_then(|request| request.done) {
            // Whoever asked may have stopped waiting.
            let _ = done.send(flows_reset);
        }
    }

    /// Drives the engine until the farewell, which it may hold back for a moment, is with every link.
    async fn flush_farewell(&mut self) {
        loop {
            self.take_outputs();
            let ours = self.engine.lsdb().lsa(self.site.router);
            if self.sends.is_empty() && ours.is_none_or(|lsa| lsa.leaving) {
                return;
            }
            let due = self.engine.poll_timeout().map(|(due, _)| due);
            tokio::select! {
                Some(Ok((id, outcome))) = self.sends.join_next() => self.sent(id, outcome), // cancel-safe
                () = sleep_until(due) => { // cancel-safe
                    self.engine.handle_timeout(clock::now(), clock::unix_s());
                }
            }
        }
    }
}

/// Waits for the end of step 3; for ever, while there is none.
pub(super) async fn poll_drain(job: &mut Draining) -> u64 {
    match job {
        Some((job, _)) => job.await,
        None => std::future::pending().await,
    }
}
