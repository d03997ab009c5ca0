//! The receiving half of a flow.

use super::{
    Reservation,
    ahead::Ahead,
    flow::{CODE_ABORTED, FlowError, FlowState},
    queue::{CHUNKS_MAX, ChunkQueue},
};
use crate::clock;
use bytes::Bytes;
use prost::Message;
use quinn::VarInt;
use skein_wire::framing::{Decoder, FramingError};
use std::{sync::Arc, time::Duration};

/// A window from which on a flow may lose more packets at a time than quinn puts up with; below, there is no room for 1,024 gaps.
const SCATTERED_WINDOW_BYTES_MIN: u64 = 2 << 20;
/// Over shorter paths so much is not in flight that this could happen, and reading in order is cheaper.
const SCATTERED_RTT_MIN: Duration = Duration::from_millis(5);

/// The receiving half: everything that arrived is taken from quinn at once, and held here until the socket takes it.
#[derive(Debug)]
pub(crate) struct FlowRecv {
    pub(super) state: Arc<FlowState>,
    stream: quinn::RecvStream,
    queue: ChunkQueue,
    received_bytes: u64,
    /// Read from the stream, in order.
    read_bytes: u64,
    /// The window when it was last decided how to read.
    seen_window_bytes: u64,
    /// After so many bytes that is decided again: the path may have become a longer one.
    look_at_bytes: u64,
    /// What is ahead of its turn, once the flow reads what arrives as it arrives.
    ahead: Option<Ahead>,
    finished: bool,
}

impl FlowRecv {
    pub(super) fn new(state: Arc<FlowState>, stream: quinn::RecvStream) -> Self {
        Self {
            state,
            stream,
            queue: ChunkQueue::default(),
            received_bytes: 0,
            read_bytes: 0,
            seen_window_bytes: 0,
            look_at_bytes: 0,
            ahead: None,
            finished: false,
        }
    }

