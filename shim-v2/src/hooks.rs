//! Hooks that run on the host: `prestart`, `createRuntime`, `poststart` and `poststop`.
//!
//! The host is the namespace of a runtime whose containers are in VMs: hooks of CDI and of nerdctl's network
//! expect it. `createContainer` and `startContainer` are left to the guest's agent. What has to run at the
//! end lies in the bundle meanwhile, for the `delete` command. OCI runtime specification, config.md,
//! "POSIX-platform Hooks", and runtime.md, "Lifecycle" and "State". Must not know a VM.

use crate::{cleanup::absent_is_fine, error::one_line, log};
use oci_spec::runtime::{Hook, Hooks, Spec};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::Arc,
};
use tokio::task::spawn_blocking;

/// In a bundle: the hooks that have yet to run when its container is gone.
const LEFT_TO_RUN: &str = "walnut-poststop.json";
/// For a hook that names no time of its own.
const USUAL_SECONDS: i64 = 300;
/// Of what a hook that failed wrote to its standard error.
const MAX_WORDS_BYTES: u64 = 2048;

/// Why a container is not created or started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    /// A hook could not be run, or says no.
    #[error("hooks.{kind}[{index}] {path:?} failed")]
    Failed {
        /// Which list.
        kind: &'static str,
        /// Position in it.
        index: usize,
        /// The program.
        path: PathBuf,
        /// Why, with what it wrote.
        source: io::Error,
    },
    /// What has to run at the end could not be noted.
    #[error("cannot note hooks.poststop in the bundle")]
    Note(#[source] io::Error),
    /// A task of the shim itself.
    #[error("a task of the shim failed")]
    Task(#[from] tokio::task::JoinError),
}

/// The hooks of one container that run on the host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct HostHooks {
    id: String,
    bundle: PathBuf,
    oci_version: String,
    annotations: HashMap<String, String>,
    hooks: Hooks,
}

/// What a hook reads from its standard input.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: &'a Path,
    annotations: &'a HashMap<String, String>,
}

