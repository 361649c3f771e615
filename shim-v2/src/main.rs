//! The containerd shim of Walnut: `containerd-shim-walnut-v2`.
//!
//! containerd runs this program with the commands of its shim contract (`start`, `delete`, `-info`, `-v`);
//! without a command it is the server that `start` left behind, one per Pod. This file only chooses.
//! Nothing but the answer may reach standard output or standard error: containerd reads both as one.

mod agent;
mod args;
mod blocks;
mod bootstrap;
mod bundle;
mod calls;
mod cgroup;
mod cgroup_path;
mod changes;
mod cleanup;
mod config;
mod container;
mod control;
mod error;
mod events;
mod exits;
mod fields;
mod hooks;
mod info;
mod insight;
mod io;
mod log;
mod log_binary;
mod machine;
mod mounts;
mod network;
mod out_of_memory;
mod pod;
mod pod_config;
mod pod_files;
mod pod_metrics;
mod port_forward;
mod process_file;
mod runtime_options;
mod sandbox;
mod sandbox_api;
mod server;
mod service;
mod size;
mod slots;
mod spec;
mod state_dir;
mod storage;
mod vm;
mod vm_end;

use args::{Args, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error::one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse(std::env::args_os().skip(1))?;
    match args.command {
        Command::Start => bootstrap::start(&args),
        Command::Delete => cleanup::delete(&args),
        Command::Info => Ok(info::print()?),
        Command::Version => bootstrap::version(),
        Command::Serve => server::serve(&args),
    }
}
