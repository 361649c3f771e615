//! The guest's network is the Pod's: interfaces by their names on the host, with addresses, neighbours, routes and rules.
//!
//! Layers: `socket` (rtnetlink), `nic` (devices and their drivers), `messages` (what is copied). Must not touch what the
//! host didn't name: containers make interfaces, addresses and routes of their own.

mod messages;
mod nic;
mod socket;

use self::{
    messages::{Message, Subject},
    nic::{IFLA_ADDRESS, IFLA_IFNAME, LINK_HEADER_BYTES, Nic},
    socket::Socket,
};
use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant},
};
use walnut_agent_api::{
    guest::{Interface, Network as Wanted},
    netlink::{Mode, push},
};

const RTM_NEWLINK: u16 = 16;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 0x1;
/// What an interface has from the host's: IFF_UP, IFF_NOARP, IFF_PROMISC, IFF_ALLMULTI, IFF_MULTICAST.
const FLAGS: u32 = IFF_UP | 0x80 | 0x100 | 0x200 | 0x1000;
/// The first device of every network namespace.
const LOOPBACK_INDEX: u32 = 1;
/// For the kernel to find a device that was attached.
const DEVICE_DEADLINE: Duration = Duration::from_secs(30);
/// IFNAMSIZ without its terminating zero.
const MAX_NAME_BYTES: usize = 15;
const MAC_BYTES: usize = 6;

