//! One flow: a bidirectional stream of a session with credit both ways.
//!
//! Dropping a quinn `SendStream` *finishes* it, which would turn an abort into a clean end. The halves here abort on drop unless they
//! ended cleanly.

use super::{
    CreditViolation, IDLE_CREDIT_BYTES, ReceiveWindow, SendCredit,
    connection::{OpenStream, Session, Turn},
    datagrams::{Arrivals, Deliver},
    incoming,
    receive::FlowRecv,
};
use crate::clock;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use prost::Message;
use quinn::VarInt;
use skein_core::Protocol;
use skein_wire::{
    framing,
    proto::session::{
        Accepted, FlowOpen, FlowReply, Refused, flow_reply::Outcome as Reply, refused::Reason,
    },
};
use std::sync::{Arc, OnceLock};
use tokio::{
    sync::{Notify, SetOnce},
    time::{Duration, sleep, timeout},
};

/// Largest reply to it.
const REPLY_LEN_MAX: usize = 4 << 10;
/// A flow whose target has not answered for so long gives its credit back: many that wait for a dead target must not use up the memory
/// of all others.
const CREDIT_UNOPENED: Duration = Duration::from_millis(100);
/// A peer that is as busy as it wants to be allows another flow within this, or another router should have it.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);
/// Stream error code: the flow was aborted.
pub(super) const CODE_ABORTED: VarInt = VarInt::from_u32(1);

/// Why a flow cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FlowError {
    /// The peer reset the flow.
    #[error("the peer reset the flow")]
    Reset,
    /// The session is gone.
    #[error("the session was lost")]
    SessionLost,
    /// The peer allows no more flows in the session for now.
    #[error("the peer allows no more flows")]
    NoStream,
    /// The peer sent something that is no flow.
    #[error("the peer broke the flow protocol: {0}")]
    Malformed(&'static str),
}

impl From<quinn::ReadError> for FlowError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(_) | quinn::ReadError::ClosedStream => Self::Reset,
            quinn::ReadError::ConnectionLost(_) => Self::SessionLost,
            // Who reads as it comes goes on so, and there is no 0-RTT.
            quinn::ReadError::IllegalOrderedRead | quinn::ReadError::ZeroRttRejected => Self::Reset,
        }
    }
}

impl From<quinn::WriteError> for FlowError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(_) | quinn::WriteError::ClosedStream => Self::Reset,
            quinn::WriteError::ConnectionLost(_) => Self::SessionLost,
            quinn::WriteError::ZeroRttRejected => unreachable!("invariant: there is no 0-RTT"),
        }
    }
}

/// What both halves and the session's control stream share.
#[derive(Debug)]
pub(super) struct FlowState {
    pub(super) session: Arc<Session>,
    pub(super) index: u64,
    credit: SendCredit,
    pub(super) window: Mutex<ReceiveWindow>,
    /// The peer has returned credit.
    returned: Notify,
    /// The peer's socket was reset after it had sent so many bytes.
    pub(super) aborted_after: SetOnce<u64>,
    /// Where its datagrams go, if it is an association.
    arrivals: OnceLock<Arrivals>,
    /// For the limit of streams, where the peer opened it.
    _counted: Option<OpenStream>,
}

impl FlowState {
    pub(super) fn new(
        session: Arc<Session>,
        index: u64,
        credit: SendCredit,
        window: ReceiveWindow,
        counted: Option<OpenStream>,
    ) -> Self {
        Self {
            session,
            index,
            credit,
            window: Mutex::new(window),
            returned: Notify::new(),
            aborted_after: SetOnce::new(),
            arrivals: OnceLock::new(),
            _counted: counted,
        }
    }

    /// Applies a credit message of the peer.
    pub(super) fn apply(&self, add_bytes: u64, return_bytes: u64) -> Result<(), CreditViolation> {
        if add_bytes > 0 {
            self.credit.add(add_bytes);
        }
        if return_bytes > 0 {
            let measure = || (clock::now(), self.session.rtt());
            let grant = self.window.lock().returned(return_bytes, measure)?;
            if let Some(bytes) = grant {
                self.session.outbox.grant(self.index, bytes);
            }
            self.returned.notify_one();
        }
        Ok(())
    }

    pub(super) fn arrivals(&self) -> Option<&Arrivals> {
        self.arrivals.get()
    }

    pub(super) fn peer_aborted(&self, after_bytes: u64) {
        // A second abort of the same flow says nothing new.
        let _ = self.aborted_after.set(after_bytes);
    }
}

impl Drop for FlowState {
    fn drop(&mut self) {
        self.session.unregister(self.index);
        self.session.outbox.forget(self.index);
    }
}

/// A flow, both halves.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) send: FlowSend,
    pub(crate) recv: FlowRecv,
}

