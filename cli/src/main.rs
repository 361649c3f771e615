//! `walnut`: what Pods a machine has, and what their containers do to the guests' kernels.
//!
//! A client of the shims (`shim-v2/api`); changes nothing. Exit status: 0 for an answer, 1 for an error, 2 for
//! wrong arguments, 3 for an answer that gives reason to look, 4 for a bad one.

mod check;
mod pods;
mod profile;
mod ps;
mod seccomp;
mod syscalls;
mod table;

use clap::{Parser, Subcommand};
use pods::{PodError, Pods};
use seccomp::ProfileError;
use std::{error::Error, io, path::PathBuf, process::ExitCode, time::Duration};

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
    /// Tell whether this machine can run Pods, and what to do if it can't
    Check {
        /// Whether it is set up safely, too
        #[arg(long)]
        hardening: bool,
        /// One JSON array
        #[arg(long)]
        json: bool,
    },
    /// Record, merge and test seccomp profiles of what containers call
    #[command(subcommand)]
    Profile(profile::Command),
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

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Answer {
    /// Nothing to do.
    Good,
    /// Somebody should look.
    Doubtful,
    /// Something is wrong.
    Bad,
}

impl From<Answer> for ExitCode {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Good => Self::SUCCESS,
            Answer::Doubtful => Self::from(3),
            Answer::Bad => Self::from(4),
        }
    }
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
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error("{}", path.display())]
    ProfileFile { path: PathBuf, source: ProfileError },
    #[error("cannot {attempted} {}", path.display())]
    File {
        attempted: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let pods = Pods::of_this_machine();
    let done = match Arguments::parse().command {
        Command::Ps { json } => ps::run(&pods, json).await.map(|()| Answer::Good),
        Command::Check { hardening, json } => check::run(hardening, json),
        Command::Profile(command) => profile::run(&pods, command).await,
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
            let shown = syscalls::run(&pods, &pod, &plan).await;
            shown.map(|()| Answer::Good)
        }
    };
    match done {
        Ok(answer) => answer.into(),
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
