//! The shim's end of the VMM's control socket (vmm/api): one packet, one message.
//!
//! The VMM is trusted with its own Pod only, so what comes back is bounded and checked.

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};
use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};
use tokio::{io::Interest, net::UnixStream};
use walnut_vmm_api::{MAX_FDS, MAX_MESSAGE_BYTES, Message, MessageError, Request};

/// Why the VMM can't be talked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// The socket.
    #[error("{0} the VMM's control socket failed")]
    Socket(&'static str, #[source] io::Error),
    /// A message that breaks the contract.
    #[error("a control message breaks the contract")]
    Message(#[from] MessageError),
    /// The VMM has gone.
    #[error("the VMM closed its control socket")]
    Closed,
}

/// The shim's end.
#[derive(Debug)]
pub(crate) struct Control {
    /// The type is tokio's for any connected Unix socket; this one keeps packets apart, so that it is only
    /// read and written whole, by `recv` and `sendmsg`.
    socket: UnixStream,
}

/// A connected pair: the shim's end, and the one that the VMM inherits.
pub(crate) fn pair() -> Result<(Control, OwnedFd), ControlError> {
    let failed = |error: io::Error| ControlError::Socket("creating", error);
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| failed(error.into()))?;
    // Only this end must not block: the VMM's end is a file description of its own.
    rustix::io::ioctl_fionbio(&ours, true).map_err(|error| failed(error.into()))?;
    let socket = UnixStream::from_std(ours.into()).map_err(failed)?;
    Ok((Control { socket }, theirs))
}

impl Control {
    /// Sends a request together with file descriptors.
    pub(crate) async fn send(
        &self,
        request: &Request,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        let packet = request.encode()?;
        let sent = self.socket.async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
                return Err(io::Error::other("too many file descriptors"));
            }
            sendmsg(
                self.socket.as_fd(),
                &[IoSlice::new(&packet)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )
            .map_err(io::Error::from)
        });
        sent.await
            .map(drop)
            .map_err(|error| ControlError::Socket("writing to", error))
    }

    /// Receives the next message.
    pub(crate) async fn receive(&self) -> Result<Message, ControlError> {
        // One byte more than a message may have shows a packet that was cut off.
        let mut packet = vec![0; MAX_MESSAGE_BYTES + 1];
        let received = self.socket.async_io(Interest::READABLE, || {
            recv(
                self.socket.as_fd(),
                packet.as_mut_slice(),
                RecvFlags::empty(),
            )
            .map(|(length, _)| length)
            .map_err(io::Error::from)
        });
        let length = match received.await {
            Ok(0) => return Err(ControlError::Closed),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ControlError::Closed);
            }
            Err(error) => return Err(ControlError::Socket("reading from", error)),
        };
        Ok(Message::decode(packet.get(..length).unwrap_or_default())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, recvmsg, send};
    use std::io::IoSliceMut;

    #[tokio::test]
    async fn a_request_carries_its_files() {
        let (control, theirs) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        control
            .send(&Request::Statistics, &[null.as_fd(), null.as_fd()])
            .await
            .unwrap();
        let mut packet = [0; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &theirs,
            &mut [IoSliceMut::new(&mut packet)],
            &mut ancillary,
            RecvFlags::empty(),
        )
        .unwrap();
        let files: usize = ancillary
            .drain()
            .map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => files.count(),
                _ => 0,
            })
            .sum();
        assert_eq!(files, 2);
        assert_eq!(
            Request::decode(&packet[..received.bytes]).unwrap(),
            Request::Statistics
        );
    }

    #[tokio::test]
    async fn answers_are_read_one_by_one_until_the_end() {
        let (control, theirs) = pair().unwrap();
        for message in [Message::Booted, Message::GuestReady] {
            send(&theirs, &message.encode().unwrap(), SendFlags::empty()).unwrap();
        }
        send(&theirs, b"nonsense", SendFlags::empty()).unwrap();
        drop(theirs);
        assert_eq!(control.receive().await.unwrap(), Message::Booted);
        assert_eq!(control.receive().await.unwrap(), Message::GuestReady);
        assert!(matches!(
            control.receive().await,
            Err(ControlError::Message(_))
        ));
        assert!(matches!(control.receive().await, Err(ControlError::Closed)));
    }
}
