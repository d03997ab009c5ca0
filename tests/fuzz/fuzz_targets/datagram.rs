//! See `skein_fuzz_targets::datagram`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_fuzz_targets::datagram(data));
