//! What the agent and `walnut-init` say to each other over the socket that is the latter's standard input.
//!
//! A SOCK_SEQPACKET pair. The agent's first packet carries file descriptors: [`Job`] and the container's
//! filter as JSON in an anonymous file, then those the job calls for, in the order of [`Job::fds`]. `walnut-init` answers with
//! [`Report`]s, one packet each. Then the process waits for one more packet, [`GO`], and becomes the
//! container's program; the end of the socket is the sign that it did. Must not hold container logic.

use super::{
    seccomp::Filter,
    spec::{Inherited, Process, Spec},
};
use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// The agent's second packet.
pub(crate) const GO: &[u8] = b"go";
/// Longest report, and longest message in one.
const MAX_PACKET_BYTES: usize = 16 * 1024;
/// Longest message of a failure, so that its packet fits however JSON escapes it.
const MAX_MESSAGE_BYTES: usize = 2048;
/// Most file descriptors in a packet.
const MAX_PACKET_FDS: usize = 8;

/// What `walnut-init` is to become.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// The first process of a container.
    Create(Box<Spec>, Identity),
    /// A further process of the container whose first process a pidfd names.
    Exec(Box<Process>, Inherited),
}

/// What containerd calls a container; its hooks are told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) id: String,
    /// On the host.
    pub(crate) bundle: String,
}

impl Job {
    /// The process, of either kind.
    pub(crate) fn process(&self) -> &Process {
        match self {
            Self::Create(spec, _) => &spec.process,
            Self::Exec(process, _) => process,
        }
    }
}

/// File descriptors of a job, beside the job itself.
#[derive(Debug)]
pub(crate) struct JobFds {
    /// The container's cgroup directory.
    pub(crate) cgroup: OwnedFd,
    /// Of [`Job::Exec`]: the container's first process.
    pub(crate) container: Option<OwnedFd>,
    /// stdin, stdout and stderr; absent when the process has a terminal.
    pub(crate) stdio: Option<[OwnedFd; 3]>,
}

impl JobFds {
    fn in_order(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = vec![self.cgroup.as_fd()];
        fds.extend(self.container.iter().map(AsFd::as_fd));
        fds.extend(self.stdio.iter().flatten().map(AsFd::as_fd));
        fds
    }

    fn from_order(job: &Job, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let cgroup = fds.next()?;
        let container = match job {
            Job::Create(..) => None,
            Job::Exec(..) => Some(fds.next()?),
        };
        let stdio = if job.process().terminal {
            None
        } else {
            Some([fds.next()?, fds.next()?, fds.next()?])
        };
        fds.next().is_none().then_some(Self {
            cgroup,
            container,
            stdio,
        })
    }
}

/// What `walnut-init` says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The container's process exists, with this id in the agent's PID namespace.
    Process(i32),
    /// All is set up and the program was found. With a terminal, its master side comes along.
    Ready,
    /// Nothing will run.
    Failed(Failure),
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Blame {
    /// The configuration asks for what cannot be, or names what does not exist.
    Request,
    /// Anything else.
    Guest,
}

/// Why `walnut-init` gave up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// Whose fault it is.
    pub(crate) blame: Blame,
    /// What was attempted and how it failed.
    pub(crate) message: String,
}

/// Sends the job; nothing has been sent on `socket` before.
pub(crate) fn send_job(
    socket: impl AsFd,
    job: &Job,
    filter: Option<&Filter>,
    fds: &JobFds,
) -> io::Result<()> {
    let file = rustix::fs::memfd_create("walnut-job", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    serde_json::to_writer(io::BufWriter::new(&mut file), &(job, filter))?;
    io::Seek::rewind(&mut file)?;
    let mut all = vec![file.as_fd()];
    all.extend(fds.in_order());
    send(socket, b"job", &all)
}

/// Receives what [`send_job`] sent.
pub(crate) fn receive_job(socket: impl AsFd) -> io::Result<(Job, Option<Filter>, JobFds)> {
    let malformed = || io::Error::other("the job's file descriptors do not fit the job");
    let (_, mut fds) = receive(socket)?;
    if fds.is_empty() {
        return Err(malformed());
    }
    let file = std::fs::File::from(fds.remove(0));
    let (job, filter): (Job, _) = serde_json::from_reader(io::BufReader::new(file))?;
    let fds = JobFds::from_order(&job, fds).ok_or_else(malformed)?;
    Ok((job, filter, fds))
}

/// Sends a report, with the terminal's master side if there is one.
pub(crate) fn send_report(
    socket: impl AsFd,
    report: &Report,
    terminal: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    send(socket, &serde_json::to_vec(report)?, terminal.as_slice())
}

/// Receives a report; `None` is the end of the socket. Blocks only if the socket does.
pub(crate) fn receive_report(socket: impl AsFd) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let (bytes, fds) = receive(socket)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    Ok(Some((
        serde_json::from_slice(&bytes)?,
        fds.into_iter().next(),
    )))
}

/// A failure whose message is short enough to be sent.
pub(crate) fn failure(blame: Blame, message: &str) -> Failure {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    Failure {
        blame,
        message: message.get(..end).unwrap_or_default().to_owned(),
    }
}

fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PACKET_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many file descriptors for one packet"));
    }
    let flags = SendFlags::NOSIGNAL;
    rustix::io::retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, flags))?;
    Ok(())
}

/// One packet; empty at the end of the socket.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX_PACKET_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PACKET_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let received = match received {
        // The peer died with our packet unread.
        Err(Errno::CONNRESET) => return Ok((Vec::new(), Vec::new())),
        other => other?,
    };
    bytes.truncate(received.bytes);
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_job_larger_than_any_packet_arrives() {
        let (agent, init) = pair();
        let mut spec = Spec::default();
        spec.process.env = vec!["A=".to_owned() + &"x".repeat(1_000_000)];
        let job = Job::Create(Box::new(spec), Identity::default());
        let fds = JobFds {
            cgroup: null(),
            container: None,
            stdio: Some([null(), null(), null()]),
        };
        send_job(&agent, &job, None, &fds).unwrap();
        let (received, _, fds) = receive_job(&init).unwrap();
        assert_eq!(received.process().env, job.process().env);
        assert!(fds.stdio.is_some());
    }

    #[test]
    fn the_end_of_the_socket_is_not_a_report() {
        let (agent, init) = pair();
        send_report(&init, &Report::Ready, None).unwrap();
        drop(init);
        assert_eq!(receive_report(&agent).unwrap().unwrap().0, Report::Ready);
        assert!(receive_report(&agent).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn the_longest_failure_fits_a_packet(message in "\\PC{0,3000}|[\\x00-\\x1f]{3000}") {
            let (agent, init) = pair();
            let report = Report::Failed(failure(Blame::Request, &message));
            send_report(&init, &report, None).unwrap();
            prop_assert_eq!(receive_report(&agent).unwrap().unwrap().0, report);
        }
    }
}
