//! See `walnut_vmm::fuzz::fs_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::fs_message(data));
