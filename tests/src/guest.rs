//! A VM with an agent and a root file system, in which tests run containers without containerd.

use crate::{
    agent::Agent,
    bundle::{Spec, busybox_rootfs},
    programs::Programs,
    task::Stdio,
    vmm::{Vm, VmBuilder},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use walnut_agent_api::SHARE_MOUNT_POINT;

/// The signal that no process survives.
pub const SIGKILL: u32 = 9;

/// A VM whose agent has been set up, and a root file system for its containers.
#[derive(Debug)]
pub struct Guest {
    /// The VM.
    pub vm: Vm,
    /// Its agent.
    pub agent: Agent,
    root: String,
    containers: u32,
}

/// What a container left.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status.
    pub status: u32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

impl Guest {
    /// Boots a VM; its agent awaits `setup`.
    pub fn boot(programs: &Programs) -> Result<Self> {
        Self::of(programs, &VmBuilder::agent(programs))
    }

    /// Boots this VM, whose agent awaits `setup`.
    pub fn of(programs: &Programs, vm: &VmBuilder) -> Result<Self> {
        let mut vm = vm.start()?;
        let root = vm.share_path().join("box/rootfs");
        std::fs::create_dir_all(&root)?;
        busybox_rootfs(&programs.busybox, &root)?;
        vm.wait_until_ready()?;
        let agent = Agent::connect(&vm)?;
        Ok(Self {
            vm,
            agent,
            root: format!("{SHARE_MOUNT_POINT}/box/rootfs"),
            containers: 0,
        })
    }

    /// A name that no container has had.
    pub fn name(&mut self) -> String {
        self.containers += 1;
        format!("container-{}", self.containers)
    }

    /// A configuration of a container in this guest.
    pub fn spec(&self, id: &str, args: &[&str]) -> Spec {
        Spec::new(&self.root, args).with("/linux/cgroupsPath", json!(format!("/tests/{id}")))
    }

    /// Creates, starts, feeds, awaits and deletes a container.
    pub fn run(
        &mut self,
        change: impl FnOnce(Spec) -> Spec,
        script: &str,
        stdin: &[u8],
    ) -> Result<Outcome> {
        let id = self.name();
        let spec = change(self.spec(&id, &["sh", "-c", script]));
        let (input, mut to_process) = self.agent.open_stream()?;
        let (output, stdout) = self.agent.open_stream()?;
        let (errors, stderr) = self.agent.open_stream()?;
        let stdio = Stdio {
            stdin: input,
            stdout: output,
            stderr: errors,
            terminal: false,
        };
        self.agent
            .create(&id, spec.to_json(), &stdio)
            .context("create")?;
        let tasks = &self.agent.tasks;
        tasks.start(&id, "").context("start")?;
        let (status, stdout, stderr) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| stdout.read_all());
            let errors = scope.spawn(|| stderr.read_text());
            to_process.write(stdin)?;
            to_process.finish()?;
            let status = tasks.wait(&id, "").context("wait")?;
            let joined = (reader.join(), errors.join());
            match joined {
                (Ok(stdout), Ok(stderr)) => anyhow::Ok((status, stdout?, stderr?)),
                _ => bail!("a reader panicked"),
            }
        })?;
        let deleted = tasks.delete(&id, "").context("delete")?;
        ensure!(deleted == status, "wait says {status}, delete {deleted}");
        Ok(Outcome {
            status,
            stdout,
            stderr,
        })
    }

    /// A container that stays until it is removed.
    pub fn stay(&mut self) -> Result<String> {
        let id = self.name();
        let spec = self.spec(&id, &["sleep", "100000"]);
        self.agent
            .create(&id, spec.to_json(), &Stdio::default())
            .context("create")?;
        self.agent.tasks.start(&id, "").context("start")?;
        Ok(id)
    }

    /// Kills and deletes a container, and gives its exit status.
    pub fn remove(&self, id: &str) -> Result<u32> {
        let tasks = &self.agent.tasks;
        tasks.kill(id, "", SIGKILL, false).context("kill")?;
        let status = tasks.wait(id, "").context("wait")?;
        tasks.delete(id, "").context("delete")?;
        Ok(status)
    }
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}
