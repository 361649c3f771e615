//! Builds the guest kernel and the initramfs.
