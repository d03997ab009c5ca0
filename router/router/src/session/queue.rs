//! Received bytes that the local socket has not taken yet.

use bytes::{Buf as _, Bytes, BytesMut};
use std::{collections::VecDeque, io::IoSlice};

/// Chunks taken from quinn or given to the socket at a time.
pub(crate) const CHUNKS_MAX: usize = 16;
/// A chunk keeps its whole receive buffer of up to 64 KiB alive. Smaller ones than a quarter of that are copied when they have to wait.
const SMALL_CHUNK_LEN: usize = 16 << 10;

/// Chunks in order.
#[derive(Debug, Default)]
pub(crate) struct ChunkQueue {
    chunks: VecDeque<Chunk>,
    /// The last so many chunks have not had to wait yet.
    fresh: usize,
    len_bytes: usize,
}

#[derive(Debug)]
enum Chunk {
    /// A part of a receive buffer.
    Shared(Bytes),
    /// Small ones together, with room for more.
    Copied(BytesMut),
}

impl Chunk {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Copied(bytes) => bytes,
        }
    }

    fn advance(&mut self, len: usize) {
        match self {
            Self::Shared(bytes) => bytes.advance(len),
            Self::Copied(bytes) => bytes.advance(len),
        }
    }
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
        let chunk = |i: usize| self.chunks.get(i).map_or(&[][..], Chunk::as_slice);
        let slices = std::array::from_fn(|i| IoSlice::new(chunk(i)));
        (slices, self.chunks.len().min(CHUNKS_MAX))
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.len_bytes += chunk.len();
            self.fresh += 1;
            self.chunks.push_back(Chunk::Shared(chunk));
        }
    }

    pub(super) fn advance(&mut self, mut len: usize) {
        self.len_bytes -= len;
        while len > 0 {
            let first =
                self.chunks.front_mut().expect("invariant: no more is consumed than is held");
            let first_len = first.as_slice().len();
            if first_len > len {
                first.advance(len);
                return;
            }
            len -= first_len;
            self.chunks.pop_front();
            self.fresh = self.fresh.min(self.chunks.len());
        }
    }

    /// Copies small chunks together: what is held has to wait. Each is copied once.
    pub(super) fn compact(&mut self) {
        let fresh = self.chunks.split_off(self.chunks.len() - self.fresh);
        self.fresh = 0;
        for chunk in fresh {
            let bytes = chunk.as_slice();
            if bytes.len() >= SMALL_CHUNK_LEN {
                self.chunks.push_back(chunk);
                continue;
            }
            match self.chunks.back_mut() {
                Some(Chunk::Copied(last)) if last.capacity() - last.len() >= bytes.len() => {
                    last.extend_from_slice(bytes);
                }
                _ => {
                    let mut copied = BytesMut::with_capacity(SMALL_CHUNK_LEN);
                    copied.extend_from_slice(bytes);
                    self.chunks.push_back(Chunk::Copied(copied));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Push(usize),
        Advance(usize),
        Compact,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..40_000_usize).prop_map(Op::Push),
            (0..300_usize).prop_map(Op::Push),
            (0..50_000_usize).prop_map(Op::Advance),
            Just(Op::Compact),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_queue_keeps_order(ops in proptest::collection::vec(op(), 0..100)) {
            let (mut queue, mut held, mut next) = (ChunkQueue::default(), VecDeque::<u8>::new(), 0_u8);
            for op in ops {
                match op {
                    Op::Push(len) => {
                        let bytes: Vec<u8> = (0..len).map(|i| next.wrapping_add(u8::try_from(i % 251).unwrap())).collect();
                        next = next.wrapping_add(101);
                        held.extend(&bytes);
                        queue.push(bytes.into());
                    }
                    Op::Advance(len) => {
                        let len = len.min(held.len());
                        held.drain(..len);
                        queue.advance(len);
                    }
                    Op::Compact => queue.compact(),
                }
                prop_assert_eq!(queue.len_bytes(), held.len());
                prop_assert_eq!(queue.is_empty(), queue.chunks.is_empty());
                let (slices, count) = queue.slices();
                let seen = slices[..count].iter().flat_map(|s| s.iter().copied());
                prop_assert!(seen.zip(&held).all(|(seen, held)| seen == *held));
            }
        }
    }

    #[test]
    fn what_waits_keeps_no_buffer_alive_that_it_does_not_fill() {
        let mut queue = ChunkQueue::default();
        let buffer = Bytes::from(vec![1; 64 << 10]);
        for _ in 0..3 {
            queue.push(buffer.slice(..100));
            queue.push(buffer.slice(..SMALL_CHUNK_LEN));
            queue.push(buffer.slice(100..200));
            queue.push(buffer.slice(200..300));
            queue.compact();
        }
        let shared = |chunk: &&Chunk| matches!(chunk, Chunk::Shared(_));
        assert!(queue.chunks.iter().filter(shared).all(|c| c.as_slice().len() >= SMALL_CHUNK_LEN));
        assert_eq!(queue.chunks.iter().filter(shared).count(), 3);
        // The last two of a round go along with the first of the next.
        assert_eq!(queue.chunks.len(), 7);
    }
}
