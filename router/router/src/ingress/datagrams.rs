//! UDP at the ingress: one socket for all clients of a port, and an association for each client address and port.
//!
//! The socket is always read, whatever becomes of what arrives: what nobody reads keeps the kernel from taking what others send.

use super::{
    Ingress,
    attempt::{Attempt, Client, Opened, Opening},
    held::Held,
};
use crate::{
    association::{self, Outlet},
    egress::{Egress, Local, LocalAssociation, Refusal},
    flows::{DatagramDrop, Edge, FlowRecord, FlowSlot, Outcome, Progress, may_provide},
    net::{Conversation, ServiceSocket},
    session::{Class, Deliver, Flow},
};
use bytes::Bytes;
use parking_lot::Mutex;
use skein_core::{Fib, Protocol, RouterId};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{sync::Notify, task::yield_now, time::sleep};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument as _;

/// Datagrams handed on until other tasks of the thread get their turn.
const TURN_DATAGRAMS: usize = 32;
/// A client whose association nobody took is not heard for so long: each of its datagrams would otherwise be another attempt.
const REFUSED_FOR: Duration = Duration::from_secs(1);

/// What is to become of clients that are not known.
pub(super) enum Newcomers<'a> {
    /// They get an association.
    Served(&'a (dyn Fn(Conversation) -> Opening + Sync)),
    /// Nobody serves them.
    Ignored,
}

/// The UDP socket of a port of a listener, with the associations of its clients.
#[derive(Debug)]
pub(super) struct Entrance {
    socket: ServiceSocket,
    ingress: Ingress,
    clients: Mutex<HashMap<Conversation, Arc<Association>>>,
    emptied: Notify,
    /// Ends the associations with the socket.
    closed: CancellationToken,
}

/// Closes an entrance when it is dropped: nobody reads the socket any more.
#[derive(Debug)]
pub(super) struct Open {
    entrance: Arc<Entrance>,
    _closed: DropGuard,
}

/// What clients of one address and port say and hear.
#[derive(Debug)]
struct Association {
    with: Conversation,
    entrance: Weak<Entrance>,
    progress: Progress,
    state: Mutex<State>,
    /// For the session, which holds on to whom it delivers to.
    this: Weak<Self>,
}

#[derive(Debug)]
enum State {
    /// An egress is sought; the newest datagrams wait.
    Opening(Held),
    /// It leaves elsewhere.
    Remote(Arc<Outlet>),
    /// It leaves here.
    Local(Arc<LocalAssociation>),
    /// Nobody took it.
    Refused,
}

impl Open {
    pub(super) fn new(socket: ServiceSocket, ingress: &Ingress) -> Self {
        let closed = CancellationToken::new();
        let entrance = Arc::new(Entrance {
            socket,
            ingress: ingress.clone(),
            clients: Mutex::default(),
            emptied: Notify::new(),
            closed: closed.clone(),
        });
        Self { entrance, _closed: closed.drop_guard() }
    }

    /// Hands what clients say to their associations, for as long as it is polled.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(super) async fn receive(&self, newcomers: Newcomers<'_>) {
        loop {
            if let Err(error) = self.entrance.socket.readable().await {
                // Only a runtime that shuts down refuses to wait.
                tracing::debug!(%error, "UDP socket is no longer polled");
                return std::future::pending().await;
            }
            self.receive_turn(&newcomers);
            yield_now().await;
        }
    }

    fn receive_turn(&self, newcomers: &Newcomers<'_>) {
        let surroundings = &self.entrance.ingress.0.config.surroundings;
        for _ in 0..TURN_DATAGRAMS {
            let received = surroundings.buffer.with_datagram(|buffer| {
                let arrival = self.entrance.socket.try_recv(buffer)?;
                let counters = &surroundings.counters.datagrams;
                counters.add_dropped(DatagramDrop::Kernel, arrival.dropped);
                self.entrance.take(&buffer[..arrival.len], arrival.with, newcomers);
                Ok::<_, io::Error>(())
            });
            match received {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => tracing::debug!(%error, "UDP socket reports an error"),
            }
        }
    }

    /// Completes when no client has an association.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(super) async fn emptied(&self) {
        while !self.entrance.clients.lock().is_empty() {
            self.entrance.emptied.notified().await;
        }
    }
}

