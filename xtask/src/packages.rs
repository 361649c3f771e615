//! Installs the Debian packages that the other commands need: only those that are missing.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use walnut_guest_image::{apparmor, kernel};

use crate::debian::{self, Source};
use crate::lab::qemu;
use crate::progress::Progress;
use crate::project::Project;

/// What builds the kernel, the images and the node.
const PACKAGES: [&str; 16] = [
    kernel::SOURCE_PACKAGE,
    apparmor::PACKAGE,
    "bc",
    "binutils",
    "bison",
    "debian-archive-keyring",
    "e2fsprogs",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "lz4",
    "make",
    "mmdebstrap",
    "xz-utils",
    "zstd",
];

const QEMU_PACKAGE: &str = "qemu-system-x86";

/// Older versions corrupt the flags register of nested guests (docs/operations.md).
const QEMU_MAJOR: u32 = 10;

const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/walnut-backports.sources";

/// Installs what is missing. A machine that has everything pays two queries.
pub(crate) fn install(project: &Project, progress: Progress) -> Result<()> {
    let missing = missing(&PACKAGES)?;
    let qemu_needed = qemu::version().map_or(true, |(major, _)| major < QEMU_MAJOR);
    if missing.is_empty() && !qemu_needed {
        return Ok(());
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "packages are missing: run this as root"
    );
    let names = missing.join(" ");
    let qemu_name = if qemu_needed { QEMU_PACKAGE } else { "" };
    progress.step(
        "packages",
        &format!("installing {names} {qemu_name}"),
        || {
            apt(project, progress, &["update"])?;
            if !missing.is_empty() {
                let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
                arguments.extend(&missing);
                apt(project, progress, &arguments)?;
            }
            if qemu_needed {
                install_qemu(project, progress)?;
            }
            Ok(())
        },
    )
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(wanted)
        .output()
        .context("run dpkg-query: is this Debian?")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    Ok(wanted
        .iter()
        .copied()
        .filter(|name| !installed.contains(name))
        .collect())
}

/// QEMU from the release, or from its backports where the release's own is too old.
fn install_qemu(project: &Project, progress: Progress) -> Result<()> {
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    let release;
    if candidate_major(QEMU_PACKAGE)? < QEMU_MAJOR {
        let codename = debian::codename()?;
        release = format!("{codename}-backports");
        progress.say(
            "packages",
            &format!("QEMU {QEMU_MAJOR} comes from {release}"),
        );
        let text = backports_source(&debian::own_source()?, &release);
        fs::write(BACKPORTS_FILE, text).with_context(|| format!("write {BACKPORTS_FILE}"))?;
        apt(project, progress, &["update"])?;
        arguments.extend(["-t", &release]);
    }
    arguments.push(QEMU_PACKAGE);
    apt(project, progress, &arguments)?;
    let (major, version) = qemu::version()?;
    if major < QEMU_MAJOR {
        bail!("{version} is too old: the lab needs QEMU {QEMU_MAJOR} or newer");
    }
    Ok(())
}

/// The major version that apt would install; 0 if it knows none.
fn candidate_major(package: &str) -> Result<u32> {
    let output = Command::new("apt-cache")
        .env("LC_ALL", "C")
        .args(["policy", package])
        .output()
        .context("run apt-cache")?;
    Ok(parse_candidate(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_candidate(policy: &str) -> u32 {
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"));
    let version = version.unwrap_or_default().trim();
    let upstream = version
        .split_once(':')
        .map_or(version, |(_, upstream)| upstream);
    let digits: String = upstream.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// A source of the same mirror and keyring for another release (sources.list(5), deb822).
fn backports_source(own: &Source, release: &str) -> String {
    let mut text = format!(
        "Types: deb\nURIs: {}\nSuites: {release}\nComponents: main\n",
        own.uri
    );
    if let Some(keyring) = &own.signed_by {
        text.push_str(&format!("Signed-By: {keyring}\n"));
    }
    text
}

fn apt(project: &Project, progress: Progress, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["--quiet", "-o"]);
    command.arg("DPkg::Lock::Timeout=300").args(arguments);
    let verb = arguments.first().copied().unwrap_or_default();
    let log = project.logs().join(Path::new(&format!("apt-{verb}.log")));
    progress.run("packages", &mut command, &log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_read() {
        let policy = "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7+deb12u1\n";
        assert_eq!(parse_candidate(policy), 7);
        assert_eq!(parse_candidate("  Candidate: 10.0.2+ds-2\n"), 10);
        assert_eq!(parse_candidate("  Candidate: (none)\n"), 0);
        assert_eq!(parse_candidate(""), 0);
    }

    #[test]
    fn backports_have_the_mirror_and_keyring_of_the_release() {
        let own = Source {
            uri: "http://m/debian".to_owned(),
            suites: vec!["x".to_owned()],
            signed_by: Some("/k.gpg".to_owned()),
        };
        let text = backports_source(&own, "x-backports");
        let expected = "Types: deb\nURIs: http://m/debian\nSuites: x-backports\n\
            Components: main\nSigned-By: /k.gpg\n";
        assert_eq!(text, expected);
    }
}
