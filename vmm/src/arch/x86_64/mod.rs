//! x86-64: layout of the address space, kernel loading, boot state of a vCPU, ACPI.

pub mod acpi;
pub mod cpuid;
pub mod hotplug;
pub mod image;
pub mod kernel;
pub mod layout;
pub mod pvh;
pub mod registers;
