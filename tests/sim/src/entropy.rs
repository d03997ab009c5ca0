//! Randomness from the seed: the kernel's, as far as this program's simulating threads ask for it.
//!
//! `tokio::select!` draws the order of its branches, and hash tables the order of their entries, from what `std` asks the kernel for once
//! per thread; neither can be given a seed. So this program has a `getrandom` of its own in place of the C library's.

use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use std::cell::RefCell;

thread_local! {
    static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// From now on this thread's randomness follows from `seed`. To be called before anything else on a new thread.
pub(crate) fn seed_thread(seed: u64) {
    SEEDED.set(Some(StdRng::seed_from_u64(seed)));
}

/// Fills `buffer` from the thread's seed, if it has one.
fn fill(buffer: &mut [u8]) -> bool {
    // A thread that ends has no seed any more.
    SEEDED
        .try_with(|seeded| match seeded.try_borrow_mut().as_deref_mut() {
            Ok(Some(rng)) => {
                rng.fill_bytes(buffer);
                true
            }
            _ => false,
        })
        .unwrap_or(false)
}

/// Stands in for the C library's function of this name.
///
/// # Safety
/// `buffer` is valid for writes of `len` bytes, as the function's contract is everywhere.
#[allow(unsafe_code, reason = "there is no other way into std's hash keys and tokio's select")]
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, len: usize, flags: u32) -> isize {
    // SAFETY: the caller promises it.
    let buffer = unsafe {
        std::ptr::write_bytes(buffer, 0, len);
        std::slice::from_raw_parts_mut(buffer, len)
    };
    if fill(buffer) {
        return isize::try_from(len).unwrap_or(isize::MAX);
    }
    let flags = rustix::rand::GetRandomFlags::from_bits_retain(flags);
    match rustix::rand::getrandom(&mut *buffer, flags) {
        Ok(filled) => isize::try_from(filled).unwrap_or(isize::MAX),
        // Callers turn to /dev/urandom.
        Err(_) => -1,
    }
}
