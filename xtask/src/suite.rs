//! `cargo xtask test`: formatting, lints, unit tests on this machine, and the tests that need KVM
//! and containerd in the lab. Its last line is the sum of all of them.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use walnut_lab_init::wire::Exec;

use crate::check;
use crate::lab::client::{Client, Inherit, Sink};
use crate::lab::delivery::Delivery;
use crate::lab::qemu::Accelerator;
use crate::prepare;
use crate::programs::Targets;
use crate::progress::Progress;
use crate::project::Project;

/// The package, by its folder, of the tests that need the lab.
const LAB_TESTS: &str = "tests";

/// The test of that package that reads the source tree, and so runs on this machine.
const TREE_TEST: &str = "tidy";

/// How long one test program may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(900);

/// How long output is awaited after a program's end.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// How often a program may run in an emulated lab until it passes.
const EMULATED_ATTEMPTS: usize = 3;

/// Sums of what test programs report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Reads the line in which a test program sums up.
    fn parse(line: &str) -> Option<Self> {
        let (_, sums) = line
            .trim()
            .strip_prefix("test result: ")?
            .split_once(". ")?;
        let mut counts = Self::default();
        for part in sums.split("; ") {
            let Some((number, what)) = part.split_once(' ') else {
                continue;
            };
            let Ok(number) = number.parse() else { continue };
            match what {
                "passed" => counts.passed = number,
                "failed" => counts.failed = number,
                "ignored" => counts.skipped = number,
                _ => {}
            }
        }
        Some(counts)
    }
}

/// Runs everything; says whether all passed.
pub(crate) fn run(project: &Project, progress: Progress) -> Result<bool> {
    check_format(project, progress)?;
    prepare::build(project, Targets::ProgramsAndTests, progress)?;
    check_lints(project, progress)?;
    let mut counts = Counts::default();
    let programs = build_tests(project, progress)?;
    let (lab_tests, host_tests): (Vec<_>, Vec<_>) = programs
        .into_iter()
        .partition(|program| program.place == Place::Lab);
    for program in &host_tests {
        counts.add(program.run_here(progress)?);
    }
    counts.add(run_all_in_lab(project, &lab_tests, progress)?);
    let Counts {
        passed,
        failed,
        skipped,
    } = counts;
    progress.say("test", "all run");
    if failed > 0 {
        progress.say("test", "see above, and: cargo xtask lab logs");
    }
    let skipped = if skipped > 0 {
        format!(", {skipped} skipped")
    } else {
        String::new()
    };
    println!("{passed} passed, {failed} failed{skipped}");
    Ok(failed == 0)
}

/// Runs the tests that need the lab.
///
/// QEMU's emulation of nested guests now and then puts a guest's processor at an address of the lab's own kernel, where
/// nothing of it is: the guest hangs or dies, and now and then the lab does (docs/testing.md). So a program that fails
/// in an emulated lab runs again, in a fresh one; what it says last counts.
fn run_all_in_lab(
    project: &Project,
    programs: &[TestProgram],
    progress: Progress,
) -> Result<Counts> {
    let deliveries: Vec<Delivery> = programs.iter().map(TestProgram::delivery).collect();
    let fresh_lab = || -> Result<Client> {
        let mut lab = prepare::fresh_lab(project, progress)?;
        lab.deliver(&deliveries, progress)?;
        Ok(lab.client())
    };
    let attempts = match check::accelerator()? {
        Accelerator::Tcg => EMULATED_ATTEMPTS,
        Accelerator::Kvm => 1,
    };
    let mut client = fresh_lab()?;
    let mut counts = Counts::default();
    for program in programs {
        let mut result = program.run_in_lab(&client, progress);
        for _ in 1..attempts {
            match &result {
                Ok(counts) if counts.failed == 0 => break,
                Ok(_) => {}
                Err(error) => progress.say("test", &format!("{error:#}")),
            }
            let name = &program.name;
            progress.say("test", &format!("{name} failed; again in a fresh lab"));
            client = fresh_lab()?;
            result = program.run_in_lab(&client, progress);
        }
        counts.add(result?);
    }
    Ok(counts)
}

fn check_format(project: &Project, progress: Progress) -> Result<()> {
    let mut fmt = cargo(project);
    fmt.args(["fmt", "--all", "--check"]);
    progress.run("test", &mut fmt, &project.logs().join("fmt.log"))
}

