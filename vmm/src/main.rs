//! The virtual machine monitor of Walnut.

fn main() {}
