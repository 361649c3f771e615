//! Streams between the shim and the standard streams of processes.
//!
//! The shim connects, says a number and is answered; later a request names the number (`StreamId`). Until
//! then the connection is kept here. Every byte is carried, both ends are half-closed as they close. Must
//! not know processes.

mod pump;
mod terminal;

pub(crate) use pump::Pump;
pub(crate) use terminal::Terminal;

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use walnut_agent_api::{MAX_UNCLAIMED_STREAMS, STREAM_ACCEPTED, StreamId, StreamIdError};

/// For the shim to say the number, once connected.
const HELLO_DEADLINE: Duration = Duration::from_secs(60);

/// A connection that carries bytes both ways.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Connection for T {}

/// A connection of whatever transport.
pub(crate) type Stream = Pin<Box<dyn Connection>>;

/// Why a process cannot have its streams.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// The request names it in another way than the contract says.
    #[error("{field} is not the name of a stream")]
    Name {
        /// Which of the three.
        field: &'static str,
        /// What the contract says.
        source: StreamIdError,
    },
    /// Nobody has connected it, or another process has it.
    #[error("{field} names stream {}, which is not connected", id.0)]
    Missing {
        /// Which of the three.
        field: &'static str,
        /// The number.
        id: StreamId,
    },
    /// A pipe or terminal could not be made.
    #[error("cannot {attempted}")]
    System {
        /// What was to be made.
        attempted: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A number that a connection has said.
enum Slot {
    /// It is being answered.
    Greeting,
    /// It waits for its process.
    Waiting(Stream),
}

/// Streams that wait for their processes.
#[derive(Clone, Default)]
pub(crate) struct Streams(Arc<Mutex<HashMap<StreamId, Slot>>>);

impl Streams {
    /// Takes a new connection in; the caller goes on accepting meanwhile.
    pub(crate) fn welcome(&self, mut stream: Stream) {
        let streams = self.clone();
        tokio::spawn(async move {
            let mut bytes = [0; 8];
            let read = timeout(HELLO_DEADLINE, stream.read_exact(&mut bytes)).await;
            if matches!(read, Ok(Ok(_))) {
                streams.keep(StreamId::from_bytes(bytes), stream).await;
            }
        });
    }

    /// A connection that is refused is closed without an answer.
    async fn keep(&self, id: StreamId, mut stream: Stream) {
        let reserved = self.with(|slots| {
            let free = slots.len() < MAX_UNCLAIMED_STREAMS && !slots.contains_key(&id);
            if free {
                slots.insert(id, Slot::Greeting);
            }
            free
        });
        if !reserved {
            eprintln!("walnut-agent: refused stream {}", id.0);
            return;
        }
        let answered = stream.write_all(&[STREAM_ACCEPTED]).await;
        // The runtime has one thread, so no request can look between the answer and this.
        self.with(|slots| match answered {
            Ok(()) => slots.insert(id, Slot::Waiting(stream)),
            Err(_) => slots.remove(&id),
        });
    }

    /// Hands a stream to its process. An empty name stands for `/dev/null`.
    pub(crate) fn claim(
        &self,
        field: &'static str,
        name: &str,
    ) -> Result<Option<Stream>, StdioError> {
        if name.is_empty() {
            return Ok(None);
        }
        let id: StreamId = name
            .parse()
            .map_err(|source| StdioError::Name { field, source })?;
        self.with(|slots| match slots.remove(&id) {
            Some(Slot::Waiting(stream)) => Ok(Some(stream)),
            greeting => {
                slots.extend(greeting.map(|slot| (id, slot)));
                Err(StdioError::Missing { field, id })
            }
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut HashMap<StreamId, Slot>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::duplex, task::yield_now};

    async fn connect(streams: &Streams, id: u64) -> Option<tokio::io::DuplexStream> {
        let (mut shim, agent) = duplex(64);
        streams.welcome(Box::pin(agent));
        shim.write_all(&StreamId(id).to_bytes()).await.unwrap();
        let answer = shim.read_u8().await;
        (answer.ok()? == STREAM_ACCEPTED).then_some(shim)
    }

    #[tokio::test]
    async fn a_number_is_said_and_claimed_once() {
        let streams = Streams::default();
        let first = connect(&streams, 5).await;
        assert!(first.is_some());
        assert!(connect(&streams, 5).await.is_none());
        assert!(streams.claim("stdin", "stream:5").unwrap().is_some());
        assert!(streams.claim("stdin", "stream:5").is_err());
        assert!(streams.claim("stdin", "").unwrap().is_none());
        assert!(streams.claim("stdin", "/run/fifo").is_err());
    }

    #[tokio::test]
    async fn the_number_of_waiting_streams_is_bounded() {
        let streams = Streams::default();
        let mut open = Vec::new();
        for id in 0..MAX_UNCLAIMED_STREAMS as u64 {
            open.push(connect(&streams, id).await.unwrap());
        }
        assert!(connect(&streams, 1 << 40).await.is_none());
        streams.claim("stdout", "stream:0").unwrap();
        assert!(connect(&streams, 1 << 40).await.is_some());
    }

    #[tokio::test]
    async fn a_connection_that_ends_early_leaves_nothing() {
        let streams = Streams::default();
        let (mut shim, agent) = duplex(64);
        streams.welcome(Box::pin(agent));
        shim.write_all(b"123").await.unwrap();
        drop(shim);
        yield_now().await;
        assert!(streams.with(|slots| slots.is_empty()));
    }
}
