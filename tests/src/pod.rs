//! A Pod of several containers, as containerd asks the shim for it: bundles, the shim's commands, and both of its
//! services over one socket.

use crate::{
    bundle::{Spec, busybox_rootfs, process},
    command::{self, Output},
    deadline::{self, Deadline},
    processes,
    programs::Programs,
    requirement::CONTAINERD_SOCKET,
    task::{Stdio, Tasks},
};
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
    api::CreateTaskRequest,
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
        SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse,
        ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    ttrpc,
};

const NAMESPACE: &str = "walnut-tests";

/// A Pod with a directory, where its bundles are and which its containers see as `/pod`.
#[derive(Debug)]
pub struct Pod {
    directory: TempDir,
    programs: Programs,
    /// The id of the sandbox.
    pub id: String,
}

impl Pod {
    /// A Pod that doesn't run, with a bundle as the Sandbox API's: without a configuration.
    pub fn new(programs: Programs, name: &str) -> Result<Self> {
        let pod = Self {
            directory: TempDir::with_prefix("walnut-pod-")?,
            programs,
            id: format!("test-{name}-{}", std::process::id()),
        };
        fs::create_dir_all(pod.bundle(&pod.id).join("rootfs"))?;
        Ok(pod)
    }

    /// The bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory.path().join(id)
    }

    /// What a container has written to a file in `/pod`.
    pub fn read(&self, name: &str) -> Result<String> {
        let path = self.directory.path().join(name);
        deadline::until(name, Deadline::after(deadline::REQUEST), || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            Ok(text.ends_with('\n').then_some(text))
        })
    }

    /// Makes a bundle for a container that runs a shell command, with `namespaces` and these annotations.
    pub fn prepare(&self, id: &str, script: &str, namespaces: Value, kind: &str) -> Result<()> {
        let bundle = self.bundle(id);
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(&rootfs)?;
        busybox_rootfs(&self.programs.busybox, &rootfs)?;
        // The CRI makes it for a Pod with a pause container, and leaves it to the runtime else.
        let shm = if self.bundle(&self.id).join("config.json").exists() || kind == "sandbox" {
            let source = format!("/nowhere/sandboxes/{}/shm", self.id);
            json!({ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "rprivate", "rw"] })
        } else {
            json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=65536k"] })
        };
        let mounts = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
            shm,
            { "destination": "/pod", "type": "bind", "source": self.directory.path(), "options": ["rbind", "rw"] },
        ]);
        let annotations = json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": self.id,
        });
        let spec = Spec::new("rootfs", &["true"])
            .with("/process", process(&["sh", "-c", script]))
            .with(
                "/hostname",
                json!(if kind == "sandbox" { "the-pod" } else { "" }),
            )
            .with("/mounts", mounts)
            .with("/annotations", annotations)
            .with(
                "/linux/cgroupsPath",
                json!(format!("/tests/{}/{id}", self.id)),
            )
            .with("/linux/namespaces", namespaces);
        fs::write(bundle.join("config.json"), spec.to_json())?;
        Ok(())
    }

    /// Runs the shim's program for a container, as containerd does.
    pub fn shim(&self, id: &str, word: &str, stdin: Vec<u8>) -> Result<Output> {
        let mut shim = Command::new(&self.programs.shim);
        shim.args([
            "-namespace",
            NAMESPACE,
            "-id",
            id,
            "-address",
            CONTAINERD_SOCKET,
        ])
        .args(["-publish-binary", "/usr/bin/containerd", word])
        .current_dir(self.bundle(id))
        .env("TTRPC_ADDRESS", format!("{CONTAINERD_SOCKET}.ttrpc"))
        .env("MAX_SHIM_VERSION", "2");
        command::run(&mut shim, stdin, Deadline::after(deadline::REQUEST))
    }

    /// `start` for a container; answers the address.
    pub fn start(&self, id: &str) -> Result<String> {
        let reply = self.shim(id, "start", Vec::new())?.success()?;
        ensure!(reply.stderr.is_empty(), "{reply:?}");
        let parsed: Value = serde_json::from_slice(&reply.stdout)?;
        Ok(parsed["address"].as_str().context("no address")?.to_owned())
    }

    /// Creates and starts a container that has been prepared; answers the process that stands for it.
    pub fn run(&self, tasks: &Tasks, id: &str) -> Result<u32> {
        let pid = tasks.create(&self.request(id))?;
        ensure!(tasks.start(id, "")? == pid, "{id} has two processes");
        Ok(pid)
    }

    /// What containerd asks for to create a container.
    pub fn request(&self, id: &str) -> CreateTaskRequest {
        CreateTaskRequest {
            id: id.to_owned(),
            bundle: self.bundle(id).display().to_string(),
            ..Default::default()
        }
    }

    /// Runs a command in a container; answers its exit status.
    pub fn exec(&self, tasks: &Tasks, id: &str, script: &str) -> Result<u32> {
        tasks.exec(
            id,
            "exec",
            &process(&["sh", "-c", script]),
            &Stdio::default(),
        )?;
        tasks.start(id, "exec")?;
        let status = tasks.wait(id, "exec")?;
        tasks.delete(id, "exec")?;
        Ok(status)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A server that a failed test has left would be the next test's leak.
        for process in processes::list().unwrap_or_default() {
            if process.runs("containerd-shim-walnut-v2") && process.command.contains(&self.id) {
                let _ = process.kill(Signal::KILL);
            }
        }
    }
}

