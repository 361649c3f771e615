//! See `walnut_vmm::fuzz::device_vsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::device_vsock(data));
