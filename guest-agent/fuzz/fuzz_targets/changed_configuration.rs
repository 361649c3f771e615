//! See `walnut_agent::fuzz::changed_configuration`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_agent::fuzz::changed_configuration(data));
