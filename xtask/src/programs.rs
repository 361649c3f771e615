//! Walnut's own programs: what cargo builds, and with which flags.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::progress::Progress;
use crate::project::Project;

/// The target of static programs: named, so that build scripts and macros stay dynamic.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The host's programs; each is a package of the same name.
pub(crate) const HOST_PROGRAMS: [&str; 3] = ["containerd-shim-walnut-v2", "walnut", "walnut-vmm"];

/// What cargo builds for this machine. Always for the whole workspace: cargo chooses the features of
/// a dependency by what it is asked for, and compiles it again for another choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Targets {
    /// The programs.
    Programs,
    /// The programs and all tests.
    ProgramsAndTests,
}

/// The profile of static programs, see the workspace's manifest.
const STATIC_PROFILE: &str = "guest";

/// Makes a cargo command build a static program.
pub(crate) fn static_build(cargo: &mut Command, package: &str, target: &Path) {
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    cargo.args([
        "build",
        "--profile",
        STATIC_PROFILE,
        "--target",
        STATIC_TARGET,
        "-p",
        package,
        "--target-dir",
    ]);
    cargo.arg(target);
}

/// Where [`static_build`] puts the program.
pub(crate) fn static_program(target: &Path, name: &str) -> PathBuf {
    target.join(STATIC_TARGET).join(STATIC_PROFILE).join(name)
}

/// Builds the programs; returns the agent's path.
pub(crate) fn build(project: &Project, targets: Targets, progress: Progress) -> Result<PathBuf> {
    progress.step("build", "shim, VMM and the rest", || {
        let mut cargo = Command::new("cargo");
        cargo
            .current_dir(&project.root)
            .args(["build", "--release", "--workspace"]);
        if targets == Targets::ProgramsAndTests {
            cargo.arg("--all-targets");
        }
        cargo.arg("--target-dir").arg(&project.target);
        progress.run("build", &mut cargo, &project.logs().join("build.log"))
    })?;
    progress.step("build", "agent (static)", || {
        let target = project.target.join("guest");
        let mut cargo = Command::new("cargo");
        cargo.current_dir(&project.root);
        static_build(&mut cargo, "walnut-agent", &target);
        progress.run("build", &mut cargo, &project.logs().join("build-agent.log"))?;
        Ok(static_program(&target, "walnut-agent"))
    })
}
