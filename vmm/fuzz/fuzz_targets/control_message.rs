//! See `walnut_vmm::fuzz::control_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::control_message(data));
