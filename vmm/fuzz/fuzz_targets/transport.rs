//! See `walnut_vmm::fuzz::transport`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::transport(data));
