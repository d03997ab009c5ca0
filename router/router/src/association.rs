//! An association while it runs, alike at both edges: datagrams of a local socket go into the session in a packet, in two, or on the
//! association's stream; those that arrive go to the socket.
//!
//! An association is a flow: the stream opens it and ends with it. There is no order among its datagrams, but those on the stream stay
//! behind each other.

use crate::{
    clock,
    flows::{DatagramCounters, DatagramDrop, Outcome, Way},
    session::{Deliver, Flow, FlowError, FlowRecv, FlowSend, Reservation, Session, TURN_BYTES},
};
use bytes::Bytes;
use parking_lot::Mutex;
use skein_wire::association::{self, Piece, Records};
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{sync::Notify, time::timeout};

/// Datagrams that wait for the stream: the four largest, or a burst of those that just do not fit two packets.
const STREAM_WAITING_BYTES_MAX: usize = 256 << 10;
/// Datagrams that waited longer are of no use to anybody who sends datagrams: on a slow path the newest would only come late after them.
const STREAM_WAIT_MAX: Duration = Duration::from_secs(1);
/// Credit that an association keeps whose stream is idle. Most never use it after they were opened.
const IDLE_CREDIT_BYTES: u64 = 4 << 10;
/// A stream that was not used for so long gives its credit back.
const CREDIT_IDLE: Duration = Duration::from_secs(1);

/// Takes the datagrams of a local socket.
#[derive(Debug)]
pub(crate) struct Outlet {
    session: Arc<Session>,
    flow: u64,
    counters: Arc<DatagramCounters>,
    /// Of the next datagram that is split.
    number: AtomicU64,
    waiting: Mutex<Waiting>,
    filled: Notify,
}

/// Records for the stream, paid for.
#[derive(Debug, Default)]
struct Waiting {
    records: VecDeque<(Instant, Bytes, Reservation)>,
    len_bytes: usize,
}

impl Outlet {
    pub(crate) fn new(flow: &Flow, counters: Arc<DatagramCounters>) -> Arc<Self> {
        Arc::new(Self {
            session: Arc::clone(flow.session()),
            flow: flow.index(),
            counters,
            number: AtomicU64::default(),
            waiting: Mutex::default(),
            filled: Notify::new(),
        })
    }

    /// Sends one datagram in the way that fits it. Never waits: where queues are full, the oldest goes.
    pub(crate) fn send(&self, payload: &[u8]) {
        // Unknown where the peer takes no datagrams: then they all go by stream.
        let frame_len_max = self.session.frame_len_max().unwrap_or(0);
        let number = self.number.load(Ordering::Relaxed);
        let half = |second| Piece::Half { number, second };
        let room = |piece| frame_len_max.checked_sub(association::header_len(self.flow, piece));
        if room(Piece::Whole).is_some_and(|room| payload.len() <= room) {
            self.counters.add_sent(Way::Packet);
            self.send_piece(Piece::Whole, payload);
        } else if room(half(false)).is_some_and(|room| payload.len() <= 2 * room) {
            let number = self.number.fetch_add(1, Ordering::Relaxed);
            let half = |second| Piece::Half { number, second };
            let (first, second) = payload.split_at(payload.len() / 2);
            self.counters.add_sent(Way::Halves);
            self.send_piece(half(false), first);
            self.send_piece(half(true), second);
        } else if let Some(record) = association::record(payload) {
            self.counters.add_sent(Way::Stream);
            self.send_record(record);
        } else {
            // No socket gives such a datagram.
            self.counters.add_dropped(DatagramDrop::Malformed, 1);
        }
    }

    fn send_piece(&self, piece: Piece, payload: &[u8]) {
        let frame = association::encode(self.flow, piece, payload);
        let dropped = self.session.send_frame(self.flow, frame);
        self.counters.add_dropped(DatagramDrop::Queue, dropped);
    }

