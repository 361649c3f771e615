//! See `walnut_agent::fuzz::seccomp_profile`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_agent::fuzz::seccomp_profile(data));
