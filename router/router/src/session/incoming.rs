//! Streams that a peer opens, until they are flows.

use super::{
    connection::{OpenStream, Session},
    flow::{CODE_ABORTED, Flow, FlowError},
};
use quinn::VarInt;
use skein_wire::proto::session::{
    FlowOpen, FlowReply, Refused, flow_reply::Outcome as Reply, refused::Reason,
};
use std::{sync::Arc, time::Duration};

/// Largest head of a flow: an address, a trace context and attributes of a few kilobytes.
const OPEN_LEN_MAX: usize = 16 << 10;
/// A head comes with the stream's first packet; a peer that takes longer is not opening a flow.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Stream error code: the flow was refused, as the reply says.
pub(super) const CODE_REFUSED: VarInt = VarInt::from_u32(2);

/// A stream that a peer has just opened. It is reset unless it becomes a flow.
#[derive(Debug)]
pub(crate) struct IncomingFlow {
    session: Arc<Session>,
    stream: Option<(OpenStream, quinn::SendStream, quinn::RecvStream)>,
}

impl IncomingFlow {
    pub(super) fn new(
        counted: OpenStream,
        send: quinn::SendStream,
        recv: quinn::RecvStream,
    ) -> Self {
        let session = Arc::clone(counted.session());
        Self { session, stream: Some((counted, send, recv)) }
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Reserves the flow's window and reads its head. `None` when the flow was refused at the ceiling of memory.
    ///
    /// # Errors
    /// The flow or the session is gone, or this is no flow.
    ///
    /// # Cancel safety
    /// Not cancel-safe; dropping resets the stream.
    pub(crate) async fn open(mut self) -> Result<Option<(FlowOpen, Flow)>, FlowError> {
        let session = Arc::clone(&self.session);
        let Some(window) = session.window() else {
            self.refuse().await?;
            return Ok(None);
        };
        let Some((counted, send, recv)) = self.stream.take() else { return Ok(None) };
        let mut flow = Flow::new(&session, send, recv, window, Some(counted));
        let head = tokio::time::timeout(OPEN_TIMEOUT, flow.recv.message(OPEN_LEN_MAX)).await;
        let head = head.map_err(|_elapsed| FlowError::Malformed("no head in time"))??;
        Ok(Some((head, flow)))
    }

    async fn refuse(mut self) -> Result<(), FlowError> {
        let session = Arc::clone(&self.session);
        // Without a word where too many wait to be told: nothing pays for those.
        let Ok(_told) = session.refusals.try_acquire() else { return Ok(()) };
        if let Some((_, send, recv)) = &mut self.stream {
            // First, because nobody reads it. Fails when the peer has ended it already.
            let _ = recv.stop(CODE_REFUSED);
            let detail = "the egress router is at its ceiling of memory".into();
            refuse(&session, send, Reason::Overloaded, detail).await?;
        }
        // Ended cleanly; a reset would overtake the reply.
        self.stream = None;
        Ok(())
    }
}

impl Drop for IncomingFlow {
    fn drop(&mut self) {
        // Left to itself, quinn would finish the one half.
        if let Some((_, send, recv)) = &mut self.stream {
            // Either fails when the peer has ended that half already.
            let _ = send.reset(CODE_ABORTED);
            let _ = recv.stop(CODE_ABORTED);
        }
    }
}

pub(super) async fn refuse(
    session: &Session,
    stream: &mut quinn::SendStream,
    reason: Reason,
    detail: String,
) -> Result<(), FlowError> {
    let refused = Refused { reason: reason.into(), detail };
    let reply = FlowReply { outcome: Some(Reply::Refused(refused)) };
    session.reply(stream, &reply).await?;
    stream.finish().map_err(|_closed| FlowError::Reset)
}
