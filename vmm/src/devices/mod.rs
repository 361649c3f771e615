//! Devices of the VM. They must not import `vm`, `vcpu` or `boot`.

pub mod console_log;
pub mod ged;
pub mod reset;
pub mod serial;
pub mod virtio;
