//! Datagrams of an association: how each travels in a QUIC DATAGRAM frame, or as a record on the association's stream.
//!
//! A frame begins with a QUIC varint (RFC 9000, section 16): twice the index of the association's stream, plus 1 if a half of a datagram
//! follows and not all of it. A half has one more varint: the number of the datagram, times two, plus 1 for the second half. Numbers are never
//! used twice: halves of two datagrams put together would be a datagram that nobody sent, and UDP has no way to tell.
//! A record on the stream is a length of two bytes and so many bytes.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Largest payload of a UDP datagram over IPv4.
pub const PAYLOAD_LEN_MAX: usize = 65_507;
/// Bytes in front of each record.
pub const RECORD_PREFIX_LEN: usize = 2;
/// What a QUIC varint can hold.
const VARINT_MAX: u64 = (1 << 62) - 1;

/// What of a datagram a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// All of it.
    Whole,
    /// A half of the datagram with this number.
    Half {
        /// Which datagram.
        number: u64,
        /// Whether it is the second half.
        second: bool,
    },
}

/// One frame, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Index of the association's stream.
    pub flow: u64,
    /// What of the datagram it is.
    pub piece: Piece,
    /// The bytes.
    pub payload: Bytes,
}

/// Length of what stands in front of the payload.
#[must_use]
pub fn header_len(flow: u64, piece: Piece) -> usize {
    let varint_len = |half: u64| match half.saturating_mul(2) {
        0..0x40 => 1,
        0x40..0x4000 => 2,
        0x4000..0x4000_0000 => 4,
        _ => 8,
    };
    match piece {
        Piece::Whole => varint_len(flow),
        Piece::Half { number, .. } => varint_len(flow) + varint_len(number),
    }
}

/// Puts a frame together.
///
/// # Panics
/// When `flow` is no index of a stream, i.e. not below 2^60, or a number not below 2^61.
#[must_use]
pub fn encode(flow: u64, piece: Piece, payload: &[u8]) -> Bytes {
    assert!(flow < 1 << 60, "invariant: QUIC has no such stream");
    let mut out = BytesMut::with_capacity(header_len(flow, piece) + payload.len());
    put_varint(&mut out, flow * 2 + u64::from(piece != Piece::Whole));
    if let Piece::Half { number, second } = piece {
        assert!(number < 1 << 61, "invariant: nobody lives to send so many");
        put_varint(&mut out, number * 2 + u64::from(second));
    }
    out.put_slice(payload);
    out.freeze()
}

/// Takes a frame apart; `None` if it is none.
#[must_use]
pub fn decode(mut frame: Bytes) -> Option<Frame> {
    let first = take_varint(&mut frame)?;
    let piece = if first % 2 == 0 {
        Piece::Whole
    } else {
        let half = take_varint(&mut frame)?;
        Piece::Half { number: half / 2, second: half % 2 == 1 }
    };
    // Both halves have something, so that no datagram is longer than two packets or shorter than one byte more than one.
    let is_empty_half = piece != Piece::Whole && frame.is_empty();
    (!is_empty_half).then_some(Frame { flow: first / 2, piece, payload: frame })
}

fn put_varint(out: &mut BytesMut, value: u64) {
    debug_assert!(value <= VARINT_MAX);
    match value {
        0..0x40 => out.put_u8(low(value)),
        0x40..0x4000 => out.put_slice(&(0x4000 | value).to_be_bytes()[6..]),
        0x4000..0x4000_0000 => out.put_slice(&(0x8000_0000 | value).to_be_bytes()[4..]),
        _ => out.put_u64(0xc000_0000_0000_0000 | value),
    }
}

fn low(value: u64) -> u8 {
    value.to_be_bytes()[7]
}

fn take_varint(from: &mut Bytes) -> Option<u64> {
    let first = *from.first()?;
    let len = 1 << (first >> 6);
    if from.len() < len {
        return None;
    }
    let mut value = u64::from(first & 0x3f);
    for byte in &from[1..len] {
        value = value << 8 | u64::from(*byte);
    }
    from.advance(len);
    Some(value)
}

/// A record: the datagram behind its length. `None` if it is longer than a datagram can be.
#[must_use]
pub fn record(payload: &[u8]) -> Option<Bytes> {
    let len = u16::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_LEN_MAX)?;
    let mut out = BytesMut::with_capacity(RECORD_PREFIX_LEN + payload.len());
    out.put_u16(len);
    out.put_slice(payload);
    Some(out.freeze())
}

/// A record claims a length that no datagram has; nothing after it can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a datagram of {0} bytes")]
pub struct RecordError(pub usize);

/// Cuts a stream into records. Holds less than one record and what was pushed at a time.
#[derive(Debug, Default)]
pub struct Records {
    buffer: BytesMut,
    /// Of a record that is passed over.
    skipped: usize,
}

