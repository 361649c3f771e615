//! Profiles of AppArmor for the guest's kernel, compiled by Debian's `apparmor_parser`.
//!
//! The text is one for all names; `features` is what the guest's kernel says of itself in
//! `/sys/kernel/security/apparmor/features`, for the compiler to aim at. The same input gives the same bytes.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The Debian package that has the compiler.
pub const PACKAGE: &str = "apparmor";

/// What containerd and Docker call their default profile.
const NAMES: [&str; 2] = ["cri-containerd.apparmor.d", "docker-default"];

/// Why there are no profiles.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// The profile can't be read.
    #[error("read {}", path.display())]
    Read {
        /// Where it was expected.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The compiler can't be run.
    #[error("run apparmor_parser, of the package {PACKAGE}")]
    Run(#[source] io::Error),
    /// The compiler refuses the profile.
    #[error("apparmor_parser refuses the profile {name}: {message}")]
    Refused {
        /// Which.
        name: &'static str,
        /// What it says.
        message: String,
    },
}

/// A compiled profile.
#[derive(Debug, PartialEq, Eq)]
pub struct Policy {
    /// What containers ask for.
    pub name: &'static str,
    /// What the kernel loads.
    pub bytes: Vec<u8>,
}

/// Compiles the profiles of a folder that holds `container.profile` and `features`.
pub fn compile(folder: &Path) -> Result<Vec<Policy>, AppArmorError> {
    let path = folder.join("container.profile");
    let text = fs::read_to_string(&path).map_err(|source| AppArmorError::Read { path, source })?;
    let policy = |name: &'static str| {
        let text = text.replace("@NAME@", name);
        compile_one(&folder.join("features"), name, &text).map(|bytes| Policy { name, bytes })
    };
    NAMES.into_iter().map(policy).collect()
}

fn compile_one(features: &Path, name: &'static str, text: &str) -> Result<Vec<u8>, AppArmorError> {
    let mut parser = Command::new("apparmor_parser")
        .args([
            "--skip-kernel-load",
            "--skip-cache",
            "--stdout",
            "--kernel-features",
        ])
        .arg(features)
        // Its defaults are the build machine's own.
        .args(["--config-file", "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(AppArmorError::Run)?;
    if let Some(mut input) = parser.stdin.take() {
        input
            .write_all(text.as_bytes())
            .map_err(AppArmorError::Run)?;
    }
    let output = parser.wait_with_output().map_err(AppArmorError::Run)?;
    if output.status.success() && !output.stdout.is_empty() {
        return Ok(output.stdout);
    }
    Err(AppArmorError::Refused {
        name,
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_compiled_to_the_same_bytes_each_time() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("apparmor");
        let policies = match compile(&folder) {
            Err(AppArmorError::Run(error)) => return println!("skipped: {error}"),
            other => other.unwrap(),
        };
        assert_eq!(compile(&folder).unwrap(), policies);
        for policy in policies {
            let name = policy.name.as_bytes();
            assert!(policy.bytes.windows(name.len()).any(|part| part == name));
        }
    }

    #[test]
    fn what_the_compiler_says_is_told() {
        let features = Path::new(env!("CARGO_MANIFEST_DIR")).join("apparmor/features");
        match compile_one(&features, "broken", "profile broken {") {
            Err(AppArmorError::Run(error)) => println!("skipped: {error}"),
            Err(AppArmorError::Refused { message, .. }) => assert!(message.contains("syntax")),
            other => panic!("{other:?}"),
        }
    }
}
