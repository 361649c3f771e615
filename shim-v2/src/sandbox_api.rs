//! A Pod that containerd's Sandbox API makes, starts and stops (`containerd.runtime.sandbox.v1`).
//!
//! ```text
//!    Absent --Create--> Created --Start--> Starting --> Ready --Stop, or the VM ends--> Stopping --> Stopped
//!                        ^  |                  |
//!                        |  '---Stop--> Stopped|
//!                        '------- failed ------'
//! ```
//!
//! `Absent` is every Pod that this API was not asked for: it lives as long as its containers. All others live
//! from Start to Stop, with or without containers. The states' names for containerd are the CRI's.

use crate::{
    agent::StreamNames,
    container::{Exit, KILLED},
    error::ShimError,
    log,
    machine::Machine,
    pod::Pod,
    pod_config::{PodConfig, configuration},
    pod_files,
    sandbox::{Sandbox, state_error},
    spec,
};
use containerd_shim_protos::sandbox_api as api;
use protobuf::MessageField;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::timeout;

/// For the containers' exits to be told, once their VM has ended.
const REPORT_DEADLINE: Duration = Duration::from_secs(10);
/// The CRI's names.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Where a Pod of the Sandbox API is in its life.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    Absent,
    Created(Arc<PodConfig>),
    Starting,
    Ready { pid: u32, created_at: SystemTime },
    Stopping,
    Stopped(Exit),
}

impl Stage {
    /// For error messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Absent => "not created",
            Self::Created(_) => "created and not started",
            Self::Starting => "starting",
            Self::Ready { .. } => "running",
            Self::Stopping => "stopping",
            Self::Stopped(_) => "stopped",
        }
    }

    /// Whether the Pod lives by itself, and not by its containers.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

impl Sandbox {
    fn check_sandbox(&self, id: &str) -> Result<(), ShimError> {
        if id == self.id && !self.stage.borrow().is_absent() {
            return Ok(());
        }
        Err(ShimError::NoSandbox(id.to_owned()))
    }

    /// Goes to `next` if the present stage is one from which that is possible; answers the stage it was in.
    fn advance(
        &self,
        next: Stage,
        allowed: impl FnOnce(&Stage) -> bool,
    ) -> Result<Stage, ShimError> {
        let mut before = None;
        let advanced = self.stage.send_if_modified(|stage| {
            let may = allowed(stage);
            before = Some(stage.clone());
            if may {
                *stage = next;
            }
            may
        });
        let before = before.unwrap_or(Stage::Absent);
        if advanced {
            Ok(before)
        } else {
            Err(state_error("change", &self.id, before.name()))
        }
    }

    /// CreateSandbox.
    pub(crate) fn create_sandbox(
        &self,
        request: &api::CreateSandboxRequest,
    ) -> Result<(), ShimError> {
        if request.sandbox_id != self.id {
            return Err(ShimError::NoSandbox(request.sandbox_id.clone()));
        }
        if !request.rootfs.is_empty() {
            return Err(ShimError::Unsupported(
                "a root file system of the sandbox's own",
            ));
        }
        let config = configuration(request)?;
        if !self.containers.is_empty() {
            return Err(state_error(
                "create the sandbox",
                &self.id,
                "in use by containers",
            ));
        }
        self.advance(Stage::Created(Arc::new(config)), Stage::is_absent)
            .map(drop)
            .map_err(|_| ShimError::Exists {
                what: "sandbox",
                id: self.id.clone(),
            })
    }

    /// StartSandbox: boots the VM.
    pub(crate) async fn start_sandbox(
        self: Arc<Self>,
        id: String,
    ) -> Result<(u32, SystemTime), ShimError> {
        self.check_sandbox(&id)?;
        let before = self
            .advance(Stage::Starting, |stage| matches!(stage, Stage::Created(_)))
            .map_err(|_| state_error("start", &id, self.stage.borrow().name()))?;
        let Stage::Created(config) = &before else {
            return Err(state_error("start", &id, before.name()));
        };
        match self.start_pod(config).await {
            Ok(machine) => {
                let (pid, created_at) = (machine.pid(), SystemTime::now());
                self.stage.send_replace(Stage::Ready { pid, created_at });
                tokio::spawn(self.watch_pod(machine));
                Ok((pid, created_at))
            }
            Err(error) => {
                self.close_machine().await;
                self.stage.send_replace(before);
                Err(error)
            }
        }
    }

