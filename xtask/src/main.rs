//! The developer's commands: `cargo xtask <command>`.

mod bench;
mod check;
mod container_images;
mod debian;
mod demo;
mod image;
mod lab;
mod oci_image;
mod packages;
mod prepare;
mod programs;
mod progress;
mod project;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::lab::delivery::Delivery;
use crate::lab::{Freshness, Lab};
use crate::programs::Targets;
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
    /// Say what this machine can do, and why
    Check,
    #[command(name = check::PROBE_COMMAND, hide = true)]
    ProbeGuest,
    /// Build the guest's kernel and initramfs
    Image,
    /// Build everything: programs, guest image, node image, container images
    Build,
    /// Build everything and run every test
    Test,
    /// Build everything and show containers in microVMs
    Demo,
    /// Build everything and measure it against runc and QEMU
    Bench {
        /// Passed on to the benchmark
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
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
    // These two need no checkout.
    match &arguments.command {
        Command::Check => return check::run().map(|()| ExitCode::SUCCESS),
        Command::ProbeGuest => return check::guest::report().map(|()| ExitCode::SUCCESS),
        _ => {}
    }
    let project = Project::find()?;
    let progress = Progress::new();
    match &arguments.command {
        Command::Check | Command::ProbeGuest => {}
        Command::Image => {
            packages::install(&project, progress)?;
            image::kernel(&project, progress)?;
            prepare::programs_and_initramfs(&project, Targets::Programs, progress)?;
        }
        Command::Build => prepare::build(&project, Targets::Programs, progress)?,
        Command::Test => {
            if !suite::run(&project, progress)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Demo => demo::run(&project, progress)?,
        Command::Bench { arguments } => bench::run(&project, arguments, progress)?,
        Command::Lab(command) => return run_lab(&project, command, progress),
    }
    Ok(ExitCode::SUCCESS)
}

fn run_lab(project: &Project, command: &LabCommand, progress: Progress) -> Result<ExitCode> {
    let up = |with: &[PathBuf]| -> Result<_> {
        packages::install(project, progress)?;
        let mut lab = Lab::up(project, check::accelerator()?, Freshness::Warm, progress)?;
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
