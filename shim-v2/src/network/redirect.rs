//! An interface and a tap, each of which sends what the other receives: tc(8)'s `mirred`, at the moment when a packet
//! arrives, before anything else of the namespace sees it.
//!
//! Works on the namespace of the socket.

use super::netlink::Socket;
use std::io;
use walnut_agent_api::netlink::{Mode, push, push_nested};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;

/// Linux' pkt_sched.h: TC_H_CLSACT, its own handle, and its hook for what arrives.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const ARRIVING: u32 = 0xffff_fff2;
/// The filter's own place in the order of filters: before those of anybody who came first would not be ours to say.
const PRIORITY: u32 = 49_152;
/// ETH_P_ALL, in the network's order.
const ALL_PROTOCOLS: u16 = 3u16.to_be();

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_MATCHALL_ACT: u16 = 2;
const FIRST_ACTION: u16 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;

pub(super) const IFF_UP: u32 = 0x1;
pub(super) const IFF_ALLMULTI: u32 = 0x200;
pub(super) const IFLA_MTU: u16 = 4;

/// Makes a place for filters on an interface; false if somebody has made it already.
pub(super) fn make_place(socket: &Socket, index: u32) -> io::Result<bool> {
    match socket.change(RTM_NEWQDISC, Mode::Create, &place(index)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sends by `to` all that arrives at `from`. Refused if somebody does so already.
pub(super) fn redirect(socket: &Socket, from: u32, to: u32) -> io::Result<()> {
    let mut mirred = Vec::new();
    // struct tc_mirred: index, capabilities, action, two counts, what to do, with which interface.
    for field in [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to] {
        mirred.extend(u32::to_ne_bytes(field));
    }
    let mut parameters = Vec::new();
    push(&mut parameters, TCA_MIRRED_PARMS, &mirred);
    let mut action = Vec::new();
    push(&mut action, TCA_ACT_KIND, b"mirred\0");
    push_nested(&mut action, TCA_ACT_OPTIONS, &parameters);
    let mut actions = Vec::new();
    push_nested(&mut actions, FIRST_ACTION, &action);
    let mut options = Vec::new();
    push_nested(&mut options, TCA_MATCHALL_ACT, &actions);
    let mut request = filter(from);
    push_nested(&mut request, TCA_OPTIONS, &options);
    socket.change(RTM_NEWTFILTER, Mode::Create, &request)
}

/// Undoes [`redirect`] and, if that made it, [`make_place`]; what has gone already is fine.
pub(super) fn undo(socket: &Socket, index: u32, place_made: bool) -> io::Result<()> {
    absent_is_fine(socket.change(RTM_DELTFILTER, Mode::Change, &filter(index)))?;
    if place_made {
        absent_is_fine(socket.change(RTM_DELQDISC, Mode::Change, &place(index)))?;
    }
    Ok(())
}

/// Changes flags of an interface, those in `mask`, and its MTU.
pub(super) fn set_link(
    socket: &Socket,
    index: u32,
    flags: u32,
    mask: u32,
    mtu: Option<u32>,
) -> io::Result<()> {
    let mut request = vec![0; 4];
    for field in [index, flags, mask] {
        request.extend(field.to_ne_bytes());
    }
    if let Some(mtu) = mtu {
        push(&mut request, IFLA_MTU, &mtu.to_ne_bytes());
    }
    socket.change(RTM_NEWLINK, Mode::Change, &request)
}

/// Of an interface that has gone, or a place that somebody else has removed.
pub(super) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn place(index: u32) -> Vec<u8> {
    let mut request = header(index, CLSACT_HANDLE, CLSACT, 0);
    push(&mut request, TCA_KIND, b"clsact\0");
    request
}

fn filter(index: u32) -> Vec<u8> {
    let information = PRIORITY << 16 | u32::from(ALL_PROTOCOLS);
    let mut request = header(index, 0, ARRIVING, information);
    push(&mut request, TCA_KIND, b"matchall\0");
    request
}

/// struct tcmsg.
fn header(index: u32, handle: u32, parent: u32, information: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    for field in [index, handle, parent, information] {
        message.extend(field.to_ne_bytes());
    }
    message
}