fn check_lints(project: &Project, progress: Progress) -> Result<()> {
    progress.step("test", "lints", || {
        let mut clippy = cargo(project);
        clippy.args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]);
        progress.run("test", &mut clippy, &project.logs().join("clippy.log"))
    })
}

fn cargo(project: &Project) -> Command {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(&project.root)
        .env("CARGO_TARGET_DIR", &project.target);
    cargo
}

/// Where a test program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On this machine: unit tests, and what needs neither KVM nor containerd.
    Here,
    /// In the lab.
    Lab,
}

/// A built test program.
#[derive(Debug, PartialEq, Eq)]
struct TestProgram {
    /// The package's folder and the target's name.
    name: String,
    package: PathBuf,
    executable: PathBuf,
    place: Place,
}

impl TestProgram {
    fn path_in_lab(&self) -> String {
        format!("/usr/libexec/walnut/tests/{}", self.name.replace('/', "-"))
    }

    fn delivery(&self) -> Delivery {
        Delivery {
            source: self.executable.clone(),
            destination: self.path_in_lab(),
            executable: true,
        }
    }

    /// Runs it on this machine, as cargo does: in its package's folder.
    fn run_here(&self, progress: Progress) -> Result<Counts> {
        progress.say("test", &format!("{}, on this machine", self.name));
        let mut command = Command::new(&self.executable);
        command
            .current_dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package);
        let mut summary = Summary::default();
        let status = run_watched(&mut command, &mut summary)
            .with_context(|| format!("run {}", self.executable.display()))?;
        Ok(summary.judge(&self.name, status, progress))
    }

    fn run_in_lab(&self, client: &Client, progress: Progress) -> Result<Counts> {
        progress.say("test", &format!("{}, in the lab", self.name));
        let argv = vec![self.path_in_lab(), "--test-threads=1".to_owned()];
        let mut summary = Summary::default();
        let exec = Exec {
            argv,
            environment: Vec::new(),
            terminal: None,
        };
        let status = client.run(exec, &mut summary, SILENCE_LIMIT)?;
        Ok(summary.judge(&self.name, status, progress))
    }
}

/// What a program that runs on this machine does.
enum Event {
    Output(Vec<u8>),
    End(io::Result<ExitStatus>),
}