    /// Takes what has arrived, or waits for it. Must not be called again once [`FlowRecv::is_finished`].
    ///
    /// # Errors
    /// The flow or the session is gone.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn fill(&mut self) -> Result<(), FlowError> {
        if self.is_to_scatter() {
            self.ahead = Some(Ahead::new(self.read_bytes));
        }
        if self.ahead.is_some() {
            return self.fill_scattered().await;
        }
        let mut chunks: [Bytes; CHUNKS_MAX] = Default::default();
        match self.stream.read_chunks(&mut chunks).await? {
            Some(count) => {
                let taken_bytes = chunks[..count].iter().map(|c| c.len() as u64).sum();
                self.state.session.took(taken_bytes);
                self.read_bytes += taken_bytes;
                chunks[..count].iter_mut().try_for_each(|c| self.push(std::mem::take(c)))
            }
            None => {
                self.finished = true;
                self.state.window.lock().finished();
                Ok(())
            }
        }
    }

    /// Whether from now on to read what arrives as it arrives, and to bring it into order here.
    fn is_to_scatter(&mut self) -> bool {
        let window_bytes = self.state.window.lock().window_bytes();
        let is_seen =
            window_bytes == self.seen_window_bytes && self.read_bytes < self.look_at_bytes;
        if self.ahead.is_some() || is_seen {
            return false;
        }
        self.seen_window_bytes = window_bytes;
        self.look_at_bytes = self.read_bytes + window_bytes;
        window_bytes >= SCATTERED_WINDOW_BYTES_MIN && self.state.session.rtt() >= SCATTERED_RTT_MIN
    }

    /// As [`FlowRecv::fill`]: until something is in order, or the stream has ended.
    async fn fill_scattered(&mut self) -> Result<(), FlowError> {
        let before = self.received_bytes;
        while self.received_bytes == before && !self.finished {
            let chunk = self.stream.read_chunk(usize::MAX, false).await?;
            self.take(chunk)?;
            for _ in 1..CHUNKS_MAX {
                if self.finished {
                    break;
                }
                let more = tokio::select! {
                    biased;
                    more = self.stream.read_chunk(usize::MAX, false) => more?, // cancel-safe
                    () = std::future::ready(()) => break,
                };
                self.take(more)?;
            }
        }
        Ok(())
    }

    /// Takes a chunk from anywhere in the stream, or its end.
    fn take(&mut self, chunk: Option<quinn::Chunk>) -> Result<(), FlowError> {
        let Some(chunk) = chunk else {
            self.finished = true;
            self.state.window.lock().finished();
            return Ok(());
        };
        let Some(ahead) = &mut self.ahead else { return self.push(chunk.bytes) };
        self.state.session.took(chunk.bytes.len() as u64);
        // Heads of flows are no payload.
        let head_bytes = self.read_bytes - self.received_bytes;
        let end_bytes = (chunk.offset + chunk.bytes.len() as u64).saturating_sub(head_bytes);
        let granted = self.state.window.lock().reaches(end_bytes);
        let next = ahead.push(chunk.offset, chunk.bytes);
        let mut next = match (granted, next) {
            (Ok(()), Ok(next)) => next,
            (Err(violation), _) => return Err(self.violated(&violation)),
            (_, Err(violation)) => return Err(self.violated(&violation)),
        };
        while let Some(bytes) = next {
            self.read_bytes += bytes.len() as u64;
            self.push(bytes)?;
            next = self.ahead.as_mut().and_then(Ahead::pop);
        }
        Ok(())
    }

    fn violated(&self, violation: &dyn std::error::Error) -> FlowError {
        self.state.session.violated(violation);
        FlowError::Malformed("more than was granted")
    }

    /// As [`FlowRecv::fill`], where what arrives has to wait.
    pub(super) async fn hold(&mut self) -> Result<(), FlowError> {
        self.fill().await?;
        self.compact();
        Ok(())
    }

    /// Whether the peer has ended its half; what it sent before may still be held.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// What is held.
    pub(crate) fn queue(&self) -> &ChunkQueue {
        &self.queue
    }

    /// Drops the first `len` bytes held: the socket took them. Grants credit when it is due.
    pub(crate) fn consume(&mut self, len: usize) {
        self.queue.advance(len);
        let session = &self.state.session;
        let measure = || (clock::now(), session.rtt());
        let grant = self.state.window.lock().consumed(len as u64, measure);
        if let Some(bytes) = grant {
            session.outbox.grant(self.state.index, bytes);
        }
    }

    /// Pays for memory that the peer makes us hold; `None` at the ceiling.
    pub(crate) fn reserve(&self, bytes: u64) -> Option<Reservation> {
        self.state.session.account.reserve(bytes)
    }

    /// Copies small chunks together that have to wait.
    pub(crate) fn compact(&mut self) {
        self.queue.compact();
    }

    /// Completes when the peer has aborted the flow, with the number of bytes to deliver before.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) fn aborted(&self) -> impl Future<Output = u64> + Send + 'static {
        let state = Arc::clone(&self.state);
        async move { *state.aborted_after.wait().await }
    }

    /// Whether the peer has aborted the flow and everything before that has been delivered.
    pub(crate) fn is_aborted(&self) -> bool {
        let delivered = self.received_bytes - self.queue.len_bytes() as u64;
        self.state.aborted_after.get().is_some_and(|&after| delivered >= after)
    }

    pub(super) fn stop(&mut self, code: VarInt) {
        if !self.finished {
            self.finished = true;
            // Fails when the peer has already reset the stream.
            let _ = self.stream.stop(code);
        }
    }

    fn push(&mut self, chunk: Bytes) -> Result<(), FlowError> {
        self.received_bytes += chunk.len() as u64;
        let received = self.state.window.lock().received(chunk.len() as u64);
        if let Err(violation) = received {
            return Err(self.violated(&violation));
        }
        self.queue.push(chunk);
        Ok(())
    }

    /// Reads one message; what comes after it is payload.
    pub(super) async fn message<M: Message + Default>(
        &mut self,
        len_max: usize,
    ) -> Result<M, FlowError> {
        let mut decoder = Decoder::new(len_max);
        loop {
            let next = decoder.next_message().map_err(|error| match error {
                FramingError::TooLong { .. } => FlowError::Malformed("too long a message"),
                FramingError::Length | FramingError::Truncated => {
                    FlowError::Malformed("a malformed message length")
                }
            })?;
            if let Some(message) = next {
                let rest = decoder.into_rest().freeze();
                if !rest.is_empty() {
                    self.push(rest)?;
                }
                return M::decode(message)
                    .map_err(|_| FlowError::Malformed("an unreadable message"));
            }
            match self.stream.read_chunk(len_max, true).await? {
                Some(chunk) => {
                    self.state.session.took(chunk.bytes.len() as u64);
                    self.read_bytes += chunk.bytes.len() as u64;
                    decoder.push(&chunk.bytes);
                }
                None => return Err(FlowError::Reset),
            }
        }
    }
}

impl Drop for FlowRecv {
    fn drop(&mut self) {
        self.stop(CODE_ABORTED);
    }
}
