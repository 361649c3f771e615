//! A socket of rtnetlink(7) in the namespace of the thread that opens it: one request at a time.

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
/// A list that changed while it was read is read again, so often.
const MAX_ATTEMPTS: usize = 5;
/// RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE; and the bit of
/// RTNLGRP_IPV6_RULE (19).
const EVERYTHING: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;

pub(super) struct Socket(OwnedFd);

impl Socket {
    /// For requests.
    pub(super) fn new() -> io::Result<Self> {
        let socket = open(SocketFlags::CLOEXEC)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(DEADLINE))?;
        Ok(Self(socket))
    }

    /// For news of whatever a guest's network is made from; does not block.
    pub(super) fn of_news() -> io::Result<OwnedFd> {
        let socket = open(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        bind(&socket, &SocketAddrNetlink::new(0, EVERYTHING))?;
        Ok(socket)
    }

    /// The socket itself, for what asks any socket of the namespace.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.0
    }

    /// Asks for a change.
    pub(super) fn change(&self, kind: u16, mode: Mode, body: &[u8]) -> io::Result<()> {
        self.ask(kind, mode, body).map(drop)
    }

    /// Asks for all there is of a kind.
    pub(super) fn list(&self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..MAX_ATTEMPTS {
            let (messages, interrupted) = self.ask(kind, Mode::Dump, body)?;
            if !interrupted {
                return Ok(messages);
            }
        }
        Err(io::Error::other("it changes faster than it can be read"))
    }

    fn ask(&self, kind: u16, mode: Mode, body: &[u8]) -> io::Result<(Vec<Vec<u8>>, bool)> {
        send(&self.0, &request(kind, mode, body), SendFlags::empty())?;
        let mut messages = Vec::new();
        let mut changed = false;
        let mut datagram = vec![0; DATAGRAM_BYTES];
        loop {
            let (_, count) = recv(&self.0, datagram.as_mut_slice(), RecvFlags::empty())?;
            for answer in answers(datagram.get(..count).unwrap_or_default()) {
                match answer {
                    Answer::Message {
                        body, interrupted, ..
                    } => {
                        messages.push(body.to_vec());
                        changed |= interrupted;
                    }
                    Answer::End(0) => return Ok((messages, changed)),
                    Answer::End(error) => return Err(io::Error::from_raw_os_error(error)),
                }
            }
        }
    }
}

fn open(flags: SocketFlags) -> io::Result<OwnedFd> {
    // NETLINK_ROUTE is number 0.
    Ok(socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_listed() {
        let links = Socket::new().unwrap().list(18, &[0; 16]).unwrap();
        assert!(!links.is_empty());
        let error = Socket::new().unwrap().list(0xfff0, &[0; 16]).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }
}
