//! The developer's commands: `cargo xtask <command>`.

mod container_images;
mod debian;
mod lab;
mod oci_image;
mod programs;
mod progress;
mod project;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::lab::delivery::Delivery;
use crate::lab::qemu::Accelerator;
use crate::lab::{Freshness, Lab};
use crate::progress::Progress;
use crate::project::Project;

/// Walnut's developer commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The lab: a virtual machine with containerd, KVM and this checkout's programs
    #[command(subcommand)]
    Lab(LabCommand),
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Start it, unless it runs; install the current build in it
    Up,
    /// Stop it
    Down,
    /// Run a program in it (one argument: a shell script); its exit status is passed on
    Exec {
        /// Install this file first as /usr/libexec/walnut/tests/<name>
        #[arg(long = "with", value_name = "FILE")]
        with: Vec<PathBuf>,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
    /// Open a terminal in it
    Shell,
    /// Print its console and containerd's log
    Logs,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let project = Project::find()?;
    let progress = Progress::new();
    match &arguments.command {
        Command::Lab(command) => run_lab(&project, command, progress),
    }
}

fn run_lab(project: &Project, command: &LabCommand, progress: Progress) -> Result<ExitCode> {
    let up = |with: &[PathBuf]| -> Result<_> {
        let mut lab = Lab::up(project, Accelerator::Tcg, Freshness::Warm, progress)?;
        let mut files = lab::installed_files(project);
        for source in with {
            files.push(test_program(source)?);
        }
        lab.deliver(&files, progress)?;
        Ok(lab.client())
    };
    match command {
        LabCommand::Up => {
            up(&[])?;
            progress.say("lab", "up; use: cargo xtask lab exec|shell|logs|down");
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Down => {
            let text = if lab::down(project)? {
                "stopped"
            } else {
                "was not running"
            };
            progress.say("lab", text);
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Exec { with, argv } => Ok(exit_code(lab::exec(&up(with)?, argv.clone())?)),
        LabCommand::Shell => Ok(exit_code(lab::shell(&up(&[])?)?)),
        LabCommand::Logs => lab::logs(project).map(|()| ExitCode::SUCCESS),
    }
}

fn test_program(source: &std::path::Path) -> Result<Delivery> {
    let name = source
        .file_name()
        .context("--with needs a file")?
        .to_string_lossy()
        .into_owned();
    Ok(Delivery {
        source: source.to_owned(),
        destination: format!("/usr/libexec/walnut/tests/{name}"),
        executable: true,
    })
}

fn exit_code(status: i32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(255))
}
