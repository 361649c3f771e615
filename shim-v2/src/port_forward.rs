//! Carries connections to the loopback addresses of the Pod's namespace on the host to those of the guest.
//!
//! containerd's CRI enters that namespace for `kubectl port-forward` and connects to localhost. The host alone opens
//! connections here, and so many at once as are bounded; each has buffers of one size, and who sends waits for who reads.
//! A connection that nobody takes in the guest is reset: the kernel here has accepted it before the guest is asked.

use crate::{agent::Agent, log, network::Loopback};
use rustix::net::sockopt::{set_socket_keepalive, set_socket_linger, set_tcp_keepidle};
use std::{future::Future, io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader, Interest, copy_buf},
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
};
use ttrpc::Code;

/// Connections at once; the next waits until one ends.
const MAX_CONNECTIONS: usize = 128;
/// For each direction of each.
const BUFFER_BYTES: usize = 16 * 1024;
/// After it the kernel asks whether a caller that is silent is still there. One that has closed its socket is not, when
/// its own kernel has given up on it, after a minute.
const SILENCE: Duration = Duration::from_secs(60);

/// Serves until the VM ends.
pub(crate) async fn serve(taken: Loopback, agent: Arc<Agent>, ended: impl Future<Output = ()>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut listening = JoinSet::new();
    for listener in taken.listeners {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                listening.spawn(accept(listener, Arc::clone(&agent), Arc::clone(&room)));
            }
            Err(error) => log::error("waiting for port-forwards", &error),
        }
    }
    ended.await;
    // Nobody is led here any more before nobody listens.
    drop(taken.link);
}

async fn accept(listener: TcpListener, agent: Arc<Agent>, room: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        match listener.accept().await {
            Ok((caller, _)) => {
                while connections.try_join_next().is_some() {}
                let agent = Arc::clone(&agent);
                connections.spawn(async move {
                    // Whoever has broken it off knows.
                    let _ = forward(caller, &agent).await;
                    drop(permit);
                });
            }
            Err(error) => {
                log::error("accepting a port-forward", &error);
                // Such as for want of files, which the end of one of these frees.
                if connections.join_next().await.is_none() {
                    return;
                }
            }
        }
    }
}

async fn forward(mut caller: TcpStream, agent: &Agent) -> io::Result<()> {
    // Until all has gone well, its end is a reset.
    set_socket_linger(&caller, Some(Duration::ZERO))?;
    set_socket_keepalive(&caller, true)?;
    set_tcp_keepidle(&caller, SILENCE)?;
    caller.set_nodelay(true)?;
    match agent.dial(caller.local_addr()?).await {
        Ok(guest) => carry(&mut caller, guest).await?,
        Err(error) => {
            if !error.is_of_code(Code::UNAVAILABLE) {
                log::error("forwarding a port", &error);
            }
            return Ok(());
        }
    }
    Ok(set_socket_linger(&caller, None)?)
}

/// Until both have said all, or the caller has gone.
async fn carry(caller: &mut TcpStream, mut guest: UnixStream) -> io::Result<()> {
    let (from_caller, to_caller) = caller.split();
    let (from_guest, to_guest) = guest.split();
    let there = one_way(from_caller, to_guest);
    let back = one_way(from_guest, to_caller);
    tokio::pin!(there, back);
    tokio::select! {
        answered = &mut back => {
            answered?;
            there.await?;
        }
        asked = &mut there => {
            let from_caller = asked?;
            tokio::select! {
                answered = back => {
                    answered?;
                }
                // Nobody waits for the answer.
                gone = from_caller.ready(Interest::ERROR) => {
                    gone?;
                }
            }
        }
    }
    Ok(())
}

/// Carries all of one direction, and its end.
async fn one_way<R: AsyncRead + Unpin>(from: R, mut to: impl AsyncWrite + Unpin) -> io::Result<R> {
    let mut from = BufReader::with_capacity(BUFFER_BYTES, from);
    copy_buf(&mut from, &mut to).await?;
    to.shutdown().await?;
    Ok(from.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncReadExt as _, time::timeout};

    const DEADLINE: Duration = Duration::from_secs(60);

    /// A caller and the shim's end of its connection.
    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (caller, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (caller.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn every_byte_goes_both_ways_and_each_end_after_them() {
        let (mut caller, mut shims) = connected().await;
        let (guest, shim) = UnixStream::pair().unwrap();
        let carrying = tokio::spawn(async move { carry(&mut shims, shim).await });
        let (mut from_shim, mut to_shim) = guest.into_split();
        let echo = tokio::spawn(async move {
            tokio::io::copy(&mut from_shim, &mut to_shim).await.unwrap();
            // After the caller's end, more may come.
            to_shim.write_all(b"the end").await.unwrap();
        });
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let (mut reader, mut writer) = caller.split();
        let mut received = Vec::new();
        let write = async {
            writer.write_all(&sent).await?;
            writer.shutdown().await
        };
        let both = async { tokio::try_join!(write, reader.read_to_end(&mut received)) };
        timeout(DEADLINE, both).await.unwrap().unwrap();
        assert!(received == [&sent[..], b"the end"].concat());
        echo.await.unwrap();
        carrying.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_caller_that_goes_for_good_ends_a_guest_that_never_does() {
        let (mut caller, mut shims) = connected().await;
        let (mut guest, shim) = UnixStream::pair().unwrap();
        let carrying = tokio::spawn(async move { carry(&mut shims, shim).await });
        caller.write_all(b"once").await.unwrap();
        caller.shutdown().await.unwrap();
        let mut asked = Vec::new();
        guest.read_to_end(&mut asked).await.unwrap();
        assert_eq!(asked, b"once");
        set_socket_linger(&caller, Some(Duration::ZERO)).unwrap();
        drop(caller);
        timeout(DEADLINE, carrying).await.unwrap().unwrap().unwrap();
    }
}
