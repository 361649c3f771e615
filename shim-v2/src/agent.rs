//! The client of the guest's agent.
//!
//! The guest is hostile: every call but `wait` has a deadline (`wait` ends with the VM), answers are
//! bounded by ttrpc's message size, an error's text is cut and made printable, and nothing that the agent
//! says is used as a path, a process id or a time on the host.

mod guest_calls;

use crate::error::printable;
use containerd_shim_protos::{api, shim_async::TaskClient};
use protobuf::{MessageField, well_known_types::any::Any};
use std::{
    future::Future,
    io,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
    context::Context,
};
use walnut_agent_api::{
    AGENT_PORT, PROCESS_TYPE_URL, SPEC_TYPE_URL, STDIO_PORT, STREAM_ACCEPTED, StreamId, guest,
    guest_ttrpc::GuestClient,
};
use walnut_vmm_api::{HandshakeError, MAX_HANDSHAKE_BYTES, connect_line, parse_ok};

/// One scale for every wait that depends on the guest's speed: a guest under an emulator is twenty times
/// slower than one on hardware. A VM that died is noticed by its VMM's exit, not by this.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// The end of a VM has its own, shorter scale: afterwards it is killed.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(15);
/// The signal that no process survives.
const SIGKILL: u32 = 9;
const MAX_ERROR_BYTES: usize = 1024;
/// The only statistics that are passed on.
const METRICS_TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Why the agent can't be reached or refuses.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The VMM's Unix socket.
    #[error("connecting to port {port} of the guest failed")]
    Connect {
        /// The guest's port.
        port: u32,
        /// Why.
        source: io::Error,
    },
    /// Not the handshake that the contract asks for.
    #[error("port {port} of the guest answered wrongly")]
    Handshake {
        /// The guest's port.
        port: u32,
        /// Why.
        source: HandshakeError,
    },
    /// No answer.
    #[error("the guest did not answer {call} within {} s", deadline.as_secs())]
    Deadline {
        /// What was asked.
        call: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// The agent refuses; its own words.
    #[error("{message}")]
    Refused {
        /// The agent's code.
        code: Code,
        /// The agent's text, bounded and printable.
        message: String,
    },
    /// The connection is gone.
    #[error("the connection to the guest's agent broke during {call}")]
    Broken {
        /// What was asked.
        call: &'static str,
        /// Why.
        source: ttrpc::Error,
    },
    /// An answer that the contract doesn't allow.
    #[error("the guest's agent answered {call} with {what}")]
    Answer {
        /// What was asked.
        call: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl AgentError {
    /// Whether the agent refuses for this reason.
    pub(crate) fn is_of_code(&self, reason: Code) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == reason)
    }
}

/// The names by which a process of the guest finds its stdio; empty is `/dev/null`.
#[derive(Debug, Clone, Default)]
pub(crate) struct StreamNames {
    /// Flows to the guest.
    pub(crate) stdin: String,
    /// Flows from the guest; a terminal's whole output.
    pub(crate) stdout: String,
    /// Flows from the guest.
    pub(crate) stderr: String,
}

/// The agent of one VM.
pub(crate) struct Agent {
    task: TaskClient,
    guest: GuestClient,
    vsock: PathBuf,
    next_stream: AtomicU64,
}

impl Agent {
    /// Connects to the agent of a guest that has said that it listens.
    pub(crate) async fn connect(vsock: PathBuf) -> Result<Self, AgentError> {
        let client = Client::new(Socket::new(connect(&vsock, AGENT_PORT).await?));
        Ok(Self {
            task: TaskClient::new(client.clone()),
            guest: GuestClient::new(client),
            vsock,
            next_stream: AtomicU64::new(1),
        })
    }

    /// Creates a container from its configuration for the guest.
    pub(crate) async fn create(
        &self,
        id: &str,
        spec: Vec<u8>,
        terminal: bool,
        names: &StreamNames,
    ) -> Result<(), AgentError> {
        let request = api::CreateTaskRequest {
            id: id.to_owned(),
            terminal,
            stdin: names.stdin.clone(),
            stdout: names.stdout.clone(),
            stderr: names.stderr.clone(),
            options: json_any(SPEC_TYPE_URL, spec),
            ..Default::default()
        };
        call("Create", CALL_DEADLINE, |context| {
            self.task.create(context, &request)
        })
        .await?;
        Ok(())
    }

