//! See `walnut_agent::fuzz::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_agent::fuzz::request(data));
