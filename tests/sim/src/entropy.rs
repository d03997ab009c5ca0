//! Randomness from the seed: the kernel's, as far as this program's simulating threads ask for it, and the cryptographic library's.
//!
//! `tokio::select!` draws the order of its branches, and hash tables the order of their entries, from what `std` asks the kernel for once
//! per thread; neither can be given a seed. So this program has a `getrandom` of its own in place of the C library's. AWS-LC takes its
//! entropy from the timing of the processor; it has a way to be given another source for its own tests. With that, keys are the same in
//! every run, and so is every byte that is sent: what becomes of a packet that arrives with the wrong keys depends on its bytes.
#![allow(unsafe_code, reason = "there is no other way into std's, tokio's and AWS-LC's randomness")]

use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use std::{
    cell::RefCell,
    ffi::{c_int, c_void},
    sync::Once,
};

include!(concat!(env!("OUT_DIR"), "/aws_lc.rs"));

/// Bytes that AWS-LC's generator is seeded with.
const SEED_LEN: usize = 48;

thread_local! {
    static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// From now on this thread's randomness follows from `seed`. To be called before anything else on a new thread.
pub(crate) fn seed_thread(seed: u64) {
    static ONCE: Once = Once::new();
    // SAFETY: the library keeps the reference, which is to a static, and its table has this form.
    ONCE.call_once(|| unsafe { override_entropy_source(&METHODS) });
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

/// AWS-LC's `entropy_source_methods`.
#[repr(C)]
struct EntropyMethods {
    initialize: extern "C" fn(*mut c_void) -> c_int,
    zeroize_thread: extern "C" fn(*mut c_void),
    free_thread: extern "C" fn(*mut c_void),
    seed: unsafe extern "C" fn(*const c_void, *mut u8) -> c_int,
    extra_entropy: Option<extern "C" fn(*const c_void, *mut u8) -> c_int>,
    prediction_resistance: Option<extern "C" fn(*const c_void, *mut u8) -> c_int>,
    id: c_int,
}

static METHODS: EntropyMethods = EntropyMethods {
    initialize: nothing_to_initialize,
    zeroize_thread: nothing_to_free,
    free_thread: nothing_to_free,
    seed,
    extra_entropy: None,
    prediction_resistance: None,
    id: 0,
};

extern "C" fn nothing_to_initialize(_source: *mut c_void) -> c_int {
    1
}

extern "C" fn nothing_to_free(_source: *mut c_void) {}

/// # Safety
/// `seed` is valid for writes of [`SEED_LEN`] bytes.
unsafe extern "C" fn seed(_source: *const c_void, seed: *mut u8) -> c_int {
    // SAFETY: the library promises it.
    let filled = unsafe { getrandom(seed, SEED_LEN, 0) };
    c_int::from(usize::try_from(filled) == Ok(SEED_LEN))
}