    /// Adds a process to a container.
    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        terminal: bool,
        names: &StreamNames,
    ) -> Result<(), AgentError> {
        let request = api::ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal,
            stdin: names.stdin.clone(),
            stdout: names.stdout.clone(),
            stderr: names.stderr.clone(),
            spec: json_any(PROCESS_TYPE_URL, process),
            ..Default::default()
        };
        call("Exec", CALL_DEADLINE, |context| {
            self.task.exec(context, &request)
        })
        .await?;
        Ok(())
    }

    /// Starts a process that was created or added.
    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<(), AgentError> {
        let request = api::StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        call("Start", CALL_DEADLINE, |context| {
            self.task.start(context, &request)
        })
        .await?;
        Ok(())
    }

    /// Waits for a process to end, as long as the VM lives, and answers its exit status.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<u32, AgentError> {
        let request = api::WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let answer = self.task.wait(Context::default(), &request).await;
        answer
            .map(|answer| answer.exit_status)
            .map_err(|error| refused("Wait", error))
    }

    /// Waits, as long as the VM lives and the container is there, until memory has run out for it more often
    /// than `seen`; answers how often.
    pub(crate) async fn out_of_memory(&self, id: &str, seen: u64) -> Result<u64, AgentError> {
        let request = guest::WaitOutOfMemoryRequest {
            container_id: id.to_owned(),
            seen,
            ..Default::default()
        };
        let answer = self.guest.wait_out_of_memory(Context::default(), &request);
        answer
            .await
            .map(|answer| answer.kills)
            .map_err(|error| refused("WaitOutOfMemory", error))
    }

    /// Forwards a request to signal a process.
    pub(crate) async fn kill(&self, request: &api::KillRequest) -> Result<(), AgentError> {
        call("Kill", CALL_DEADLINE, |context| {
            self.task.kill(context, request)
        })
        .await?;
        Ok(())
    }

    /// Ends a container's first process, and with it the others, at once.
    pub(crate) async fn kill_now(&self, id: &str) -> Result<(), AgentError> {
        let request = api::KillRequest {
            id: id.to_owned(),
            signal: SIGKILL,
            ..Default::default()
        };
        self.kill(&request).await
    }

    /// Removes a process that has ended, or a container.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<(), AgentError> {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        call("Delete", CALL_DEADLINE, |context| {
            self.task.delete(context, &request)
        })
        .await?;
        Ok(())
    }

    /// Forwards a request to resize a terminal.
    pub(crate) async fn resize_pty(
        &self,
        request: &api::ResizePtyRequest,
    ) -> Result<(), AgentError> {
        call("ResizePty", CALL_DEADLINE, |context| {
            self.task.resize_pty(context, request)
        })
        .await?;
        Ok(())
    }

    /// Freezes a container.
    pub(crate) async fn pause(&self, request: &api::PauseRequest) -> Result<(), AgentError> {
        call("Pause", CALL_DEADLINE, |context| {
            self.task.pause(context, request)
        })
        .await?;
        Ok(())
    }

    /// How many processes a container has.
    pub(crate) async fn pids(&self, request: &api::PidsRequest) -> Result<usize, AgentError> {
        let answer = call("Pids", CALL_DEADLINE, |context| {
            self.task.pids(context, request)
        });
        Ok(answer.await?.processes.len())
    }

    /// Thaws a container.
    pub(crate) async fn resume(&self, request: &api::ResumeRequest) -> Result<(), AgentError> {
        call("Resume", CALL_DEADLINE, |context| {
            self.task.resume(context, request)
        })
        .await?;
        Ok(())
    }

    /// Forwards a request to change a container's limits.
    pub(crate) async fn update(&self, request: &api::UpdateTaskRequest) -> Result<(), AgentError> {
        call("Update", CALL_DEADLINE, |context| {
            self.task.update(context, request)
        })
        .await?;
        Ok(())
    }

    /// Asks for a container's statistics.
    pub(crate) async fn stats(
        &self,
        request: &api::StatsRequest,
    ) -> Result<api::StatsResponse, AgentError> {
        let answer = call("Stats", CALL_DEADLINE, |context| {
            self.task.stats(context, request)
        })
        .await?;
        // containerd decodes it by its type: only the one that it expects passes.
        let known = answer
            .stats
            .as_ref()
            .is_some_and(|stats| stats.type_url == METRICS_TYPE_URL);
        let what = "statistics that are not containerd's cgroup v2 metrics";
        if known {
            Ok(answer)
        } else {
            Err(AgentError::Answer {
                call: "Stats",
                what,
            })
        }
    }

    /// Opens a stdio stream: its name for the agent, and the connection.
    pub(crate) async fn open_stream(&self) -> Result<(String, UnixStream), AgentError> {
        let id = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let stream = within("a stdio stream", async {
            let mut stream = connect(&self.vsock, STDIO_PORT).await?;
            let failed = |source| AgentError::Connect {
                port: STDIO_PORT,
                source,
            };
            stream.write_all(&id.to_bytes()).await.map_err(failed)?;
            match stream.read_u8().await.map_err(failed)? {
                STREAM_ACCEPTED => Ok(stream),
                _ => Err(AgentError::Answer {
                    call: "a stdio stream",
                    what: "a byte that is not acceptance",
                }),
            }
        });
        Ok((id.to_string(), stream.await?))
    }
}

