//! What stands in a Pod's network namespace at one moment, and what a guest is to have of it.
//!
//! Reading and judging apart: [`Lists`] is read, [`Snapshot`] is made from it without any I/O. What can't be mirrored is
//! refused by name, or left out where the guest's kernel makes it by itself.

use super::{NetworkError, netlink::Socket, tap::TAP_PREFIX};
use std::io;
use walnut_agent_api::{
    guest::{self, Interface},
    netlink::{attribute, attributes, push, push_nested, set_u32, u16_at, u32_at},
};

const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEIGH: u16 = 30;
const RTM_GETRULE: u16 = 34;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// struct ifinfomsg; struct ifaddrmsg; struct rtmsg, ndmsg and fib_rule_hdr.
const LINK_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 8;
const HEADER_BYTES: usize = 12;

const ARPHRD_ETHER: u16 = 1;
const ARPHRD_LOOPBACK: u16 = 772;
const LOOPBACK_INDEX: u32 = 1;
const IFF_UP: u32 = 0x1;
/// IFF_UP, IFF_NOARP, IFF_PROMISC, IFF_ALLMULTI, IFF_MULTICAST.
const MIRRORED_FLAGS: u32 = IFF_UP | 0x80 | 0x100 | 0x200 | 0x1000;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINK_NETNSID: u16 = 37;

const IFA_ADDRESS: u16 = 1;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_PERMANENT: u32 = 0x80;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;

const RT_TABLE_LOCAL: u8 = 255;
const RTPROT_REDIRECT: u8 = 1;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_RA: u8 = 9;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_NH_ID: u16 = 30;

const NUD_PERMANENT: u16 = 0x80;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

const FRA_PROTOCOL: u16 = 21;

/// What the kernel says of a namespace.
#[derive(Debug, Default)]
pub(super) struct Lists {
    links: Vec<Vec<u8>>,
    addresses: Vec<Vec<u8>>,
    neighbours: Vec<Vec<u8>>,
    routes: Vec<Vec<u8>>,
    rules: Vec<Vec<u8>>,
}

impl Lists {
    pub(super) fn read(socket: &Socket) -> io::Result<Self> {
        let both = |kind: u16, header: usize| -> io::Result<Vec<Vec<u8>>> {
            let mut messages = Vec::new();
            for family in [AF_INET, AF_INET6] {
                let mut body = vec![0; header];
                body[0] = family;
                messages.extend(socket.list(kind, &body)?);
            }
            Ok(messages)
        };
        Ok(Self {
            links: socket.list(RTM_GETLINK, &[0; LINK_BYTES])?,
            addresses: both(RTM_GETADDR, ADDRESS_BYTES)?,
            neighbours: both(RTM_GETNEIGH, HEADER_BYTES)?,
            routes: both(RTM_GETROUTE, HEADER_BYTES)?,
            rules: both(RTM_GETRULE, HEADER_BYTES)?,
        })
    }
}

/// An interface, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    hardware: u16,
    flags: u32,
    mac: Vec<u8>,
    mtu: u32,
    kind: String,
    /// What it stands on, if that is in this namespace too.
    lower: Option<u32>,
    /// The bridge or bond whose port it is.
    master: Option<u32>,
}

/// What a guest is to have.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Snapshot {
    pub(super) network: guest::Network,
    /// Those of the interfaces that only take multicast packets which somebody in their namespace listens to.
    pub(super) filtering: Vec<u32>,
}

impl Snapshot {
    /// Judges what was read.
    pub(super) fn of(lists: &Lists) -> Result<Self, NetworkError> {
        let links = lists.links.iter().filter_map(|body| Link::parse(body));
        let links: Vec<_> = links.filter(|link| !link.is_walnuts()).collect();
        let mut snapshot = Self::default();
        for link in &links {
            if !link.is_mirrored(&links)? {
                continue;
            }
            if matches!(
                link.kind.as_str(),
                "macvlan" | "macvtap" | "ipvlan" | "ipvtap"
            ) {
                snapshot.filtering.push(link.index);
            }
            snapshot.network.interfaces.push(Interface {
                index: link.index,
                name: link.name.clone(),
                mac: link.mac.clone(),
                mtu: link.mtu,
                flags: link.flags & MIRRORED_FLAGS,
                ..Default::default()
            });
        }
        let interfaces = snapshot.network.interfaces.iter();
        let mut known: Vec<u32> = interfaces.map(|interface| interface.index).collect();
        known.push(LOOPBACK_INDEX);
        let network = &mut snapshot.network;
        network.addresses = lists
            .addresses
            .iter()
            .filter_map(|body| address(body, &known))
            .collect();
        network.neighbours = lists
            .neighbours
            .iter()
            .filter_map(|body| neighbour(body, &known))
            .collect();
        network.routes = lists.routes.iter().filter_map(|body| route(body)).collect();
        network.rules = lists
            .rules
            .iter()
            .filter(|body| is_of_user(body))
            .cloned()
            .collect();
        Ok(snapshot)
    }
}

