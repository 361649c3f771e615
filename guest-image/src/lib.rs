//! Builds what a guest boots: a kernel from Debian's own source with our fragment, and an
//! initramfs that holds the agent, profiles of AppArmor for it to load, and nothing else.
//!
//! Both are cached by the hash of all that goes into them, and come out the same bytes each time.

pub mod apparmor;
pub mod cache;
pub mod cpio;
pub mod initramfs;
pub mod kernel;
