//! What has arrived of a stream ahead of what is missing.
//!
//! quinn keeps that itself, but closes the whole connection when more than 1,024 pieces of a stream are apart from each other: nothing a
//! peer does wrong, but what a lossy or overrun path of some length does to a fast flow. Pure.

use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;

/// Pieces that are apart from each other. The largest window of a flow is 56,000 packets of the smallest size, of which at most every other
/// one makes a piece; what is put together makes none.
const PIECES_MAX: usize = 32 << 10;
/// Pieces that join are put together up to this. Longer ones would be held until their last byte has been consumed, while the credit for
/// the first has long been granted again.
const PIECE_BYTES_MAX: usize = 32 << 10;

/// The peer sends in smaller pieces, and leaves out more, than any network does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer sends a flow in too many pieces")]
pub(super) struct TooScattered;

/// Pieces of one stream that wait for their turn.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Offset of the byte whose turn it is.
    next: u64,
    /// By offset. Copies, so that a piece does not keep the receive buffer it came in.
    pieces: BTreeMap<u64, BytesMut>,
}

impl Ahead {
    /// Everything before `next` has had its turn.
    pub(super) fn new(next: u64) -> Self {
        Self { next, pieces: BTreeMap::new() }
    }

    /// Takes a piece that does not overlap others; returns it if it is its turn. Others may follow, see [`Ahead::pop`].
    ///
    /// # Errors
    /// When there are too many pieces.
    pub(super) fn push(
        &mut self,
        offset: u64,
        piece: Bytes,
    ) -> Result<Option<Bytes>, TooScattered> {
        if offset == self.next {
            self.next += piece.len() as u64;
            return Ok(Some(piece));
        }
        let before = self.pieces.range_mut(..offset).next_back();
        if let Some((start, before)) = before
            && start + before.len() as u64 == offset
            && before.len() + piece.len() <= PIECE_BYTES_MAX
        {
            before.extend_from_slice(&piece);
        } else if self.pieces.len() >= PIECES_MAX {
            return Err(TooScattered);
        } else {
            self.pieces.insert(offset, BytesMut::from(&piece[..]));
        }
        Ok(None)
    }

    /// The next piece whose turn it is.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let first = self.pieces.first_entry().filter(|first| *first.key() == self.next)?;
        let piece = first.remove().freeze();
        self.next += piece.len() as u64;
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(ahead: &mut Ahead, offset: u64, piece: Bytes, out: &mut Vec<u8>) {
        let mut next = ahead.push(offset, piece).unwrap();
        while let Some(piece) = next {
            out.extend_from_slice(&piece);
            next = ahead.pop();
        }
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_come_out_in_theirs(
            cuts in proptest::collection::btree_set(1_u16..2_000, 0..200), start in 0_u64..1_000, seed: u64,
        ) {
            let whole: Vec<u8> = (0..2_000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
            let ends: Vec<usize> = cuts.iter().map(|&cut| cut.into()).chain([2_000]).collect();
            let mut pieces: Vec<(usize, usize)> =
                ends.iter().scan(0, |from, &to| Some((std::mem::replace(from, to), to))).collect();
            // Any order will do, as long as the seed repeats it.
            pieces.sort_by_key(|(from, _)| (*from as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (mut ahead, mut out) = (Ahead::new(start), Vec::new());
            for (from, to) in pieces {
                let piece = Bytes::copy_from_slice(&whole[from..to]);
                drain(&mut ahead, start + from as u64, piece, &mut out);
            }
            prop_assert_eq!(out, whole);
            prop_assert!(ahead.pieces.is_empty());
        }
    }

    #[test]
    fn every_other_packet_of_the_largest_window_fits_and_more_does_not() {
        let mut ahead = Ahead::new(0);
        let piece = || Bytes::from_static(&[7; 1_200]);
        for n in 0..PIECES_MAX as u64 {
            assert_eq!(ahead.push(2_400 * n + 1_200, piece()), Ok(None));
        }
        const _: () = assert!(PIECES_MAX as u64 * 2_400 >= super::super::WINDOW_BYTES_MAX);
        assert_eq!(ahead.push(2_400, piece()), Ok(None), "what joins another is none of its own");
        let far = 2_400 * PIECES_MAX as u64 + 1_200;
        assert_eq!(ahead.push(far, piece()), Err(TooScattered));
        let mut out = Vec::new();
        drain(&mut ahead, 0, piece(), &mut out);
        assert_eq!(out.len(), 4_800);
    }
}
