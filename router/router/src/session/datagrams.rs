//! Datagrams of a session's associations: a fair queue in front of QUIC on the one side, on the other the way to the local sockets.
//!
//! QUIC sends datagrams before streams. A session that carries them carries nothing else but the streams of the same associations, and
//! lets those through now and then however many datagrams wait.

use super::{
    Account, Class, Reservation,
    class::Misplaced,
    connection::Session,
    fair::{FairQueue, WAITING_BYTES_TOTAL_MAX},
    halves::{Halves, Joined},
};
use crate::{
    clock,
    flows::{DatagramCounters, DatagramDrop},
};
use bytes::Bytes;
use parking_lot::Mutex;
use skein_wire::association::{self, Piece};
use std::{fmt::Debug, sync::Arc, time::Duration};
use tokio::{sync::Notify, task::yield_now, time::sleep};

/// What QUIC holds of datagrams to be sent: a few batches of packets, so that the queue in front of it decides whose turn it is, and one
/// datagram of the largest packets.
pub(super) const SEND_BUFFER_BYTES: usize = 32 << 10;
/// What QUIC holds of datagrams that arrived until they are taken: what one turn of the endpoint brings.
pub(super) const RECEIVE_BUFFER_BYTES: usize = 256 << 10;
/// What a session for associations takes besides what every session does; paid for while it lasts.
pub(super) const DATAGRAMS_BYTES: u64 =
    (SEND_BUFFER_BYTES + RECEIVE_BUFFER_BYTES + WAITING_BYTES_TOTAL_MAX) as u64;
/// When datagrams have waited for the path without a break for so long, streams get a chance.
const BUSY_MAX: Duration = Duration::from_millis(8);
/// So long, once QUIC has no datagram left: an eighth of the path at least is theirs.
const BREATH: Duration = Duration::from_millis(1);
/// Longest wait between looks at whether QUIC has a datagram left.
const BREATH_LOOK_MAX: Duration = Duration::from_millis(16);
/// What a full QUIC buffer reports of its room when empty is this much less than its size at most.
const EMPTY_SLACK_BYTES: usize = 256;
/// Datagrams handed on until other tasks of the thread get their turn.
const TURN_DATAGRAMS: usize = 32;

/// Takes the datagrams of one association that arrive from the other edge.
pub(crate) trait Deliver: Send + Sync + Debug {
    /// Hands one to the local socket; never waits.
    fn deliver(&self, payload: &[u8]);
}

/// The receiving side of one association.
#[derive(Debug)]
pub(super) struct Arrivals {
    to: Arc<dyn Deliver>,
    halves: Mutex<Halves<Reservation>>,
    counters: Arc<DatagramCounters>,
}

impl Arrivals {
    pub(super) fn new(to: Arc<dyn Deliver>, counters: Arc<DatagramCounters>) -> Self {
        Self { to, halves: Mutex::default(), counters }
    }

    fn take(&self, piece: Piece, payload: &Bytes, account: &Arc<Account>) {
        let Piece::Half { number, second } = piece else { return self.to.deliver(payload) };
        let pay = |bytes| account.reserve(bytes);
        let joined = self.halves.lock().join(number, second, payload, pay);
        match joined {
            Joined::Whole(datagram) => self.to.deliver(&datagram),
            Joined::Waits(dropped) => self.counters.add_dropped(DatagramDrop::Half, dropped),
            Joined::NoMemory => self.counters.add_dropped(DatagramDrop::Memory, 1),
        }
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.counters.add_dropped(DatagramDrop::Half, self.halves.get_mut().len());
    }
}

/// What waits to be sent.
#[derive(Debug, Default)]
pub(super) struct Departures {
    queue: Mutex<FairQueue>,
    filled: Notify,
}

impl Departures {
    /// Appends a frame of an association, and returns how many older ones had to go for it.
    pub(super) fn push(&self, flow: u64, frame: Bytes) -> u64 {
        let dropped = self.queue.lock().push(flow, frame);
        self.filled.notify_one();
        dropped
    }

    /// Forgets an association that has ended, and returns how many frames it still had.
    pub(super) fn remove(&self, flow: u64) -> u64 {
        self.queue.lock().remove(flow)
    }

    fn pop(&self) -> Option<Bytes> {
        self.queue.lock().pop()
    }
}

/// Hands queued frames to QUIC for as long as it is polled, one association after the other.
pub(super) async fn send(session: &Session) {
    let connection = &session.connection;
    let (mut busy_since, mut handed) = (None, 0_u64);
    loop {
        let Some(frame) = session.departures.pop() else {
            busy_since = None;
            session.departures.filled.notified().await;
            continue;
        };
        if connection.datagram_send_buffer_space() < frame.len() {
            let now = clock::now();
            if now.saturating_duration_since(*busy_since.get_or_insert(now)) >= BUSY_MAX {
                breathe(connection).await;
                busy_since = None;
            }
        }
        match connection.send_datagram_wait(frame).await {
            Ok(()) => handed += 1,
            Err(quinn::SendDatagramError::ConnectionLost(_)) => return,
            // The path has come to carry less since it was cut to size.
            Err(_too_large) => session.datagrams().add_dropped(DatagramDrop::Path, 1),
        }
        if handed.is_multiple_of(TURN_DATAGRAMS as u64) {
            yield_now().await;
        }
    }
}

/// Waits until QUIC has sent its datagrams, and a moment longer: it then sends what streams have.
async fn breathe(connection: &quinn::Connection) {
    let mut look = BREATH;
    while connection.datagram_send_buffer_space() + EMPTY_SLACK_BYTES < SEND_BUFFER_BYTES
        && connection.close_reason().is_none()
    {
        sleep(look).await;
        look = (look * 2).min(BREATH_LOOK_MAX);
    }
    sleep(BREATH).await;
}

/// Hands datagrams that arrive to their associations for as long as it is polled.
pub(super) async fn receive(session: &Session) {
    let connection = &session.connection;
    if session.terms.class == Class::Streams {
        if connection.read_datagram().await.is_ok() {
            session.violated(&Misplaced::Datagram);
        }
        return;
    }
    let (mut taken, mut lost) = (0_u64, 0_u64);
    loop {
        let arrived = connection.stats().frame_rx.datagram;
        let mut turn = 0;
        while turn < TURN_DATAGRAMS {
            let frame = tokio::select! {
                biased;
                frame = connection.read_datagram() => frame, // cancel-safe
                () = std::future::ready(()) => break,
            };
            let Ok(frame) = frame else { return };
            dispatch(session, frame);
            (taken, turn) = (taken + 1, turn + 1);
        }
        if turn == TURN_DATAGRAMS {
            yield_now().await;
            continue;
        }
        // Everything that had arrived before was either taken or displaced by what came after it.
        let displaced = arrived.saturating_sub(taken + lost);
        lost += displaced;
        session.datagrams().add_dropped(DatagramDrop::Buffer, displaced);
        let Ok(frame) = connection.read_datagram().await else { return };
        dispatch(session, frame);
        taken += 1;
    }
}

fn dispatch(session: &Session, frame: Bytes) {
    let Some(frame) = association::decode(frame) else {
        return session.datagrams().add_dropped(DatagramDrop::Malformed, 1);
    };
    let flow = session.flow(frame.flow);
    match flow.as_ref().and_then(|flow| flow.arrivals()) {
        Some(arrivals) => arrivals.take(frame.piece, &frame.payload, &session.account),
        None => session.datagrams().add_dropped(DatagramDrop::Unknown, 1),
    }
}