/// Connects to a server by the address that `start` has answered.
pub fn connect(address: &str) -> Result<Tasks> {
    let path = address.strip_prefix("unix://").context("no Unix address")?;
    Tasks::over(UnixStream::connect(Path::new(path)).context("nobody listens")?)
}

/// The VMM of a Pod, and nothing if that process is another program.
pub fn vmm(pid: u32) -> Result<Option<processes::Process>> {
    let found = processes::list()?.into_iter();
    Ok(found
        .filter(|process| process.runs("walnut-vmm"))
        .find(|process| u32::try_from(process.pid) == Ok(pid)))
}

/// The namespaces that the CRI gives a container: those in `shared` by the process of the sandbox.
pub fn namespaces(sandbox_pid: u32, shared: &[&str]) -> Value {
    let kinds = ["mount", "cgroup", "pid", "ipc", "uts", "network"];
    let namespace = |kind: &str| {
        let name = if kind == "network" { "net" } else { kind };
        match shared.contains(&kind) {
            true => json!({ "type": kind, "path": format!("/proc/{sandbox_pid}/ns/{name}") }),
            false => json!({ "type": kind }),
        }
    };
    kinds.into_iter().map(namespace).collect()
}

/// The Sandbox service of one Pod.
#[derive(Debug)]
pub struct Sandbox<'a> {
    /// The connection.
    pub tasks: &'a Tasks,
    /// The Pod.
    pub id: &'a str,
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $answer:ty = $take:expr;)+) => {
        $($(#[$doc])*
        pub fn $name(&self) -> ttrpc::Result<$answer> {
            let request = $request { sandbox_id: self.id.to_owned(), ..Default::default() };
            self.tasks
                .call(|client, context| async move {
                    SandboxClient::new(client).$name(context, &request).await
                })
                .map($take)
        })+
    };
}

impl Sandbox<'_> {
    /// `CreateSandbox`.
    pub fn create_sandbox(
        &self,
        bundle: &Path,
        options: Option<(&str, Vec<u8>)>,
    ) -> ttrpc::Result<()> {
        let options = options.map(|(type_url, value)| crate::task::any(type_url, value));
        let request = CreateSandboxRequest {
            sandbox_id: self.id.to_owned(),
            bundle_path: bundle.display().to_string(),
            options: options.into(),
            ..Default::default()
        };
        self.tasks
            .call(|client, context| async move {
                SandboxClient::new(client)
                    .create_sandbox(context, &request)
                    .await
            })
            .map(drop)
    }

    calls! {
        /// `StartSandbox`; answers the process that stands for the Pod.
        start_sandbox(StartSandboxRequest) -> u32 = |answer| answer.pid;
        /// `Platform`, as `os/architecture`.
        platform(PlatformRequest) -> String =
            |answer| format!("{}/{}", answer.platform.os, answer.platform.architecture);
        /// `StopSandbox`.
        stop_sandbox(StopSandboxRequest) -> () = drop;
        /// `WaitSandbox`; answers the exit status.
        wait_sandbox(WaitSandboxRequest) -> u32 = |answer| answer.exit_status;
        /// `SandboxStatus`.
        sandbox_status(SandboxStatusRequest) -> SandboxStatusResponse = |answer| answer;
        /// `PingSandbox`.
        ping_sandbox(PingRequest) -> () = drop;
        /// `ShutdownSandbox`.
        shutdown_sandbox(ShutdownSandboxRequest) -> () = drop;
        /// `SandboxMetrics`.
        sandbox_metrics(SandboxMetricsRequest) -> SandboxMetricsResponse = |answer| answer;
    }
}