/// Runs a program and hands out what it prints. It ends when the program does: what that left
/// behind may hold its output open for long.
fn run_watched(command: &mut Command, sink: &mut dyn Sink) -> Result<i32> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("read its output")?;
    let pid = rustix::process::Pid::from_child(&child);
    let (event, events) = mpsc::channel();
    let read = event.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0u8; 64 << 10];
        while let Ok(length @ 1..) = output.read(&mut buffer) {
            if read.send(Event::Output(buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || event.send(Event::End(child.wait())));
    let mut status = None;
    loop {
        let limit = if status.is_none() {
            SILENCE_LIMIT
        } else {
            DRAIN_LIMIT
        };
        match (events.recv_timeout(limit), status) {
            (Ok(Event::Output(bytes)), _) => sink.stdout(&bytes).context("print its output")?,
            (Ok(Event::End(end)), _) => status = Some(end.context("wait for it")?),
            (Err(_), Some(status)) => return Ok(status.code().unwrap_or(255)),
            (Err(_), None) => {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                bail!("it was silent for {SILENCE_LIMIT:?}");
            }
        }
    }
}

fn build_tests(project: &Project, progress: Progress) -> Result<Vec<TestProgram>> {
    progress.step("test", "building the tests", || {
        let output = cargo(project)
            .args([
                "test",
                "--release",
                "--workspace",
                "--no-run",
                "--message-format=json",
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("run cargo")?;
        if !output.status.success() {
            bail!("the tests don't build; see above");
        }
        Ok(test_programs(
            &project.root,
            &String::from_utf8_lossy(&output.stdout),
        ))
    })
}

/// Reads cargo's messages (cargo-build(1), "compiler-artifact").
fn test_programs(root: &Path, messages: &str) -> Vec<TestProgram> {
    let mut programs: Vec<TestProgram> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| test_program(root, &message))
        .collect();
    programs.sort_by_key(|program| (order(&program.name), program.name.clone()));
    programs
}

fn test_program(root: &Path, message: &Value) -> Option<TestProgram> {
    let package = Path::new(message["manifest_path"].as_str()?)
        .parent()?
        .to_owned();
    let folder = package
        .strip_prefix(root)
        .ok()?
        .to_string_lossy()
        .into_owned();
    let target = message["target"]["name"].as_str()?;
    let in_lab =
        folder == LAB_TESTS && message["target"]["kind"][0] == "test" && target != TREE_TEST;
    Some(TestProgram {
        name: format!("{folder}/{target}"),
        package,
        executable: message["executable"].as_str()?.into(),
        place: if in_lab { Place::Lab } else { Place::Here },
    })
}

/// From the lowest rung of the testing ladder up: what fails there explains the rest.
fn order(name: &str) -> usize {
    let ladder = [
        "boot",
        "machine",
        "block",
        "network",
        "socket",
        "share",
        "memory",
        "jail",
        "hostile_guest",
        "agent",
        "shim",
        "ctr",
        "changes",
        "resources",
        "crash",
    ];
    let rung = name
        .strip_prefix(LAB_TESTS)
        .map(|name| name.trim_start_matches('/'));
    ladder
        .iter()
        .position(|known| rung == Some(known))
        .unwrap_or(ladder.len())
}

/// Passes output on and sums up.
#[derive(Debug, Default)]
struct Summary {
    line: Vec<u8>,
    counts: Counts,
}

impl Summary {
    /// The sums; a program that failed without a failed test counts as one.
    fn judge(self, name: &str, status: i32, progress: Progress) -> Counts {
        let mut counts = self.counts;
        if status != 0 && counts.failed == 0 {
            progress.say("test", &format!("{name} ended with status {status}"));
            counts.failed = 1;
        }
        counts
    }

    fn count(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line);
                self.counts.add(Counts::parse(&line).unwrap_or_default());
                self.line.clear();
            } else {
                self.line.push(*byte);
            }
        }
    }
}

impl Sink for Summary {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.count(bytes);
        Inherit.stdout(bytes)
    }

    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        Inherit.stderr(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read() {
        let line = "test result: FAILED. 5 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            Counts::parse(line),
            Some(Counts {
                passed: 5,
                failed: 1,
                skipped: 2
            })
        );
        assert_eq!(Counts::parse("test boot ... ok"), None);
    }

    #[test]
    fn output_in_pieces_is_summed() {
        let mut summary = Summary::default();
        for piece in [
            "running\ntest resu",
            "lt: ok. 3 passed; 0 failed; 0 ignored\n",
        ] {
            summary.count(piece.as_bytes());
        }
        assert_eq!(
            summary.counts,
            Counts {
                passed: 3,
                failed: 0,
                skipped: 0
            }
        );
    }

    #[test]
    fn what_a_program_leaves_behind_is_not_awaited() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 60 2>/dev/null & echo printed; exit 3"]);
        let mut output = crate::lab::client::Capture::default();
        let begun = std::time::Instant::now();
        assert_eq!(run_watched(&mut command, &mut output).unwrap(), 3);
        assert_eq!(output.stdout, b"printed\n");
        assert!(begun.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn test_programs_come_in_the_order_of_the_ladder() {
        let message = |folder: &str, kind: &str, name: &str| {
            let message = serde_json::json!({
                "profile": { "test": true },
                "manifest_path": format!("/root/{folder}/Cargo.toml"),
                "target": { "kind": [kind], "name": name },
                "executable": format!("/{name}"),
            });
            format!("{message}\n")
        };
        let messages = message("tests", "test", "ctr")
            + &message("tests", "test", "tidy")
            + &message("tests", "lib", "walnut_tests")
            + &message("agent", "test", "agent")
            + "{\"reason\": \"build-finished\"}\n"
            + &message("tests", "test", "boot");
        let programs = test_programs(Path::new("/root"), &messages);
        let names = |place| -> Vec<&str> {
            let programs = programs.iter().filter(|program| program.place == place);
            programs.map(|program| program.name.as_str()).collect()
        };
        assert_eq!(names(Place::Lab), ["tests/boot", "tests/ctr"]);
        assert_eq!(
            names(Place::Here),
            ["agent/agent", "tests/tidy", "tests/walnut_tests"]
        );
    }
}
