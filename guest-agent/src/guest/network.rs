//! The guest's network: the loopback device for now.
//!
//! rtnetlink(7), by hand: one request of 32 bytes. Must not grow: more needs a netlink crate.

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use std::io;

const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;
/// The first device of every network namespace.
const LOOPBACK_INDEX: i32 = 1;

/// Brings the loopback device up.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        // NETLINK_ROUTE is number 0.
        None,
    )?;
    send(&socket, &link_up(LOOPBACK_INDEX), SendFlags::empty())?;
    let mut answer = [0; 256];
    let (_, count) = recv(&socket, &mut answer, RecvFlags::empty())?;
    outcome(answer.get(..count).unwrap_or_default())
}

/// struct nlmsghdr, then struct ifinfomsg.
fn link_up(index: i32) -> Vec<u8> {
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message
}

/// struct nlmsgerr: a negative error number, 0 for success.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let malformed = || io::Error::other("the kernel's answer is not a netlink acknowledgement");
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    let error = answer.get(16..20).and_then(|bytes| bytes.try_into().ok());
    match (kind.map(u16::from_ne_bytes), error.map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => {
            Err(io::Error::from_raw_os_error(error.saturating_neg()))
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers() {
        // An index that no device has; unprivileged, the answer is EPERM.
        let error = outcome(&{
            let mut answer = vec![0; 20];
            answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
            answer[16..20].copy_from_slice(&(-19i32).to_ne_bytes());
            answer
        })
        .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(19));
        assert!(outcome(&[]).is_err());
        assert_eq!(link_up(1).len(), 32);
    }
}
