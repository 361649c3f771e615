//! The server that `start` leaves behind: one per Pod, one ttrpc socket, until containerd says Shutdown.
//!
//! Serves the Task service under its two names, whose messages are the same on the wire, and the Sandbox
//! service.

use crate::{
    args::Args,
    bootstrap::READY,
    cleanup::{absent_is_fine, remove_directory},
    error::one_line,
    events::Events,
    insight::PodService,
    log, process_file,
    sandbox::Sandbox,
    service::{SandboxService, TaskService},
    state_dir::{StateDir, socket_path},
};
use anyhow::Context as _;
use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use futures_core::Stream;
use rustix::stdio::{dup2_stdin, dup2_stdout};
use std::{
    fs::File,
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::net::UnixListener as StdListener},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::timeout,
};
use ttrpc::r#async::{Server, transport::Listener};
use walnut_shim_api::pod_ttrpc::create_pod;

const TASK_V2: &str = "containerd.task.v2.Task";
/// For containerd to read its last answer and hang up.
const HANG_UP_DEADLINE: Duration = Duration::from_secs(3);
/// File work runs on other threads, a few at a time, which go when they are idle.
const FILE_THREADS: usize = 4;
const IDLE_THREAD: Duration = Duration::from_secs(1);

/// Serves until the end.
pub(crate) fn serve(args: &Args) -> anyhow::Result<()> {
    let served = prepare().and_then(|listener| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(FILE_THREADS)
            .thread_keep_alive(IDLE_THREAD)
            .build()
            .context("starting the runtime")?
            .block_on(run(args, listener))
    });
    if let Err(error) = &served {
        // `start` reads it while it waits; later this is /dev/null.
        let _ = write!(io::stdout(), "{}", one_line(error.as_ref()));
    }
    served
}

/// Leaves the session of `start`, and takes the socket from standard input.
fn prepare() -> anyhow::Result<StdListener> {
    // Fails only for a process that leads a group already, as by hand in a terminal: nothing is lost.
    let _ = rustix::process::setsid();
    let stdin = rustix::stdio::stdin();
    let listens = rustix::net::sockopt::socket_acceptconn(stdin).unwrap_or(false);
    anyhow::ensure!(
        listens,
        "standard input is not a listening socket; containerd runs \"start\""
    );
    let listener = StdListener::from(stdin.try_clone_to_owned().context("taking the socket")?);
    listener
        .set_nonblocking(true)
        .context("taking the socket")?;
    dup2_stdin(File::open("/dev/null").context("opening /dev/null")?).context("closing stdin")?;
    Ok(listener)
}

async fn run(args: &Args, listener: StdListener) -> anyhow::Result<()> {
    let socket = socket_path(&args.address, &args.namespace, &args.id);
    let state = StateDir::new(&args.namespace, &args.id);
    let served = serve_pod(args, listener, &socket, &state).await;
    // Also where it could not serve: containerd calls no `delete` for a `start` that failed.
    for result in [
        remove_directory(&state),
        absent_is_fine(std::fs::remove_file(&socket)),
    ] {
        if let Err(error) = result {
            log::error("removing the sandbox", &error);
        }
    }
    served
}

async fn serve_pod(
    args: &Args,
    listener: StdListener,
    socket: &Path,
    state: &StateDir,
) -> anyhow::Result<()> {
    state
        .create()
        .with_context(|| format!("creating {:?}", state.path()))?;
    process_file::write(&state.server_pid(), std::process::id())?;
    std::fs::write(state.address(), socket.as_os_str().as_encoded_bytes())
        .with_context(|| format!("writing {:?}", state.address()))?;
    let events = Events::start(events_address(args), args.namespace.clone());
    let sandbox = Arc::new(Sandbox::new(
        &args.namespace,
        &args.id,
        state.clone(),
        events,
    ));
    let connections = watch::Sender::new(0);
    let accepting = Accepting {
        listener: UnixListener::from_std(listener).context("taking the socket")?,
        connections: connections.clone(),
    };
    let mut services = create_task(Arc::new(TaskService(Arc::clone(&sandbox))));
    let mut older = create_task(Arc::new(TaskService(Arc::clone(&sandbox))));
    services.extend(
        older
            .drain()
            .map(|(_, service)| (TASK_V2.to_owned(), service)),
    );
    services.extend(create_pod(Arc::new(PodService(Arc::clone(&sandbox)))));
    services.extend(create_sandbox(Arc::new(SandboxService(Arc::clone(
        &sandbox,
    )))));
    let mut server = Server::new()
        .add_listener(Listener::new(accepting))
        .register_service(services);
    server.start().await.context("serving")?;
    announce()?;
    until_the_end(&sandbox).await?;
    sandbox.events.flush().await;
    let mut open = connections.subscribe();
    // A containerd that doesn't hang up is hung up on.
    let _ = timeout(HANG_UP_DEADLINE, open.wait_for(|open| *open == 0)).await;
    Ok(())
}

async fn until_the_end(sandbox: &Sandbox) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("waiting for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for signals")?;
    tokio::select! {
        () = sandbox.finished() => {}
        _ = terminate.recv() => sandbox.terminate().await,
        _ = interrupt.recv() => sandbox.terminate().await,
    }
    Ok(())
}

/// Tells `start` that the server serves, and lets go of its pipe.
fn announce() -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(&[READY])
        .and_then(|()| stdout.flush())
        .context("answering \"start\"")?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("opening /dev/null")?;
    dup2_stdout(null.as_fd()).context("closing stdout")
}

/// containerd's ttrpc socket, where events go.
fn events_address(args: &Args) -> String {
    match std::env::var("TTRPC_ADDRESS") {
        Ok(address) => address,
        Err(_) if args.address.is_empty() => String::new(),
        Err(_) => format!("{}.ttrpc", args.address),
    }
}

/// Accepts connections and counts those that are open.
struct Accepting {
    listener: UnixListener,
    connections: watch::Sender<usize>,
}

struct Connection {
    stream: UnixStream,
    connections: watch::Sender<usize>,
}

impl Stream for Accepting {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = ready!(self.listener.poll_accept(context));
        Poll::Ready(Some(accepted.map(|(stream, _)| {
            self.connections.send_modify(|open| *open += 1);
            Connection {
                stream,
                connections: self.connections.clone(),
            }
        })))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.connections.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
