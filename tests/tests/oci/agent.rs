//! Shows a case to the agent in a VM.

use crate::case::{Case, Expected};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use walnut_agent_api::SHARE_MOUNT_POINT;
use walnut_tests::{
    agent::Stream,
    guest::{Guest, SIGKILL},
    programs::Programs,
    task::{Stdio, refusal},
};

/// Runs a case, and compares.
pub(crate) fn try_case(guest: &mut Guest, programs: &Programs, case: &Case) -> Result<()> {
    let id = guest.name();
    let place = guest.vm.share_path().join(&id);
    case.make_root(&programs.busybox, &place.join("rootfs"))?;
    let root = format!("{SHARE_MOUNT_POINT}/{id}/rootfs");
    let spec = case.spec(&id, &root)?;
    let outcome = match case.expected(&root)? {
        Expected::Prints(text) => prints(guest, case, &id, &spec, text),
        Expected::Refused(words) => is_refused(guest, &id, &spec, &words),
    };
    // One that failed half way must not be in the way of the next.
    let tasks = &guest.agent.tasks;
    if tasks.state(&id, "").is_ok() {
        let _ = tasks.kill(&id, "", SIGKILL, true);
        let _ = tasks.wait(&id, "");
        let _ = tasks.delete(&id, "");
    }
    fs::remove_dir_all(place)?;
    outcome
}

fn streams(guest: &mut Guest) -> Result<(Stdio, Stream, Stream)> {
    let (output, stdout) = guest.agent.open_stream()?;
    let (errors, stderr) = guest.agent.open_stream()?;
    let stdio = Stdio {
        stdout: output,
        stderr: errors,
        ..Stdio::default()
    };
    Ok((stdio, stdout, stderr))
}

fn prints(guest: &mut Guest, case: &Case, id: &str, spec: &Value, text: &str) -> Result<()> {
    let bytes = spec.to_string().into_bytes();
    let exec = case.exec();
    let (stdio, stdout, stderr) = streams(guest)?;
    let first = if exec.is_some() {
        Stdio::default()
    } else {
        stdio.clone()
    };
    guest.agent.create(id, bytes, &first).context("create")?;
    let tasks = &guest.agent.tasks;
    tasks.start(id, "").context("start")?;
    if let Some(process) = exec {
        tasks.exec(id, "added", &process, &stdio).context("exec")?;
        tasks.start(id, "added").context("start of the exec")?;
    }
    let (found, errors) = (stdout.read_text()?, stderr.read_text()?);
    ensure!(found == text, "{found:?}, expected {text:?}; {errors:?}");
    Ok(())
}

fn is_refused(guest: &mut Guest, id: &str, spec: &Value, words: &str) -> Result<()> {
    let bytes = spec.to_string().into_bytes();
    let answer = guest.agent.create(id, bytes, &Stdio::default());
    match answer.and_then(|_| guest.agent.tasks.start(id, "")) {
        Ok(_) => bail!("it was not refused"),
        Err(error) => {
            let (_, message) = refusal(&error)?;
            ensure!(message.contains(words), "{message:?}, expected {words:?}");
            Ok(())
        }
    }
}
