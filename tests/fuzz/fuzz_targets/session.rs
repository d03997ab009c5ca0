//! See `skein_fuzz_targets::session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_fuzz_targets::session(data));
