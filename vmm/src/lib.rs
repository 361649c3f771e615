//! The virtual machine monitor of Walnut: one process is one VM.
//!
//! A library so that its parts are tested and fuzzed without a VM; the program is `main.rs`.

pub mod arch;
pub mod attach;
pub mod boot;
pub mod bus;
pub mod control;
pub mod cuts;
pub mod devices;
pub mod event_loop;
pub mod file_mapping;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod resize;
pub mod running;
pub mod seccomp;
pub mod session;
pub mod slots;
pub mod vcpu;
pub mod vm;
pub mod window;
