//! An agent that serves on Unix sockets, a client of it, and a container configuration to start from.
//!
//! Containers are real: this needs root and a cgroup v2 hierarchy, on this machine or in the lab.

use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use ttrpc::{
    Code,
    asynchronous::Client,
    context::{self, Context},
};
use walnut_agent::{AgentConfig, serve};
use walnut_agent_api::{
    PROCESS_TYPE_URL, SPEC_TYPE_URL, STREAM_ACCEPTED, StreamId,
    containerd::{
        api::{
            CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, StartRequest,
            StateRequest, StateResponse, WaitRequest, WaitResponse,
        },
        shim_async::TaskClient,
    },
};

/// For everything that a test waits for, on the slowest machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Sockets of the one agent of this process, if containers can be made here.
struct Served {
    directory: PathBuf,
    cgroups: PathBuf,
}

/// A connection to the agent.
pub(crate) struct Agent {
    pub(crate) tasks: TaskClient,
    served: &'static Served,
}

/// What a process left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The shim's ends of a process's streams.
pub(crate) struct Streams {
    names: [String; 3],
    pub(crate) stdin: UnixStream,
    pub(crate) stdout: UnixStream,
    pub(crate) stderr: UnixStream,
}

pub(crate) fn deadline() -> Context {
    context::with_duration(DEADLINE)
}

/// An agent, or a visible reason why there can be none.
pub(crate) async fn agent() -> Option<Agent> {
    static SERVED: OnceLock<Option<Served>> = OnceLock::new();
    let Some(served) = SERVED.get_or_init(start) else {
        println!("skipped: needs root and a cgroup v2 hierarchy");
        assert!(
            std::env::var_os("WALNUT_REQUIRE_KVM").is_none(),
            "the lab has both"
        );
        return None;
    };
    let address = format!("unix://{}", served.directory.join("rpc").display());
    let client = Client::connect(&address).await.unwrap();
    Some(Agent {
        tasks: TaskClient::new(client),
        served,
    })
}

fn start() -> Option<Served> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let hierarchy = mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
    })?;
    remove_leftovers(&hierarchy, "walnut-test-");
    remove_leftovers(&std::env::temp_dir(), "walnut-agent-");
    let directory = std::env::temp_dir().join(format!("walnut-agent-{}", std::process::id()));
    let cgroups = hierarchy.join(format!("walnut-test-{}", std::process::id()));
    fs::create_dir_all(&directory).ok()?;
    fs::create_dir_all(&cgroups).ok()?;
    let config = AgentConfig {
        program: std::env::var_os("WALNUT_AGENT")
            .map_or_else(|| env!("CARGO_BIN_EXE_walnut-agent").into(), PathBuf::from),
        cgroup_root: cgroups.clone(),
        boot_time: Duration::ZERO,
    };
    let (ready, is_ready) = mpsc::channel();
    let sockets = directory.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let listen = |name| accept(UnixListener::bind(sockets.join(name)).unwrap());
            let serving = serve(&config, listen("rpc"), listen("stdio"));
            ready.send(()).unwrap();
            serving.await.unwrap();
        });
    });
    is_ready.recv().unwrap();
    Some(Served { directory, cgroups })
}

/// A run cannot clean up after its last test; the next one does, also after one that was killed.
fn remove_leftovers(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(prefix) else {
            continue;
        };
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        let kill = entry.path().join("cgroup.kill");
        if !kill.exists() {
            let _ = fs::remove_dir_all(entry.path());
            continue;
        }
        let _ = fs::write(kill, "1");
        let containers = entry.path().join("walnut");
        for container in fs::read_dir(&containers).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(container.path());
        }
        let _ = fs::remove_dir(containers);
        let _ = fs::remove_dir(entry.path());
    }
}

fn accept(
    listener: UnixListener,
) -> impl futures::Stream<Item = std::io::Result<UnixStream>> + Send + 'static {
    futures::stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    })
}

/// A name that no other container or process of this run has.
pub(crate) fn unique(what: &str) -> String {
    format!("{what}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn any(type_url: &str, value: &Value) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: type_url.to_owned(),
        value: value.to_string().into_bytes(),
        ..Any::default()
    })
}

/// The code of a failure, and its message.
pub(crate) fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not an answer: {other}"),
    }
}

impl Agent {
    /// Where the cgroup of a container is.
    pub(crate) fn cgroup(&self, id: &str) -> PathBuf {
        self.served.cgroups.join("walnut").join(id)
    }

    /// Whether containers here can be given limits.
    pub(crate) fn has_controller(&self, name: &str) -> bool {
        let file = self.served.cgroups.join("cgroup.controllers");
        fs::read_to_string(file)
            .unwrap()
            .split_whitespace()
            .any(|controller| controller == name)
    }

