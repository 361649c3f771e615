//! Calls on containers and processes that exist.

use crate::{
    args::is_name,
    container::{Container, Exit, Process, ProcessState},
    error::ShimError,
    exits::{start_failed, watch_process},
    io::{Stdio, Streams},
    log,
    machine::Machine,
    sandbox::{Sandbox, delete_in_guest, state_error},
    slots::SlotError,
};
use containerd_shim_protos::{api, types::task::ProcessInfo};
use protobuf::{EnumOrUnknown, MessageField};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::time::timeout;

/// Processes that an answer has at the most.
const MAX_PIDS: usize = 4096;
/// A containerd that comes back gives a shim five seconds to answer this.
const PIDS_PATIENCE: Duration = Duration::from_secs(2);

impl Sandbox {
    fn container(&self, id: &str) -> Result<Arc<Container>, ShimError> {
        self.containers
            .get(id)
            .ok_or_else(|| ShimError::NoContainer(id.to_owned()))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, ShimError> {
        self.container(id)?
            .process(exec_id)
            .ok_or_else(|| ShimError::NoProcess {
                id: id.to_owned(),
                exec_id: exec_id.to_owned(),
            })
    }

    /// The machine of a container that exists, if its VM still runs.
    pub(crate) fn living(&self) -> Result<Arc<Machine>, ShimError> {
        match self.running() {
            Some(machine) if !machine.has_exited() => Ok(machine),
            Some(machine) => Err(ShimError::VmEnded(machine.describe_end())),
            None => Err(ShimError::VmEnded("it was stopped".to_owned())),
        }
    }

    /// Start.
    pub(crate) async fn start(
        self: Arc<Self>,
        request: api::StartRequest,
    ) -> Result<u32, ShimError> {
        let process = self.process(&request.id, &request.exec_id)?;
        let machine = self.living()?;
        process
            .begin_start()
            .map_err(|state| state_error("start", process.event_id(), state.name()))?;
        let started = async {
            if process.is_init() {
                // Docker and `ctr --cni` connect a container between its creation and its start.
                machine.refresh_network().await?;
            }
            process.start_stdin()?;
            let started = machine.agent().start(&request.id, &request.exec_id);
            machine.ask(started).await
        };
        if let Err(error) = started.await {
            start_failed(&process);
            return Err(error);
        }
        // Queued before the process may be seen to end, so that its exit comes after it.
        self.events.started(&process);
        process.started();
        if process.is_init() {
            let container = self.container(&request.id)?;
            if let Err(error) = container.hooks.started(machine.pid()).await {
                kill_now(&machine, &request.id).await;
                return Err(error.into());
            }
        } else {
            // A container's first process is watched since its creation.
            tokio::spawn(watch_process(
                machine,
                Arc::clone(&process),
                self.events.clone(),
            ));
        }
        Ok(process.pid())
    }

    /// Exec: adds a process to a container.
    pub(crate) async fn exec(
        self: Arc<Self>,
        request: api::ExecProcessRequest,
    ) -> Result<(), ShimError> {
        let (id, exec_id) = (&request.id, &request.exec_id);
        if !is_name(exec_id) {
            return Err(ShimError::Name {
                field: "exec_id",
                value: exec_id.clone(),
            });
        }
        let container = self.container(id)?;
        if !container.execs.reserve(exec_id) {
            return Err(ShimError::Exists {
                what: "process",
                id: exec_id.clone(),
            });
        }
        match self.exec_reserved(&container, &request).await {
            Ok(process) => {
                container.execs.fill(exec_id, Arc::new(process));
                self.events.exec_added(id, exec_id);
                Ok(())
            }
            Err(error) => {
                container.execs.remove(exec_id);
                Err(error)
            }
        }
    }

    async fn exec_reserved(
        &self,
        container: &Container,
        request: &api::ExecProcessRequest,
    ) -> Result<Process, ShimError> {
        let state = container.init.state();
        if state != ProcessState::Running {
            return Err(state_error("add a process to", &request.id, state.name()));
        }
        let json = request.spec.value.clone();
        // Read here so that what isn't a process fails with its place; passed on as it came.
        let checked: Result<oci_spec::runtime::Process, _> = serde_json::from_slice(&json);
        checked.map_err(|source| ShimError::Json {
            what: "the process of exec",
            path: PathBuf::from(&request.exec_id),
            source,
        })?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            owner: (self.events.namespace(), request.exec_id.clone()),
        };
        let machine = self.living()?;
        let agent = machine.agent();
        let (streams, names) = machine.ask(Streams::open(agent, &stdio)).await?;
        machine
            .ask(agent.exec(&request.id, &request.exec_id, json, stdio.terminal, &names))
            .await?;
        Ok(Process::new(
            &request.id,
            &request.exec_id,
            machine.pid(),
            stdio,
            streams,
        ))
    }

