//! containerd's Task and Sandbox services: decode, call, encode. No logic.
//!
//! Each call runs as a task of its own, so that a caller that goes away or gives up doesn't leave a
//! container half made.

use crate::{error::ShimError, sandbox::Sandbox};
use async_trait::async_trait;
use containerd_shim_protos::{api, sandbox_api, sandbox_async, shim_async::Task};
use protobuf::MessageField;
use std::{future::Future, sync::Arc};
use ttrpc::r#async::TtrpcContext;

/// The Task service of one Pod.
pub(crate) struct TaskService(pub(crate) Arc<Sandbox>);

async fn run<T: Send + 'static>(
    call: impl Future<Output = Result<T, ShimError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let result = tokio::spawn(call).await.map_err(ShimError::from).flatten();
    Ok(result?)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let pid = run(Arc::clone(&self.0).create(request)).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let pid = run(Arc::clone(&self.0).start(request)).await?;
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        run(Arc::clone(&self.0).exec(request)).await?;
        Ok(api::Empty::default())
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        Ok(self.0.state(&request)?)
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        run(Arc::clone(&self.0).pids(request)).await
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<api::Empty> {
        run(Arc::clone(&self.0).kill(request)).await?;
        Ok(api::Empty::default())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let exit = Arc::clone(&self.0).wait(request).await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let (pid, exit) = run(Arc::clone(&self.0).delete(request)).await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<api::Empty> {
        self.0.close_io(&request)?;
        Ok(api::Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        run(Arc::clone(&self.0).resize_pty(request)).await?;
        Ok(api::Empty::default())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        run(Arc::clone(&self.0).update(request)).await?;
        Ok(api::Empty::default())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        run(Arc::clone(&self.0).stats(request)).await
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        Ok(self.0.connect(&request.id))
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: api::ShutdownRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.0.shutdown();
        Ok(api::Empty::default())
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: api::PauseRequest,
    ) -> ttrpc::Result<api::Empty> {
        run(Arc::clone(&self.0).pause(request)).await?;
        Ok(api::Empty::default())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: api::ResumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        run(Arc::clone(&self.0).resume(request)).await?;
        Ok(api::Empty::default())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        Err(ShimError::Unsupported("checkpoint").into())
    }
}

/// The Sandbox service of one Pod.
pub(crate) struct SandboxService(pub(crate) Arc<Sandbox>);

#[async_trait]
impl sandbox_async::Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::CreateSandboxRequest,
    ) -> ttrpc::Result<sandbox_api::CreateSandboxResponse> {
        self.0.create_sandbox(&request)?;
        Ok(sandbox_api::CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::StartSandboxRequest,
    ) -> ttrpc::Result<sandbox_api::StartSandboxResponse> {
        let started = run(Arc::clone(&self.0).start_sandbox(request.sandbox_id));
        let (pid, created_at) = started.await?;
        Ok(sandbox_api::StartSandboxResponse {
            pid,
            created_at: MessageField::some(created_at.into()),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: sandbox_api::PlatformRequest,
    ) -> ttrpc::Result<sandbox_api::PlatformResponse> {
        let mut response = sandbox_api::PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        // The guest kernel is built for no other.
        platform.architecture = "amd64".to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::StopSandboxRequest,
    ) -> ttrpc::Result<sandbox_api::StopSandboxResponse> {
        run(Arc::clone(&self.0).stop_sandbox(request.sandbox_id)).await?;
        Ok(sandbox_api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::WaitSandboxRequest,
    ) -> ttrpc::Result<sandbox_api::WaitSandboxResponse> {
        let exit = Arc::clone(&self.0).wait_sandbox(request.sandbox_id).await?;
        Ok(sandbox_api::WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::SandboxStatusRequest,
    ) -> ttrpc::Result<sandbox_api::SandboxStatusResponse> {
        Ok(self.0.sandbox_status(&request.sandbox_id)?)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::PingRequest,
    ) -> ttrpc::Result<sandbox_api::PingResponse> {
        self.0.ping_sandbox(&request.sandbox_id)?;
        Ok(sandbox_api::PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<sandbox_api::ShutdownSandboxResponse> {
        run(Arc::clone(&self.0).shutdown_sandbox(request.sandbox_id)).await?;
        Ok(sandbox_api::ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: sandbox_api::SandboxMetricsRequest,
    ) -> ttrpc::Result<sandbox_api::SandboxMetricsResponse> {
        Ok(self.0.sandbox_metrics(&request.sandbox_id)?)
    }
}