impl Link {
    fn parse(body: &[u8]) -> Option<Self> {
        let number = |kind| attribute(body, LINK_BYTES, kind).and_then(|value| u32_at(value, 0));
        let info = attribute(body, LINK_BYTES, IFLA_LINKINFO).unwrap_or_default();
        let elsewhere = attribute(body, LINK_BYTES, IFLA_LINK_NETNSID).is_some();
        Some(Self {
            index: u32_at(body, 4)?,
            name: text(attribute(body, LINK_BYTES, IFLA_IFNAME)?),
            hardware: u16_at(body, 2)?,
            flags: u32_at(body, 8)?,
            mac: attribute(body, LINK_BYTES, IFLA_ADDRESS)
                .unwrap_or_default()
                .to_vec(),
            mtu: number(IFLA_MTU)?,
            kind: attribute(info, 0, IFLA_INFO_KIND)
                .map(text)
                .unwrap_or_default(),
            lower: number(IFLA_LINK).filter(|lower| *lower != 0 && !elsewhere),
            master: number(IFLA_MASTER),
        })
    }

    /// Whether it is a tap that a sandbox has made.
    fn is_walnuts(&self) -> bool {
        self.kind == "tun" && self.name.starts_with(TAP_PREFIX)
    }

    /// Whether the guest gets it, among the others of its namespace.
    fn is_mirrored(&self, others: &[Self]) -> Result<bool, NetworkError> {
        let refused = |reason| {
            Err(NetworkError::Unmirrorable {
                interface: self.name.clone(),
                kind: self.kind.clone(),
                reason,
            })
        };
        // A port's packets are its bridge's. What the kernel puts into every namespace for its tunnels is down.
        let unused = self.hardware != ARPHRD_ETHER && self.flags & IFF_UP == 0;
        if self.hardware == ARPHRD_LOOPBACK || self.master.is_some() || unused {
            return Ok(false);
        }
        if self.hardware != ARPHRD_ETHER {
            return refused("its packets are not Ethernet's");
        }
        let stands_on_another =
            self.kind != "veth" && others.iter().any(|other| Some(other.index) == self.lower);
        if stands_on_another {
            return refused(
                "it stands on another interface of the Pod, whose packets are the guest's",
            );
        }
        if u16::try_from(self.mtu).is_err() {
            return refused("its MTU is above 65535");
        }
        Ok(true)
    }
}

/// An address of ours: those with a lifetime come from routers, whom the guest asks itself, and loopback's own are there.
fn address(body: &[u8], known: &[u32]) -> Option<Vec<u8>> {
    let index = u32_at(body, 4)?;
    let short = u32::from(*body.get(2)?);
    let flags = attribute(body, ADDRESS_BYTES, IFA_FLAGS).and_then(|value| u32_at(value, 0));
    let flags = flags.unwrap_or(short);
    let value = attribute(body, ADDRESS_BYTES, IFA_ADDRESS)?;
    let is_own = index == LOOPBACK_INDEX
        && matches!(
            value,
            [127, 0, 0, 1] | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
        );
    let failed = flags & IFA_F_DADFAILED != 0;
    if !known.contains(&index) || flags & IFA_F_PERMANENT == 0 || failed || is_own {
        return None;
    }
    // Its route is among the routes, if it has one. It was seen to be nobody else's, or else the guest has to look.
    let mut guests = flags & !(IFA_F_PERMANENT | IFA_F_TENTATIVE) | IFA_F_NOPREFIXROUTE;
    if flags & IFA_F_TENTATIVE == 0 && body.first() == Some(&AF_INET6) {
        guests |= IFA_F_NODAD;
    }
    let mut message = body.get(..ADDRESS_BYTES)?.to_vec();
    if let Some(place) = message.get_mut(2) {
        *place = 0;
    }
    for (kind, value) in attributes(body, ADDRESS_BYTES).filter(|(kind, _)| *kind != IFA_FLAGS) {
        push(&mut message, kind, value);
    }
    push(&mut message, IFA_FLAGS, &guests.to_ne_bytes());
    Some(message)
}

