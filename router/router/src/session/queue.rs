//! Received bytes that the local socket has not taken yet.

use bytes::{Bytes, BytesMut};
use std::{collections::VecDeque, io::IoSlice};

/// Chunks taken from quinn or given to the socket at a time.
pub(crate) const CHUNKS_MAX: usize = 16;
/// A held chunk pins its whole receive buffer of up to 64 KiB. Smaller ones than this are copied together when there are many.
const SMALL_CHUNK_LEN: usize = 16 << 10;
/// As many small chunks may be held as they came.
const SMALL_CHUNKS_MAX: usize = 16;

/// Chunks in order.
#[derive(Debug, Default)]
pub(crate) struct ChunkQueue {
    chunks: VecDeque<Bytes>,
    len_bytes: usize,
}

impl ChunkQueue {
    pub(crate) fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The first chunks, for one vectored write.
    pub(crate) fn slices(&self) -> ([IoSlice<'_>; CHUNKS_MAX], usize) {
        let slices = std::array::from_fn(|i| IoSlice::new(self.chunks.get(i).map_or(&[], |c| c)));
        (slices, self.chunks.len().min(CHUNKS_MAX))
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.len_bytes += chunk.len();
            self.chunks.push_back(chunk);
        }
    }

    pub(super) fn advance(&mut self, mut len: usize) {
        self.len_bytes -= len;
        while len > 0 {
            let first =
                self.chunks.front_mut().expect("invariant: no more is consumed than is held");
            if first.len() > len {
                let _consumed = first.split_to(len);
                return;
            }
            len -= first.len();
            self.chunks.pop_front();
        }
    }

    pub(super) fn compact(&mut self) {
        let small = self.chunks.iter().rev().take_while(|c| c.len() < SMALL_CHUNK_LEN).count();
        if small < SMALL_CHUNKS_MAX {
            return;
        }
        let at = self.chunks.len() - small;
        let mut joined = BytesMut::with_capacity(self.chunks.range(at..).map(Bytes::len).sum());
        for chunk in self.chunks.drain(at..) {
            joined.extend_from_slice(&chunk);
        }
        self.chunks.push_back(joined.freeze());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_keeps_order_through_compaction_and_partial_writes() {
        let mut queue = ChunkQueue::default();
        let bytes: Vec<u8> = (0..200).collect();
        for chunk in bytes.chunks(5) {
            queue.push(Bytes::copy_from_slice(chunk));
        }
        queue.advance(7);
        queue.compact();
        assert_eq!(queue.chunks.len(), 1);
        queue.push(Bytes::from_static(b"!"));
        let (slices, count) = queue.slices();
        let seen: Vec<u8> = slices[..count].iter().flat_map(|s| s.iter().copied()).collect();
        assert_eq!(seen, [&bytes[7..], b"!"].concat());
        queue.advance(194);
        assert!(queue.is_empty() && queue.chunks.is_empty());
    }
}
