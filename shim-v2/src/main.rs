//! The containerd shim of Walnut.

fn main() {}
