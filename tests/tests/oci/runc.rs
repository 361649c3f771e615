//! Shows a case to runc, the oracle.

use crate::case::{Case, Expected};
use anyhow::{Result, ensure};
use serde_json::Value;
use std::{fs, path::Path, process::Command};
use walnut_tests::{
    command::{self, End, Output},
    deadline::{self, Deadline},
    programs::Programs,
};

/// Runs a case, and compares.
pub(crate) fn try_case(programs: &Programs, case: &Case) -> Result<()> {
    let bundle = tempfile::tempdir()?;
    // A container with users of its own must be able to look for its root.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.path(), open)?;
    let root = bundle.path().join("rootfs");
    case.make_root(&programs.busybox, &root)?;
    let root = root.to_string_lossy();
    let id = format!("oci-{}", std::process::id());
    let spec = case.spec(&id, &root)?;
    fs::write(bundle.path().join("config.json"), spec.to_string())?;
    let output = run(bundle.path(), &id, case.exec().as_ref());
    let _ = runc(&["delete", "--force", &id]);
    let output = output?;
    match case.expected(&root)? {
        Expected::Prints(text) => ensure!(
            output.text() == text.trim_end(),
            "{output:?}, expected {text:?}"
        ),
        Expected::Refused(_) => ensure!(
            output.end != End::Exited(0),
            "runc did not refuse it: {output:?}"
        ),
    }
    Ok(())
}

fn run(bundle: &Path, id: &str, exec: Option<&Value>) -> Result<Output> {
    let bundle_path = bundle.to_string_lossy();
    let Some(process) = exec else {
        return runc(&["run", "--bundle", &bundle_path, id]);
    };
    // Its streams would be those of the test for as long as the container lives.
    let log = fs::File::create(bundle.join("log"))?;
    let mut detached = Command::new("runc");
    detached.args(["run", "--detach", "--bundle", &bundle_path, id]);
    let status = detached.stdout(log.try_clone()?).stderr(log).status()?;
    let log = fs::read_to_string(bundle.join("log"))?;
    ensure!(status.success(), "{log}");
    let file = bundle.join("process.json");
    fs::write(&file, process.to_string())?;
    runc(&["exec", "--process", &file.to_string_lossy(), id])
}

fn runc(arguments: &[&str]) -> Result<Output> {
    let mut runc = Command::new("runc");
    runc.args(arguments);
    command::run(&mut runc, Vec::new(), Deadline::after(deadline::BOOT))
}