impl Entrance {
    fn take(self: &Arc<Self>, payload: &[u8], with: Conversation, newcomers: &Newcomers<'_>) {
        let counters = &self.ingress.0.config.surroundings.counters.datagrams;
        let known = self.clients.lock().get(&with).cloned();
        match (known, newcomers) {
            (Some(association), _) => association.send(payload),
            (None, Newcomers::Ignored) => counters.add_dropped(DatagramDrop::Unserved, 1),
            (None, Newcomers::Served(opening)) => match self.begin(with, opening(with)) {
                Some(association) => association.send(payload),
                None => counters.add_dropped(DatagramDrop::Overloaded, 1),
            },
        }
    }

    /// Begins an association, if there is room for one more.
    fn begin(self: &Arc<Self>, with: Conversation, opening: Opening) -> Option<Arc<Association>> {
        let surroundings = &self.ingress.0.config.surroundings;
        let limit = &surroundings.limit;
        let slot = limit.enter(Edge::Ingress, Protocol::Udp, surroundings.local.site)?;
        let record = self.ingress.record(&opening, &surroundings.counters);
        let association = Arc::new_cyclic(|this| Association {
            with,
            entrance: Arc::downgrade(self),
            progress: record.progress(),
            state: Mutex::new(State::Opening(Held::new(&self.ingress.0.held))),
            this: this.clone(),
        });
        self.clients.lock().insert(with, Arc::clone(&association));
        let span = record.span();
        let known = Known { entrance: Arc::clone(self), with };
        let serve = serve(known, Arc::clone(&association), opening, record, slot);
        self.ingress.0.flows.spawn_on(serve.instrument(span), &surroundings.runtime);
        Some(association)
    }
}

/// A client's place among those of its entrance, until it is dropped.
struct Known {
    entrance: Arc<Entrance>,
    with: Conversation,
}

impl Drop for Known {
    fn drop(&mut self) {
        let mut clients = self.entrance.clients.lock();
        clients.remove(&self.with);
        if clients.is_empty() {
            self.entrance.emptied.notify_one();
        }
    }
}

/// Serves an association from the first datagram of its client to its end.
async fn serve(
    known: Known,
    association: Arc<Association>,
    opening: Opening,
    mut record: FlowRecord,
    _slot: FlowSlot,
) {
    let ingress = &known.entrance.ingress;
    let turn = ingress.turn(&opening);
    let opening_counted = ingress.count_opening(&opening.address);
    let attempt =
        Attempt { ingress, opening: &opening, client: &*association, flow_id: record.flow_id };
    let opened = match opening_counted {
        None => Err(Outcome::Overloaded),
        Some(_) => tokio::select! {
            opened = attempt.open(&mut record, turn) => opened,
            outcome = known.entrance.over() => Err(outcome),
        },
    };
    drop(opening_counted);
    let is_refused = matches!(
        opened,
        Err(Outcome::Refused | Outcome::Unreachable | Outcome::Overloaded | Outcome::SessionLost)
    );
    let outcome = match opened {
        Ok((Opened::Remote(flow, _), counted)) => {
            let router = counted.router();
            association.run_remote(&known.entrance, *flow, &opening, router, &record).await
        }
        Ok((Opened::Local(local, _), _counted)) => {
            association.run_local(&known.entrance, local).await
        }
        Err(outcome) => outcome,
    };
    record.outcome = outcome;
    // The line in the access log is of now. The slot is kept: it bounds those that are not heard as well.
    drop(record);
    if is_refused {
        association.refuse();
        tokio::select! {
            () = sleep(REFUSED_FOR) => {} // cancel-safe
            _ = known.entrance.over() => {} // cancel-safe
        }
    }
}

impl Entrance {
    /// Completes when associations end for reasons of this router.
    async fn over(&self) -> Outcome {
        tokio::select! {
            () = self.closed.cancelled() => Outcome::Aborted,
            () = self.ingress.0.abort.cancelled() => Outcome::Aborted,
        }
    }

    /// Completes when no path leads to `router` any more, but one to another that serves the same: the client's next datagram goes there.
    async fn moved(&self, opening: &Opening, router: RouterId) {
        let mut fib = self.ingress.0.config.surroundings.fib.clone();
        let is_better_elsewhere = |fib: &Arc<Fib>| {
            let providers = fib.addresses.get(&opening.address);
            let mut providers = providers.into_iter().flat_map(|providers| providers.iter());
            !fib.routes.contains_key(&router)
                && providers.any(|provider| {
                    provider.router != router && provider.entry.ports.contains(&opening.service)
                })
        };
        if fib.wait_for(is_better_elsewhere).await.is_err() {
            // Nobody says any more where paths lead: this router stops.
            std::future::pending().await
        }
    }
}

