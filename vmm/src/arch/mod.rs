//! The only architecture-specific code of the VMM.

pub mod x86_64;
