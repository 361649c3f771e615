//! `walnut-agent`: PID 1 of the guest.
//!
//! `guest` makes a machine out of a kernel and one program; `server` serves the shim; `service` decodes
//! requests; `task` holds containers and their processes; `container` makes them, `cgroup` holds them,
//! `stdio` connects them, `storage` mounts their disks, `reaper` sees them end; `pause` holds a Pod's
//! namespaces; `insight` counts what containers do. Must not trust a container.

mod apparmor;
mod cgroup;
mod container;
mod error;
mod file_system;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod guest;
mod hotplug;
mod insight;
mod kernel_events;
mod pause;
mod reaper;
mod server;
mod service;
mod stdio;
mod storage;
mod syscall;
mod task;

pub use server::{AgentConfig, ServeError, serve};

use container::launch::INIT_NAME;
use std::process::ExitCode;

/// Runs the program by the name that it was given.
pub fn run() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if name == INIT_NAME {
        return container::run_init();
    }
    if name == walnut_agent_api::PAUSE_PROGRAM {
        return pause::run();
    }
    if std::process::id() != 1 {
        eprintln!("walnut-agent: is to be PID 1 of a guest");
        return ExitCode::FAILURE;
    }
    guest::boot::run()
}