impl HostHooks {
    /// Takes them out of a configuration.
    pub(crate) fn take(spec: &mut Spec, id: &str, bundle: &Path) -> Arc<Self> {
        let hooks = spec.hooks().clone().unwrap_or_default();
        let mut of_guest = Hooks::default();
        of_guest.set_create_container(hooks.create_container().clone());
        of_guest.set_start_container(hooks.start_container().clone());
        spec.set_hooks((of_guest != Hooks::default()).then_some(of_guest));
        Arc::new(Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            oci_version: spec.version().clone(),
            annotations: spec.annotations().clone().unwrap_or_default(),
            hooks,
        })
    }

    /// `prestart` and `createRuntime`: the machine is there, the container is not. `pid` is the VMM's.
    pub(crate) async fn creating(self: &Arc<Self>, pid: u32) -> Result<(), HookError> {
        let (before, at_end) = (self.hooks.prestart(), self.hooks.poststop());
        if [before, self.hooks.create_runtime(), at_end]
            .into_iter()
            .all(is_none)
        {
            return Ok(());
        }
        let this = Arc::clone(self);
        spawn_blocking(move || {
            this.note()?;
            let hooks = this.hooks.prestart().as_deref();
            this.run_all("prestart", hooks, "creating", Some(pid))?;
            let hooks = this.hooks.create_runtime().as_deref();
            this.run_all("createRuntime", hooks, "creating", Some(pid))
        })
        .await?
    }

    /// `poststart`: the container's program runs.
    pub(crate) async fn started(self: &Arc<Self>, pid: u32) -> Result<(), HookError> {
        if is_none(self.hooks.poststart()) {
            return Ok(());
        }
        let this = Arc::clone(self);
        spawn_blocking(move || {
            let hooks = this.hooks.poststart().as_deref();
            this.run_all("poststart", hooks, "running", Some(pid))
        })
        .await?
    }

    /// `poststop`: the container is gone. What fails is told to the log, as nothing can come of it.
    pub(crate) async fn stopped(self: &Arc<Self>) {
        if is_none(self.hooks.poststop()) {
            return;
        }
        let this = Arc::clone(self);
        if let Err(error) = spawn_blocking(move || this.run_last()).await {
            log::error("running hooks.poststop", &error);
        }
    }

    /// For the `delete` command: `poststop` of a container whose server died.
    pub(crate) fn run_left_behind(bundle: &Path) {
        let Ok(json) = std::fs::read(bundle.join(LEFT_TO_RUN)) else {
            return;
        };
        match serde_json::from_slice::<Self>(&json) {
            Ok(hooks) => hooks.run_last(),
            Err(error) => log::error("reading the hooks that are left to run", &error),
        }
    }

    fn poststop(&self) -> &[Hook] {
        self.hooks.poststop().as_deref().unwrap_or_default()
    }

    /// Leaves `poststop` where the `delete` command finds it.
    fn note(&self) -> Result<(), HookError> {
        if self.poststop().is_empty() {
            return Ok(());
        }
        serde_json::to_vec(self)
            .map_err(io::Error::other)
            .and_then(|json| std::fs::write(self.bundle.join(LEFT_TO_RUN), json))
            .map_err(HookError::Note)
    }

    /// Each of `poststop`, whatever becomes of the ones before it, and once.
    fn run_last(&self) {
        for (index, hook) in self.poststop().iter().enumerate() {
            if let Err(error) = self.run_one("poststop", index, hook, "stopped", None) {
                log::line(&one_line(&error));
            }
        }
        if let Err(error) = absent_is_fine(std::fs::remove_file(self.bundle.join(LEFT_TO_RUN))) {
            log::error("removing the note of hooks.poststop", &error);
        }
    }

    fn run_all(
        &self,
        kind: &'static str,
        hooks: Option<&[Hook]>,
        status: &'static str,
        pid: Option<u32>,
    ) -> Result<(), HookError> {
        let mut hooks = hooks.unwrap_or_default().iter().enumerate();
        hooks.try_for_each(|(index, hook)| self.run_one(kind, index, hook, status, pid))
    }

    fn run_one(
        &self,
        kind: &'static str,
        index: usize,
        hook: &Hook,
        status: &'static str,
        pid: Option<u32>,
    ) -> Result<(), HookError> {
        let state = State {
            oci_version: &self.oci_version,
            id: &self.id,
            status,
            pid,
            bundle: &self.bundle,
            annotations: &self.annotations,
        };
        serde_json::to_vec(&state)
            .map_err(io::Error::other)
            .and_then(|state| run(hook, &self.bundle, &state))
            .map_err(|source| HookError::Failed {
                kind,
                index,
                path: hook.path().clone(),
                source,
            })
    }
}

/// Then no thread is needed.
fn is_none(hooks: &Option<Vec<Hook>>) -> bool {
    hooks.as_ref().is_none_or(Vec::is_empty)
}

/// Its streams are files, so that no hook makes the shim wait by reading or writing too little.
fn run(hook: &Hook, directory: &Path, state: &[u8]) -> io::Result<()> {
    let file = || memfd_create("walnut-hook", MemfdFlags::CLOEXEC).map(File::from);
    let (mut input, mut errors) = (file()?, file()?);
    input.write_all(state)?;
    input.rewind()?;
    let mut command = Command::new(hook.path());
    if let Some([name, rest @ ..]) = hook.args().as_deref() {
        command.arg0(name).args(rest);
    }
    let variables = hook.env().iter().flatten();
    let variables = variables.filter_map(|entry| entry.split_once('='));
    command.env_clear().envs(variables).current_dir(directory);
    command
        .stdin(input)
        .stdout(file()?)
        .stderr(errors.try_clone()?);
    let status = wait(command.spawn()?, hook.timeout().unwrap_or(USUAL_SECONDS))?;
    if status.success() {
        return Ok(());
    }
    let mut words = Vec::new();
    errors.rewind()?;
    errors.take(MAX_WORDS_BYTES).read_to_end(&mut words)?;
    let words = String::from_utf8_lossy(&words);
    Err(io::Error::other(format!("{status}: {}", words.trim())))
}

