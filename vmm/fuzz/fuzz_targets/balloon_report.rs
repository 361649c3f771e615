//! See `walnut_vmm::fuzz::balloon_report`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::balloon_report(data));
