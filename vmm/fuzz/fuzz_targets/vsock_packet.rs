//! See `walnut_vmm::fuzz::vsock_packet`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_vmm::fuzz::vsock_packet(data));
