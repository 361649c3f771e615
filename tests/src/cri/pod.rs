//! A Pod, as the kubelet makes it: a cgroup, a directory for logs, a sandbox.

use super::{Container, Cri, Refused, merge, text};
use crate::ctr;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// The parent of all Pods' cgroups, as the kubelet has one.
const CGROUPS: &str = "/sys/fs/cgroup/walnut-pods";

/// A sandbox that is stopped and removed, with all it has, when this value goes.
#[derive(Debug)]
pub struct Pod<'a> {
    pub(super) cri: &'a Cri,
    /// Its id.
    pub id: String,
    pub(super) config: Value,
    files: Files,
}

/// What the kubelet makes for a Pod, and removes after it.
#[derive(Debug)]
struct Files {
    cgroup: PathBuf,
    directory: TempDir,
}

impl Drop for Files {
    fn drop(&mut self) {
        // One that isn't empty is for the leak check to find.
        let _ = fs::remove_dir(&self.cgroup);
    }
}

impl Cri {
    /// Runs a Pod; `over` is put over a plain configuration.
    pub fn pod(&self, over: Value) -> Result<Pod<'_>> {
        let name = ctr::unique_name(self.runtime());
        let cgroup = Path::new(CGROUPS).join(&name);
        fs::create_dir_all(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        // As the kubelet does: what a Pod's cgroup may limit.
        let controllers = "+cpu +memory +pids";
        for parent in [Path::new(CGROUPS), &cgroup] {
            fs::write(parent.join("cgroup.subtree_control"), controllers)
                .with_context(|| format!("cannot delegate {}", parent.display()))?;
        }
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let files = Files { cgroup, directory };
        let mut config = json!({
            "metadata": { "name": name, "uid": name, "namespace": "walnut", "attempt": 0 },
            "hostname": name,
            "log_directory": files.directory.path().join("logs"),
            "linux": {
                "cgroup_parent": format!("/walnut-pods/{name}"),
                "security_context": { "namespace_options": { "pid": "CONTAINER" } },
            },
        });
        merge(&mut config, over);
        let request = json!({ "config": config, "runtime_handler": self.handler });
        let answer = self.call("RunPodSandbox", request)?;
        Ok(Pod {
            cri: self,
            id: text(&answer["pod_sandbox_id"])?,
            config,
            files,
        })
    }
}

impl<'a> Pod<'a> {
    /// The service that it was made with.
    pub fn cri(&self) -> &Cri {
        self.cri
    }

    /// Its status.
    pub fn status(&self) -> Result<Value> {
        let request = json!({ "pod_sandbox_id": self.id });
        Ok(self.cri.call("PodSandboxStatus", request)?["status"].take())
    }

    /// Its first address.
    pub fn address(&self) -> Result<String> {
        text(&self.status()?["network"]["ip"])
    }

    /// Makes and starts a container of busybox that runs a script; `over` is put over its configuration.
    pub fn shell(&self, name: &str, script: &str, over: Value) -> Result<Container<'_>> {
        let container = self.create(name, script, over)?;
        container.start()?;
        Ok(container)
    }

    /// Makes a container, without starting it.
    pub fn create(&self, name: &str, script: &str, over: Value) -> Result<Container<'_>> {
        self.create_program(name, &["sh", "-c", script], over)
    }

    /// As [`Pod::create`], with a program and its arguments.
    pub fn create_program(
        &self,
        name: &str,
        program: &[&str],
        over: Value,
    ) -> Result<Container<'_>> {
        let mut config = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": ctr::BUSYBOX },
            "command": program,
            "log_path": format!("{name}.log"),
            "linux": { "security_context": { "namespace_options": { "pid": "CONTAINER" } } },
        });
        merge(&mut config, over);
        let request = json!({
            "pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config,
        });
        let answer = self.cri.call("CreateContainer", request)?;
        let log = format!("logs/{}", text(&config["log_path"])?);
        let log = self.files.directory.path().join(log);
        let id = text(&answer["container_id"])?;
        Ok(Container { pod: self, id, log })
    }

    /// A directory for what its containers share with the node.
    pub fn directory(&self) -> &Path {
        self.files.directory.path()
    }

    /// `StopPodSandbox`.
    pub fn stop(&self) -> Result<()> {
        let request = json!({ "pod_sandbox_id": self.id });
        self.cri.call("StopPodSandbox", request).map(drop)
    }

    /// `StopPodSandbox` and `RemovePodSandbox`, as the kubelet does it.
    pub fn remove(&self) -> Result<()> {
        self.stop()?;
        let request = json!({ "pod_sandbox_id": self.id });
        self.cri.call("RemovePodSandbox", request).map(drop)
    }

    /// Calls a method whose request is this Pod's id.
    pub fn ask(&self, method: &str) -> Result<Value> {
        self.cri.call(method, json!({ "pod_sandbox_id": self.id }))
    }

    /// The address at which connections to a port of it are taken.
    pub fn port_forward(&self, port: u16) -> Result<String> {
        let request = json!({ "pod_sandbox_id": self.id, "port": [port] });
        text(&self.cri.call("PortForward", request)?["url"])
    }

    /// `CreateContainer` or what else must be refused; gives why.
    pub fn refuses(&self, name: &str, over: Value) -> Result<Refused> {
        match self.shell(name, "true", over) {
            Ok(_) => anyhow::bail!("{name} runs"),
            Err(error) => error.downcast(),
        }
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Removing twice succeeds, as the CRI asks; what stays is for the leak check to find.
        let _ = self.remove();
    }
}
