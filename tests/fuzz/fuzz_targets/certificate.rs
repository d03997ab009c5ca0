//! See `skein_fuzz_targets::certificate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_fuzz_targets::certificate(data));
