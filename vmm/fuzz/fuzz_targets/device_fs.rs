//! See `walnut_vmm::fuzz::device_fs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::device_fs(data));
