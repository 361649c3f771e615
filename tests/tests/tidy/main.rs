//! The house rules that a program can check. Needs no KVM, no lab and no network.
//!
//! Each rule is a function from the project's files to what breaks it. A file may be excused, with a
//! reason, in `exceptions.rs`. Every rule is itself tested by a file that breaks it.

mod exceptions;
mod oci_table;
mod rules;
mod source;
mod structure;

use anyhow::Result;
use exceptions::EXCEPTIONS;
use source::{File, read_tree};
use std::path::Path;

/// What breaks a rule.
#[derive(Debug)]
struct Violation {
    path: String,
    line: usize,
    what: String,
}

impl Violation {
    fn new(file: &File, line: usize, what: impl Into<String>) -> Self {
        Self {
            path: file.path.clone(),
            line,
            what: what.into(),
        }
    }
}

/// A rule's name and its check.
type Rule = (&'static str, fn(&[File]) -> Vec<Violation>);

const RULES: &[Rule] = &[
    ("size", rules::size),
    ("module-doc", rules::module_doc),
    ("unfinished", rules::unfinished),
    ("ignored-test", rules::ignored_test),
    ("sleep", rules::sleep),
    ("unsafe", rules::unsafe_code),
    ("safety-comment", rules::safety_comment),
    ("names", rules::names),
    ("global-state", rules::global_state),
    ("anyhow", rules::anyhow),
    ("one-error", rules::one_error),
    ("allow-reason", rules::allow_reason),
    ("machine-path", rules::machine_path),
    ("device-imports", structure::device_imports),
    ("device-knowledge", structure::device_knowledge),
    ("opens-paths", structure::opens_paths),
    ("api-io", structure::api_io),
    ("edges", structure::edges),
    ("manifest", structure::manifest),
    ("decisions", structure::decisions),
    ("links", structure::links),
    ("budget", structure::budget),
];

fn project() -> Result<Vec<File>> {
    let root = match std::env::var_os("WALNUT_TIDY_ROOT") {
        Some(root) => root.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
    };
    read_tree(&root)
}

fn excused(rule: &str, path: &str) -> bool {
    EXCEPTIONS
        .iter()
        .any(|exception| (exception.0, exception.1) == (rule, path))
}

#[test]
fn the_house_rules_hold() -> Result<()> {
    let files = project()?;
    let mut broken = Vec::new();
    for (rule, check) in RULES {
        for violation in check(&files) {
            if !excused(rule, &violation.path) {
                let Violation { path, line, what } = violation;
                broken.push(format!("{path}:{line}: {rule}: {what}"));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
    Ok(())
}

#[test]
fn every_exception_excuses_something() -> Result<()> {
    let files = project()?;
    for (rule, path, reason) in EXCEPTIONS {
        let check = RULES.iter().find(|(name, _)| name == rule);
        let found = check.is_some_and(|(_, check)| {
            let violations = check(&files);
            violations.iter().any(|violation| violation.path == *path)
        });
        assert!(found, "stale exception: {rule} in {path} ({reason})");
        assert!(reason.len() > 20, "{rule} in {path} wants a real reason");
    }
    Ok(())
}

/// For each rule, a file that breaks it.
const BREAKERS: &[(&str, &str, &str)] = &[
    ("module-doc", "a/src/x.rs", "use std::fs;"),
    (
        "module-doc",
        "a/src/x.rs",
        "#![allow(\n    x, reason = \"\"\n)]\nuse std::fs;\n//! x",
    ),
    ("unfinished", "a/src/x.rs", "//! x\n// TODO: later"),
    ("unfinished", "a/src/x.rs", "//! x\nfn a() { todo!() }"),
    ("ignored-test", "a/src/x.rs", "//! x\n#[ignore = \"slow\"]"),
    ("sleep", "a/src/x.rs", "//! x\nfn a() { thread::sleep(b); }"),
    ("sleep", "a/src/x.rs", "//! x\nuse tokio::time::sleep;"),
    ("unsafe", "a/src/x.rs", "//! x\nfn a() { unsafe { b() } }"),
    (
        "safety-comment",
        "a/src/x.rs",
        "//! x\nlet a = unsafe { b() };",
    ),
    ("names", "a/src/x.rs", "//! x\npub struct DeviceManager;"),
    ("names", "a/src/x.rs", "//! x\nmod test_helpers;"),
    ("names", "a/src/utils.rs", "//! x"),
    ("names", "a/src/common/x.rs", "//! x"),
    (
        "global-state",
        "a/src/x.rs",
        "//! x\nstatic A: Mutex<u8> = b;",
    ),
    ("global-state", "a/src/x.rs", "//! x\nstatic mut A: u8 = 0;"),
    ("anyhow", "vmm/src/x.rs", "//! x\nuse anyhow::Result;"),
    (
        "one-error",
        "a/src/x.rs",
        "//! x\n#[derive(Debug, thiserror::Error)]\nenum A {}\n#[derive(Debug, Error)]\nenum B {}",
    ),
    ("allow-reason", "a/src/x.rs", "//! x\n#![allow(dead_code)]"),
    (
        "allow-reason",
        "a/src/x.rs",
        "//! x\n#[expect(\n    dead_code\n)]",
    ),
    (
        "device-imports",
        "vmm/src/devices/x.rs",
        "//! x\nuse crate::vm::Vm;",
    ),
    (
        "device-imports",
        "vmm/src/devices/x.rs",
        "//! x\nuse crate::{bus::Bus, vcpu};",
    ),
    (
        "device-knowledge",
        "vmm/src/vcpu.rs",
        "//! x\nuse crate::devices::Serial;",
    ),
    (
        "opens-paths",
        "vmm/src/control.rs",
        "//! x\nlet a = File::open(b);",
    ),
    ("api-io", "vmm/api/src/x.rs", "//! x\nuse std::fs::File;"),
    (
        "edges",
        "shim-v2/Cargo.toml",
        "[dependencies]\nwalnut-vmm.workspace = true",
    ),
    (
        "edges",
        "shim-v2/Cargo.toml",
        "[dependencies]\nkvm-ioctls.workspace = true",
    ),
    ("manifest", "a/Cargo.toml", "[package]\nname = \"a\""),
    (
        "manifest",
        "a/Cargo.toml",
        "[package]\nname = \"a\"\n[lints]\nworkspace = true\n[dependencies]\nserde = \"1\"",
    ),
    ("decisions", "docs/decisions/0002-second.md", "# Second"),
    ("decisions", "docs/decisions/first.md", "# First"),
    ("links", "README.md", "see [the map](docs/nowhere.md)"),
];

#[test]
fn each_rule_finds_what_breaks_it() {
    for (rule, path, text) in BREAKERS {
        let file = File {
            path: (*path).to_owned(),
            text: (*text).to_owned(),
        };
        let (_, check) = RULES.iter().find(|(name, _)| name == rule).unwrap();
        assert_eq!(check(&[file]).len(), 1, "{rule} must find this: {text}");
    }
    let path_of_a_machine = ["see /wo", "rk/main"].concat();
    let long = ["//! x\n", &"fn a() {}\n".repeat(500)].concat();
    let huge = "x\n".repeat(50_001);
    for (rule, path, text) in [
        ("machine-path", "docs/x.md", path_of_a_machine),
        ("size", "a/src/x.rs", long),
        ("budget", "vmm/src/x.rs", huge),
    ] {
        let path = path.to_owned();
        let (_, check) = RULES.iter().find(|(name, _)| *name == rule).unwrap();
        assert_eq!(check(&[File { path, text }]).len(), 1, "{rule}");
    }
    for (rule, _) in RULES {
        let tested = BREAKERS.iter().any(|(name, ..)| name == rule)
            || ["machine-path", "size", "budget"].contains(rule);
        assert!(tested, "nothing shows that {rule} finds anything");
    }
}
