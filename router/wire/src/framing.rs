//! Length-delimited messages on a stream: a varint length, then that many bytes.
//!
//! The length is a protobuf varint (base 128, least significant group first), at most ten bytes.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

/// Longest message on a link's or session's control stream, in bytes: a batch of records and some.
pub const MESSAGE_LEN_MAX: usize = 256 * 1024;
/// Longest varint of a `u64`.
const VARINT_LEN_MAX: usize = 10;

/// Why the bytes of a stream cannot be cut into messages; nothing after it can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FramingError {
    /// The length exceeds the decoder's limit.
    #[error("a message of {len} bytes exceeds the limit of {limit}")]
    TooLong {
        /// As announced.
        len: u64,
        /// As allowed.
        limit: usize,
    },
    /// The length is not a varint.
    #[error("malformed message length")]
    Length,
    /// The stream ended within a message.
    #[error("the stream ended within a message")]
    Truncated,
}

/// Appends `message` to `out`, length first.
pub fn encode(message: &impl Message, out: &mut BytesMut) {
    message.encode_length_delimited(out).expect("invariant: BytesMut grows as needed");
}

/// Cuts a byte stream into messages. Holds at most one message and what was read with it.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses messages longer than `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { buffer: BytesMut::new(), limit }
    }

    /// Takes bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Where to read into directly; what is put there counts as pushed.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole message; `None` until more bytes arrive.
    ///
    /// # Errors
    /// [`FramingError`] when what arrives cannot be messages; the stream is then unusable.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, FramingError> {
        let Some((len, prefix)) = self.length()? else { return Ok(None) };
        if self.buffer.len() < prefix + len {
            self.buffer.reserve(prefix + len - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(prefix);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }

    /// Says whether the stream may end here.
    ///
    /// # Errors
    /// [`FramingError::Truncated`] when part of a message is left.
    pub fn finish(&self) -> Result<(), FramingError> {
        if self.buffer.is_empty() { Ok(()) } else { Err(FramingError::Truncated) }
    }

    /// What was read beyond the messages taken, e.g. payload after the head of a flow.
    #[must_use]
    pub fn into_rest(self) -> BytesMut {
        self.buffer
    }

    fn length(&self) -> Result<Option<(usize, usize)>, FramingError> {
        let mut len = 0_u64;
        for (i, &byte) in self.buffer.iter().take(VARINT_LEN_MAX).enumerate() {
            let group = u64::from(byte & 0x7f);
            let shift = 7 * u32::try_from(i).map_err(|_| FramingError::Length)?;
            if group << shift >> shift != group {
                return Err(FramingError::Length);
            }
            len |= group << shift;
            if byte & 0x80 == 0 {
                let fits = usize::try_from(len).ok().filter(|&len| len <= self.limit);
                let len = fits.ok_or(FramingError::TooLong { len, limit: self.limit })?;
                return Ok(Some((len, i + 1)));
            }
        }
        if self.buffer.len() < VARINT_LEN_MAX { Ok(None) } else { Err(FramingError::Length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_framed_comes_out_whole_however_it_is_cut(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..10),
            piece in 1_usize..50,
        ) {
            let mut stream = BytesMut::new();
            for message in &messages {
                encode(message, &mut stream);
            }
            let mut decoder = Decoder::new(400);
            let mut out = Vec::new();
            for piece in stream.chunks(piece) {
                decoder.push(piece);
                while let Some(message) = decoder.next_message().unwrap() {
                    out.push(Vec::<u8>::decode(message).unwrap());
                }
            }
            prop_assert_eq!(out, messages);
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn noise_neither_panics_nor_reserves_beyond_the_limit(noise: Vec<u8>) {
            let mut decoder = Decoder::new(64);
            decoder.push(&noise);
            while let Ok(Some(message)) = decoder.next_message() {
                prop_assert!(message.len() <= 64);
            }
            prop_assert!(decoder.buffer.capacity() <= noise.len() + 64 + VARINT_LEN_MAX);
        }
    }

    #[test]
    fn too_long_and_truncated_are_told() {
        let mut decoder = Decoder::new(10);
        decoder.push(&[11]);
        assert_eq!(decoder.next_message(), Err(FramingError::TooLong { len: 11, limit: 10 }));
        let mut decoder = Decoder::new(10);
        decoder.push(&[2, 1]);
        assert_eq!(decoder.next_message(), Ok(None));
        assert_eq!(decoder.finish(), Err(FramingError::Truncated));
        let mut decoder = Decoder::new(10);
        decoder.push(&[0xff; 10]);
        assert_eq!(decoder.next_message(), Err(FramingError::Length));
    }
}
