//! `walnut-vmm`: see the library.

fn main() {}
