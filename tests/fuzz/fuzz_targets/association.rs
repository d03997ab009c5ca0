//! See `skein_fuzz_targets::association`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_fuzz_targets::association(data));