    async fn start_pod(&self, config: &PodConfig) -> Result<Arc<Machine>, ShimError> {
        let pod = Pod {
            id: &self.id,
            pid: None,
        };
        let mut guest = config.spec.clone();
        spec::translate_linux(&mut guest, &self.id, pod)?;
        let json = serde_json::to_vec(&guest).map_err(|source| ShimError::Json {
            what: "the Pod's configuration",
            path: self.id.clone().into(),
            source,
        })?;
        let hostname = config.spec.hostname().as_deref().unwrap_or_default();
        let files = self.state.etc();
        pod_files::write(&files, hostname, config.resolv.as_deref()).map_err(|source| {
            ShimError::File {
                what: "writing",
                path: files,
                source,
            }
        })?;
        let part = spec::host_part(&config.spec)?;
        let machine = self.machine(&part).await?;
        let agent = machine.agent();
        let names = StreamNames::default();
        machine
            .ask(agent.create(&self.id, json, false, &names))
            .await?;
        machine.ask(agent.start(&self.id, "")).await?;
        Ok(machine)
    }

    /// Ends the Pod when its VM or what holds its namespaces ends, unless Stop does.
    async fn watch_pod(self: Arc<Self>, machine: Arc<Machine>) {
        // Any answer, a refusal too, says that it is no more.
        let held = machine.ask(machine.agent().wait(&self.id, "")).await;
        let mine = self.advance(Stage::Stopping, |stage| {
            matches!(stage, Stage::Ready { .. })
        });
        if mine.is_ok() {
            if let Err(error) = held {
                log::error("the sandbox has ended", &error);
            }
            self.close_pod(KILLED).await;
        }
    }

    /// Ends the VM, and waits until containerd has been told of its containers' ends.
    async fn close_pod(&self, status: u32) {
        let containers = self.containers.all();
        if let Some(machine) = self.running() {
            machine.end().await;
        }
        let told = async {
            for container in &containers {
                container.init.wait().await;
            }
        };
        if timeout(REPORT_DEADLINE, told).await.is_err() {
            log::line("containerd was not told of every container's end");
        }
        self.close_machine().await;
        self.stage.send_replace(Stage::Stopped(Exit::now(status)));
    }

    /// StopSandbox: everything in it is killed at once, so that there is no time to allow for.
    pub(crate) async fn stop_sandbox(self: Arc<Self>, id: String) -> Result<(), ShimError> {
        self.check_sandbox(&id)?;
        let mut stages = self.stage.subscribe();
        loop {
            let stage = stages.borrow_and_update().clone();
            match stage {
                Stage::Absent => return Err(ShimError::NoSandbox(id)),
                Stage::Stopped(_) => return Ok(()),
                Stage::Created(_) => {
                    let stopped = Stage::Stopped(Exit::now(0));
                    // Somebody else's change is looked at in the next turn.
                    let _ = self.advance(stopped, |stage| matches!(stage, Stage::Created(_)));
                }
                Stage::Ready { .. } => {
                    let ready = |stage: &Stage| matches!(stage, Stage::Ready { .. });
                    if self.advance(Stage::Stopping, ready).is_ok() {
                        self.close_pod(0).await;
                    }
                }
                // Both have deadlines of their own, so this ends. The sender is `self`.
                Stage::Starting | Stage::Stopping => drop(stages.changed().await),
            }
        }
    }

    /// WaitSandbox.
    pub(crate) async fn wait_sandbox(self: Arc<Self>, id: String) -> Result<Exit, ShimError> {
        self.check_sandbox(&id)?;
        let mut stages = self.stage.subscribe();
        let stopped = stages
            .wait_for(|stage| matches!(stage, Stage::Stopped(_)))
            .await;
        match stopped.as_deref() {
            Ok(Stage::Stopped(exit)) => Ok(*exit),
            _ => Err(ShimError::NoSandbox(id)),
        }
    }

