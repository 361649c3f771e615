//! `walnut check`: whether this machine can run Pods, and with `--hardening` whether it is set up safely.
//!
//! Each finding says what is so, why it matters and what to do. All but KVM is read below one root, so that tests
//! have machines of every kind. Must not change anything.

mod host;
mod kernel_config;
mod kvm;
mod product;
mod vmms;

use crate::{Answer, CommandError};
use serde::Serialize;
use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// Files that are read whole are small.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// How well something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Pass,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// For programs; never changes.
    id: &'static str,
    result: Grade,
    /// What is so.
    what: String,
    /// Why it matters.
    why: &'static str,
    /// What to do; empty if there is nothing.
    remedy: String,
}

/// A thing to look at, and why.
#[derive(Debug, Clone, Copy)]
struct Subject {
    id: &'static str,
    why: &'static str,
}

impl Subject {
    fn pass(self, what: impl Into<String>) -> Finding {
        self.finding(Grade::Pass, what, "")
    }

    fn warn(self, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        self.finding(Grade::Warn, what, remedy)
    }

    fn fail(self, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        self.finding(Grade::Fail, what, remedy)
    }

    fn finding(self, result: Grade, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            id: self.id,
            result,
            what: what.into(),
            why: self.why,
            remedy: remedy.into(),
        }
    }
}

/// The machine, or what a test has in its place.
#[derive(Debug, Clone)]
struct Root {
    path: PathBuf,
    /// Who may own the programs.
    owner: u32,
}

impl Root {
    fn of_this_machine() -> Self {
        Self {
            path: "/".into(),
            owner: 0,
        }
    }

    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.path.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn has(&self, path: impl AsRef<Path>) -> bool {
        self.at(path).exists()
    }

    /// A file's text without space around it; none if it can't be read.
    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let path = self.at(path);
        let length = fs::metadata(&path).ok()?.len();
        if length > MAX_TEXT_BYTES {
            return None;
        }
        let bytes = fs::read(path).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Names in a directory, sorted; none if it can't be read.
    fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.at(path)).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

/// Looks, and writes what it found to standard output.
pub(crate) fn run(hardening: bool, json: bool) -> Result<Answer, CommandError> {
    let findings = look(&Root::of_this_machine(), hardening);
    let mut output = io::stdout().lock();
    if json {
        writeln!(output, "{}", serde_json::to_string(&findings)?)?;
    } else {
        output.write_all(text(&findings).as_bytes())?;
    }
    let worst = findings.iter().map(|finding| finding.result).max();
    Ok(match worst.unwrap_or(Grade::Pass) {
        Grade::Pass => Answer::Good,
        Grade::Warn => Answer::Doubtful,
        Grade::Fail => Answer::Bad,
    })
}

fn look(root: &Root, hardening: bool) -> Vec<Finding> {
    let mut findings = vec![kvm::look(root)];
    findings.extend(product::look(root));
    findings.extend(host::look(root));
    if hardening {
        findings.extend(host::hardening(root));
        findings.extend(product::hardening(root));
        findings.push(vmms::look(root));
        findings.push(kernel_config::look(
            root,
            &product::Paths::read(root).kernel,
        ));
    }
    findings
}

fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.id.len()).max();
    let width = width.unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let grade = match finding.result {
            Grade::Pass => "pass",
            Grade::Warn => "WARN",
            Grade::Fail => "FAIL",
        };
        text.push_str(&format!(
            "{grade}  {:<width$}  {}\n",
            finding.id, finding.what
        ));
        if finding.result != Grade::Pass {
            let indent = " ".repeat(width + 8);
            text.push_str(&format!("{indent}why: {}\n", finding.why));
            text.push_str(&format!("{indent}do:  {}\n", finding.remedy));
        }
    }
    let count = |grade| {
        findings
            .iter()
            .filter(|finding| finding.result == grade)
            .count()
    };
    text.push_str(&format!(
        "{} passed, {} to look at, {} failed\n",
        count(Grade::Pass),
        count(Grade::Warn),
        count(Grade::Fail)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of some files.
    pub(super) fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let path = folder.path().to_owned();
        let owner = rustix::process::getuid().as_raw();
        (folder, Root { path, owner })
    }

    pub(super) fn grade(findings: &[Finding], id: &str) -> Grade {
        let found = findings.iter().find(|finding| finding.id == id);
        found
            .unwrap_or_else(|| panic!("no {id} in {findings:?}"))
            .result
    }

    #[test]
    fn a_machine_with_nothing_fails_and_each_finding_has_a_remedy() {
        let (_folder, root) = machine(&[]);
        let findings = look(&root, true);
        assert_eq!(grade(&findings, "kvm"), Grade::Fail);
        assert_eq!(grade(&findings, "programs"), Grade::Fail);
        for finding in &findings {
            let needs_remedy = finding.result != Grade::Pass;
            assert_eq!(needs_remedy, !finding.remedy.is_empty(), "{finding:?}");
        }
        let mut ids: Vec<_> = findings.iter().map(|finding| finding.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), findings.len());
    }

    #[test]
    fn text_explains_what_is_not_well() {
        let subject = Subject {
            id: "x",
            why: "because",
        };
        let findings = [subject.pass("good"), subject.warn("odd", "look")];
        assert_eq!(
            text(&findings),
            "pass  x  good\nWARN  x  odd\n         why: because\n         do:  look\n1 passed, 1 to look at, 0 failed\n"
        );
    }
}