impl Flow {
    pub(super) fn new(
        session: &Arc<Session>,
        send: quinn::SendStream,
        recv: quinn::RecvStream,
        window: ReceiveWindow,
        counted: Option<OpenStream>,
    ) -> Self {
        let state = session.register(send.id().index(), window, counted);
        Self {
            send: FlowSend { state: Arc::clone(&state), stream: send, sent_bytes: 0, ended: false },
            recv: FlowRecv::new(state, recv),
        }
    }

    /// The session it belongs to.
    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.recv.state.session
    }

    /// Whether flows of this protocol belong into its session, which is closed if they do not.
    pub(crate) fn is_in_place(&self, protocol: Protocol) -> bool {
        let session = self.session();
        let checked = session.terms.class.check(protocol);
        checked.inspect_err(|misplaced| session.violated(misplaced)).is_ok()
    }

    /// What names it there.
    pub(crate) fn index(&self) -> u64 {
        self.recv.state.index
    }

    /// Makes it an association: datagrams that arrive for it go to `to` from now on.
    pub(crate) fn deliver_to(&self, to: Arc<dyn Deliver>) {
        let state = &self.recv.state;
        let arrivals = Arrivals::new(to, Arc::clone(state.session.datagrams()));
        // Whoever opens or accepts an association says so once.
        let _ = state.arrivals.set(arrivals);
    }

    /// Opens a flow on `session` and sends its head together with `first`; `handed_over` is called once some of that may have reached the
    /// peer. Waits a little while the peer allows no more flows, and as long as it takes for its turn.
    ///
    /// # Errors
    /// [`FlowError::SessionLost`] and [`FlowError::NoStream`]; nothing else, because a refusal comes with the reply.
    ///
    /// # Cancel safety
    /// Dropped midway, nothing was opened, or what was opened is reset.
    pub(crate) async fn open(
        session: &Arc<Session>,
        window: ReceiveWindow,
        head: &FlowOpen,
        first: Bytes,
        handed_over: impl Fn(),
    ) -> Result<Self, FlowError> {
        let opened = timeout(STREAM_TIMEOUT, session.connection.open_bi()).await;
        let opened = opened.map_err(|_elapsed| FlowError::NoStream)?;
        let (send, recv) = opened.map_err(|_lost| FlowError::SessionLost)?;
        let mut flow = Self::new(session, send, recv, window, None);
        let mut buffer = BytesMut::with_capacity(head.encoded_len() + 4);
        framing::encode(head, &mut buffer);
        let (head_len, mut written) = (buffer.len(), 0);
        let mut chunks = [buffer.freeze(), first];
        let (turn, stream) = (session.turn().await, &mut flow.send.stream);
        let sent = session.write(turn, stream, &mut chunks, |len| {
            written += len;
            if written > head_len {
                handed_over();
            }
        });
        let sent = sent.await;
        flow.send.sent_bytes = written.saturating_sub(head_len) as u64;
        match sent {
            // Refused before all of it was written: the reply says why.
            Ok(()) | Err(quinn::WriteError::Stopped(_)) => Ok(flow),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the egress's answer; while that waits for its target, the flow holds little on either side.
    ///
    /// # Errors
    /// The flow or the session is gone, or the answer is none.
    ///
    /// # Cancel safety
    /// Not cancel-safe: drop the flow then.
    pub(crate) async fn reply(&mut self) -> Result<Result<(), Refused>, FlowError> {
        let state = Arc::clone(&self.recv.state);
        let mut reply = std::pin::pin!(self.recv.message::<FlowReply>(REPLY_LEN_MAX));
        let reply = loop {
            tokio::select! {
                biased;
                reply = &mut reply => break reply?,
                // It has begun to wait for its target. Not earlier: a return must not overtake the stream it is about.
                () = state.returned.notified() => drop(self.send.give_back()), // cancel-safe
            }
        };
        match reply.outcome {
            Some(Reply::Accepted(Accepted {})) => Ok(Ok(())),
            Some(Reply::Refused(refused)) => Ok(Err(refused)),
            None => Err(FlowError::Malformed("a reply of an unknown kind")),
        }
    }

    /// Tells the ingress that the target is there, taking what arrives in the meantime: the ring may be in others' hands for a while.
    ///
    /// # Errors
    /// The flow or the session is gone.
    ///
    /// # Cancel safety
    /// Not cancel-safe: drop the flow then.
    pub(crate) async fn accept(&mut self) -> Result<(), FlowError> {
        let Self { send, recv } = self;
        let reply = FlowReply { outcome: Some(Reply::Accepted(Accepted {})) };
        let mut written = std::pin::pin!(send.state.session.reply(&mut send.stream, &reply));
        loop {
            tokio::select! {
                biased;
                written = &mut written => return written,
                held = recv.hold(), if !recv.is_finished() => held?, // cancel-safe
            }
        }
    }

    /// Tells the ingress why not, and ends the flow.
    ///
    /// # Errors
    /// The flow or the session is gone.
    ///
    /// # Cancel safety
    /// Not cancel-safe: drop the flow then.
    pub(crate) async fn refuse(mut self, reason: Reason, detail: String) -> Result<(), FlowError> {
        // First, because nobody reads any more.
        self.recv.stop(incoming::CODE_REFUSED);
        incoming::refuse(&self.send.state.session, &mut self.send.stream, reason, detail).await?;
        self.send.ended = true;
        Ok(())
    }

    /// Waits while chunks may arrive, taking what does, until `until` is done. If that takes long, the flow gives its credit back, and the
    /// peer does the same.
    ///
    /// # Errors
    /// What `until` says, or that the flow is gone.
    ///
    /// # Cancel safety
    /// As cancel-safe as `until`.
    pub(crate) async fn buffer_during<T>(
        &mut self,
        until: impl Future<Output = T>,
    ) -> Result<T, FlowError> {
        let mut until = std::pin::pin!(until);
        let mut patience = std::pin::pin!(sleep(CREDIT_UNOPENED));
        let mut is_patient = true;
        loop {
            tokio::select! {
                biased;
                done = &mut until => return Ok(done),
                held = self.recv.hold(), if !self.recv.is_finished() => held?, // cancel-safe
                () = &mut patience, if is_patient => { // cancel-safe
                    is_patient = false;
                    self.send.give_back();
                }
            }
        }
    }
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct FlowSend {
    state: Arc<FlowState>,
    stream: quinn::SendStream,
    sent_bytes: u64,
    ended: bool,
}

impl FlowSend {
    /// Waits until payload may be sent, and returns how many bytes.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn credit(&self) -> u64 {
        self.state.credit.wait(self.sent_bytes).await
    }

    /// Waits until it is this flow's turn to write to the session.
    ///
    /// # Cancel safety
    /// Cancelled, it goes to the end of the queue.
    pub(crate) async fn turn(&self) -> Turn {
        self.state.session.turn().await
    }

    /// Sends payload within the credit.
    ///
    /// # Errors
    /// The flow or the session is gone.
    ///
    /// # Cancel safety
    /// Not cancel-safe: abort the flow then; [`FlowSend::sent_bytes`] tells what was sent.
    pub(crate) async fn write(&mut self, turn: Turn, chunk: Bytes) -> Result<(), FlowError> {
        let Self { state, stream, sent_bytes, .. } = self;
        let written = |len: usize| *sent_bytes += len as u64;
        Ok(state.session.write(turn, stream, &mut [chunk], written).await?)
    }

    /// Payload that was sent.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Whether the flow has never needed more credit than an idle one keeps.
    pub(crate) fn is_fresh(&self) -> bool {
        self.sent_bytes <= IDLE_CREDIT_BYTES
    }

    /// Gives up most of the credit of an idle flow; false when there is no more than a little.
    pub(crate) fn give_back(&self) -> bool {
        self.give_back_but(IDLE_CREDIT_BYTES)
    }

    /// Gives up the credit but for `keep_bytes`; false when there is no more than that.
    pub(crate) fn give_back_but(&self, keep_bytes: u64) -> bool {
        let surplus = self.state.credit.give_back(self.sent_bytes, keep_bytes);
        if let Some(bytes) = surplus {
            self.state.session.outbox.give_back(self.state.index, bytes);
        }
        surplus.is_some()
    }

    /// Ends the half cleanly; [`FlowSend::acknowledged`] tells when all of it has arrived.
    pub(crate) fn finish(&mut self) {
        // Fails when the peer has stopped the stream, which `acknowledged` reports.
        let _ = self.stream.finish();
    }

    /// Completes when the finished half has arrived as a whole, or fails as soon as the peer stops it.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) fn acknowledged(
        &self,
    ) -> impl Future<Output = Result<(), FlowError>> + Send + 'static {
        let stopped = self.stream.stopped();
        async move {
            match stopped.await {
                Ok(None) => Ok(()),
                Ok(Some(_code)) => Err(FlowError::Reset),
                Err(_lost) => Err(FlowError::SessionLost),
            }
        }
    }

    /// Takes note that the half has ended cleanly and need not be reset.
    pub(crate) fn set_ended(&mut self) {
        self.ended = true;
    }

    /// Tells the peer that the local socket was reset after what has been sent; the peer resets the flow when it has delivered that.
    pub(crate) fn abort_after_sent(&self) {
        self.state.session.outbox.abort(self.state.index, self.sent_bytes);
    }
}

impl Drop for FlowSend {
    fn drop(&mut self) {
        if !self.ended {
            // Fails when the peer has already stopped the stream.
            let _ = self.stream.reset(CODE_ABORTED);
        }
    }
}
