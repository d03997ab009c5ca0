//! The control stream of a session: hello, then credit and aborts, batched.

use super::{Class, INITIAL_CREDIT_BYTES, TURN_BYTES, connection::Session};
use bytes::BytesMut;
use parking_lot::Mutex;
use prost::Message as _;
use skein_core::Pin;
use skein_wire::{
    framing::{self, Decoder, FramingError},
    proto::session::{Abort, Credit, SessionHello, SessionMessage},
};
use std::{collections::BTreeMap, mem};
use tokio::sync::Notify;

/// Versions of the session protocol this router speaks.
const PROTOCOL_MIN: u32 = 1;
const PROTOCOL_MAX: u32 = 1;
/// Above every session message: a hello is tiny and batches are cut at [`BATCH_LEN_MAX`].
const MESSAGE_LEN_MAX: usize = 64 << 10;
/// Flows per message; an entry takes at most 30 bytes.
const BATCH_LEN_MAX: usize = 1_000;
/// One read of the control stream.
const READ_LEN_MAX: usize = 16 << 10;

/// Why the control stream ended; except for a lost connection, the peer is at fault.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    #[error("the control stream cannot be cut into messages: {0}")]
    Framing(#[from] FramingError),
    #[error("a session message cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("the peer speaks versions {min} to {max} of the session protocol, this router 1")]
    Version { min: u32, max: u32 },
    #[error("the peer grants {0} bytes at first, less than one turn of a writer")]
    InitialCredit(u32),
    #[error("the peer ended the control stream")]
    Ended,
    #[error(transparent)]
    Read(#[from] quinn::ReadError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Credit(#[from] super::CreditViolation),
}

/// What waits to be told to the peer: at most one entry per flow and kind, so bounded by the flows that the session has now.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pending: Mutex<Pending>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    credits: BTreeMap<u64, Credit>,
    aborts: BTreeMap<u64, u64>,
    draining: bool,
    /// A message without content, since the peer is to acknowledge something.
    sign_of_life: bool,
}

impl Outbox {
    pub(super) fn grant(&self, flow: u64, add_bytes: u64) {
        let mut pending = self.pending.lock();
        pending.credit(flow).add_bytes += add_bytes;
        self.filled.notify_one();
    }

    pub(super) fn give_back(&self, flow: u64, return_bytes: u64) {
        let mut pending = self.pending.lock();
        pending.credit(flow).return_bytes += return_bytes;
        self.filled.notify_one();
    }

    pub(super) fn abort(&self, flow: u64, after_bytes: u64) {
        self.pending.lock().aborts.insert(flow, after_bytes);
        self.filled.notify_one();
    }

    /// Drops what waits about a flow that has ended: it means nothing to the peer any more.
    pub(super) fn forget(&self, flow: u64) {
        let mut pending = self.pending.lock();
        pending.credits.remove(&flow);
        pending.aborts.remove(&flow);
    }

    pub(super) fn drain(&self) {
        self.pending.lock().draining = true;
        self.filled.notify_one();
    }

    pub(super) fn sign_of_life(&self) {
        self.pending.lock().sign_of_life = true;
        self.filled.notify_one();
    }

    /// The next message; `None` when nothing waits.
    fn take(&self) -> Option<SessionMessage> {
        let mut pending = self.pending.lock();
        let is_due = mem::take(&mut pending.sign_of_life);
        let message = SessionMessage {
            credits: pop_batch(&mut pending.credits).map(|(_, credit)| credit).collect(),
            aborts: pop_batch(&mut pending.aborts)
                .map(|(flow, after_bytes)| Abort { flow, after_bytes })
                .collect(),
            draining: mem::take(&mut pending.draining),
        };
        (is_due || message != SessionMessage::default()).then_some(message)
    }
}

impl Pending {
    fn credit(&mut self, flow: u64) -> &mut Credit {
        self.credits.entry(flow).or_insert_with(|| Credit { flow, ..Credit::default() })
    }
}

fn pop_batch<V>(map: &mut BTreeMap<u64, V>) -> impl Iterator<Item = (u64, V)> + '_ {
    std::iter::from_fn(|| map.pop_first()).take(BATCH_LEN_MAX / 2)
}