impl Records {
    /// Takes bytes from the stream.
    pub fn push(&mut self, mut bytes: &[u8]) {
        let skipped = self.skipped.min(bytes.len());
        self.skipped -= skipped;
        bytes = &bytes[skipped..];
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole datagram; `None` until more bytes arrive.
    ///
    /// # Errors
    /// When what arrives cannot be records; the stream is then unusable.
    pub fn next_datagram(&mut self) -> Result<Option<Bytes>, RecordError> {
        let Some(len) = self.expected()? else { return Ok(None) };
        if self.buffer.len() < RECORD_PREFIX_LEN + len {
            return Ok(None);
        }
        self.buffer.advance(RECORD_PREFIX_LEN);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }

    /// Bytes that this will hold until the record that has begun is whole; 0 between records.
    ///
    /// # Errors
    /// As [`Records::next_datagram`].
    pub fn held_len_max(&self) -> Result<usize, RecordError> {
        if self.buffer.is_empty() {
            return Ok(0);
        }
        Ok(RECORD_PREFIX_LEN + self.expected()?.unwrap_or(0))
    }

    /// Passes over the record that has begun, to be asked for when all whole ones are taken.
    ///
    /// # Errors
    /// As [`Records::next_datagram`].
    pub fn skip(&mut self) -> Result<(), RecordError> {
        if let Some(len) = self.expected()? {
            self.skipped = (RECORD_PREFIX_LEN + len).saturating_sub(self.buffer.len());
            self.buffer = BytesMut::new();
        }
        Ok(())
    }

    fn expected(&self) -> Result<Option<usize>, RecordError> {
        let Some(prefix) = self.buffer.first_chunk::<RECORD_PREFIX_LEN>() else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes(*prefix));
        if len <= PAYLOAD_LEN_MAX { Ok(Some(len)) } else { Err(RecordError(len)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece() -> impl Strategy<Value = Piece> {
        prop_oneof![
            Just(Piece::Whole),
            (prop_oneof![0_u64..100, Just(8_191), Just(8_192), 0..1_u64 << 60], any::<bool>())
                .prop_map(|(number, second)| Piece::Half { number, second }),
        ]
    }

    proptest! {
        #[test]
        fn frames_come_apart_as_they_were_put_together(
            flow in prop_oneof![0_u64..100, Just(31), Just(32), Just(8_191), Just(8_192), 0..1_u64 << 60],
            piece in piece(),
            payload in prop::collection::vec(any::<u8>(), 1..100),
        ) {
            let frame = encode(flow, piece, &payload);
            prop_assert_eq!(frame.len(), header_len(flow, piece) + payload.len());
            prop_assert_eq!(decode(frame), Some(Frame { flow, piece, payload: payload.into() }));
        }

        #[test]
        fn records_come_out_whole_however_they_are_cut(
            lens in prop::collection::vec(prop_oneof![Just(0_usize), 1..2_000_usize, Just(PAYLOAD_LEN_MAX)], 0..20),
            cut in 1_usize..70_000,
        ) {
            let datagrams: Vec<Bytes> =
                (0_u8..).zip(&lens).map(|(i, &len)| vec![i; len].into()).collect();
            let stream: Vec<u8> =
                datagrams.iter().flat_map(|d| record(d).unwrap().to_vec()).collect();
            let (mut records, mut out) = (Records::default(), Vec::new());
            for part in stream.chunks(cut) {
                records.push(part);
                while let Some(datagram) = records.next_datagram().unwrap() {
                    out.push(datagram);
                }
                prop_assert!(records.buffer.len() <= records.held_len_max().unwrap());
            }
            prop_assert_eq!(records.held_len_max(), Ok(0));
            prop_assert_eq!(out, datagrams);
        }
    }

    #[test]
    fn empty_datagrams_are_datagrams_and_empty_halves_are_not() {
        let empty = decode(encode(7, Piece::Whole, b"")).unwrap();
        assert_eq!((empty.flow, empty.payload.len()), (7, 0));
        let half = Piece::Half { number: 1, second: false };
        assert_eq!(decode(encode(7, half, b"")), None);
        for cut in [&b""[..], &[0x40], &[0xc0, 0, 0], &[0x01]] {
            assert_eq!(decode(Bytes::copy_from_slice(cut)), None, "{cut:?}");
        }
    }

    #[test]
    fn lengths_that_no_datagram_has_are_refused() {
        assert!(record(&vec![0; PAYLOAD_LEN_MAX]).is_some());
        assert!(record(&vec![0; PAYLOAD_LEN_MAX + 1]).is_none());
        let mut records = Records::default();
        records.push(&65_508_u16.to_be_bytes());
        assert_eq!(records.next_datagram(), Err(RecordError(65_508)));
    }

    #[test]
    fn a_record_that_is_passed_over_leaves_the_next_one_whole() {
        let mut records = Records::default();
        let stream = [record(&[1; 1_000]).unwrap(), record(b"next").unwrap()].concat();
        records.push(&stream[..10]);
        assert_eq!(records.held_len_max(), Ok(1_002));
        records.skip().unwrap();
        for part in stream[10..].chunks(7) {
            records.push(part);
        }
        assert_eq!(records.next_datagram(), Ok(Some(Bytes::from_static(b"next"))));
        assert_eq!(records.held_len_max(), Ok(0));
    }
}
