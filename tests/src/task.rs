//! Speaks containerd's Task service (v3) over ttrpc, as containerd does to a shim and a shim to its agent.
//!
//! Blocks: a test tells one story. Every call has a deadline, which ttrpc keeps.

use crate::deadline;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::{fmt, future::Future, os::unix::net::UnixStream};
use walnut_agent_api::{
    PROCESS_TYPE_URL,
    containerd::{
        api::{
            CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
            StartRequest, StateRequest, StateResponse, WaitRequest,
        },
        protobuf::well_known_types::any::Any,
        shim_async::TaskClient,
        ttrpc::{self, asynchronous::Client, context},
    },
};

/// The files or streams of one process; empty for none.
#[derive(Debug, Clone, Default)]
pub struct Stdio {
    /// Its standard input.
    pub stdin: String,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// A connection to a server of the Task service.
pub struct Tasks {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl fmt::Debug for Tasks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Tasks").finish_non_exhaustive()
    }
}

impl Tasks {
    /// Speaks ttrpc over this stream.
    pub fn over(stream: UnixStream) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        let client = runtime.block_on(async {
            stream.set_nonblocking(true)?;
            let stream = tokio::net::UnixStream::from_std(stream)?;
            std::io::Result::Ok(Client::new(ttrpc::asynchronous::transport::Socket::new(
                stream,
            )))
        });
        Ok(Self {
            runtime,
            client: client.context("cannot use a socket")?,
        })
    }

    /// Makes one call on any service of this connection.
    pub fn call<T, F>(&self, call: impl FnOnce(Client, context::Context) -> F) -> ttrpc::Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let context = context::with_duration(deadline::BOOT);
        self.runtime.block_on(call(self.client.clone(), context))
    }

    /// Creates a container.
    pub fn create(&self, request: &CreateTaskRequest) -> ttrpc::Result<u32> {
        self.call(|client, context| async {
            TaskClient::new(client).create(context, request).await
        })
        .map(|response| response.pid)
    }

    /// Adds a process to a container.
    pub fn exec(&self, id: &str, exec: &str, process: &Value, stdio: &Stdio) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            spec: Some(any(PROCESS_TYPE_URL, process.to_string().into_bytes())).into(),
            ..Default::default()
        };
        self.call(
            |client, context| async move { TaskClient::new(client).exec(context, &request).await },
        )
        .map(drop)
    }

    /// Starts a container (an empty `exec`) or one of its processes.
    pub fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.call(|client, context| async move {
            TaskClient::new(client).start(context, &request).await
        })
        .map(|response| response.pid)
    }

    /// Waits for the end of a process.
    pub fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.call(
            |client, context| async move { TaskClient::new(client).wait(context, &request).await },
        )
        .map(|response| response.exit_status)
    }

    /// Sends a signal to a process, or to all of a container.
    pub fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.call(
            |client, context| async move { TaskClient::new(client).kill(context, &request).await },
        )
        .map(drop)
    }

    /// Says that no more will come on a process's standard input.
    pub fn close_stdin(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        let request = CloseIORequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: true,
            ..Default::default()
        };
        self.call(|client, context| async move {
            TaskClient::new(client).close_io(context, &request).await
        })
        .map(drop)
    }

    /// Forgets a process that has ended.
    pub fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.call(|client, context| async move {
            TaskClient::new(client).delete(context, &request).await
        })
        .map(|response| response.exit_status)
    }

    /// Where a process stands.
    pub fn state(&self, id: &str, exec: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.call(|client, context| async move {
            TaskClient::new(client).state(context, &request).await
        })
    }
}

/// A value with its type's name, as containerd wraps JSON.
pub fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    }
}

/// The status of a refused call: its code and its message.
pub fn refusal(error: &ttrpc::Error) -> Result<(ttrpc::Code, String)> {
    match error {
        ttrpc::Error::RpcStatus(status) => Ok((status.code(), status.message().to_owned())),
        other => bail!("the connection failed instead of the call: {other}"),
    }
}

/// Fails unless a call was refused with `code`, in one line that holds each of `words`.
pub fn refused<T>(answer: ttrpc::Result<T>, code: ttrpc::Code, words: &[&str]) -> Result<()> {
    let Err(error) = answer else {
        bail!("the call succeeded, but {code:?} was expected");
    };
    let (found, message) = refusal(&error)?;
    ensure!(
        found == code,
        "expected {code:?}, found {found:?}: {message}"
    );
    for word in words {
        ensure!(message.contains(word), "{word:?} is not in {message:?}");
    }
    ensure!(!message.contains('\n'), "more than one line: {message:?}");
    Ok(())
}
