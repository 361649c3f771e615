//! The agent's promises to the shim, with real containers: set-up, life cycle, stdio, enforcement.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod enforcement;
mod fixture;
mod lifecycle;
mod pod;
mod setup;
mod stdio;
