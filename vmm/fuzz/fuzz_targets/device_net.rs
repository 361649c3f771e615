//! See `walnut_vmm::fuzz::device_net`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::device_net(data));
