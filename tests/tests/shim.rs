//! The shim without containerd's daemon as its caller: its command line, and its server over ttrpc.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use walnut_agent_api::containerd::{
    api::{CreateTaskRequest, DeleteResponse, ShutdownRequest},
    protobuf::{Message, well_known_types::any::Any},
    shim_async::TaskClient,
    ttrpc,
    types::introspection::RuntimeInfo,
};
use walnut_tests::{
    bundle::{Spec, busybox_rootfs},
    command::{self, End, Output},
    ctr::Runtime,
    deadline::{self, Deadline},
    leak::Leak,
    processes::{self, Process},
    programs::Programs,
    requirement::{self, CONTAINERD_SOCKET},
    task::{Stdio, Tasks, any, refused},
};

const NAMESPACE: &str = "walnut-tests";

/// Types of options: of any runtime, and of runc.
const GENERIC_OPTIONS: &str = "runtimeoptions.v1.Options";
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

/// Options whose fields, by number, are short texts.
fn options(kind: &str, fields: &[(u8, &str)]) -> Any {
    let mut value = Vec::new();
    for (number, text) in fields {
        // protobuf's wire type 2: a length, and so many bytes.
        value.extend([number << 3 | 2, text.len().to_le_bytes()[0]]);
        value.extend(text.as_bytes());
    }
    any(kind, value)
}

/// A cgroup that a shim is asked to be in.
struct ShimCgroup;

impl ShimCgroup {
    const PATH: &str = "/walnut-test-shim";

    fn directory() -> PathBuf {
        Path::new("/sys/fs/cgroup").join(Self::PATH.trim_start_matches('/'))
    }

    fn new() -> Result<Self> {
        fs::create_dir(Self::directory()).context("cannot make the shim's cgroup")?;
        Ok(Self)
    }

    fn processes(&self) -> Result<Vec<Process>> {
        let text = fs::read_to_string(Self::directory().join("cgroup.procs"))?;
        let numbers: Vec<i32> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
        let all = processes::list()?.into_iter();
        Ok(all
            .filter(|process| numbers.contains(&process.pid))
            .collect())
    }

    /// Removes it, once the shim is gone.
    fn remove(self) -> Result<()> {
        let deadline = Deadline::after(deadline::REQUEST);
        deadline::until("the shim to leave its cgroup", deadline, || {
            Ok(fs::remove_dir(Self::directory()).is_ok().then_some(()))
        })
    }
}

impl Drop for ShimCgroup {
    fn drop(&mut self) {
        // Where a shim is left in it, that is what the test says.
        let _ = fs::remove_dir(Self::directory());
    }
}

/// A bundle, as containerd lays it out, and its name.
struct Bundle {
    directory: TempDir,
    id: String,
}

impl Bundle {
    fn new(programs: &Programs, spec: impl FnOnce(Spec) -> Spec) -> Result<Self> {
        let directory = TempDir::with_prefix("walnut-bundle-")?;
        let rootfs = directory.path().join("rootfs");
        fs::create_dir(&rootfs)?;
        busybox_rootfs(&programs.busybox, &rootfs)?;
        let spec = spec(Spec::new("rootfs", &["sh", "-c", "nproc; exit 42"]).networked());
        fs::write(directory.path().join("config.json"), spec.to_json())?;
        let id = format!("test-shim-{}", std::process::id());
        Ok(Self { directory, id })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Runs the shim's program as containerd would for this bundle.
    fn shim(&self, programs: &Programs, words: &[&str]) -> Result<Output> {
        self.shim_with(programs, words, None)
    }

    /// The same, with options of the runtime.
    fn shim_with(
        &self,
        programs: &Programs,
        words: &[&str],
        options: Option<Any>,
    ) -> Result<Output> {
        let stdin = options.map_or(Ok(Vec::new()), |options| options.write_to_bytes())?;
        let mut shim = Command::new(&programs.shim);
        shim.args(["-namespace", NAMESPACE, "-id", &self.id])
            .args(["-address", CONTAINERD_SOCKET])
            .args(["-publish-binary", "/usr/bin/containerd"])
            .args(words)
            .current_dir(self.path())
            .env("TTRPC_ADDRESS", format!("{CONTAINERD_SOCKET}.ttrpc"))
            .env("GRPC_ADDRESS", CONTAINERD_SOCKET)
            .env("NAMESPACE", NAMESPACE)
            .env("MAX_SHIM_VERSION", "3");
        command::run(&mut shim, stdin, Deadline::after(deadline::REQUEST))
    }

    /// `start`, and a connection to the server.
    fn start(&self, programs: &Programs, options: Option<Any>) -> Result<Tasks> {
        let reply = self.shim_with(programs, &["start"], options)?.success()?;
        // containerd reads both streams as one reply.
        ensure!(reply.stderr.is_empty(), "{reply:?}");
        let parsed: Value = serde_json::from_slice(&reply.stdout)
            .with_context(|| format!("the reply is no JSON: {:?}", reply.text()))?;
        let version = &parsed["version"];
        ensure!(*version == 2 || *version == 3, "{parsed}");
        ensure!(parsed["protocol"] == "ttrpc", "{parsed}");
        let address = parsed["address"].as_str().unwrap_or_default();
        let path = address.strip_prefix("unix://").context("no Unix address")?;
        Tasks::over(UnixStream::connect(path).context("nobody listens")?)
    }

    fn request(&self, stdio: &Stdio) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.path().display().to_string(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            ..Default::default()
        }
    }

