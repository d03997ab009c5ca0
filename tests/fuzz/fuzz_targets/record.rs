//! See `skein_fuzz_targets::record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_fuzz_targets::record(data));
