//! See `walnut_vmm::fuzz::device_mem`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::device_mem(data));
