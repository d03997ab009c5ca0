//! Receive buffers, lent to readers of sockets and to what waits for the end-to-end endpoint.

use parking_lot::Mutex;

/// Room for the largest batch the kernel coalesces.
pub(crate) const BUFFER_BYTES: usize = 64 << 10;
/// Buffers kept for reuse; those beyond are given back to the allocator.
const KEPT_MAX: usize = 32;

/// Buffers nobody uses at the moment.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Box<[u8]>>>);

impl Pool {
    /// Lends `n` buffers.
    pub(crate) fn take(&self, n: usize) -> Vec<Box<[u8]>> {
        let mut free = self.0.lock();
        let kept = free.len().saturating_sub(n);
        let mut lent = free.split_off(kept);
        drop(free);
        lent.resize_with(n, empty);
        lent
    }

    /// Lends one buffer.
    pub(crate) fn take_one(&self) -> Box<[u8]> {
        self.0.lock().pop().unwrap_or_else(empty)
    }

    /// Takes buffers back; those of another size are dropped.
    pub(crate) fn give(&self, buffers: impl IntoIterator<Item = Box<[u8]>>) {
        let mut free = self.0.lock();
        free.extend(buffers.into_iter().filter(|buffer| buffer.len() == BUFFER_BYTES));
        free.truncate(KEPT_MAX);
    }
}

fn empty() -> Box<[u8]> {
    vec![0; BUFFER_BYTES].into_boxed_slice()
}