/// A neighbour that somebody has written down.
fn neighbour(body: &[u8], known: &[u32]) -> Option<Vec<u8>> {
    let is_ours = known.contains(&u32_at(body, 4)?) && u32_at(body, 4)? != LOOPBACK_INDEX;
    if !is_ours || u16_at(body, 8)? & NUD_PERMANENT == 0 {
        return None;
    }
    let mut message = body.get(..HEADER_BYTES)?.to_vec();
    for kind in [NDA_DST, NDA_LLADDR] {
        push(&mut message, kind, attribute(body, HEADER_BYTES, kind)?);
    }
    Some(message)
}

/// A route that the guest's kernel doesn't make or learn by itself.
fn route(body: &[u8]) -> Option<Vec<u8>> {
    let (table, protocol, kind) = (*body.get(4)?, *body.get(5)?, *body.get(7)?);
    let flags = u32_at(body, 8)?;
    let kernels = protocol == RTPROT_KERNEL && (table == RT_TABLE_LOCAL || kind != RTN_UNICAST);
    let learnt = matches!(protocol, RTPROT_REDIRECT | RTPROT_RA);
    if kernels || learnt || flags & RTM_F_CLONED != 0 {
        return None;
    }
    let mut message = body.get(..HEADER_BYTES)?.to_vec();
    // The others say how the interface is at the moment.
    set_u32(&mut message, 8, flags & RTNH_F_ONLINK);
    for (attribute, value) in attributes(body, HEADER_BYTES) {
        match attribute {
            // How old it is; and a name for what the message says by itself too.
            RTA_CACHEINFO | RTA_NH_ID => {}
            // Where packets don't go, the interface is the kernel's own choice.
            RTA_OIF if kind != RTN_UNICAST && is_loopback(value) => {}
            RTA_MULTIPATH => push_nested(&mut message, attribute, &hops(value)),
            _ => push(&mut message, attribute, value),
        }
    }
    Some(message)
}

/// struct rtnexthop: length, flags, weight, interface. The flags say how the interface is, but for one.
fn hops(value: &[u8]) -> Vec<u8> {
    let mut hops = value.to_vec();
    let mut at = 0;
    while let Some(length @ 8..) = u16_at(&hops, at) {
        if let Some(flags) = hops.get_mut(at + 2) {
            *flags &= 4;
        }
        at += usize::from(length).next_multiple_of(4);
    }
    hops
}

fn is_loopback(value: &[u8]) -> bool {
    u32_at(value, 0) == Some(LOOPBACK_INDEX)
}

/// Whether a rule was made by somebody: the kernel's own are in every namespace.
fn is_of_user(body: &&Vec<u8>) -> bool {
    attribute(body, HEADER_BYTES, FRA_PROTOCOL) != Some(&[RTPROT_KERNEL])
}