    fn shut_down(&self, tasks: &Tasks) -> Result<()> {
        let request = ShutdownRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        // The server may be gone before its answer is out.
        let _ = tasks.call(|client, context| async move {
            TaskClient::new(client).shutdown(context, &request).await
        });
        Ok(())
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // A server that a failed test has left would be the next test's leak.
        for process in processes::list().unwrap_or_default() {
            if process.runs("containerd-shim-walnut-v2") && process.command.contains(&self.id) {
                let _ = process.kill(Signal::KILL);
            }
        }
    }
}

#[test]
fn it_says_what_it_is() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let mut shim = Command::new(&programs.shim);
    let deadline = Deadline::after(deadline::REQUEST);
    let output = command::run(shim.arg("-info"), Vec::new(), deadline)?.success()?;
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).context("no RuntimeInfo")?;
    ensure!(info.name == Runtime::Walnut.name(), "{info}");
    ensure!(!info.version.version.is_empty(), "{info}");
    Ok(())
}

#[test]
fn a_wrong_command_line_is_one_line_and_nothing_more() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let cases: [(&[&str], &str); 5] = [
        (&["-turbo", "start"], "-turbo"),
        (&["restart"], "restart"),
        (&["-id", "../../etc", "start"], "../../etc"),
        (&["-namespace", "", "start"], "-namespace"),
        (&["-id"], "-id"),
    ];
    let bundle = Bundle::new(&programs, |spec| spec)?;
    for (words, named) in cases {
        let output = bundle.shim(&programs, words)?;
        ensure!(output.end != End::Exited(0), "{words:?}: {output:?}");
        let said = format!("{}{}", output.text(), output.stderr);
        ensure!(said.trim_end().lines().count() == 1, "{words:?}: {said:?}");
        ensure!(said.contains(named), "{words:?}: {said:?}");
    }
    leak.nothing_left()
}

#[test]
fn delete_succeeds_twice_where_nothing_is() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let bundle = Bundle::new(&programs, |spec| spec)?;
    for _ in 0..2 {
        let output = bundle.shim(&programs, &["delete"])?.success()?;
        let response = DeleteResponse::parse_from_bytes(&output.stdout)?;
        ensure!(response.exit_status == 137, "{response}");
    }
    leak.nothing_left()
}

#[test]
fn a_container_runs_from_its_bundle() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let bundle = Bundle::new(&programs, |spec| spec)?;
    let cgroup = ShimCgroup::new()?;
    let config = options(GENERIC_OPTIONS, &[(3, "vcpus = 2")]);
    let tasks = bundle.start(&programs, Some(config))?;
    let id = bundle.id.as_str();
    refused(tasks.state(id, ""), ttrpc::Code::NOT_FOUND, &[id])?;

    let stdout = bundle.path().join("stdout");
    rustix::fs::mkfifoat(rustix::fs::CWD, &stdout, rustix::fs::Mode::RWXU)?;
    let stdio = Stdio {
        stdout: stdout.display().to_string(),
        ..Stdio::default()
    };
    let reader = std::thread::spawn(move || fs::read_to_string(stdout));
    let mut request = bundle.request(&stdio);
    for (kind, fields, word) in [
        (RUNC_OPTIONS, (6, "crun"), "binary_name"),
        ("some.Options", (1, ""), "some.Options"),
    ] {
        request.options = Some(options(kind, &[fields])).into();
        refused(
            tasks.create(&request),
            ttrpc::Code::INVALID_ARGUMENT,
            &[word],
        )?;
    }
    request.options = Some(options(RUNC_OPTIONS, &[(3, ShimCgroup::PATH)])).into();
    let pid = tasks.create(&request)?;
    ensure!(pid > 0, "no pid");
    let shims = cgroup.processes()?;
    ensure!(shims.len() == 1, "in the shim's cgroup: {shims:?}");
    ensure!(shims[0].runs("containerd-shim-walnut-v2"), "{shims:?}");
    tasks.start(id, "")?;
    ensure!(tasks.wait(id, "")? == 42, "no 42");
    ensure!(tasks.delete(id, "")? == 42, "no 42");
    let text = reader
        .join()
        .map_err(|_| anyhow::anyhow!("a reader panicked"))??;
    ensure!(text.trim() == "2", "not the vCPUs of the options: {text:?}");
    bundle.shut_down(&tasks)?;
    bundle.shim(&programs, &["delete"])?.success()?;
    cgroup.remove()?;
    leak.nothing_left()
}

#[test]
fn what_a_bundle_asks_for_in_vain_is_named() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let rdt = json!({ "closID": "chosen" });
    let bundle = Bundle::new(&programs, |spec| spec.with("/linux/intelRdt", rdt))?;
    let tasks = bundle.start(&programs, None)?;
    let answer = tasks.create(&bundle.request(&Stdio::default()));
    refused(answer, ttrpc::Code::UNIMPLEMENTED, &["linux.intelRdt"])?;
    bundle.shut_down(&tasks)?;
    bundle.shim(&programs, &["delete"])?.success()?;
    leak.nothing_left()
}
