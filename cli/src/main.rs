//! `walnut`: what Pods a machine has, and what their containers do to the guests' kernels.
//!
//! A client of the shims (`shim-v2/api`); changes nothing. Exit status: 0 for an answer, 1 for an error, 2 for
//! wrong arguments.

mod pods;
mod ps;
mod syscalls;
mod table;

use clap::{Parser, Subcommand};
use pods::{PodError, Pods};
use std::{error::Error, io, process::ExitCode, time::Duration};

/// What Pods there are, and what their containers do
#[derive(Debug, Parser)]
#[command(name = "walnut", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List Pods and their containers
    Ps {
        /// One JSON object for each Pod
        #[arg(long)]
        json: bool,
    },
    /// Count the system calls of a Pod's containers: calls, errors, times
    Syscalls {
        /// The Pod's id, or as much of its beginning as names no other
        pod: String,
        /// Only this container
        container: Option<String>,
        /// Seconds between two tables
        #[arg(long, short, value_name = "SECONDS", default_value_t = 2,
              value_parser = clap::value_parser!(u32).range(1..=300))]
        interval: u32,
        /// End after as many tables; 0: until interrupted
        #[arg(long, short = 'n', value_name = "TABLES", default_value_t = 0)]
        count: u32,
        /// How to show them
        #[arg(long, value_enum, default_value_t = syscalls::Format::Table)]
        format: syscalls::Format,
    },
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("cannot write the answer")]
    Output(#[from] io::Error),
    #[error("cannot make JSON of the answer")]
    Json(#[from] serde_json::Error),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let pods = Pods::of_this_machine();
    let done = match Arguments::parse().command {
        Command::Ps { json } => ps::run(&pods, json).await,
        Command::Syscalls {
            pod,
            container,
            interval,
            count,
            format,
        } => {
            let plan = syscalls::Plan {
                container: container.unwrap_or_default(),
                interval: Duration::from_secs(interval.into()),
                tables: count,
                format,
            };
            syscalls::run(&pods, &pod, &plan).await
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the answer has read enough.
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("walnut: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