impl Association {
    /// Sends a datagram of the client in the way of its state.
    fn send(&self, payload: &[u8]) {
        self.progress.add_from_socket(payload.len() as u64);
        match &mut *self.state.lock() {
            State::Opening(held) => {
                let dropped = held.push(payload);
                self.count_dropped(DatagramDrop::Queue, dropped);
            }
            State::Remote(outlet) => outlet.send(payload),
            State::Local(local) => local.exit.deliver(payload),
            State::Refused => self.count_dropped(DatagramDrop::Refused, 1),
        }
    }

    fn count_dropped(&self, why: DatagramDrop, count: u64) {
        if let Some(entrance) = self.entrance.upgrade() {
            let counters = &entrance.ingress.0.config.surroundings.counters;
            counters.datagrams.add_dropped(why, count);
        }
    }

    async fn run_remote(
        &self,
        entrance: &Entrance,
        flow: Flow,
        opening: &Opening,
        router: RouterId,
        record: &FlowRecord,
    ) -> Outcome {
        let surroundings = &entrance.ingress.0.config.surroundings;
        let outlet = Outlet::new(&flow, Arc::clone(&surroundings.counters.datagrams));
        self.leave_by(State::Remote(Arc::clone(&outlet)), |payload| outlet.send(payload));
        let allowed = |trust: &_| {
            record.egress_site.is_some_and(|site| may_provide(trust, site, &opening.address))
        };
        let over = async {
            tokio::select! {
                outcome = entrance.over() => outcome,
                () = entrance.moved(opening, router) => Outcome::SessionLost,
                () = surroundings.revoked(allowed) => Outcome::Aborted,
            }
        };
        association::run(flow, &outlet, self, over).await
    }

    async fn run_local(&self, entrance: &Entrance, local: Arc<LocalAssociation>) -> Outcome {
        self.leave_by(State::Local(Arc::clone(&local)), |payload| local.exit.deliver(payload));
        local.run_local(|payload| self.deliver(payload), &entrance.closed).await
    }

    /// Lets what waits go on, and what comes after it.
    fn leave_by(&self, next: State, send: impl Fn(&[u8])) {
        let mut state = self.state.lock();
        if let State::Opening(held) = &mut *state {
            held.unsent().for_each(|payload| send(&payload));
        }
        *state = next;
    }

    fn refuse(&self) {
        let before = std::mem::replace(&mut *self.state.lock(), State::Refused);
        if let State::Opening(held) = before {
            self.count_dropped(DatagramDrop::Refused, held.len());
        }
    }
}

impl Client for Association {
    type Local = Arc<LocalAssociation>;
    const CLASS: Class = Class::Datagrams;

    /// All that waits: whoever refuses has passed none of it on.
    fn first(&self, _ingress: &Ingress, _before: Bytes) -> Result<Bytes, Outcome> {
        match &mut *self.state.lock() {
            State::Opening(held) => Ok(held.records()),
            State::Remote(_) | State::Local(_) | State::Refused => Ok(Bytes::new()),
        }
    }

    fn is_repeatable(&self) -> bool {
        true
    }

    fn began(&self, flow: &Flow) {
        if let Some(this) = self.this.upgrade() {
            flow.deliver_to(this);
        }
    }

    async fn open_local(
        &self,
        egress: &Egress,
        local: Local<'_>,
    ) -> Result<Arc<LocalAssociation>, Refusal> {
        if let State::Opening(held) = &mut *self.state.lock() {
            held.forget_sent();
        }
        egress.open_local(local, self.progress.of_target()).await.map(Arc::new)
    }
}

impl Deliver for Association {
    /// To the client, from where it had sent to.
    fn deliver(&self, payload: &[u8]) {
        let Some(entrance) = self.entrance.upgrade() else { return };
        match entrance.socket.try_send(payload, &self.with) {
            Ok(()) => self.progress.add_to_socket(payload.len() as u64),
            Err(error) => {
                tracing::trace!(%error, "a client's socket took no datagram");
                self.count_dropped(DatagramDrop::Socket, 1);
            }
        }
    }
}
