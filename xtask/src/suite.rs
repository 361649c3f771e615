//! `cargo xtask test`: formatting, lints, unit tests on this machine, and the tests that need KVM
//! and containerd in the lab. Its last line is the sum of all of them.

use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use walnut_lab_init::wire::Exec;

use crate::lab::client::{Client, Inherit, Sink};
use crate::lab::delivery::Delivery;
use crate::prepare;
use crate::progress::Progress;
use crate::project::Project;

/// The package of the tests that need the lab.
const LAB_TESTS: &str = "walnut-tests";

/// The test of that package that reads the source tree, and so runs on this machine.
const TREE_TEST: &str = "tidy";

/// The package whose test sets up real containers, on this machine.
const AGENT: &str = "walnut-agent";

/// How long one test program may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(900);

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
    prepare::build(project, progress)?;
    check_lints(project, progress)?;
    let mut counts = host_tests(project, progress)?;
    let programs = build_lab_tests(project, progress)?;
    let mut lab = prepare::fresh_lab(project, progress)?;
    let deliveries: Vec<Delivery> = programs.iter().map(TestProgram::delivery).collect();
    lab.deliver(&deliveries, progress)?;
    let client = lab.client();
    for program in &programs {
        counts.add(lab_test(&client, program, progress)?);
    }
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

/// Unit tests of all packages, the test that reads the source tree, and the agent's with real containers.
fn host_tests(project: &Project, progress: Progress) -> Result<Counts> {
    let unit = [
        "test",
        "--release",
        "--no-fail-fast",
        "--workspace",
        "--lib",
        "--bins",
    ];
    let tree = [
        "test",
        "--release",
        "--no-fail-fast",
        "-p",
        LAB_TESTS,
        "--test",
        TREE_TEST,
    ];
    let containers = [
        "test",
        "--release",
        "--no-fail-fast",
        "-p",
        AGENT,
        "--test",
        "agent",
    ];
    let mut counts = Counts::default();
    for (name, arguments) in [
        ("unit tests", unit.as_slice()),
        ("the source tree", &tree),
        ("the agent's containers", &containers),
    ] {
        progress.say("test", &format!("{name}, on this machine"));
        let mut command = cargo(project);
        command.args(["--color", "never"]).args(arguments);
        let (some, succeeded) = count_output(&mut command)?;
        counts.add(some);
        if !succeeded && some.failed == 0 {
            bail!("cargo {} failed; see above", arguments.join(" "));
        }
    }
    Ok(counts)
}

/// Runs cargo, passes its output on and sums up what it reports.
fn count_output(command: &mut Command) -> Result<(Counts, bool)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("run cargo")?;
    let output = child.stdout.take().context("read cargo's output")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("read cargo's output")?;
        println!("{line}");
        counts.add(Counts::parse(&line).unwrap_or_default());
    }
    let status = child.wait().context("wait for cargo")?;
    Ok((counts, status.success()))
}

/// A built test program.
#[derive(Debug, PartialEq, Eq)]
struct TestProgram {
    name: String,
    executable: PathBuf,
}

impl TestProgram {
    fn path_in_lab(&self) -> String {
        format!("/usr/libexec/walnut/tests/{}", self.name)
    }

    fn delivery(&self) -> Delivery {
        Delivery {
            source: self.executable.clone(),
            destination: self.path_in_lab(),
            executable: true,
        }
    }
}

fn build_lab_tests(project: &Project, progress: Progress) -> Result<Vec<TestProgram>> {
    progress.step("test", "building the tests that run in the lab", || {
        let output = cargo(project)
            .args([
                "test",
                "--release",
                "--no-run",
                "--message-format=json",
                "-p",
                LAB_TESTS,
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("run cargo")?;
        if !output.status.success() {
            bail!("the tests of {LAB_TESTS} don't build; see above");
        }
        Ok(test_programs(&String::from_utf8_lossy(&output.stdout)))
    })
}

/// Reads cargo's messages (cargo-build(1), "compiler-artifact").
fn test_programs(messages: &str) -> Vec<TestProgram> {
    let mut programs: Vec<TestProgram> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["kind"][0] == "test")
        .filter_map(|message| {
            Some(TestProgram {
                name: message["target"]["name"].as_str()?.to_owned(),
                executable: message["executable"].as_str()?.into(),
            })
        })
        .filter(|program| program.name != TREE_TEST)
        .collect();
    programs.sort_by_key(|program| (order(&program.name), program.name.clone()));
    programs
}

/// From the lowest rung of the testing ladder up: what fails there explains the rest.
fn order(name: &str) -> usize {
    let ladder = ["boot", "agent", "shim", "ctr", "crash"];
    ladder
        .iter()
        .position(|rung| *rung == name)
        .unwrap_or(ladder.len())
}

fn lab_test(client: &Client, program: &TestProgram, progress: Progress) -> Result<Counts> {
    progress.say("test", &format!("{}, in the lab", program.name));
    let argv = vec![program.path_in_lab(), "--test-threads=1".to_owned()];
    let mut summary = Summary::default();
    let exec = Exec {
        argv,
        environment: Vec::new(),
        terminal: None,
    };
    let status = client.run(exec, &mut summary, SILENCE_LIMIT)?;
    let mut counts = summary.counts;
    if status != 0 && counts.failed == 0 {
        progress.say(
            "test",
            &format!("{} ended with status {status}", program.name),
        );
        counts.failed = 1;
    }
    Ok(counts)
}

/// Passes output on and sums up.
#[derive(Debug, Default)]
struct Summary {
    line: Vec<u8>,
    counts: Counts,
}

impl Summary {
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
    fn test_programs_come_in_the_order_of_the_ladder() {
        let message = |name: &str| {
            format!(
                "{{\"reason\":\"compiler-artifact\",\"target\":{{\"kind\":[\"test\"],\
                 \"name\":\"{name}\"}},\"executable\":\"/{name}\"}}\n"
            )
        };
        let messages: String = ["ctr", "tidy", "other", "boot"]
            .into_iter()
            .map(message)
            .collect();
        let names: Vec<String> = test_programs(&messages)
            .into_iter()
            .map(|program| program.name)
            .collect();
        assert_eq!(names, ["boot", "ctr", "other"]);
    }
}
