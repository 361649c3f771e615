#![allow(unsafe_code, reason = "adopts the inherited control socket")]
//! Serves the contract with the parent ([`walnut_vmm_api`]) on the inherited socket.
//!
//! The first packet brings the configuration and every file; then requests are answered until the VM ends.
//! The end of the socket is the end of the parent, and so of the VM. Must not open a path.

use rustix::{
    io::{Errno, FdFlags, fcntl_setfd},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketType,
        recvmsg, send, sockopt::socket_type,
    },
};
use std::{
    error::Error,
    fs::File,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd},
};
use walnut_vmm_api::{
    CONTROL_FD, ConfigError, FailureKind, FdSlot, MAX_FDS, MAX_MESSAGE_BYTES, Message,
    MessageError, Request, VmConfig,
};

/// Why the conversation with the parent broke.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not started by a parent that keeps to the contract.
    #[error(
        "file descriptor {CONTROL_FD} is not a SOCK_SEQPACKET socket: walnut-vmm is started by containerd-shim-walnut-v2, not by hand"
    )]
    NotASocket,
    /// The parent hung up before it sent a configuration.
    #[error("the parent closed the control socket before it sent a configuration")]
    NoBoot,
    /// Something else came first.
    #[error("the first control message is not a configuration")]
    NotBoot,
    /// There is one VM in each process.
    #[error("a second configuration came while the VM runs")]
    SecondBoot,
    /// A packet or its descriptors were cut off.
    #[error(
        "a control message is larger than {MAX_MESSAGE_BYTES} bytes or has more than {MAX_FDS} file descriptors"
    )]
    TooLarge,
    /// Not this contract's.
    #[error("the control message makes no sense")]
    Message(#[from] MessageError),
    /// The configuration breaks the contract.
    #[error("the configuration is refused")]
    Config(#[from] ConfigError),
    /// A descriptor is named twice, or is not there.
    #[error("file descriptor {0} of the configuration is not there")]
    MissingFile(u8),
    /// The socket failed.
    #[error("cannot {action} the control socket")]
    Socket {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: Errno,
    },
}

/// The files that came with a request, by slot.
#[derive(Debug, Default)]
pub struct Files(Vec<Option<OwnedFd>>);

impl Files {
    /// Takes the file out of its slot.
    pub fn take(&mut self, slot: FdSlot) -> Result<OwnedFd, ControlError> {
        self.0
            .get_mut(usize::from(slot.0))
            .and_then(Option::take)
            .ok_or(ControlError::MissingFile(slot.0))
    }

    /// As [`Files::take`], for files that are read or written.
    pub fn take_file(&mut self, slot: FdSlot) -> Result<File, ControlError> {
        self.take(slot).map(File::from)
    }
}

/// What the parent wants next.
#[derive(Debug)]
pub enum Incoming {
    /// This, with the files that came along: those that nobody takes are closed.
    Request(Request, Files),
    /// Nothing any more: it is gone.
    Hangup,
    /// Nothing at the moment.
    Nothing,
}

/// The control socket.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
}

impl Control {
    /// The socket that the parent left at [`CONTROL_FD`]. Call it once, before any file is opened.
    pub fn inherited() -> Result<Self, ControlError> {
        // SAFETY: borrowed for two system calls, which report a descriptor that isn't open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
        if socket_type(borrowed) != Ok(SocketType::SEQPACKET) {
            return Err(ControlError::NotASocket);
        }
        fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(failed("keep to itself"))?;
        // SAFETY: it is open, as was just seen, and by the contract nobody else in this process owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
        Ok(Self { socket })
    }

    /// The other end of a pair, for tests.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Waits for the configuration and its files. The parent may take its time; its end ends the wait.
    pub fn receive_boot(&self) -> Result<(VmConfig, Files), ControlError> {
        let (request, files) = match self.receive_with(RecvFlags::empty())? {
            Incoming::Request(request, files) => (request, files),
            Incoming::Hangup | Incoming::Nothing => return Err(ControlError::NoBoot),
        };
        let Request::Boot(config) = request else {
            return Err(ControlError::NotBoot);
        };
        config.validate(files.0.len())?;
        Ok((config, files))
    }

    /// Reads one request and its files, if there is one.
    pub fn receive(&self) -> Result<Incoming, ControlError> {
        self.receive_with(RecvFlags::DONTWAIT)
    }

