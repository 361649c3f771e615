//! The agent of a VM of the test's own: its ttrpc services, and the streams of its processes.

use crate::{
    deadline,
    task::{Stdio, Tasks, any},
    vmm::{SHARE_TAG, Vm},
};
use anyhow::{Context, Result, ensure};
use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};
use walnut_agent_api::{
    AGENT_PORT, SPEC_TYPE_URL, STDIO_PORT, STREAM_ACCEPTED, StreamId,
    containerd::{api::CreateTaskRequest, ttrpc},
    guest::{
        LoadProfileRequest, SetupRequest, SetupResponse, ShutdownRequest, WaitOutOfMemoryRequest,
    },
    guest_ttrpc::GuestClient,
};
use walnut_vmm_api::{MAX_HANDSHAKE_BYTES, connect_line, parse_ok};

/// The agent of one VM.
#[derive(Debug)]
pub struct Agent {
    /// Its Task service.
    pub tasks: Tasks,
    socket: PathBuf,
    streams: u64,
}

impl Agent {
    /// Connects to the agent of a VM that is ready.
    pub fn connect(vm: &Vm) -> Result<Self> {
        let socket = vm.socket_path();
        let tasks = Tasks::over(connect(&socket, AGENT_PORT)?)?;
        Ok(Self {
            tasks,
            socket,
            streams: 0,
        })
    }

    /// `Guest.Setup`.
    pub fn setup(&self) -> ttrpc::Result<SetupResponse> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let request = SetupRequest {
            hostname: "guest".to_owned(),
            realtime_ns: now
                .ok()
                .and_then(|now| u64::try_from(now.as_nanos()).ok())
                .unwrap_or_default(),
            share_tag: SHARE_TAG.to_owned(),
            ..Default::default()
        };
        self.tasks.call(|client, context| async move {
            GuestClient::new(client).setup(context, &request).await
        })
    }

    /// `Guest.LoadProfile`.
    pub fn load_profile(&self, name: &str, policy: &[u8]) -> ttrpc::Result<()> {
        let request = LoadProfileRequest {
            name: name.to_owned(),
            policy: policy.to_owned(),
            ..Default::default()
        };
        let answer = self.tasks.call(|client, context| async move {
            GuestClient::new(client)
                .load_profile(context, &request)
                .await
        });
        answer.map(drop)
    }

    /// `Guest.Shutdown`.
    pub fn shutdown(&self) -> ttrpc::Result<()> {
        self.tasks
            .call(|client, context| async move {
                let request = ShutdownRequest::new();
                GuestClient::new(client).shutdown(context, &request).await
            })
            .map(drop)
    }

    /// `Guest.WaitOutOfMemory`.
    pub fn out_of_memory(&self, id: &str, seen: u64) -> ttrpc::Result<u64> {
        let request = WaitOutOfMemoryRequest {
            container_id: id.to_owned(),
            seen,
            ..Default::default()
        };
        let answer = self.tasks.call(|client, context| async move {
            let guest = GuestClient::new(client);
            guest.wait_out_of_memory(context, &request).await
        });
        answer.map(|answer| answer.kills)
    }

    /// Creates a container from a configuration.
    pub fn create(&self, id: &str, spec: Vec<u8>, stdio: &Stdio) -> ttrpc::Result<u32> {
        self.tasks.create(&CreateTaskRequest {
            id: id.to_owned(),
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            options: Some(any(SPEC_TYPE_URL, spec)).into(),
            ..Default::default()
        })
    }

    /// Opens a stream, and gives its name for the request that will claim it.
    pub fn open_stream(&mut self) -> Result<(String, Stream)> {
        self.streams += 1;
        let id = StreamId(self.streams);
        let mut stream = connect(&self.socket, STDIO_PORT)?;
        stream
            .write_all(&id.to_bytes())
            .context("cannot name a stream")?;
        let mut answer = [0];
        stream
            .read_exact(&mut answer)
            .context("no answer to a stream's name")?;
        ensure!(
            answer == [STREAM_ACCEPTED],
            "a stream was answered {answer:?}"
        );
        Ok((id.to_string(), Stream(stream)))
    }
}

/// The test's end of one direction of a process's stdio.
#[derive(Debug)]
pub struct Stream(UnixStream);

impl Stream {
    /// Everything up to the end of the stream.
    pub fn read_all(mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.0
            .read_to_end(&mut bytes)
            .context("a stream broke off")?;
        Ok(bytes)
    }

    /// Everything up to the end of the stream, as text.
    pub fn read_text(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read_all()?).into_owned())
    }

    /// Exactly this many bytes.
    pub fn read_some(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0
            .read_exact(&mut bytes)
            .context("a stream broke off")?;
        Ok(bytes)
    }

    /// Writes to the process.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write_all(bytes).context("a stream broke off")
    }

    /// Half-closes the stream: nothing more will be written.
    pub fn finish(&self) -> Result<()> {
        self.0
            .shutdown(Shutdown::Write)
            .context("cannot half-close")
    }
}

/// Connects to a port of the guest, see `vmm/api`. Reads and writes have a deadline.
pub fn connect(socket: &PathBuf, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).context("the VMM does not listen")?;
    stream.set_read_timeout(Some(deadline::REQUEST))?;
    stream.set_write_timeout(Some(deadline::REQUEST))?;
    stream
        .write_all(connect_line(port).as_bytes())
        .context("cannot ask for a port")?;
    let mut line = Vec::new();
    let mut byte = [0];
    // One byte at a time: what follows the line belongs to the guest.
    while line.len() < MAX_HANDSHAKE_BYTES && line.last() != Some(&b'\n') {
        stream
            .read_exact(&mut byte)
            .with_context(|| format!("the guest refused port {port}"))?;
        line.extend(byte);
    }
    parse_ok(&line).context("the VMM answered something else")?;
    Ok(stream)
}
