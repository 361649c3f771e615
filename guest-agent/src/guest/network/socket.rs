//! A socket of rtnetlink(7): one request at a time.

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink,
    recv, send, socket_with, sockopt,
};
use std::{io, os::fd::OwnedFd, time::Duration};
use walnut_agent_api::netlink::{Answer, Mode, answers, request};

/// The kernel answers at once; this is for what it can't.
const DEADLINE: Duration = Duration::from_secs(10);
/// The kernel's own limit of a datagram that lists things.
const DATAGRAM_BYTES: usize = 32 * 1024;
/// RTMGRP_LINK: links that come and go.
const LINKS: u32 = 1;

pub(super) struct Socket(OwnedFd);

impl Socket {
    /// For requests.
    pub(super) fn new() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is number 0.
            None,
        )?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(DEADLINE))?;
        Ok(Self(socket))
    }

    /// For news of links.
    pub(super) fn of_links() -> io::Result<Self> {
        let socket = Self::new()?;
        bind(&socket.0, &SocketAddrNetlink::new(0, LINKS))?;
        Ok(socket)
    }

    /// Waits for news, but no longer than this.
    pub(super) fn news(&self, within: Duration) -> io::Result<()> {
        let within = within.max(Duration::from_millis(1));
        sockopt::set_socket_timeout(&self.0, sockopt::Timeout::Recv, Some(within))?;
        let mut news = [0; 1];
        recv(&self.0, &mut news, RecvFlags::empty())?;
        Ok(())
    }

    /// Asks for a change.
    pub(super) fn change(&self, kind: u16, mode: Mode, body: &[u8]) -> io::Result<()> {
        self.ask(kind, mode, body, |_| {})
    }

    /// Asks, and hands over each message of the answer.
    pub(super) fn ask(
        &self,
        kind: u16,
        mode: Mode,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        send(&self.0, &request(kind, mode, body), SendFlags::empty())?;
        let mut datagram = vec![0; DATAGRAM_BYTES];
        loop {
            let (_, count) = recv(&self.0, datagram.as_mut_slice(), RecvFlags::empty())?;
            for answer in answers(datagram.get(..count).unwrap_or_default()) {
                match answer {
                    Answer::Message { body, .. } => each(body),
                    Answer::End(0) => return Ok(()),
                    Answer::End(error) => return Err(io::Error::from_raw_os_error(error)),
                }
            }
        }
    }
}
