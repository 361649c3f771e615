//! The virtual machine monitor of Walnut: one process is one VM.
//!
//! A library so that its parts are tested and fuzzed without a VM; the program is `main.rs`.

pub mod devices;
pub mod event_loop;