/// Connects to a port of the guest through the VMM's Unix socket.
async fn connect(vsock: &std::path::Path, port: u32) -> Result<UnixStream, AgentError> {
    let failed = |source| AgentError::Connect { port, source };
    within("a connection", async {
        let mut stream = UnixStream::connect(vsock).await.map_err(failed)?;
        stream
            .write_all(connect_line(port).as_bytes())
            .await
            .map_err(failed)?;
        let mut line = Vec::with_capacity(MAX_HANDSHAKE_BYTES);
        // Byte by byte: what follows the newline belongs to the caller.
        while line.last() != Some(&b'\n') && line.len() < MAX_HANDSHAKE_BYTES {
            line.push(stream.read_u8().await.map_err(failed)?);
        }
        parse_ok(&line).map_err(|source| AgentError::Handshake { port, source })?;
        Ok(stream)
    })
    .await
}

async fn within<T>(
    what: &'static str,
    work: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    timeout(CALL_DEADLINE, work)
        .await
        .unwrap_or(Err(AgentError::Deadline {
            call: what,
            deadline: CALL_DEADLINE,
        }))
}

/// One call. The deadline is kept here and told to the agent.
async fn call<T, F>(
    call: &'static str,
    deadline: Duration,
    send: impl FnOnce(Context) -> F,
) -> Result<T, AgentError>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    match timeout(deadline, send(ttrpc::context::with_duration(deadline))).await {
        Ok(answer) => answer.map_err(|error| refused(call, error)),
        Err(_) => Err(AgentError::Deadline { call, deadline }),
    }
}

fn refused(call: &'static str, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Refused {
            code: status.code.enum_value().unwrap_or(Code::UNKNOWN),
            message: printable(&status.message, MAX_ERROR_BYTES),
        },
        source => AgentError::Broken { call, source },
    }
}

fn json_any(type_url: &str, value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn answer(listener: &UnixListener, bytes: &[u8]) -> Vec<u8> {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = vec![0; connect_line(AGENT_PORT).len()];
        stream.read_exact(&mut line).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        line
    }

    #[tokio::test]
    async fn the_handshake_leaves_what_follows_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let (stream, line) =
            tokio::join!(connect(&path, AGENT_PORT), answer(&listener, b"OK 5\nrest"));
        assert_eq!(line, b"CONNECT 1024\n");
        let mut rest = String::new();
        stream.unwrap().read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "rest");
    }

    #[tokio::test]
    async fn a_guest_that_answers_nonsense_or_hangs_up_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let nonsense = [b'x'; 64];
        let (stream, _) = tokio::join!(connect(&path, AGENT_PORT), answer(&listener, &nonsense));
        assert!(matches!(
            stream,
            Err(AgentError::Handshake {
                port: AGENT_PORT,
                ..
            })
        ));
        let (stream, _) = tokio::join!(connect(&path, AGENT_PORT), answer(&listener, b""));
        assert!(matches!(stream, Err(AgentError::Connect { .. })));
    }

    #[test]
    fn what_a_guest_says_in_an_error_is_cut_and_printable() {
        let text = format!("bad\u{1b}[31m\n{}", "x".repeat(10_000));
        let status = ttrpc::get_status(Code::NOT_FOUND, text);
        let AgentError::Refused { code, message } =
            refused("Start", ttrpc::Error::RpcStatus(status))
        else {
            panic!("not a refusal");
        };
        assert_eq!(code, Code::NOT_FOUND);
        assert!(message.len() <= MAX_ERROR_BYTES + 3);
        assert!(message.chars().all(|character| !character.is_control()));
    }
}