    fn send_record(&self, record: Bytes) {
        let mut waiting = self.waiting.lock();
        while waiting.len_bytes + record.len() > STREAM_WAITING_BYTES_MAX {
            let Some((_, oldest, _)) = waiting.records.pop_front() else { break };
            waiting.len_bytes -= oldest.len();
            self.counters.add_dropped(DatagramDrop::Queue, 1);
        }
        let Some(paid) = self.session.account.reserve(record.len() as u64) else {
            return self.counters.add_dropped(DatagramDrop::Memory, 1);
        };
        waiting.len_bytes += record.len();
        waiting.records.push_back((clock::now(), record, paid));
        self.filled.notify_one();
    }

    fn next_record(&self) -> Option<(Bytes, Reservation)> {
        let now = clock::now();
        let mut waiting = self.waiting.lock();
        loop {
            let (since, record, paid) = waiting.records.pop_front()?;
            waiting.len_bytes -= record.len();
            if now.saturating_duration_since(since) <= STREAM_WAIT_MAX {
                return Some((record, paid));
            }
            self.counters.add_dropped(DatagramDrop::Queue, 1);
        }
    }

    /// Writes records to the stream as credit and turns come.
    async fn write(&self, send: &mut FlowSend) -> Result<std::convert::Infallible, FlowError> {
        send.give_back_but(IDLE_CREDIT_BYTES);
        loop {
            let Some((mut record, _paid)) = self.next_record() else {
                if timeout(CREDIT_IDLE, self.filled.notified()).await.is_err() {
                    send.give_back_but(IDLE_CREDIT_BYTES);
                    self.filled.notified().await;
                }
                continue;
            };
            while !record.is_empty() {
                let credit = send.credit().await;
                let turn = send.turn().await;
                let len = usize::try_from(credit).unwrap_or(TURN_BYTES).min(TURN_BYTES);
                send.write(turn, record.split_to(len.min(record.len()))).await?;
            }
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        let left = self.waiting.get_mut().records.len() as u64;
        self.counters.add_dropped(DatagramDrop::Ended, left);
    }
}

/// Serves an association from its acceptance until either end of the session ends it, or `until` says how it ends here. An idle one ends in
/// an orderly way: the other end takes it for idle, too.
///
/// # Cancel safety
/// Dropped midway, the association is reset.
pub(crate) async fn run(
    flow: Flow,
    outlet: &Outlet,
    to: &dyn Deliver,
    until: impl Future<Output = Outcome>,
) -> Outcome {
    let Flow { mut send, mut recv } = flow;
    let ended = tokio::select! {
        biased;
        read = read(&mut recv, to, &outlet.counters) => read.map(|()| Outcome::Idle),
        written = outlet.write(&mut send) => written.map(|never| match never {}),
        outcome = until => Ok(outcome),
    };
    match ended {
        Ok(Outcome::Idle) => {
            send.finish();
            send.set_ended();
            Outcome::Idle
        }
        Ok(outcome) => outcome,
        Err(error) => Outcome::from(&error),
    }
}

/// Delivers what comes on the stream, until it ends.
async fn read(
    recv: &mut FlowRecv,
    to: &dyn Deliver,
    counters: &DatagramCounters,
) -> Result<(), FlowError> {
    let malformed = |_| FlowError::Malformed("a length that no datagram has");
    let mut records = Records::default();
    // For the record that has begun.
    let mut paid = None::<Reservation>;
    loop {
        while !recv.queue().is_empty() {
            let len = {
                let (slices, count) = recv.queue().slices();
                slices[..count].iter().for_each(|slice| records.push(slice));
                slices[..count].iter().map(|slice| slice.len()).sum()
            };
            recv.consume(len);
            while let Some(datagram) = records.next_datagram().map_err(malformed)? {
                to.deliver(&datagram);
                paid = None;
            }
            let held = records.held_len_max().map_err(malformed)? as u64;
            if held > paid.as_ref().map_or(0, Reservation::bytes) {
                paid = recv.reserve(held);
                if paid.is_none() {
                    records.skip().map_err(malformed)?;
                    counters.add_dropped(DatagramDrop::Memory, 1);
                }
            }
        }
        if recv.is_finished() {
            return Ok(());
        }
        recv.fill().await?;
    }
}