    fn receive_with(&self, flags: RecvFlags) -> Result<Incoming, ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut packet = vec![0; MAX_MESSAGE_BYTES];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut packet)];
            match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Incoming::Nothing),
                // The kernel says so once when a message to the parent was lost.
                Err(Errno::CONNRESET) => return Ok(Incoming::Hangup),
                result => break result.map_err(failed("read"))?,
            }
        };
        let mut files = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                files.extend(descriptors.map(Some));
            }
        }
        if received.bytes == 0 {
            return Ok(Incoming::Hangup);
        }
        let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
        if received.flags.intersects(cut) || files.len() > MAX_FDS {
            return Err(ControlError::TooLarge);
        }
        packet.truncate(received.bytes);
        Ok(Incoming::Request(Request::decode(&packet)?, Files(files)))
    }

    /// Sends one message. A parent that reads none until the socket is full breaks the contract.
    pub fn send(&self, message: &Message) -> Result<(), ControlError> {
        let packet = message.encode()?;
        send(
            &self.socket,
            &packet,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )
        .map(|_| ())
        .map_err(failed("write to"))
    }
}

impl std::os::fd::AsRawFd for Control {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// The answer to a request that failed.
pub fn failure(kind: FailureKind, error: &dyn Error) -> Message {
    Message::Failed {
        kind,
        error: chain(error),
    }
}

/// An error and its sources on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

fn failed(action: &'static str) -> impl FnOnce(Errno) -> ControlError {
    move |source| ControlError::Socket { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, sendmsg, socketpair,
    };
    use std::{
        io::{IoSlice, Read, Write},
        os::fd::AsFd,
    };

    fn pair() -> (OwnedFd, Control) {
        let (parent, own) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (parent, Control::new(own))
    }

    fn send_with(parent: &OwnedFd, packet: &[u8], files: &[File]) {
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
        let parts = [IoSlice::new(packet)];
        sendmsg(parent, &parts, &mut ancillary, SendFlags::empty()).unwrap();
    }

    fn config() -> VmConfig {
        VmConfig::new(FdSlot(0), FdSlot(1), FdSlot(2))
    }

    fn named_files(count: u8) -> Vec<File> {
        (0..count)
            .map(|number| {
                let fd = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC);
                let file = File::from(fd.unwrap());
                (&file).write_all(&[number]).unwrap();
                file
            })
            .collect()
    }

    #[test]
    fn a_configuration_arrives_with_its_files_in_their_slots() {
        let (parent, control) = pair();
        let packet = Request::Boot(config()).encode().unwrap();
        send_with(&parent, &packet, &named_files(3));
        let (received, mut files) = control.receive_boot().unwrap();
        assert_eq!(received, config());
        let mut console = files.take_file(received.console).unwrap();
        let mut name = Vec::new();
        std::io::Seek::rewind(&mut console).unwrap();
        console.read_to_end(&mut name).unwrap();
        assert_eq!(name, [2]);
        let again = files.take(received.console).unwrap_err();
        assert!(matches!(again, ControlError::MissingFile(2)));
    }

    #[test]
    fn what_breaks_the_contract_is_refused_by_name() {
        let refused = |packet: &[u8], files: u8| {
            let (parent, control) = pair();
            send_with(&parent, packet, &named_files(files));
            control.receive_boot().unwrap_err()
        };
        let boot = Request::Boot(config()).encode().unwrap();
        assert!(matches!(refused(&boot, 2), ControlError::Config(_)));
        assert!(matches!(refused(b"garbage", 0), ControlError::Message(_)));
        let stop = Request::Stop.encode().unwrap();
        assert!(matches!(refused(&stop, 0), ControlError::NotBoot));
        let long = vec![b' '; MAX_MESSAGE_BYTES + 1];
        assert!(matches!(refused(&long, 0), ControlError::TooLarge));
        let many = u8::try_from(MAX_FDS + 1).unwrap();
        assert!(matches!(refused(&boot, many), ControlError::TooLarge));
        let (parent, control) = pair();
        drop(parent);
        let error = control.receive_boot().unwrap_err();
        assert!(matches!(error, ControlError::NoBoot));
    }

    #[test]
    fn requests_and_the_end_of_the_parent_are_told_apart() {
        let (parent, control) = pair();
        assert!(matches!(control.receive().unwrap(), Incoming::Nothing));
        let packet = Request::Statistics.encode().unwrap();
        send_with(&parent, &packet, &[]);
        let request = control.receive().unwrap();
        assert!(matches!(request, Incoming::Request(Request::Statistics, _)));
        // Files that nobody asked for are closed with the request.
        let (mut kept, sent) = rustix::pipe::pipe()
            .map(|(r, w)| (File::from(r), w))
            .unwrap();
        send_with(&parent, &packet, &[sent.into()]);
        drop(control.receive().unwrap());
        assert_eq!(kept.read(&mut [0]).unwrap(), 0, "no writer is left");
        send_with(&parent, b"garbage", &[]);
        assert!(control.receive().is_err());
        control.send(&Message::Booted).unwrap();
        drop(parent);
        // The kernel says once that a message was lost, and then that the end is there.
        assert!(matches!(control.receive().unwrap(), Incoming::Hangup));
        assert!(matches!(control.receive().unwrap(), Incoming::Hangup));
        assert!(control.send(&Message::GuestReady).is_err());
    }
}
