//! The `delete` command: what a dead server left behind, undone from what is on disk.
//!
//! Runs when containerd lost its connection to a shim, or when a container could not be created. Never asks
//! the agent; succeeds a second time; a Pod that is alive stays when only one of its containers is meant.

use crate::{
    args::Args,
    bootstrap::bundle_of,
    bundle::Membership,
    cgroup,
    container::KILLED,
    error::one_line,
    mounts::unmount_below,
    network, process_file,
    state_dir::{StateDir, socket_path},
    storage::Share,
};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message as _, MessageField};
use std::{
    error::Error,
    fs,
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::SystemTime,
};

/// `delete`.
pub(crate) fn delete(args: &Args) -> anyhow::Result<()> {
    // A bundle that can't be read any more is no reason to leave a VM behind.
    let membership = bundle_of(args)
        .ok()
        .and_then(|bundle| Membership::read(&bundle, &args.id).ok())
        .unwrap_or(Membership::Own);
    let sandbox_id = membership.sandbox_id(&args.id);
    let socket = socket_path(&args.address, &args.namespace, sandbox_id);
    let alive = UnixStream::connect(&socket).is_ok();
    let mut pid = 0;
    if !(alive && matches!(membership, Membership::Joins(_))) {
        let state = StateDir::new(&args.namespace, sandbox_id);
        pid = remove_sandbox(&state, &socket)?;
    }
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(SystemTime::now().into()),
        ..DeleteResponse::default()
    };
    io::stdout().write_all(&response.write_to_bytes()?)?;
    Ok(())
}

/// Kills and removes everything; every step is tried, and the errors are told together.
fn remove_sandbox(state: &StateDir, socket: &Path) -> anyhow::Result<u32> {
    let mut errors = Vec::new();
    // The server first: it would report what happens next as the guest's doing.
    note(&mut errors, process_file::kill(&state.server_pid()));
    let vmm = note(&mut errors, process_file::kill(&state.vmm_pid()));
    note(
        &mut errors,
        Share::left_behind(state.share(), state.tree()).remove(),
    );
    note(&mut errors, cgroup::remove(&state.cgroup()));
    note(&mut errors, network::undo(&state.network()));
    if errors.is_empty() {
        note(&mut errors, remove_directory(state));
        note(&mut errors, absent_is_fine(fs::remove_file(socket)));
    }
    if errors.is_empty() {
        return Ok(vmm.flatten().unwrap_or(0));
    }
    Err(anyhow::anyhow!(
        "{} of sandbox {:?}",
        errors.join("; "),
        state.path()
    ))
}

fn note<T, E: Error + 'static>(errors: &mut Vec<String>, result: Result<T, E>) -> Option<T> {
    result.map_err(|error| errors.push(one_line(&error))).ok()
}

/// Removes a sandbox's directory: its own files, as nothing is mounted in it any more.
pub(crate) fn remove_directory(state: &StateDir) -> io::Result<()> {
    unmount_below(state.path())?;
    absent_is_fine(fs::remove_dir_all(state.path()))?;
    state.remove_empty_parent();
    Ok(())
}

/// Removing what isn't there is success.
pub(crate) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_sandbox_is_removed_with_its_processes_and_a_second_time_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::at(directory.path().join("ns/pod"));
        state.create().unwrap();
        let socket = directory.path().join("socket");
        fs::write(&socket, "").unwrap();
        fs::write(state.console(), "panic").unwrap();
        let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
        process_file::write(&state.vmm_pid(), vmm.id()).unwrap();
        assert_eq!(remove_sandbox(&state, &socket).unwrap(), vmm.id());
        assert!(!vmm.wait().unwrap().success());
        assert!(!state.path().exists() && !directory.path().join("ns").exists());
        assert!(!socket.exists());
        assert_eq!(remove_sandbox(&state, &socket).unwrap(), 0);
    }

    #[test]
    fn what_fails_is_named_and_the_rest_is_still_done() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::at(directory.path().join("ns/pod"));
        state.create().unwrap();
        fs::write(state.server_pid(), "nonsense").unwrap();
        let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
        process_file::write(&state.vmm_pid(), vmm.id()).unwrap();
        let error = remove_sandbox(&state, Path::new("/nonexistent"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("server.pid"), "{error}");
        assert!(!vmm.wait().unwrap().success());
    }
}
