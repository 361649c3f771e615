//! Serves the shim on whatever transport it comes by: requests on one listener, stdio on the other.
//!
//! Must not open a transport.

use crate::{
    cgroup::{CgroupError, Hierarchy},
    guest::{Guest, changes::Volumes},
    insight::{Recorder, SyscallCounter},
    reaper::Reaper,
    service::{GuestService, TaskService},
    stdio::Streams,
    storage::Storage,
    task::{Machinery, Tasks},
};
use futures::{Stream, StreamExt};
use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, watch},
    time::timeout,
};
use ttrpc::asynchronous::{Server, transport::Listener};
use walnut_agent_api::{containerd::shim_async::create_task, guest_ttrpc::create_guest};

/// For the shim to hang up once it has its last answer.
const FAREWELL_DEADLINE: Duration = Duration::from_millis(200);

/// Where the agent finds what it needs.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The agent's own program, executed again as `walnut-init`.
    pub program: PathBuf,
    /// Root of a cgroup v2 hierarchy that is the agent's alone.
    pub cgroup_root: PathBuf,
    /// From the program's start until it listened.
    pub boot_time: Duration,
}

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The cgroup hierarchy is not as it should be.
    #[error("cannot prepare the cgroup hierarchy")]
    Cgroups(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Children cannot be reaped.
    #[error("cannot follow children")]
    Reaper(#[source] io::Error),
    /// The ttrpc server does not start.
    #[error("cannot start the ttrpc server")]
    Server(#[source] Box<ttrpc::Error>),
    /// No more streams can come.
    #[error("the listener for stdio ended")]
    StdioEnded,
}

impl From<CgroupError> for ServeError {
    fn from(error: CgroupError) -> Self {
        Self::Cgroups(Box::new(error))
    }
}

/// Serves until `Guest.Shutdown` has been answered. Needs a tokio runtime of one thread.
pub async fn serve<C>(
    config: &AgentConfig,
    requests: impl Stream<Item = io::Result<C>> + Send + 'static,
    stdio: impl Stream<Item = io::Result<C>> + Send + 'static,
) -> Result<(), ServeError>
where
    C: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let streams = Streams::default();
    let hierarchy = Hierarchy::prepare(&config.cgroup_root)?;
    let syscalls = SyscallCounter::new(hierarchy.clone());
    let recorder = Recorder::new(hierarchy.clone());
    let tasks = Arc::new(Tasks::new(Machinery {
        program: config.program.clone(),
        hierarchy,
        recorder: recorder.clone(),
        profiles: Arc::default(),
        reaper: Reaper::start().map_err(ServeError::Reaper)?,
        streams: streams.clone(),
    }));
    let end = Arc::new(Notify::new());
    let volumes = Arc::new(Volumes::default());
    let guest = GuestService {
        guest: Guest::default(),
        storage: Storage::default(),
        tasks: Arc::clone(&tasks),
        volumes: Arc::clone(&volumes),
        syscalls,
        recorder,
        streams: streams.clone(),
        boot_time: config.boot_time,
        end: Arc::clone(&end),
    };
    let connections = watch::Sender::new(());
    let count = connections.clone();
    let mut server = Server::new()
        .register_service(create_task(Arc::new(TaskService { tasks, volumes })))
        .register_service(create_guest(Arc::new(guest)))
        .add_listener(Listener::new(requests.map(move |accepted| {
            accepted.map(|connection| Counted {
                connection,
                _alive: count.subscribe(),
            })
        })));
    server
        .start()
        .await
        .map_err(|error| ServeError::Server(Box::new(error)))?;
    tokio::select! {
        () = end.notified() => {}
        () = welcome(streams, stdio) => return Err(ServeError::StdioEnded),
    }
    // The last answer is on its way; the shim hangs up when it has it.
    let _ = timeout(FAREWELL_DEADLINE, connections.closed()).await;
    Ok(())
}

async fn welcome<C>(streams: Streams, stdio: impl Stream<Item = io::Result<C>>)
where
    C: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut stdio = std::pin::pin!(stdio);
    while let Some(accepted) = stdio.next().await {
        match accepted {
            Ok(connection) => streams.welcome(Box::pin(connection)),
            Err(error) => eprintln!("walnut-agent: cannot accept a stream: {error}"),
        }
    }
}

/// A connection that is known to be open as long as it is.
struct Counted<C> {
    connection: C,
    _alive: watch::Receiver<()>,
}

impl<C: AsyncRead + Unpin> AsyncRead for Counted<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(context, buffer)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Counted<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }
}
