//! See `walnut_vmm::fuzz::block_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::block_request(data));