    /// A fresh root file system: this machine's `/usr`, read-only, and little else.
    pub(crate) fn root(&self, id: &str) -> PathBuf {
        let root = self.served.directory.join(id);
        for directory in ["dev", "etc", "proc", "root", "run", "sys", "tmp", "usr"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for link in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{link}"), root.join(link)).unwrap();
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        root
    }

    /// containerd's default configuration, for a shell command.
    pub(crate) fn spec(&self, id: &str, command: &str) -> Value {
        let default = include_str!("../../src/container/testdata/ctr-run.json");
        let mut spec: Value = serde_json::from_str(default).unwrap();
        spec["root"]["path"] = json!(self.root(id));
        spec["process"]["args"] = json!(["/bin/sh", "-c", command]);
        let usr = json!({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]});
        spec["mounts"].as_array_mut().unwrap().push(usr);
        spec
    }

    /// Connects one stream and waits until the agent has it.
    pub(crate) async fn stream(&self) -> (String, UnixStream) {
        let id = StreamId(NEXT.fetch_add(1, Ordering::Relaxed));
        let path = self.served.directory.join("stdio");
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(&id.to_bytes()).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), STREAM_ACCEPTED);
        (id.to_string(), stream)
    }

    pub(crate) async fn streams(&self) -> Streams {
        let (stdin_name, stdin) = self.stream().await;
        let (stdout_name, stdout) = self.stream().await;
        let (stderr_name, stderr) = self.stream().await;
        Streams {
            names: [stdin_name, stdout_name, stderr_name],
            stdin,
            stdout,
            stderr,
        }
    }

    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &Value,
        streams: Option<&Streams>,
    ) -> ttrpc::Result<u32> {
        let names = streams
            .map(|streams| streams.names.clone())
            .unwrap_or_default();
        let [stdin, stdout, stderr] = names;
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: "/bundle".to_owned(),
            terminal: spec["process"]["terminal"] == true,
            stdin,
            stdout,
            stderr,
            options: any(SPEC_TYPE_URL, spec),
            ..CreateTaskRequest::default()
        };
        Ok(self.tasks.create(deadline(), &request).await?.pid)
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        streams: &Streams,
    ) -> ttrpc::Result<()> {
        let [stdin, stdout, stderr] = streams.names.clone();
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal: process["terminal"] == true,
            stdin,
            stdout,
            stderr,
            spec: any(PROCESS_TYPE_URL, process),
            ..ExecProcessRequest::default()
        };
        self.tasks.exec(deadline(), &request).await.map(drop)
    }

    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StartRequest::default()
        };
        Ok(self.tasks.start(deadline(), &request).await?.pid)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> WaitResponse {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..WaitRequest::default()
        };
        self.tasks.wait(deadline(), &request).await.unwrap()
    }

    pub(crate) async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: signal.unsigned_abs(),
            all,
            ..KillRequest::default()
        };
        self.tasks.kill(deadline(), &request).await.map(drop)
    }

    pub(crate) async fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StateRequest::default()
        };
        self.tasks.state(deadline(), &request).await
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..DeleteRequest::default()
        };
        Ok(self.tasks.delete(deadline(), &request).await?.exit_status)
    }

    /// Ends a container however it is, and checks that nothing of it is left.
    pub(crate) async fn end(&self, id: &str) {
        let _ = self.kill(id, "", libc::SIGKILL, true).await;
        self.wait(id, "").await;
        self.delete(id, "").await.unwrap();
        assert!(!self.cgroup(id).exists());
        self.remove_root(id);
    }

    pub(crate) fn remove_root(&self, id: &str) {
        let _ = fs::remove_dir_all(self.served.directory.join(id));
    }

    /// Runs a container to its end.
    pub(crate) async fn run(
        &self,
        command: &str,
        change: impl FnOnce(&mut Value, &Path),
    ) -> Outcome {
        let id = unique("run");
        let mut spec = self.spec(&id, command);
        let root = PathBuf::from(spec["root"]["path"].as_str().unwrap());
        change(&mut spec, &root);
        let streams = self.streams().await;
        self.create(&id, &spec, Some(&streams)).await.unwrap();
        self.start(&id, "").await.unwrap();
        let outcome = self.finish(&id, "", streams).await;
        self.end(&id).await;
        outcome
    }

    /// Runs a process in a container to its end.
    pub(crate) async fn run_exec(&self, id: &str, process: &Value) -> Outcome {
        let exec_id = unique("exec");
        let streams = self.streams().await;
        self.exec(id, &exec_id, process, &streams).await.unwrap();
        self.start(id, &exec_id).await.unwrap();
        let outcome = self.finish(id, &exec_id, streams).await;
        assert_eq!(self.delete(id, &exec_id).await.unwrap(), outcome.status);
        outcome
    }

    pub(crate) async fn finish(&self, id: &str, exec_id: &str, streams: Streams) -> Outcome {
        let Streams {
            stdin,
            mut stdout,
            mut stderr,
            ..
        } = streams;
        drop(stdin);
        let (mut out, mut err) = (String::new(), String::new());
        let all = async {
            tokio::try_join!(
                stdout.read_to_string(&mut out),
                stderr.read_to_string(&mut err)
            )
        };
        timeout(DEADLINE, all).await.unwrap().unwrap();
        let status = self.wait(id, exec_id).await.exit_status;
        Outcome {
            status,
            stdout: out,
            stderr: err,
        }
    }
}