    /// SandboxStatus.
    pub(crate) fn sandbox_status(&self, id: &str) -> Result<api::SandboxStatusResponse, ShimError> {
        self.check_sandbox(id)?;
        let mut response = api::SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            state: NOT_READY.to_owned(),
            ..Default::default()
        };
        match *self.stage.borrow() {
            Stage::Ready { pid, created_at } => {
                if self.ready().is_some() {
                    response.state = READY.to_owned();
                }
                response.pid = pid;
                response.created_at = MessageField::some(created_at.into());
            }
            Stage::Stopped(exit) => response.exited_at = MessageField::some(exit.at.into()),
            _ => {}
        }
        Ok(response)
    }

    fn ready(&self) -> Option<Arc<Machine>> {
        self.running().filter(|machine| !machine.has_exited())
    }

    /// PingSandbox: whether it is alive.
    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<(), ShimError> {
        self.check_sandbox(id)?;
        let stage = self.stage.borrow();
        match *stage {
            Stage::Ready { .. } if self.ready().is_some() => Ok(()),
            _ => Err(state_error("reach", id, stage.name())),
        }
    }

    /// SandboxMetrics: what the Pod costs the host.
    pub(crate) fn sandbox_metrics(
        &self,
        id: &str,
    ) -> Result<api::SandboxMetricsResponse, ShimError> {
        self.check_sandbox(id)?;
        let machine = self
            .ready()
            .ok_or_else(|| state_error("measure", id, self.stage.borrow().name()))?;
        let mut response = api::SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = id.to_owned();
        metrics.timestamp = MessageField::some(SystemTime::now().into());
        metrics.data = MessageField::some(machine.metrics());
        Ok(response)
    }

    /// ShutdownSandbox: stops what runs, and then the server ends.
    pub(crate) async fn shutdown_sandbox(self: Arc<Self>, id: String) -> Result<(), ShimError> {
        if id != self.id {
            return Err(ShimError::NoSandbox(id));
        }
        if !self.stage.borrow().is_absent() {
            Arc::clone(&self).stop_sandbox(id).await?;
        } else if !self.containers.is_empty() {
            return Err(state_error("shut down", &self.id, "in use by containers"));
        }
        self.finish();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{events::Events, state_dir::StateDir};
    use ttrpc::Code;

    fn sandbox(directory: &std::path::Path) -> Arc<Sandbox> {
        let events = Events::start(String::new(), "ns".into());
        Arc::new(Sandbox::new(
            "ns",
            "pod",
            StateDir::at(directory.to_owned()),
            events,
        ))
    }

    fn code<T: std::fmt::Debug>(answer: Result<T, ShimError>) -> Code {
        match ttrpc::Error::from(answer.unwrap_err()) {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other}"),
        }
    }

    fn request(id: &str) -> api::CreateSandboxRequest {
        api::CreateSandboxRequest {
            sandbox_id: id.into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_pod_that_was_not_created_does_not_exist() {
        let directory = tempfile::tempdir().unwrap();
        let sandbox = sandbox(directory.path());
        let me = || Arc::clone(&sandbox);
        assert_eq!(
            code(sandbox.create_sandbox(&request("other"))),
            Code::NOT_FOUND
        );
        assert_eq!(
            code(me().start_sandbox("pod".into()).await),
            Code::NOT_FOUND
        );
        assert_eq!(code(me().stop_sandbox("pod".into()).await), Code::NOT_FOUND);
        assert_eq!(code(me().wait_sandbox("pod".into()).await), Code::NOT_FOUND);
        assert_eq!(code(sandbox.sandbox_status("pod")), Code::NOT_FOUND);
        // Whose Create was refused ends all the same.
        me().shutdown_sandbox("pod".into()).await.unwrap();
        sandbox.finished().await;
    }

    #[tokio::test]
    async fn a_pod_that_never_started_can_be_stopped_and_not_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let sandbox = sandbox(directory.path());
        let me = || Arc::clone(&sandbox);
        sandbox.create_sandbox(&request("pod")).unwrap();
        assert_eq!(
            code(sandbox.create_sandbox(&request("pod"))),
            Code::ALREADY_EXISTS
        );
        assert_eq!(sandbox.sandbox_status("pod").unwrap().state, NOT_READY);
        assert_eq!(code(sandbox.ping_sandbox("pod")), Code::FAILED_PRECONDITION);
        assert_eq!(
            code(sandbox.sandbox_metrics("pod")),
            Code::FAILED_PRECONDITION
        );
        let waiting = tokio::spawn(me().wait_sandbox("pod".into()));
        me().stop_sandbox("pod".into()).await.unwrap();
        me().stop_sandbox("pod".into()).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().status, 0);
        assert_eq!(
            code(me().start_sandbox("pod".into()).await),
            Code::FAILED_PRECONDITION
        );
        me().shutdown_sandbox("pod".into()).await.unwrap();
        sandbox.finished().await;
    }
}