/// Why the network is not what it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// An interface that can't be.
    #[error("network.interfaces[{0}].{1}")]
    Interface(usize, &'static str),
    /// A message that isn't one, or that names an interface that isn't there.
    #[error("network: {0} is malformed, or of an interface that the Pod doesn't have")]
    Message(&'static str),
    /// No device.
    #[error("interface {0:?} has no device after {seconds} s", seconds = DEVICE_DEADLINE.as_secs())]
    NoDevice(String),
    /// The kernel refused.
    #[error("cannot {attempted}")]
    System {
        /// What was attempted.
        attempted: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn system(attempted: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let attempted = attempted.into();
    move |source| NetworkError::System { attempted, source }
}

/// Brings the loopback device up.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    let up = link(LOOPBACK_INDEX, IFF_UP, IFF_UP);
    Socket::new()?.change(RTM_NEWLINK, Mode::Change, &up)
}

/// What the host has made of the guest's network.
#[derive(Debug, Default)]
pub(crate) struct Network {
    /// By their index on the host.
    nics: BTreeMap<u32, Nic>,
    messages: Vec<Message>,
}

impl Network {
    /// Makes the network what the host wants. After a failure another attempt goes on from there.
    pub(crate) fn apply(&mut self, wanted: &Wanted) -> Result<(), NetworkError> {
        check(&wanted.interfaces)?;
        let socket = Socket::new().map_err(system("open a socket of rtnetlink"))?;
        self.release(wanted)?;
        self.find(&socket, wanted)?;
        for interface in &wanted.interfaces {
            self.configure(&socket, interface)?;
        }
        let messages = self.translate(wanted)?;
        for old in self.messages.iter().rev() {
            if !messages.contains(old) {
                // With an interface its addresses and routes have gone.
                let _ = socket.change(old.subject.kind() + 1, Mode::Change, &old.body);
            }
        }
        self.messages = messages;
        for message in &self.messages {
            let mode = match message.subject {
                // IPv6 has one of the same destination for each interface.
                Subject::Link | Subject::Route => Mode::Add,
                _ => Mode::Create,
            };
            let added = socket.change(message.subject.kind(), mode, &message.body);
            match added {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    let attempted = format!("add {}", message.subject.name());
                    return Err(system(attempted)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets go of devices that aren't wanted any more.
    fn release(&mut self, wanted: &Wanted) -> Result<(), NetworkError> {
        let is_wanted = |index: u32| wanted.interfaces.iter().any(|one| one.index == index);
        for (index, nic) in std::mem::take(&mut self.nics) {
            if is_wanted(index) {
                self.nics.insert(index, nic);
            } else {
                nic::unbind(&nic).map_err(system(format!("release {}", nic.name)))?;
            }
        }
        Ok(())
    }

    /// Finds the devices of interfaces that are new, and gives them names that are in nobody's way.
    fn find(&mut self, socket: &Socket, wanted: &Wanted) -> Result<(), NetworkError> {
        for interface in &wanted.interfaces {
            if self.nics.contains_key(&interface.index) {
                continue;
            }
            let mut nic = self.device(socket, interface)?;
            let name = format!("walnut{}", nic.index);
            let mut renamed = link(nic.index, 0, IFF_UP);
            push(&mut renamed, IFLA_IFNAME, name.as_bytes());
            socket
                .change(RTM_NEWLINK, Mode::Change, &renamed)
                .map_err(system(format!("rename {}", nic.name)))?;
            nic.name = name;
            self.nics.insert(interface.index, nic);
        }
        Ok(())
    }

    fn device(&self, socket: &Socket, interface: &Interface) -> Result<Nic, NetworkError> {
        let find = || {
            let nics = nic::list(socket).map_err(system("list the network devices"))?;
            let found = nics.into_iter().find(|nic| {
                let taken = self.nics.values().any(|other| other.index == nic.index);
                // One that came later is known by its place, as two may have one MAC address.
                !taken
                    && nic.place == interface.device
                    && (!nic.place.is_empty() || nic.mac == interface.mac)
            });
            Ok(found)
        };
        // Before the first look, so that nothing comes unseen between a look and a wait.
        let news = Socket::of_links().map_err(system("follow the network devices"))?;
        let deadline = Instant::now() + DEVICE_DEADLINE;
        loop {
            if !interface.device.is_empty() {
                nic::bind(&interface.device).map_err(system("look for a network device"))?;
            }
            if let Some(nic) = find()? {
                return Ok(nic);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || news.news(left).is_err() {
                return find()?.ok_or_else(|| NetworkError::NoDevice(interface.name.clone()));
            }
        }
    }

    fn configure(&mut self, socket: &Socket, wanted: &Interface) -> Result<(), NetworkError> {
        let Some(nic) = self.nics.get_mut(&wanted.index) else {
            return Ok(());
        };
        let attempted = || system(format!("configure {}", wanted.name));
        if nic.name != wanted.name {
            let mut renamed = link(nic.index, 0, 0);
            push(&mut renamed, IFLA_IFNAME, wanted.name.as_bytes());
            socket
                .change(RTM_NEWLINK, Mode::Change, &renamed)
                .map_err(attempted())?;
            nic.name.clone_from(&wanted.name);
            // Its addresses are the host's: none is made up here. A guest without IPv6 has no such file.
            let file = format!("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", nic.name);
            match fs::write(file, "1") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(attempted()(error));
                }
                _ => {}
            }
        }
        let mut settings = link(nic.index, wanted.flags, FLAGS);
        push(&mut settings, IFLA_MTU, &wanted.mtu.to_ne_bytes());
        if nic.mac != wanted.mac {
            push(&mut settings, IFLA_ADDRESS, &wanted.mac);
        }
        socket
            .change(RTM_NEWLINK, Mode::Change, &settings)
            .map_err(attempted())?;
        nic.mac.clone_from(&wanted.mac);
        Ok(())
    }

    /// The host's messages for this guest's interfaces, in the order in which they are said.
    fn translate(&self, wanted: &Wanted) -> Result<Vec<Message>, NetworkError> {
        let mut indices = BTreeMap::from([(LOOPBACK_INDEX, LOOPBACK_INDEX)]);
        indices.extend(self.nics.iter().map(|(&host, nic)| (host, nic.index)));
        let lists = [
            (Subject::Address, &wanted.addresses),
            (Subject::Neighbour, &wanted.neighbours),
            (Subject::Route, &wanted.routes),
            (Subject::Rule, &wanted.rules),
        ];
        let mut messages = Vec::new();
        for (subject, list) in lists {
            for host in list {
                let message = match subject {
                    Subject::Link | Subject::Route => messages::route(host, &indices),
                    Subject::Rule => Some(Message {
                        subject,
                        body: host.clone(),
                    }),
                    _ => messages::of_interface(subject, host, &indices),
                };
                messages.push(message.ok_or(NetworkError::Message(subject.name()))?);
            }
        }
        // Stable: of one subject, the host's order.
        messages.sort_by_key(|message| message.subject);
        Ok(messages)
    }
}

/// struct ifinfomsg with flags, of which those in `mask` count.
fn link(index: u32, flags: u32, mask: u32) -> Vec<u8> {
    let mut message = Vec::with_capacity(LINK_HEADER_BYTES);
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend((flags & mask).to_ne_bytes());
    message.extend(mask.to_ne_bytes());
    message
}

fn check(interfaces: &[Interface]) -> Result<(), NetworkError> {
    for (at, interface) in interfaces.iter().enumerate() {
        let name = interface.name.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_graphic() && !b"/:%".contains(byte);
        let is_name = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.iter().all(plain);
        if !is_name || name == b"." || name == b".." {
            return Err(NetworkError::Interface(at, "name is not an interface's"));
        }
        if interface.mac.len() != MAC_BYTES {
            return Err(NetworkError::Interface(at, "mac does not have 6 bytes"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_interface_cannot_be_is_named() {
        for (name, mac, expected) in [
            ("", 6, "network.interfaces[0].name"),
            ("a/b", 6, "network.interfaces[0].name"),
            ("..", 6, "network.interfaces[0].name"),
            ("sixteen-letters!", 6, "network.interfaces[0].name"),
            ("eth0", 5, "network.interfaces[0].mac"),
        ] {
            let interface = Interface {
                name: name.to_owned(),
                mac: vec![2; mac],
                ..Default::default()
            };
            let error = check(&[interface]).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_request_about_a_link_is_its_header() {
        assert_eq!(link(2, IFF_UP, FLAGS).len(), LINK_HEADER_BYTES);
    }

    #[test]
    fn a_route_of_an_unknown_interface_is_refused() {
        let mut route = vec![0; 12];
        push(&mut route, 4, &9u32.to_ne_bytes());
        let wanted = Wanted {
            routes: vec![route],
            ..Default::default()
        };
        let error = Network::default().translate(&wanted).unwrap_err();
        assert!(error.to_string().contains("a route"), "{error}");
    }
}