fn text(value: &[u8]) -> String {
    let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn link(index: u32, name: &str, kind: &str, hardware: u16) -> Vec<u8> {
        let mut body = vec![0, 0];
        body.extend(hardware.to_ne_bytes());
        body.extend(index.to_ne_bytes());
        body.extend((IFF_UP | 0x1_0042).to_ne_bytes());
        body.extend([0; 4]);
        push(&mut body, IFLA_IFNAME, name.as_bytes());
        push(&mut body, IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]);
        push(&mut body, IFLA_MTU, &1400u32.to_ne_bytes());
        let mut info = Vec::new();
        push(&mut info, IFLA_INFO_KIND, kind.as_bytes());
        push_nested(&mut body, IFLA_LINKINFO, &info);
        body
    }

    fn with(mut body: Vec<u8>, kind: u16, value: u32) -> Vec<u8> {
        push(&mut body, kind, &value.to_ne_bytes());
        body
    }

    fn judge(links: Vec<Vec<u8>>) -> Result<Vec<String>, NetworkError> {
        let lists = Lists {
            links,
            ..Lists::default()
        };
        let interfaces = Snapshot::of(&lists)?.network.interfaces;
        Ok(interfaces
            .into_iter()
            .map(|interface| interface.name)
            .collect())
    }

    #[test]
    fn what_has_ethernets_packets_is_mirrored_but_for_ports_and_taps_of_walnut() {
        let down = {
            let mut tunnel = link(2, "tunl0", "ipip", 768);
            set_u32(&mut tunnel, 8, 0);
            tunnel
        };
        let names = judge(vec![
            link(1, "lo", "", ARPHRD_LOOPBACK),
            down,
            link(3, "eth0", "veth", ARPHRD_ETHER),
            with(
                link(4, "net1", "macvlan", ARPHRD_ETHER),
                IFLA_LINK_NETNSID,
                0,
            ),
            link(5, "br0", "bridge", ARPHRD_ETHER),
            with(link(6, "port", "veth", ARPHRD_ETHER), IFLA_MASTER, 5),
            link(7, "walnut0", "tun", ARPHRD_ETHER),
            link(8, "tap0", "tun", ARPHRD_ETHER),
        ]);
        assert_eq!(names.unwrap(), ["eth0", "net1", "br0", "tap0"]);
    }

    #[test]
    fn what_cannot_be_mirrored_is_named() {
        let wireguard = link(2, "wg0", "wireguard", 65534);
        let upon = with(link(4, "eth0.7", "vlan", ARPHRD_ETHER), IFLA_LINK, 3);
        for (links, expected) in [
            (vec![wireguard], "\"wg0\" of kind \"wireguard\""),
            (
                vec![link(3, "eth0", "veth", ARPHRD_ETHER), upon],
                "\"eth0.7\"",
            ),
        ] {
            let error = judge(links).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    fn address_of(family: u8, index: u32, flags: u32, value: &[u8]) -> Vec<u8> {
        let mut body = vec![family, 24, 0x80, 0];
        body.extend(index.to_ne_bytes());
        push(&mut body, IFA_ADDRESS, value);
        push(&mut body, IFA_FLAGS, &flags.to_ne_bytes());
        body
    }

    #[test]
    fn addresses_keep_what_they_are_and_bring_no_route() {
        let flags = |body: &[u8]| {
            address(body, &[1, 3]).map(|message| {
                assert_eq!(message[2], 0);
                u32_at(attribute(&message, ADDRESS_BYTES, IFA_FLAGS).unwrap(), 0).unwrap()
            })
        };
        let (v4, v6) = ([10, 0, 0, 1], [0xfd; 16]);
        let permanent = IFA_F_PERMANENT;
        for (body, expected) in [
            (
                address_of(AF_INET, 3, permanent, &v4),
                Some(IFA_F_NOPREFIXROUTE),
            ),
            (
                address_of(AF_INET6, 3, permanent, &v6),
                Some(IFA_F_NOPREFIXROUTE | IFA_F_NODAD),
            ),
            (
                address_of(AF_INET6, 3, permanent | IFA_F_TENTATIVE, &v6),
                Some(IFA_F_NOPREFIXROUTE),
            ),
            (
                address_of(AF_INET6, 3, permanent | IFA_F_DADFAILED, &v6),
                None,
            ),
            (address_of(AF_INET6, 3, 0, &v6), None),
            (address_of(AF_INET, 9, permanent, &v4), None),
            (address_of(AF_INET, 1, permanent, &[127, 0, 0, 1]), None),
            (
                address_of(AF_INET, 1, permanent, &v4),
                Some(IFA_F_NOPREFIXROUTE),
            ),
        ] {
            assert_eq!(flags(&body), expected, "{body:?}");
        }
    }

    fn route_of(table: u8, protocol: u8, kind: u8, flags: u32) -> Vec<u8> {
        let mut body = vec![AF_INET, 24, 0, 0, table, protocol, 0, kind];
        body.extend(flags.to_ne_bytes());
        push(&mut body, RTA_OIF, &3u32.to_ne_bytes());
        push(&mut body, RTA_CACHEINFO, &[0; 32]);
        body
    }

    #[test]
    fn routes_that_the_guest_makes_or_learns_are_left_out() {
        for (body, is_told) in [
            (route_of(254, RTPROT_KERNEL, RTN_UNICAST, 0), true),
            (route_of(254, 3, RTN_UNICAST, RTNH_F_ONLINK | 0x10), true),
            (route_of(255, RTPROT_KERNEL, 2, 0), false),
            (route_of(255, 3, 2, 0), true),
            (route_of(254, RTPROT_RA, RTN_UNICAST, 0), false),
            (route_of(254, 3, RTN_UNICAST, RTM_F_CLONED), false),
        ] {
            let message = route(&body);
            assert_eq!(message.is_some(), is_told, "{body:?}");
            for message in message.iter() {
                assert_eq!(u32_at(message, 8).unwrap() & !RTNH_F_ONLINK, 0);
                assert_eq!(attribute(message, HEADER_BYTES, RTA_CACHEINFO), None);
            }
        }
    }

    proptest! {
        #[test]
        fn any_list_is_judged(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            let lists = Lists {
                links: vec![bytes.clone()],
                addresses: vec![bytes.clone()],
                neighbours: vec![bytes.clone()],
                routes: vec![bytes.clone()],
                rules: vec![bytes],
            };
            let _ = Snapshot::of(&lists);
        }
    }
}