    /// State.
    pub(crate) fn state(
        &self,
        request: &api::StateRequest,
    ) -> Result<api::StateResponse, ShimError> {
        let container = self.container(&request.id)?;
        let process = self.process(&request.id, &request.exec_id)?;
        let state = process.state();
        let stdio = process.stdio();
        let mut response = api::StateResponse {
            id: request.id.clone(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: process.pid(),
            status: EnumOrUnknown::new(state.status()),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            exec_id: request.exec_id.clone(),
            ..Default::default()
        };
        if let Some(exit) = state.exit() {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(exit.at.into());
        }
        Ok(response)
    }

    /// Pids: one for each process of the container, but each the VMM's, which stands for all that runs in it. It does so
    /// for a container that has ended too, until it is deleted: a containerd that comes back takes a shim without
    /// processes for a leak, and removes it with the exit status.
    pub(crate) async fn pids(
        self: Arc<Self>,
        request: api::PidsRequest,
    ) -> Result<api::PidsResponse, ShimError> {
        let pid = self.container(&request.id)?.init.pid();
        let mut response = api::PidsResponse::default();
        if let Ok(machine) = self.living() {
            // A guest that doesn't answer is there all the same.
            let count = timeout(PIDS_PATIENCE, machine.ask(machine.agent().pids(&request))).await;
            let count = count.map_or(0, |answer| answer.unwrap_or(0));
            let count = count.clamp(1, MAX_PIDS);
            let process = ProcessInfo {
                pid,
                ..Default::default()
            };
            response.processes = vec![process; count];
        }
        Ok(response)
    }

    /// Kill. On a VM that has ended everything is killed already.
    pub(crate) async fn kill(self: Arc<Self>, request: api::KillRequest) -> Result<(), ShimError> {
        let process = self.process(&request.id, &request.exec_id)?;
        let Ok(machine) = self.living() else {
            return Ok(());
        };
        if process.state().exit().is_some() {
            return Err(ShimError::Finished);
        }
        match machine.ask(machine.agent().kill(&request)).await {
            Err(_) if machine.has_exited() => Ok(()),
            other => other,
        }
    }

    /// Wait.
    pub(crate) async fn wait(
        self: Arc<Self>,
        request: api::WaitRequest,
    ) -> Result<Exit, ShimError> {
        Ok(self.process(&request.id, &request.exec_id)?.wait().await)
    }

    /// Delete, of a process that was added or of a container.
    pub(crate) async fn delete(
        self: Arc<Self>,
        request: api::DeleteRequest,
    ) -> Result<(u32, Exit), ShimError> {
        if request.exec_id.is_empty() {
            return self.delete_container(request.id).await;
        }
        let (id, exec_id) = (&request.id, &request.exec_id);
        let container = self.container(id)?;
        let process = container
            .execs
            .begin_removal(exec_id)
            .map_err(|error| match error {
                SlotError::Missing => ShimError::NoProcess {
                    id: id.clone(),
                    exec_id: exec_id.clone(),
                },
                SlotError::Making => state_error("delete", exec_id, "being created"),
                SlotError::Removing => state_error("delete", exec_id, "being deleted"),
            })?;
        let deleted = self.delete_process(&process).await;
        match deleted {
            Ok(_) => {
                process.drop_streams();
                container.execs.remove(exec_id);
            }
            Err(_) => container.execs.keep(exec_id, Arc::clone(&process)),
        }
        deleted.map(|exit| (process.pid(), exit))
    }

    async fn delete_process(&self, process: &Process) -> Result<Exit, ShimError> {
        let state = process.state();
        let exit = match state {
            // Added and never started.
            ProcessState::Created => Exit::now(0),
            ProcessState::Stopped(exit) | ProcessState::Reported(exit) => exit,
            ProcessState::Starting | ProcessState::Running | ProcessState::Paused => {
                return Err(state_error("delete", process.exec_id(), state.name()));
            }
        };
        if let Ok(machine) = self.living() {
            delete_in_guest(&machine, process.container_id(), process.exec_id()).await?;
        }
        Ok(exit)
    }

    /// CloseIO. Answered before the input is through: its end reaches the guest after its last byte.
    pub(crate) fn close_io(&self, request: &api::CloseIORequest) -> Result<(), ShimError> {
        let process = self.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(())
    }

    /// ResizePty.
    pub(crate) async fn resize_pty(
        self: Arc<Self>,
        request: api::ResizePtyRequest,
    ) -> Result<(), ShimError> {
        let process = self.process(&request.id, &request.exec_id)?;
        if !process.stdio().terminal {
            return Err(state_error(
                "resize",
                process.event_id(),
                "without a terminal",
            ));
        }
        if process.state().exit().is_some() {
            return Err(ShimError::Finished);
        }
        let machine = self.living()?;
        machine.ask(machine.agent().resize_pty(&request)).await
    }

    /// Pause.
    pub(crate) async fn pause(
        self: Arc<Self>,
        request: api::PauseRequest,
    ) -> Result<(), ShimError> {
        let init = Arc::clone(&self.container(&request.id)?.init);
        let state = init.state();
        if state != ProcessState::Running {
            return Err(state_error("pause", &request.id, state.name()));
        }
        let machine = self.living()?;
        machine.ask(machine.agent().pause(&request)).await?;
        init.paused();
        self.events.paused(&request.id);
        Ok(())
    }

    /// Resume.
    pub(crate) async fn resume(
        self: Arc<Self>,
        request: api::ResumeRequest,
    ) -> Result<(), ShimError> {
        let init = Arc::clone(&self.container(&request.id)?.init);
        let state = init.state();
        if state != ProcessState::Paused {
            return Err(state_error("resume", &request.id, state.name()));
        }
        let machine = self.living()?;
        machine.ask(machine.agent().resume(&request)).await?;
        init.resumed();
        self.events.resumed(&request.id);
        Ok(())
    }

    /// Update.
    pub(crate) async fn update(
        self: Arc<Self>,
        request: api::UpdateTaskRequest,
    ) -> Result<(), ShimError> {
        self.container(&request.id)?;
        let machine = self.living()?;
        machine.update(request).await
    }

    /// Stats.
    pub(crate) async fn stats(
        self: Arc<Self>,
        request: api::StatsRequest,
    ) -> Result<api::StatsResponse, ShimError> {
        self.container(&request.id)?;
        let machine = self.living()?;
        machine.ask(machine.agent().stats(&request)).await
    }

    /// Connect.
    pub(crate) fn connect(&self, id: &str) -> api::ConnectResponse {
        // containerd also asks before the first Create, to see whether the shim answers.
        let task_pid = self
            .containers
            .get(id)
            .map_or(0, |container| container.init.pid());
        api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..Default::default()
        }
    }
}

/// Ends a container whose start did not come to its end; who watches it tells containerd.
async fn kill_now(machine: &Machine, id: &str) {
    if let Err(error) = machine.ask(machine.agent().kill_now(id)).await {
        log::error("ending a container whose start failed", &error);
    }
}
