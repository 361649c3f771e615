//! Carries bytes between a stream and a process's pipe or terminal, until either ends.
//!
//! The end of a pipe is the end of output: a process that exits does not end it while a child of its own
//! holds the pipe. Must not drop a byte, nor hold more than one buffer of them.

use super::{StdioError, Stream, Terminal};
use std::{io, os::fd::OwnedFd, sync::Arc};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    task::JoinHandle,
};

/// As much as a pipe holds.
const BUFFER_BYTES: usize = 64 * 1024;

/// A task that carries one direction.
#[derive(Debug)]
pub(crate) struct Pump(JoinHandle<()>);

impl Pump {
    /// From the stream into a new pipe; answers the end for the process.
    pub(crate) fn into_process(
        stream: Option<Stream>,
    ) -> Result<(OwnedFd, Option<Self>), StdioError> {
        let Some(stream) = stream else {
            return Ok((null()?, None));
        };
        let (sender, receiver) = pipe::pipe().map_err(system("make a pipe for stdin"))?;
        let end = receiver
            .into_blocking_fd()
            .map_err(system("make a pipe for stdin"))?;
        let task = tokio::spawn(async move {
            // Dropping the pipe is the end of the process's input; dropping the stream tells the shim.
            let _ = carry(stream, sender).await;
        });
        Ok((end, Some(Self(task))))
    }

    /// From a new pipe into the stream; answers the end for the process.
    pub(crate) fn out_of_process(
        stream: Option<Stream>,
    ) -> Result<(OwnedFd, Option<Self>), StdioError> {
        let Some(mut stream) = stream else {
            return Ok((null()?, None));
        };
        let (sender, receiver) = pipe::pipe().map_err(system("make a pipe for output"))?;
        let end = sender
            .into_blocking_fd()
            .map_err(system("make a pipe for output"))?;
        let task = tokio::spawn(async move {
            // If the shim is gone, the process gets SIGPIPE, as from any reader that left.
            let _ = carry(receiver, &mut stream).await;
            finish(stream).await;
        });
        Ok((end, Some(Self(task))))
    }

    /// Both directions of a terminal, each only if it has a stream.
    pub(crate) fn terminal(
        terminal: &Arc<Terminal>,
        input: Option<Stream>,
        output: Option<Stream>,
    ) -> Vec<Self> {
        let mut pumps = Vec::new();
        if let Some(input) = input {
            let terminal = Arc::clone(terminal);
            pumps.push(Self(tokio::spawn(async move {
                let _ = carry(input, &*terminal).await;
            })));
        }
        let terminal = Arc::clone(terminal);
        pumps.push(Self(tokio::spawn(async move {
            match output {
                Some(mut output) => {
                    let _ = carry(&*terminal, &mut output).await;
                    finish(output).await;
                }
                // Somebody has to read, or the processes stop once the terminal is full.
                None => drop(carry(&*terminal, tokio::io::sink()).await),
            }
        })));
        pumps
    }
}

impl Drop for Pump {
    /// Who drops a pump wants no more of its bytes.
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Half-closes, and waits until the shim closes too: what it has not read would be lost with the socket.
async fn finish(mut stream: Stream) {
    if stream.shutdown().await.is_ok() {
        let mut nothing = [0; 64];
        while matches!(stream.read(&mut nothing).await, Ok(1..)) {}
    }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        to.write_all(bytes).await?;
    }
}

fn null() -> Result<OwnedFd, StdioError> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .map_err(system("open /dev/null"))
}

fn system(attempted: &'static str) -> impl FnOnce(io::Error) -> StdioError {
    move |source| StdioError::System { attempted, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        io::{Read, Write},
    };
    use tokio::io::duplex;

    #[tokio::test]
    async fn every_byte_arrives_and_the_end_after_it() {
        let (mut shim, agent) = duplex(1000);
        let (end, _pump) = Pump::out_of_process(Some(Box::pin(agent))).unwrap();
        let sent: Vec<u8> = (0..1_000_003u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || File::from(end).write_all(&sent));
        let mut received = Vec::new();
        shim.read_to_end(&mut received).await.unwrap();
        writer.join().unwrap().unwrap();
        assert!(received == expected);
    }

    #[tokio::test]
    async fn the_end_of_the_stream_is_the_end_of_input() {
        let (mut shim, agent) = duplex(1000);
        let (end, _pump) = Pump::into_process(Some(Box::pin(agent))).unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            File::from(end).read_to_end(&mut all).map(|_| all.len())
        });
        shim.write_all(&vec![7; 300_000]).await.unwrap();
        shim.shutdown().await.unwrap();
        let count = tokio::task::spawn_blocking(|| reader.join().unwrap().unwrap());
        assert_eq!(count.await.unwrap(), 300_000);
    }
}
