//! See `walnut_agent::fuzz::configuration`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_agent::fuzz::configuration(data));
