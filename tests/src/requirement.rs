//! What a test needs of the machine, and what it does where that is absent.
//!
//! Where the programs aren't built or KVM can't run a guest, a test is skipped *visibly*: one line
//! `SKIPPED: …` on standard error, past the test runner's capture. `WALNUT_REQUIRE_KVM=1` turns each skip
//! into a failure, so that a machine that should run everything can't pass by running nothing.

use crate::{programs::Programs, vmm::VmBuilder};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::OpenOptions,
    io::Write,
    path::Path,
    sync::{Mutex, PoisonError},
};

/// containerd's socket, where it listens on every node.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// The verdict of the first test of this process, as a guest is booted for it.
static VERDICT: Mutex<Option<Result<Programs, String>>> = Mutex::new(None);

/// The programs, on a machine whose KVM runs ordinary guests. `None`: the caller has nothing to do.
pub fn kvm() -> Result<Option<Programs>> {
    let mut verdict = VERDICT.lock().unwrap_or_else(PoisonError::into_inner);
    let found = verdict.get_or_insert_with(|| usable_kvm().map_err(|error| format!("{error:#}")));
    match found {
        Ok(programs) => Ok(Some(programs.clone())),
        Err(why) => skip(why),
    }
}

/// As [`kvm`], on a node where containerd answers and this process may ask it everything.
pub fn containerd() -> Result<Option<Programs>> {
    if !Path::new(CONTAINERD_SOCKET).exists() {
        return skip(&format!(
            "containerd does not listen on {CONTAINERD_SOCKET}"
        ));
    }
    kvm()
}

fn usable_kvm() -> Result<Programs> {
    let programs = Programs::find()?;
    ensure!(
        rustix::process::geteuid().is_root(),
        "the tests need root: they mount, and open /dev/kvm"
    );
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("cannot open /dev/kvm")?;
    // The presence of the device proves nothing: there are backends that answer each ioctl and cannot run
    // an ordinary kernel. A guest that comes up does.
    let ended = VmBuilder::probe(&programs)
        .start()?
        .wait()
        .context("KVM does not run a probe guest")?;
    ensure!(
        ended.console.contains("walnut-probe: "),
        "the probe guest said nothing; it ended with {:?}, stderr {:?}",
        ended.status,
        ended.stderr
    );
    Ok(programs)
}

fn skip<T>(why: &str) -> Result<Option<T>> {
    if std::env::var_os("WALNUT_REQUIRE_KVM").is_some_and(|value| value == "1") {
        bail!("WALNUT_REQUIRE_KVM=1, but {why}");
    }
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    // Not `eprintln!`: the test runner keeps that to itself while a test passes.
    writeln!(std::io::stderr(), "SKIPPED: {test}: {why}").context("cannot write to stderr")?;
    Ok(None)
}
