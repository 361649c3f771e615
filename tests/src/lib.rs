//! Tests of the built programs: what a test needs to start them, talk to them and see what they leave.
//!
//! The tests know the two contracts and the files that a build installs; they link none of the programs.
//! Each rung of the ladder has one file in `tests/`, see `docs/testing.md`.

pub mod agent;
pub mod answer;
pub mod bare;
pub mod bundle;
pub mod command;
pub mod cri;
pub mod ctr;
pub mod deadline;
pub mod ended;
pub mod guest;
pub mod initramfs;
pub mod leak;
pub mod memory;
pub mod mounts;
pub mod network;
pub mod node;
pub mod pod;
pub mod processes;
pub mod programs;
pub mod requirement;
pub mod shell;
pub mod story;
pub mod task;
pub mod vm_builder;
pub mod vmm;