/// Writes what waits, one write per wake. Never behind the ring: the data of the other direction waits for this.
pub(super) async fn write(
    mut stream: quinn::SendStream,
    outbox: &Outbox,
) -> Result<(), ControlError> {
    let mut buffer = BytesMut::new();
    loop {
        while let Some(message) = outbox.take() {
            framing::encode(&message, &mut buffer);
        }
        if !buffer.is_empty() {
            stream.write_chunk(buffer.split().freeze()).await?;
        }
        outbox.filled.notified().await;
    }
}

/// Applies what the peer says, until it is wrong or the session is gone.
pub(super) async fn read(mut stream: ControlReader, session: &Session) -> Result<(), ControlError> {
    loop {
        let message = stream.next::<SessionMessage>().await?;
        if message.draining {
            session.set_draining();
        }
        for credit in message.credits {
            // Of a flow that has ended here in the meantime.
            let Some(flow) = session.flow(credit.flow) else { continue };
            flow.apply(credit.add_bytes, credit.return_bytes)?;
        }
        for abort in message.aborts {
            if let Some(flow) = session.flow(abort.flow) {
                flow.peer_aborted(abort.after_bytes);
            }
        }
    }
}

/// Cuts the peer's control stream into messages.
#[derive(Debug)]
pub(super) struct ControlReader {
    stream: quinn::RecvStream,
    decoder: Decoder,
}

impl ControlReader {
    pub(super) fn new(stream: quinn::RecvStream) -> Self {
        Self { stream, decoder: Decoder::new(MESSAGE_LEN_MAX) }
    }

    async fn next<M: prost::Message + Default>(&mut self) -> Result<M, ControlError> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(M::decode(message)?);
            }
            let chunk = self.stream.read_chunk(READ_LEN_MAX, true).await?;
            self.decoder.push(&chunk.ok_or(ControlError::Ended)?.bytes);
        }
    }

    /// Reads the peer's hello and checks that both speak a common version and that a flow's first bytes fit its credit.
    pub(super) async fn hello(&mut self) -> Result<SessionHello, ControlError> {
        let hello = self.next::<SessionHello>().await?;
        let (min, max) = (hello.protocol_min, hello.protocol_max);
        if max < PROTOCOL_MIN || min > PROTOCOL_MAX {
            return Err(ControlError::Version { min, max });
        }
        if u64::from(hello.initial_credit_bytes) < TURN_BYTES as u64 {
            return Err(ControlError::InitialCredit(hello.initial_credit_bytes));
        }
        Ok(hello)
    }
}

/// Says hello.
pub(super) async fn write_hello(
    stream: &mut quinn::SendStream,
    boot_epoch: u64,
    pin: Pin,
    class: Class,
) -> Result<(), ControlError> {
    let hello = SessionHello {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        boot_epoch,
        pin: pin.0.into(),
        initial_credit_bytes: u32::try_from(INITIAL_CREDIT_BYTES)
            .expect("invariant: the initial credit is small"),
        datagrams: class == Class::Datagrams,
    };
    stream.write_all(&hello.encode_length_delimited_to_vec()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outbox_merges_per_flow_and_batches() {
        let outbox = Outbox::default();
        assert_eq!(outbox.take(), None);
        outbox.grant(7, 1);
        outbox.grant(7, 2);
        outbox.give_back(7, 4);
        outbox.abort(9, 5);
        outbox.drain();
        outbox.sign_of_life();
        let message = outbox.take().unwrap();
        assert_eq!(message.credits, [Credit { flow: 7, add_bytes: 3, return_bytes: 4 }]);
        assert_eq!(message.aborts, [Abort { flow: 9, after_bytes: 5 }]);
        assert!(message.draining);
        assert_eq!(outbox.take(), None);
        outbox.sign_of_life();
        assert_eq!(outbox.take(), Some(SessionMessage::default()));
        assert_eq!(outbox.take(), None);

        outbox.grant(7, 1);
        outbox.abort(7, 1);
        outbox.forget(7);
        assert_eq!(outbox.take(), None, "a peer that takes nothing must not make it grow");

        for flow in 0..BATCH_LEN_MAX as u64 {
            outbox.grant(flow, u64::MAX / 2);
        }
        let mut count = 0;
        while let Some(message) = outbox.take() {
            assert!(message.encoded_len() <= MESSAGE_LEN_MAX);
            count += message.credits.len();
        }
        assert_eq!(count, BATCH_LEN_MAX);
    }
}
