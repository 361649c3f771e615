//! What the lab's command server and `cargo xtask lab` say to each other.

pub mod wire;
