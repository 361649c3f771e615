//! See `walnut_vmm::fuzz::fs_announcement`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::fs_announcement(data));
