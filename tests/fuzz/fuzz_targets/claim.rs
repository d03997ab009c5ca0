//! See `skein_fuzz_targets::claim`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_fuzz_targets::claim(data));
