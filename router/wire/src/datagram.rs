//! Datagrams on a byte stream: what a router's UDP port would receive, each behind its length.
//!
//! A length is two bytes, big-endian, and counts the datagram alone.

use bytes::{Buf, BytesMut};

/// Longest datagram, in bytes: a jumbo frame's.
pub const DATAGRAM_LEN_MAX: usize = 9_000;
/// Bytes in front of each datagram.
pub const PREFIX_LEN: usize = 2;

/// Why the bytes of a stream cannot be cut into datagrams; nothing after it can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DatagramError {
    /// A length that none has: 0, or more than [`DATAGRAM_LEN_MAX`].
    #[error("a datagram of {0} bytes")]
    Length(usize),
}

/// What stands in front of a datagram of `len` bytes; `None` if no datagram may have that length.
#[must_use]
pub fn prefix(len: usize) -> Option<[u8; PREFIX_LEN]> {
    let len = u16::try_from(len).ok().filter(|_| (1..=DATAGRAM_LEN_MAX).contains(&len))?;
    Some(len.to_be_bytes())
}

/// The length of the first datagram of `bytes`, once its prefix is there.
///
/// # Errors
/// When no datagram can begin like that.
pub fn first_len(bytes: &[u8]) -> Result<Option<usize>, DatagramError> {
    let Some((&prefix, _)) = bytes.split_first_chunk() else { return Ok(None) };
    let len = usize::from(u16::from_be_bytes(prefix));
    if (1..=DATAGRAM_LEN_MAX).contains(&len) {
        Ok(Some(len))
    } else {
        Err(DatagramError::Length(len))
    }
}

/// Datagrams that lie in a buffer one behind the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch {
    /// Of all of them, in bytes.
    pub len: usize,
    /// Of each but the last, which may be shorter.
    pub stride: usize,
}

/// Cuts a byte stream into datagrams. Holds what was pushed until it is taken; whoever takes before pushing again makes it hold
/// less than one datagram and what was pushed at a time.
#[derive(Debug, Default)]
pub struct Decoder(BytesMut);

impl Decoder {
    /// Takes bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Where to read into directly; what is put there counts as pushed.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.0
    }

    /// Moves whole datagrams of one length to the front of `out`, as many as are there and fit; the last may be shorter. `None`
    /// until more bytes arrive.
    ///
    /// # Errors
    /// When what arrives cannot be datagrams; the stream is then unusable.
    ///
    /// # Panics
    /// When `out` has less than [`DATAGRAM_LEN_MAX`] bytes.
    pub fn next_batch(&mut self, out: &mut [u8]) -> Result<Option<Batch>, DatagramError> {
        assert!(out.len() >= DATAGRAM_LEN_MAX, "room for any datagram");
        let mut batch: Option<Batch> = None;
        loop {
            let len = match first_len(&self.0) {
                Ok(Some(len)) if self.0.len() >= PREFIX_LEN + len => len,
                // What came before is whole; the error is still there when asked again.
                Err(error) if batch.is_none() => return Err(error),
                Ok(_) | Err(_) => return Ok(batch),
            };
            let Batch { len: filled, stride } = batch.unwrap_or(Batch { len: 0, stride: len });
            if len > stride || !filled.is_multiple_of(stride) || filled + len > out.len() {
                return Ok(batch);
            }
            self.0.advance(PREFIX_LEN);
            self.0.copy_to_slice(&mut out[filled..filled + len]);
            batch = Some(Batch { len: filled + len, stride });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(datagrams: &[Vec<u8>]) -> Vec<u8> {
        datagrams.iter().flat_map(|d| [&prefix(d.len()).unwrap(), &d[..]].concat()).collect()
    }

    proptest! {
        #[test]
        fn what_is_sent_comes_out_whole_however_it_is_cut(
            lens in prop::collection::vec(prop_oneof![Just(1_472_usize), 1..200_usize, Just(9_000)], 0..40),
            piece in 1_usize..5_000,
        ) {
            let datagrams: Vec<Vec<u8>> =
                (0_u8..).zip(&lens).map(|(i, &len)| vec![i; len]).collect();
            let mut decoder = Decoder::default();
            let (mut out, mut buffer) = (Vec::new(), vec![0; 20_000]);
            for piece in stream(&datagrams).chunks(piece) {
                decoder.push(piece);
                while let Some(batch) = decoder.next_batch(&mut buffer).unwrap() {
                    out.extend(buffer[..batch.len].chunks(batch.stride).map(<[u8]>::to_vec));
                }
                prop_assert!(decoder.0.len() < PREFIX_LEN + DATAGRAM_LEN_MAX);
            }
            prop_assert_eq!(out, datagrams);
        }
    }

    #[test]
    fn datagrams_of_one_length_come_together_with_a_shorter_last_one() {
        let mut decoder = Decoder::default();
        decoder.push(&stream(&[vec![1; 10], vec![2; 10], vec![3; 4], vec![4; 10]]));
        let mut out = vec![0; DATAGRAM_LEN_MAX];
        assert_eq!(decoder.next_batch(&mut out), Ok(Some(Batch { len: 24, stride: 10 })));
        assert_eq!(decoder.next_batch(&mut out), Ok(Some(Batch { len: 10, stride: 10 })));
        assert_eq!(out[..10], [4; 10]);
        assert_eq!(decoder.next_batch(&mut out), Ok(None));
    }

    #[test]
    fn lengths_that_none_has_are_refused() {
        assert_eq!((prefix(0), prefix(DATAGRAM_LEN_MAX + 1)), (None, None));
        for (bytes, len) in [([0, 0], 0), ([0x23, 0x29], 9_001), (*b"GE", 0x4745)] {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let refused = decoder.next_batch(&mut vec![0; DATAGRAM_LEN_MAX]);
            assert_eq!(refused, Err(DatagramError::Length(len)));
        }
    }
}
