//! Runs the hooks that belong into a container's namespaces: `createContainer` and `startContainer`.
//!
//! OCI runtime specification, `config.md`, "POSIX-platform Hooks", and `runtime.md`, "State". The others run on
//! the host, by the shim. Must not know what a hook does.

use super::{
    SetupError,
    spec::{Hook, Spec},
    wire::Identity,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{PidfdFlags, pidfd_open},
};
use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus},
};

/// Of what a hook that failed wrote to its standard error.
const MAX_WORDS_BYTES: u64 = 1024;

/// Runs hooks one after the other; the first that fails ends it.
pub(super) fn run(
    kind: &'static str,
    hooks: &[Hook],
    spec: &Spec,
    identity: &Identity,
    status: &'static str,
) -> Result<(), SetupError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::json!({
        "ociVersion": spec.oci_version,
        "id": identity.id,
        "status": status,
        "pid": std::process::id(),
        "bundle": identity.bundle,
        "annotations": spec.annotations,
    });
    for (index, hook) in hooks.iter().enumerate() {
        let attempted = format!("hooks.{kind}[{index}] {:?}", hook.path);
        run_one(hook, state.to_string().as_bytes()).map_err(SetupError::named(attempted))?;
    }
    Ok(())
}

/// Its streams are files, so that no hook can make this process wait by reading or writing too little.
fn run_one(hook: &Hook, state: &[u8]) -> io::Result<()> {
    let file = || memfd_create("walnut-hook", MemfdFlags::CLOEXEC).map(File::from);
    let (mut input, mut errors) = (file()?, file()?);
    input.write_all(state)?;
    input.rewind()?;
    let mut command = Command::new(&hook.path);
    if let [name, rest @ ..] = hook.args.as_slice() {
        command.arg0(name).args(rest);
    }
    let variables = hook.env.iter().filter_map(|entry| entry.split_once('='));
    command.env_clear().envs(variables);
    command
        .stdin(input)
        .stdout(file()?)
        .stderr(errors.try_clone()?);
    let status = wait(command.spawn()?, hook.timeout)?;
    if status.success() {
        return Ok(());
    }
    let mut words = Vec::new();
    errors.rewind()?;
    errors.take(MAX_WORDS_BYTES).read_to_end(&mut words)?;
    let words = String::from_utf8_lossy(&words);
    Err(io::Error::other(format!("{status}: {}", words.trim())))
}

fn wait(mut hook: Child, timeout_seconds: Option<u32>) -> io::Result<ExitStatus> {
    if let Some(seconds) = timeout_seconds {
        let pid = rustix::process::Pid::from_child(&hook);
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let timeout = Timespec {
            tv_sec: seconds.into(),
            tv_nsec: 0,
        };
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        if poll(&mut ended, Some(&timeout))? == 0 {
            hook.kill()?;
            hook.wait()?;
            return Err(io::Error::other(format!("not done after {seconds} s")));
        }
    }
    hook.wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Option<u32>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script, "name"].map(str::to_owned).into(),
            env: vec!["GIVEN=value".into()],
            timeout,
        }
    }

    fn outcome(hook: Hook) -> String {
        let mut spec = Spec {
            oci_version: "1.2.0".into(),
            ..Spec::default()
        };
        spec.annotations.insert("a".into(), "b".into());
        let identity = Identity {
            id: "c1".into(),
            bundle: "/bundle".into(),
        };
        match run("createContainer", &[hook], &spec, &identity, "creating") {
            Ok(()) => String::new(),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                format!("{error}: {}", cause.unwrap_or_default())
            }
        }
    }

    #[test]
    fn a_hook_reads_the_state_and_has_no_other_environment() {
        let script = "grep -q '\"id\":\"c1\"' && test \"$GIVEN\" = value && test -z \"$HOME\" && test $0 = name";
        assert_eq!(outcome(shell(script, None)), "");
    }

    #[test]
    fn a_hook_that_fails_is_named_with_its_words() {
        let message = outcome(shell("echo no such luck >&2; exit 3", Some(60)));
        assert!(
            message.contains("hooks.createContainer[0] \"/bin/sh\": exit status: 3: no such luck"),
            "{message}"
        );
    }

    #[test]
    fn a_hook_that_takes_too_long_is_ended() {
        let message = outcome(shell("exec sleep 1000", Some(1)));
        assert!(message.contains("not done after 1 s"), "{message}");
    }
}
