//! Control messages on the link's stream.

use bytes::BytesMut;
use prost::Message as _;
use quinn::{RecvStream, SendStream};
use skein_wire::{
    framing::{self, Decoder, FramingError, MESSAGE_LEN_MAX},
    proto::routing::LinkMessage,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Bytes taken from QUIC at a time.
const READ_BYTES: usize = 64 << 10;
/// Messages written at a time.
const WRITE_BATCH: usize = 32;

/// Why no further message comes.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Framing(#[from] FramingError),
    #[error("malformed control message")]
    Decode(#[from] prost::DecodeError),
    #[error("the peer closed the control stream")]
    Ended,
}

/// Cuts the stream into messages.
#[derive(Debug)]
pub(super) struct MessageReader {
    recv: RecvStream,
    decoder: Decoder,
}

impl MessageReader {
    pub(super) fn new(recv: RecvStream) -> Self {
        Self { recv, decoder: Decoder::new(MESSAGE_LEN_MAX) }
    }

    /// The next message.
    ///
    /// # Cancel safety
    /// Cancel-safe: what was read is kept.
    pub(super) async fn next(&mut self) -> Result<LinkMessage, ReadError> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(LinkMessage::decode(message)?);
            }
            match self.recv.read_chunk(READ_BYTES, true).await {
                Ok(Some(chunk)) => self.decoder.push(&chunk.bytes),
                Ok(None) | Err(_) => return Err(ReadError::Ended),
            }
        }
    }
}

/// Writes what is queued until the queue or the stream ends. Once `closing` is cancelled nothing more is queued, and what was is written and
/// acknowledged before this returns.
///
/// # Cancel safety
/// Cancelled, the stream may end within a message.
pub(super) async fn write_queued(
    mut send: SendStream,
    mut queue: mpsc::Receiver<LinkMessage>,
    closing: &CancellationToken,
) -> Result<(), quinn::WriteError> {
    let (mut batch, mut bytes) = (Vec::with_capacity(WRITE_BATCH), BytesMut::new());
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled(), if !queue.is_closed() => queue.close(), // cancel-safe
            count = queue.recv_many(&mut batch, WRITE_BATCH) => if count == 0 { break }, // cancel-safe
        }
        for message in batch.drain(..) {
            framing::encode(&message, &mut bytes);
        }
        if !bytes.is_empty() {
            send.write_chunk(bytes.split().freeze()).await?;
        }
    }
    // The stream may have ended before: then there is nobody to acknowledge anything.
    if send.finish().is_ok() {
        drop(send.stopped().await);
    }
    Ok(())
}
