//! See `walnut_vmm::fuzz::kernel_image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::kernel_image(data));
