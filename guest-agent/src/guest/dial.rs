//! Connections of the host to what listens on the guest's loopback addresses.
//!
//! The shim forwards ports by them. They go one way: nothing here listens, and no other address is dialled. Must not know
//! containers: those of a Pod have the guest's own network.

use crate::stdio::{StdioError, Stream, Streams};
use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};
use tokio::{io::copy_bidirectional_with_sizes, net::TcpStream};

/// For each direction.
const BUFFER_BYTES: usize = 16 * 1024;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// Not loopback's.
    #[error("address {0:?} is not a loopback address and a port")]
    Address(String),
    /// None to carry it.
    #[error("stream is empty")]
    NoStream,
    /// None that is there.
    #[error(transparent)]
    Stream(#[from] StdioError),
    /// Nobody takes it.
    #[error("nobody listens on {0}")]
    NobodyListens(SocketAddr),
    /// The system refuses.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// Connects a stream of the shim to an address; from then on they are each other's.
pub(crate) async fn dial(streams: &Streams, stream: &str, address: &str) -> Result<(), DialError> {
    let stream = streams.claim("stream", stream)?;
    let stream = stream.ok_or(DialError::NoStream)?;
    let connection = connect(parse(address)?).await?;
    tokio::spawn(carry(connection, stream));
    Ok(())
}

fn parse(address: &str) -> Result<SocketAddr, DialError> {
    let parsed: Option<SocketAddr> = address.parse().ok();
    parsed
        .filter(|address| address.ip().is_loopback() && address.port() != 0)
        .ok_or_else(|| DialError::Address(address.to_owned()))
}

async fn connect(address: SocketAddr) -> Result<TcpStream, DialError> {
    match connect_to(address).await {
        // The caller asked for localhost, and its kernel took the connection before anybody knew who listens where.
        Err(DialError::NobodyListens(_)) if address.ip() == Ipv4Addr::LOCALHOST => {
            let other = SocketAddr::from((Ipv6Addr::LOCALHOST, address.port()));
            let connected = connect_to(other).await;
            connected.map_err(|_| DialError::NobodyListens(address))
        }
        connected => connected,
    }
}

async fn connect_to(address: SocketAddr) -> Result<TcpStream, DialError> {
    let connected = TcpStream::connect(address).await;
    let connected = connected.and_then(|connection| {
        connection.set_nodelay(true)?;
        Ok(connection)
    });
    connected.map_err(|source| match source.kind() {
        // The last two: the Pod has turned IPv6 off.
        ErrorKind::ConnectionRefused
        | ErrorKind::AddrNotAvailable
        | ErrorKind::NetworkUnreachable => DialError::NobodyListens(address),
        _ => DialError::Connect { address, source },
    })
}

async fn carry(mut connection: TcpStream, mut stream: Stream) {
    // Who has gone before the end is known to the other, whose connection is dropped.
    let _ = copy_bidirectional_with_sizes(&mut connection, &mut stream, BUFFER_BYTES, BUFFER_BYTES)
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        net::TcpListener,
    };
    use walnut_agent_api::StreamId;

    async fn stream(streams: &Streams, id: u64) -> tokio::io::DuplexStream {
        let (mut shim, agent) = duplex(64);
        streams.welcome(Box::pin(agent));
        shim.write_all(&StreamId(id).to_bytes()).await.unwrap();
        shim.read_u8().await.unwrap();
        shim
    }

    #[tokio::test]
    async fn a_stream_and_a_connection_become_each_others() {
        let streams = Streams::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut shim = stream(&streams, 1).await;
        dial(&streams, "stream:1", &address).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        shim.write_all(b"asked").await.unwrap();
        shim.shutdown().await.unwrap();
        let mut asked = String::new();
        server.read_to_string(&mut asked).await.unwrap();
        server.write_all(b"answered").await.unwrap();
        drop(server);
        let mut answered = String::new();
        shim.read_to_string(&mut answered).await.unwrap();
        assert_eq!((asked.as_str(), answered.as_str()), ("asked", "answered"));
    }

    #[tokio::test]
    async fn who_asks_for_localhost_finds_either_family() {
        let Ok(listener) = TcpListener::bind("[::1]:0").await else {
            return println!("skipped: no IPv6 here");
        };
        let port = listener.local_addr().unwrap().port();
        let streams = Streams::default();
        let _shim = stream(&streams, 1).await;
        let address = format!("127.0.0.1:{port}");
        dial(&streams, "stream:1", &address).await.unwrap();
        listener.accept().await.unwrap();
        // Others of loopback are asked for on purpose.
        let _shim = stream(&streams, 2).await;
        let address = format!("127.0.0.2:{port}");
        let refused = dial(&streams, "stream:2", &address).await.unwrap_err();
        assert!(matches!(refused, DialError::NobodyListens(_)), "{refused}");
        drop(listener);
        let mut shim = stream(&streams, 3).await;
        let address = format!("127.0.0.1:{port}");
        let refused = dial(&streams, "stream:3", &address).await.unwrap_err();
        assert_eq!(refused.to_string(), format!("nobody listens on {address}"));
        // The stream is not kept for another attempt.
        assert!(shim.read_u8().await.is_err());
    }

    #[tokio::test]
    async fn no_other_address_is_dialled() {
        let streams = Streams::default();
        for (id, address) in (1..).zip([
            "",
            "localhost:80",
            "127.0.0.1",
            "127.0.0.1:0",
            "192.0.2.1:80",
            "0.0.0.0:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[fe80::1]:80",
        ]) {
            let _shim = stream(&streams, id).await;
            let refused = dial(&streams, &format!("stream:{id}"), address).await;
            assert!(matches!(refused, Err(DialError::Address(_))), "{address}");
        }
        assert!(matches!(
            dial(&streams, "", "127.0.0.1:80").await,
            Err(DialError::NoStream)
        ));
    }
}
