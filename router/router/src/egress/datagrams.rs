//! Where an association leaves: a socket of its own towards one target.

use super::{
    Egress,
    connector::{Connector, FlowGuard},
    flow::{Asked, Local, Refusal, admit, no_such_service, refuse},
    target::Target,
};
use crate::{
    association::{self, Outlet},
    flows::{DatagramDrop, FlowRecord, FlowSlot, Outcome, Progress, Surroundings, may_consume},
    net::TargetSocket,
    session::{Deliver, Flow},
    splice,
};
use skein_core::Protocol;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;

/// An association without a datagram for so long ends, where its connector does not say otherwise: longer than the 30 s after which
/// most of those who keep one alive speak up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Datagrams of one target handed on until other tasks of the thread get their turn.
const TURN_DATAGRAMS: usize = 32;

/// A socket towards a target, for one association.
#[derive(Debug)]
pub(crate) struct Exit {
    socket: TargetSocket,
    target: Arc<Target>,
    surroundings: Surroundings,
    progress: Progress,
    /// Datagrams that passed, both ways.
    passed: AtomicU64,
}

impl Exit {
    /// Waits for datagrams of the target and passes them to `on`, for as long as it is polled.
    async fn receive(&self, on: impl Fn(&[u8])) {
        loop {
            if let Err(error) = self.socket.ready().await {
                // Only a runtime that shuts down refuses to wait.
                tracing::debug!(%error, "UDP socket is no longer polled");
                return std::future::pending().await;
            }
            if let Some(error) = self.socket.take_error() {
                self.target.refused(&error);
            }
            for _ in 0..TURN_DATAGRAMS {
                let received = self.surroundings.buffer.with_datagram(|buffer| {
                    let arrival = self.socket.try_recv(buffer)?;
                    let counters = &self.surroundings.counters.datagrams;
                    counters.add_dropped(DatagramDrop::Kernel, arrival.dropped);
                    self.count(arrival.len, Progress::add_from_socket);
                    on(&buffer[..arrival.len]);
                    Ok(())
                });
                match received {
                    Ok(()) => self.target.answered(),
                    Err(error) if is_would_block(&error) => break,
                    Err(error) => self.target.refused(&error),
                }
            }
            yield_now().await;
        }
    }

    fn count(&self, len: usize, add: impl Fn(&Progress, u64)) {
        add(&self.progress, len as u64);
        self.passed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Deliver for Exit {
    fn deliver(&self, payload: &[u8]) {
        let mut sent = self.socket.try_send(payload);
        // What the network said of an earlier datagram is reported once, in place of sending this one.
        if let Err(error) = &sent
            && !is_would_block(error)
        {
            self.target.refused(error);
            sent = self.socket.try_send(payload);
        }
        match sent {
            Ok(()) => self.count(payload.len(), Progress::add_to_socket),
            Err(_full_or_refused) => {
                self.surroundings.counters.datagrams.add_dropped(DatagramDrop::Socket, 1)
            }
        }
    }
}

fn is_would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// An association that a target of this router serves.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) exit: Arc<Exit>,
    connector: Arc<Connector>,
    counted: FlowGuard,
    egress: Egress,
    _slot: FlowSlot,
}

impl Served {
    /// Completes when the association is to end, with how.
    async fn over(&self) -> Outcome {
        let timeout = self.connector.idle_timeout().unwrap_or(IDLE_TIMEOUT);
        let idle = splice::idle(Some(timeout), || self.exit.passed.load(Ordering::Relaxed));
        tokio::select! {
            () = idle => Outcome::Idle,
            () = self.counted.abort().cancelled() => Outcome::Aborted,
            () = self.egress.0.abort.cancelled() => Outcome::Aborted,
            // It has no end of its own for which a drain could wait; its client opens another elsewhere.
            () = self.egress.0.withdrawn.cancelled() => Outcome::Aborted,
        }
    }

    /// Serves a client of this router's own ingress; what the target says goes to `on`.
    pub(crate) async fn run_local(&self, on: impl Fn(&[u8]), abort: &CancellationToken) -> Outcome {
        tokio::select! {
            biased;
            outcome = self.over() => outcome,
            () = abort.cancelled() => Outcome::Aborted,
            () = self.exit.receive(on) => Outcome::Aborted,
        }
    }
}

/// Opens a socket towards a target of whoever serves the port; no target can be asked whether it is there.
async fn open(egress: &Egress, asked: &Asked, progress: Progress) -> Result<Served, Refusal> {
    let slot = admit(egress, asked)?;
    let mut last = no_such_service();
    for connector in egress.connectors_for(&asked.address, asked.port) {
        match connector.open_datagrams(asked.port, asked.site).await {
            Ok((socket, target, counted)) => {
                let surroundings = egress.0.surroundings.clone();
                let passed = AtomicU64::new(0);
                let exit = Arc::new(Exit { socket, target, surroundings, progress, passed });
                let egress = egress.clone();
                return Ok(Served { exit, connector, counted, egress, _slot: slot });
            }
            Err(Some(error)) => last = Refusal::new(error.reason(), error.to_string()),
            Err(None) => {}
        }
    }
    Err(last)
}

/// The rest of an association of a peer after its head.
pub(super) async fn serve(egress: Egress, asked: Asked, mut flow: Flow, mut record: FlowRecord) {
    let served = match flow.buffer_during(open(&egress, &asked, record.progress())).await {
        Ok(Ok(served)) => served,
        Ok(Err(refusal)) => return refuse(flow, &mut record, refusal).await,
        Err(error) => return record.note_loss(&error),
    };
    // Before the answer: from then on the peer sends datagrams.
    flow.deliver_to(Arc::clone(&served.exit) as _);
    let accepted = tokio::select! {
        accepted = flow.accept() => accepted.map_err(|error| record.note_loss(&error)),
        () = egress.0.abort.cancelled() => Err(()),
    };
    if accepted.is_err() {
        return;
    }
    let surroundings = &egress.0.surroundings;
    let outlet = Outlet::new(&flow, Arc::clone(&surroundings.counters.datagrams));
    let over = async {
        tokio::select! {
            outcome = served.over() => outcome,
            () = served.exit.receive(|payload| outlet.send(payload)) => Outcome::Aborted,
            () = surroundings.revoked(|trust| may_consume(trust, asked.site, &asked.address)) => {
                tracing::debug!("association ended: the site may not reach this address any more");
                Outcome::Aborted
            }
        }
    };
    record.outcome = association::run(flow, &outlet, &*served.exit, over).await;
}

impl Egress {
    /// Opens an association of this router's own ingress towards a local target.
    ///
    /// # Errors
    /// Why it was refused.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(crate) async fn open_local(
        &self,
        local: Local<'_>,
        progress: Progress,
    ) -> Result<Served, Refusal> {
        let asked = local.asked(Protocol::Udp, self.0.surroundings.local.site);
        open(self, &asked, progress).await
    }
}
