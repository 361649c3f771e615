//! What the host's kernel says of the Pod's addresses, neighbours, routes and rules, said to the guest's kernel.
//!
//! The messages are the host's but for the interfaces' indices. No I/O.

use std::collections::BTreeMap;
use walnut_agent_api::netlink::{attributes, push, push_nested, set_u32, u16_at, u32_at};

/// struct rtmsg.
const ROUTE_HEADER_BYTES: usize = 12;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
/// struct rtnexthop: its own length, flags, weight, interface.
const NEXT_HOP_BYTES: usize = 8;

/// What a message is about; in the order in which one needs the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Address,
    Neighbour,
    /// Goes out of an interface; gateways are reached by it.
    Link,
    /// By a gateway.
    Route,
    Rule,
}

/// A message for the guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Message {
    pub(super) subject: Subject,
    pub(super) body: Vec<u8>,
}

impl Subject {
    /// RTM_NEW…; RTM_DEL… is the next number.
    pub(super) fn kind(self) -> u16 {
        match self {
            Self::Address => 20,
            Self::Link | Self::Route => 24,
            Self::Neighbour => 28,
            Self::Rule => 32,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Address => "an address",
            Self::Neighbour => "a neighbour",
            Self::Link | Self::Route => "a route",
            Self::Rule => "a rule",
        }
    }
}

/// A message about an address or a neighbour, whose header names an interface.
pub(super) fn of_interface(
    subject: Subject,
    host: &[u8],
    indices: &BTreeMap<u32, u32>,
) -> Option<Message> {
    let mut body = host.to_vec();
    set_u32(&mut body, 4, *indices.get(&u32_at(host, 4)?)?);
    Some(Message { subject, body })
}

/// A message about a route, whose attributes may name interfaces.
pub(super) fn route(host: &[u8], indices: &BTreeMap<u32, u32>) -> Option<Message> {
    let mut subject = Subject::Link;
    let mut body = host.get(..ROUTE_HEADER_BYTES)?.to_vec();
    for (kind, value) in attributes(host, ROUTE_HEADER_BYTES) {
        match kind {
            RTA_IIF | RTA_OIF => {
                let index = indices.get(&u32_at(value, 0)?)?;
                push(&mut body, kind, &index.to_ne_bytes());
            }
            RTA_MULTIPATH => {
                subject = Subject::Route;
                push_nested(&mut body, kind, &next_hops(value, indices)?);
            }
            _ => {
                if matches!(kind, RTA_GATEWAY | RTA_VIA) {
                    subject = Subject::Route;
                }
                push(&mut body, kind, value);
            }
        }
    }
    Some(Message { subject, body })
}

fn next_hops(host: &[u8], indices: &BTreeMap<u32, u32>) -> Option<Vec<u8>> {
    let mut hops = host.to_vec();
    let mut at = 0;
    while at < hops.len() {
        let length = usize::from(u16_at(&hops, at)?);
        if length < NEXT_HOP_BYTES {
            return None;
        }
        let index = indices.get(&u32_at(&hops, at + 4)?)?;
        set_u32(&mut hops, at + 4, *index);
        at += length.next_multiple_of(4);
    }
    Some(hops)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use walnut_agent_api::netlink::attribute;

    fn indices() -> BTreeMap<u32, u32> {
        BTreeMap::from([(1, 1), (7, 2), (9, 3)])
    }

    #[test]
    fn interfaces_are_the_guests() {
        let mut address = vec![2, 24, 0, 0, 7, 0, 0, 0];
        push(&mut address, 1, &[10, 0, 0, 2]);
        let message = of_interface(Subject::Address, &address, &indices()).unwrap();
        assert_eq!(u32_at(&message.body, 4), Some(2));
        assert_eq!(message.body[8..], address[8..]);
        address[4] = 8;
        assert_eq!(of_interface(Subject::Address, &address, &indices()), None);
    }

    #[test]
    fn routes_by_a_gateway_come_after_those_to_it() {
        let mut link = vec![0; ROUTE_HEADER_BYTES];
        push(&mut link, RTA_OIF, &9u32.to_ne_bytes());
        let mut by_gateway = link.clone();
        push(&mut by_gateway, RTA_GATEWAY, &[10, 0, 0, 1]);
        let [link, by_gateway] = [link, by_gateway].map(|host| route(&host, &indices()).unwrap());
        assert!(link < by_gateway);
        let index = attribute(&by_gateway.body, ROUTE_HEADER_BYTES, RTA_OIF).unwrap();
        assert_eq!(index, 3u32.to_ne_bytes());
    }

    #[test]
    fn each_of_many_hops_names_its_interface() {
        let hop = |index: u8| {
            let mut hop = vec![16, 0, 0, 0, index, 0, 0, 0];
            push(&mut hop, RTA_GATEWAY, &[10, 0, 0, index]);
            hop
        };
        let mut host = vec![0; ROUTE_HEADER_BYTES];
        push_nested(&mut host, RTA_MULTIPATH, &[hop(7), hop(9)].concat());
        let message = route(&host, &indices()).unwrap();
        let hops = attribute(&message.body, ROUTE_HEADER_BYTES, RTA_MULTIPATH).unwrap();
        assert_eq!((u32_at(hops, 4), u32_at(hops, 20)), (Some(2), Some(3)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_route_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            let _ = route(&bytes, &indices());
            let _ = next_hops(&bytes, &indices());
        }
    }
}
