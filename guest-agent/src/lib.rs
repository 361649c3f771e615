//! `walnut-agent`: PID 1 of the guest.
//!
//! `guest` makes a machine out of a kernel and one program; `server` serves the shim; `service` decodes
//! requests; `task` holds containers and their processes; `container` makes them, `cgroup` holds them,
//! `stdio` connects them, `reaper` sees them end, `insight` counts what they do. Must not trust a container.

mod bpf;
mod cgroup;
mod container;
mod error;
mod guest;
mod insight;
mod reaper;
mod server;
mod service;
mod stdio;
mod syscall;
mod task;

pub use server::{AgentConfig, ServeError, serve};

use container::launch::INIT_NAME;
use std::process::ExitCode;

/// Runs the program by the name that it was given.
pub fn run() -> ExitCode {
    if std::env::args_os()
        .next()
        .is_some_and(|name| name == INIT_NAME)
    {
        return container::run_init();
    }
    if std::process::id() != 1 {
        eprintln!("walnut-agent: is to be PID 1 of a guest");
        return ExitCode::FAILURE;
    }
    guest::boot::run()
}