fn wait(mut hook: Child, seconds: i64) -> io::Result<ExitStatus> {
    let pid = rustix::process::Pid::from_child(&hook);
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec {
        tv_sec: seconds.max(0),
        tv_nsec: 0,
    };
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    if poll(&mut ended, Some(&timeout))? == 0 {
        hook.kill()?;
        hook.wait()?;
        return Err(io::Error::other(format!("not done after {seconds} s")));
    }
    hook.wait()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn hooks(bundle: &Path, hooks: &Value) -> (Spec, Arc<HostHooks>) {
        let spec = json!({ "ociVersion": "1.2.0", "annotations": { "a": "b" }, "hooks": hooks });
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let taken = HostHooks::take(&mut spec, "c1", bundle);
        (spec, taken)
    }

    fn shell(script: &str) -> Value {
        json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] })
    }

    #[tokio::test]
    async fn each_hook_reads_the_state_in_order() {
        let bundle = tempfile::tempdir().unwrap();
        let append = |name: &str| json!([shell(&format!("(echo {name}; cat; echo) >> told"))]);
        let (spec, hooks) = hooks(
            bundle.path(),
            &json!({
                "prestart": append("1"), "createRuntime": append("2"),
                "poststart": append("3"), "poststop": append("4"),
                "startContainer": [{ "path": "/in/the/container" }],
            }),
        );
        let left = spec.hooks().clone().unwrap();
        assert!(left.start_container().is_some() && left.poststop().is_none());
        hooks.creating(7).await.unwrap();
        hooks.started(7).await.unwrap();
        hooks.stopped().await;
        let told = std::fs::read_to_string(bundle.path().join("told")).unwrap();
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(
            [lines[0], lines[2], lines[4], lines[6]],
            ["1", "2", "3", "4"]
        );
        for (line, status, pid) in [
            (1, "creating", json!(7)),
            (5, "running", json!(7)),
            (7, "stopped", Value::Null),
        ] {
            let state: Value = serde_json::from_str(lines[line]).unwrap();
            assert_eq!((&state["status"], &state["pid"]), (&json!(status), &pid));
            assert_eq!(state["id"], "c1");
            assert_eq!(state["annotations"]["a"], "b");
        }
        HostHooks::run_left_behind(bundle.path());
        let again = std::fs::read_to_string(bundle.path().join("told")).unwrap();
        assert_eq!(again, told, "poststop runs once");
    }

    #[tokio::test]
    async fn what_fails_is_named_and_the_last_hooks_are_left_for_delete() {
        let bundle = tempfile::tempdir().unwrap();
        let (_, hooks) = hooks(
            bundle.path(),
            &json!({
                "createRuntime": [shell("echo no network >&2; exit 3")],
                "poststop": [shell("exit 1"), shell("echo ran > told")],
            }),
        );
        let error = hooks.creating(7).await.unwrap_err();
        assert_eq!(
            one_line(&error),
            "hooks.createRuntime[0] \"/bin/sh\" failed: exit status: 3: no network"
        );
        HostHooks::run_left_behind(bundle.path());
        assert!(bundle.path().join("told").exists());
    }

    #[tokio::test]
    async fn a_hook_has_its_time() {
        let bundle = tempfile::tempdir().unwrap();
        let slow = json!([{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }]);
        let (_, hooks) = hooks(bundle.path(), &json!({ "poststart": slow }));
        let error = hooks.started(7).await.unwrap_err();
        assert!(one_line(&error).ends_with("not done after 1 s"), "{error}");
    }
}
