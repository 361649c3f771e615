//! The two services, a table of contents: decode, call, encode.
//!
//! Must not hold logic.

use crate::{
    cgroup::stats,
    guest::{Guest, changes::Volumes, dial, online},
    insight::{Record, Recorder, SyscallCounter},
    reaper::Exit,
    stdio::Streams,
    storage::Storage,
    task::{AddProcess, CreateContainer, Status, StdioNames, TaskError, Tasks},
};
use async_trait::async_trait;
use protobuf::{
    Message, MessageField, well_known_types::any::Any, well_known_types::timestamp::Timestamp,
};
use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use tokio::sync::Notify;
use ttrpc::{Result, asynchronous::TtrpcContext};
use walnut_agent_api::{
    containerd::{
        api::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse,
            CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
            ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
            ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
            StateRequest, StateResponse, StatsRequest, StatsResponse, Status as ContainerdStatus,
            UpdateTaskRequest, WaitRequest, WaitResponse,
        },
        shim_async::Task,
    },
    guest as guest_api, guest_ttrpc,
};

/// `containerd.task.v3.Task`.
pub(crate) struct TaskService {
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) volumes: Arc<Volumes>,
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let id = r.id.clone();
        let request = CreateContainer {
            id: r.id,
            bundle: r.bundle,
            terminal: r.terminal,
            names: names(r.stdin, r.stdout, r.stderr),
            spec: &r.options.value,
        };
        let created = self.tasks.create(request).await;
        let pid = created.inspect_err(|_| self.volumes.release(&id))?;
        Ok(CreateTaskResponse {
            pid: number(pid),
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> Result<StartResponse> {
        let pid = self.tasks.start(&r.id, &r.exec_id).await?;
        Ok(StartResponse {
            pid: number(pid),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> Result<Empty> {
        let request = AddProcess {
            exec_id: r.exec_id,
            terminal: r.terminal,
            names: names(r.stdin, r.stdout, r.stderr),
            process: &r.spec.value,
        };
        self.tasks.add(&r.id, request)?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> Result<StateResponse> {
        let container = self.tasks.container(&r.id)?;
        let process = container.process(&r.exec_id)?;
        let mut response = StateResponse {
            id: r.id,
            exec_id: r.exec_id,
            bundle: container.bundle.clone(),
            pid: number(process.pid()),
            status: containerd_status(container.status_of(&process)).into(),
            stdin: process.names.stdin.clone(),
            stdout: process.names.stdout.clone(),
            stderr: process.names.stderr.clone(),
            terminal: process.terminal,
            ..Default::default()
        };
        if let Some(exit) = process.ended() {
            response.exit_status = exit.status;
            response.exited_at = timestamp(exit);
        }
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> Result<PidsResponse> {
        let pids = self
            .tasks
            .container(&r.id)?
            .cgroup
            .processes()
            .map_err(TaskError::from)?;
        let processes = pids
            .into_iter()
            .map(|pid| ProcessInfo {
                pid: number(pid),
                ..Default::default()
            })
            .collect();
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> Result<Empty> {
        self.tasks.kill(&r.id, &r.exec_id, r.signal, r.all)?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> Result<WaitResponse> {
        let process = self.tasks.process(&r.id, &r.exec_id)?;
        let exit = process.wait().await.ok_or(TaskError::Finished)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit),
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> Result<DeleteResponse> {
        let (pid, exit) = self.tasks.delete(&r.id, &r.exec_id).await?;
        if r.exec_id.is_empty() {
            self.volumes.release(&r.id);
        }
        Ok(DeleteResponse {
            pid: number(pid),
            exit_status: exit.status,
            exited_at: timestamp(exit),
            ..Default::default()
        })
    }

    /// The half-close of the stdin stream is the message.
    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> Result<Empty> {
        self.tasks.process(&r.id, &r.exec_id)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> Result<Empty> {
        self.tasks
            .process(&r.id, &r.exec_id)?
            .resize(r.width, r.height)?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, r: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = number(self.tasks.process(&r.id, "")?.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> Result<StatsResponse> {
        let metrics = stats::metrics(&self.tasks.container(&r.id)?.cgroup);
        let stats = Any {
            type_url: stats::METRICS_TYPE_URL.to_owned(),
            value: metrics
                .write_to_bytes()
                .map_err(|error| ttrpc::Error::Others(error.to_string()))?,
            ..Default::default()
        };
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> Result<Empty> {
        self.tasks.container(&r.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> Result<Empty> {
        self.tasks.container(&r.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> Result<Empty> {
        self.tasks.update(&r.id, &r.resources.value)?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(TaskError::Unsupported("Checkpoint").into())
    }

    /// Of the shim's own life; the guest's ends by `Guest.Shutdown`.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        Ok(Empty::new())
    }
}

/// `walnut.guest.v1.Guest`.
pub(crate) struct GuestService {
    pub(crate) guest: Guest,
    pub(crate) storage: Storage,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) syscalls: SyscallCounter,
    pub(crate) recorder: Recorder,
    pub(crate) streams: Streams,
    /// Of the agent, see `AgentConfig`.
    pub(crate) boot_time: Duration,
    /// Told when the guest is to end.
    pub(crate) end: Arc<Notify>,
}

#[async_trait]
impl guest_ttrpc::Guest for GuestService {
    async fn setup(
        &self,
        _: &TtrpcContext,
        r: guest_api::SetupRequest,
    ) -> Result<guest_api::SetupResponse> {
        let kernel_release = self.guest.set_up(&r)?;
        Ok(guest_api::SetupResponse {
            kernel_release,
            boot_ns: u64::try_from(self.boot_time.as_nanos()).unwrap_or(u64::MAX),
            ..Default::default()
        })
    }

    async fn add_storage(
        &self,
        _: &TtrpcContext,
        r: guest_api::AddStorageRequest,
    ) -> Result<guest_api::AddStorageResponse> {
        let numbers = self.storage.add(&r).await?;
        Ok(guest_api::AddStorageResponse {
            numbers,
            ..Default::default()
        })
    }

    async fn wait_out_of_memory(
        &self,
        _: &TtrpcContext,
        r: guest_api::WaitOutOfMemoryRequest,
    ) -> Result<guest_api::WaitOutOfMemoryResponse> {
        let kills = self.tasks.kills_after(&r.container_id, r.seen).await?;
        Ok(guest_api::WaitOutOfMemoryResponse {
            kills,
            ..Default::default()
        })
    }

    async fn remove_storage(
        &self,
        _: &TtrpcContext,
        r: guest_api::RemoveStorageRequest,
    ) -> Result<guest_api::RemoveStorageResponse> {
        self.storage.remove(&r.container_id)?;
        Ok(guest_api::RemoveStorageResponse::new())
    }

    async fn online(
        &self,
        _: &TtrpcContext,
        r: guest_api::OnlineRequest,
    ) -> Result<guest_api::OnlineResponse> {
        online::vcpus(r.vcpus).await?;
        Ok(guest_api::OnlineResponse::new())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        r: guest_api::UpdateNetworkRequest,
    ) -> Result<guest_api::UpdateNetworkResponse> {
        let wanted = r.network.unwrap_or_default();
        self.guest.update_network(wanted).await?;
        Ok(guest_api::UpdateNetworkResponse::new())
    }

    async fn dial(
        &self,
        _: &TtrpcContext,
        r: guest_api::DialRequest,
    ) -> Result<guest_api::DialResponse> {
        dial::dial(&self.streams, &r.stream, &r.address).await?;
        Ok(guest_api::DialResponse::new())
    }

    async fn watch_volumes(
        &self,
        _: &TtrpcContext,
        r: guest_api::WatchVolumesRequest,
    ) -> Result<guest_api::WatchVolumesResponse> {
        self.volumes.watch(&r.container_id, r.volumes).await?;
        Ok(guest_api::WatchVolumesResponse::new())
    }

    async fn announce_changes(
        &self,
        _: &TtrpcContext,
        r: guest_api::AnnounceChangesRequest,
    ) -> Result<guest_api::AnnounceChangesResponse> {
        self.volumes.announce(r.changes).await?;
        Ok(guest_api::AnnounceChangesResponse::new())
    }

    async fn load_profile(
        &self,
        _: &TtrpcContext,
        r: guest_api::LoadProfileRequest,
    ) -> Result<guest_api::LoadProfileResponse> {
        self.tasks.load_profile(&r.name, &r.policy)?;
        Ok(guest_api::LoadProfileResponse::new())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: guest_api::ShutdownRequest,
    ) -> Result<guest_api::ShutdownResponse> {
        self.tasks.kill_everything().await?;
        rustix::fs::sync();
        self.end.notify_one();
        Ok(guest_api::ShutdownResponse::new())
    }

    async fn syscalls(
        &self,
        _: &TtrpcContext,
        r: guest_api::SyscallsRequest,
    ) -> Result<guest_api::SyscallsResponse> {
        let counted = self.syscalls.read(r.keep_ms)?;
        let counts = counted
            .counts
            .into_iter()
            .map(|count| guest_api::SyscallCount {
                container_id: count.container,
                number: count.number,
                calls: count.calls,
                errors: count.errors,
                total_ns: count.total_ns,
                longest_ns: count.longest_ns,
                ..Default::default()
            });
        Ok(guest_api::SyscallsResponse {
            elapsed_ns: u64::try_from(counted.elapsed.as_nanos()).unwrap_or(u64::MAX),
            counts: counts.collect(),
            missed: counted.missed,
            ..Default::default()
        })
    }

    async fn record(
        &self,
        _: &TtrpcContext,
        r: guest_api::RecordRequest,
    ) -> Result<guest_api::RecordResponse> {
        let first = self.tasks.process(&r.container_id, "")?;
        let recorder = &self.recorder;
        let record = recorder.record(&r.container_id, r.keep_ms, r.wait_ms, first.wait());
        Ok(recorded(record.await?))
    }
}

fn recorded(record: Record) -> guest_api::RecordResponse {
    let uses = record.uses.into_iter();
    let uses = uses.map(|(number, class)| guest_api::SyscallUse {
        number,
        class,
        ..Default::default()
    });
    guest_api::RecordResponse {
        elapsed_ns: u64::try_from(record.elapsed.as_nanos()).unwrap_or(u64::MAX),
        whole: record.whole,
        ended: record.ended,
        uses: uses.collect(),
        missed: record.missed,
        ..Default::default()
    }
}

fn names(stdin: String, stdout: String, stderr: String) -> StdioNames {
    StdioNames {
        stdin,
        stdout,
        stderr,
    }
}

/// A process id on the wire; 0 is none.
fn number(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}

fn timestamp(exit: Exit) -> MessageField<Timestamp> {
    let since = exit.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    })
}

fn containerd_status(status: Status) -> ContainerdStatus {
    match status {
        Status::Added | Status::Created => ContainerdStatus::CREATED,
        Status::Running => ContainerdStatus::RUNNING,
        Status::Paused => ContainerdStatus::PAUSED,
        Status::Stopped => ContainerdStatus::STOPPED,
    }
}
