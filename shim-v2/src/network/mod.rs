//! The Pod's network: whatever stands in its namespace on the host, the guest has too.
//!
//! For each interface a tap is made beside it, and each sends what the other receives (`redirect`); the tap's files are
//! the VMM's. Addresses, neighbours, routes and rules are told to the agent as the kernel tells them (`snapshot`). Nothing
//! of the CNI's is changed but for filters, which `record` undoes; taps go with the VMM. Everything here blocks.
//! Must not know the VM or the agent: `machine` carries what is found to both.

mod loopback;
mod namespace;
mod netlink;
mod record;
mod redirect;
mod snapshot;
mod tap;

pub(crate) use self::{loopback::Loopback, record::undo};

use self::{
    namespace::Namespace,
    netlink::Socket,
    record::{Record, Touched},
    redirect::{IFF_ALLMULTI, IFF_UP},
    snapshot::{Lists, Snapshot},
    tap::Tap,
};
use crate::spec::NetworkNamespace;
use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};
use walnut_agent_api::guest::{self, Interface};
use walnut_vmm_api::{FdSlot, NetworkConfig};

/// Pairs of queues of an interface at the most: each is two files of the VMM, and a thread of it or of the kernel.
const MAX_QUEUE_PAIRS: usize = 8;
/// Pairs of queues of all interfaces that are there at boot, as one message carries their files.
const MAX_BOOT_PAIRS: usize = 16;

/// Why the guest can't have the Pod's network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The host's own network.
    #[error(
        "network namespace {0:?} is the host's, which a container in a VM cannot join: run the Pod without hostNetwork"
    )]
    HostNetwork(PathBuf),
    /// The namespace.
    #[error("network namespace {path:?} cannot be entered")]
    Namespace {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An interface that a guest can't have.
    #[error("interface {interface:?} of kind {kind:?} cannot be the guest's: {reason}")]
    Unmirrorable {
        /// Its name.
        interface: String,
        /// Its kind, as `ip link` has it.
        kind: String,
        /// Why not.
        reason: &'static str,
    },
    /// An interface that somebody else redirects.
    #[error("what arrives at interface {0:?} is redirected already, by another sandbox or program")]
    Redirected(String),
    /// The host refused.
    #[error("{what} {interface:?} failed")]
    Operation {
        /// What was attempted.
        what: &'static str,
        /// With which interface, or in which namespace.
        interface: String,
        /// Why.
        source: io::Error,
    },
    /// What is heard of the namespace.
    #[error("following the changes of the Pod's network failed")]
    News(#[source] io::Error),
    /// The record.
    #[error("{what} {file:?} failed")]
    Record {
        /// What was attempted.
        what: &'static str,
        /// The record.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A network device for the VMM.
#[derive(Debug)]
pub(crate) struct Nic {
    /// The interface that it stands for.
    pub(crate) index: u32,
    mac: [u8; 6],
    mtu: u16,
    tap: Tap,
    vhost: Vec<OwnedFd>,
}

impl Nic {
    /// Puts its files to the others of a message, and describes it.
    pub(crate) fn hand_over(self, files: &mut Vec<OwnedFd>) -> NetworkConfig {
        let mut push = |file| {
            files.push(file);
            // The message's own limit of files is lower.
            FdSlot(u8::try_from(files.len() - 1).unwrap_or(u8::MAX))
        };
        NetworkConfig {
            taps: self.tap.queues.into_iter().map(&mut push).collect(),
            vhost: self.vhost.into_iter().map(&mut push).collect(),
            mac: self.mac,
            mtu: self.mtu,
            receive_rate: None,
            transmit_rate: None,
        }
    }
}

/// An interface that the guest has.
#[derive(Debug)]
struct Attached {
    tap: u32,
    mtu: u32,
    /// The VMM's name of its device; empty for one that is there since boot.
    device: String,
    touched: Touched,
}

/// The network of one Pod.
#[derive(Debug)]
pub(crate) struct PodNetwork {
    /// None before the VM has made its own, and when all is over.
    namespace: Option<Arc<Namespace>>,
    /// Where to write what is changed in the namespace; what is changed in the VMM's own goes with it.
    record: Option<PathBuf>,
    vcpus: usize,
    attached: BTreeMap<u32, Attached>,
    /// Devices whose interfaces have gone, for the VMM to remove when the guest has let go.
    leaving: Vec<String>,
    /// What the agent has been told.
    told: guest::Network,
}

impl PodNetwork {
    /// Opens the namespace that the Pod names; a Pod that asks for a new one gets it with its VM.
    pub(crate) fn open(
        source: &NetworkNamespace,
        record: PathBuf,
        vcpus: u8,
    ) -> Result<Self, NetworkError> {
        let (namespace, record) = match source {
            NetworkNamespace::Path(path) => (Some(Namespace::open(path)?), Some(record)),
            NetworkNamespace::New => (None, None),
        };
        Ok(Self {
            namespace: namespace.map(Arc::new),
            record,
            vcpus: vcpus.into(),
            attached: BTreeMap::new(),
            leaving: Vec::new(),
            told: guest::Network::default(),
        })
    }

    /// Takes the VMM's own namespace for the Pod's, unless the Pod named one: that is where others look for it, by the
    /// process id that they are told.
    pub(crate) fn adopt(&mut self, vmm: u32) -> Result<(), NetworkError> {
        if self.namespace.is_none() {
            let path = PathBuf::from(format!("/proc/{vmm}/ns/net"));
            self.namespace = Some(Arc::new(Namespace::open(&path)?));
        }
        Ok(())
    }

    /// A socket that has something to read whenever the namespace changes.
    pub(crate) fn news(&self) -> Result<Option<OwnedFd>, NetworkError> {
        let Some(namespace) = &self.namespace else {
            return Ok(None);
        };
        let news =
            namespace.run(|| Socket::of_news().map_err(failed("following", namespace.path())))?;
        Ok(Some(news))
    }

    /// Takes the connections to the loopback addresses of a namespace that the Pod has named.
    pub(crate) fn loopback(&self) -> Result<Option<Loopback>, NetworkError> {
        let (Some(namespace), Some(_)) = (&self.namespace, &self.record) else {
            return Ok(None);
        };
        let taken = namespace.run(|| {
            Loopback::take(namespace.file()).map_err(failed(
                "taking the loopback connections of",
                namespace.path(),
            ))
        })?;
        Ok(Some(taken))
    }

    /// Looks what there is now: redirects interfaces that are new, and gives their devices for the VMM.
    pub(crate) fn look(&mut self) -> Result<(guest::Network, Vec<Nic>), NetworkError> {
        let Some(namespace) = self.namespace.clone() else {
            return Ok(Default::default());
        };
        namespace.run(|| {
            let listing = || failed("listing", namespace.path());
            let socket = Socket::new().map_err(listing())?;
            let lists = Lists::read(&socket).map_err(listing())?;
            let Snapshot { network, filtering } = Snapshot::of(&lists)?;
            self.part_with(&network.interfaces);
            let mut nics = Vec::new();
            let count = network.interfaces.len();
            for interface in &network.interfaces {
                if let Some(attached) = self.attached.get_mut(&interface.index) {
                    attached.follow(&socket, interface)?;
                } else {
                    let filters = filtering.contains(&interface.index);
                    match self.attach(&socket, interface, filters, count) {
                        Ok(nic) => nics.push(nic),
                        Err(error) => {
                            for nic in nics {
                                self.give_up(nic.index);
                            }
                            return Err(error);
                        }
                    }
                }
            }
            Ok((network, nics))
        })
    }

    /// Takes note of where the VMM has put the device of an interface.
    pub(crate) fn placed(&mut self, index: u32, device: String) {
        if let Some(attached) = self.attached.get_mut(&index) {
            attached.device = device;
        }
    }

    /// Undoes what [`PodNetwork::look`] did for an interface whose device nobody took.
    pub(crate) fn give_up(&mut self, index: u32) {
        if let (Some(attached), Some(namespace)) = (self.attached.remove(&index), &self.namespace) {
            let undone = namespace.run(|| {
                let undo = || attached.touched.undo(&Socket::new()?);
                undo().map_err(failed("leaving", namespace.path()))
            });
            if let Err(error) = undone.and_then(|()| self.write_record()) {
                crate::log::error("undoing what was done to an interface", &error);
            }
        }
    }

    /// What the agent is to be told, unless it knows; with the devices' places.
    pub(crate) fn to_tell(&self, mut network: guest::Network) -> Option<guest::Network> {
        for interface in &mut network.interfaces {
            if let Some(attached) = self.attached.get(&interface.index) {
                interface.device.clone_from(&attached.device);
            }
        }
        (network != self.told).then_some(network)
    }

    /// Takes note of what the agent has been told; gives the devices that it has let go of.
    pub(crate) fn told(&mut self, network: guest::Network) -> Vec<String> {
        self.told = network;
        std::mem::take(&mut self.leaving)
    }

    /// Leaves the namespace as it was found. A second time does nothing.
    pub(crate) fn release(&mut self) -> Result<(), NetworkError> {
        self.namespace = None;
        self.attached.clear();
        match &self.record {
            Some(record) => undo(record),
            None => Ok(()),
        }
    }

    /// Forgets interfaces that have gone: with them all that was done to them has.
    fn part_with(&mut self, interfaces: &[Interface]) {
        let gone = |index: &u32| !interfaces.iter().any(|interface| interface.index == *index);
        for (_, attached) in self.attached.extract_if(.., |index, _| gone(index)) {
            if !attached.device.is_empty() {
                self.leaving.push(attached.device);
            }
        }
    }

    /// Makes a tap beside an interface, in the namespace of this thread.
    fn attach(
        &mut self,
        socket: &Socket,
        interface: &Interface,
        filters: bool,
        count: usize,
    ) -> Result<Nic, NetworkError> {
        let index = interface.index;
        let fair = (MAX_BOOT_PAIRS / count.max(1)).max(1);
        let queues = self.vcpus.min(MAX_QUEUE_PAIRS).min(fair);
        let failed = |what| interface_failed(what, interface);
        let mac = interface.mac.as_slice().try_into();
        let mac = mac
            .map_err(|_| failed("reading the MAC address of")(io::ErrorKind::InvalidData.into()))?;
        let tap = Tap::create(queues).map_err(failed("making a tap beside"))?;
        let vhost = tap::vhost(queues).map_err(failed("opening /dev/vhost-net for"))?;
        let attached = Attached {
            tap: prepare_tap(socket, &tap, interface.mtu)
                .map_err(failed("preparing a tap beside"))?,
            mtu: interface.mtu,
            device: String::new(),
            touched: Touched {
                index,
                place_made: false,
                all_multicast: filters && interface.flags & IFF_ALLMULTI == 0,
            },
        };
        self.attached.insert(index, attached);
        match self.join(socket, interface) {
            Ok(()) => {}
            Err(NetworkError::Redirected(name)) => {
                // The filter is another's, and stays.
                self.attached.remove(&index);
                self.write_record()?;
                return Err(NetworkError::Redirected(name));
            }
            Err(error) => {
                self.give_up(index);
                return Err(error);
            }
        }
        Ok(Nic {
            index,
            mac,
            mtu: u16::try_from(interface.mtu).unwrap_or(u16::MAX),
            tap,
            vhost,
        })
    }

    /// Makes an interface and its tap send what the other receives; what is to be undone is written down first.
    fn join(&mut self, socket: &Socket, interface: &Interface) -> Result<(), NetworkError> {
        let index = interface.index;
        let failed = |what| interface_failed(what, interface);
        self.write_record()?;
        let place_made = redirect::make_place(socket, index).map_err(failed("preparing"))?;
        let Some(attached) = self.attached.get_mut(&index) else {
            return Ok(());
        };
        attached.touched.place_made = place_made;
        let (tap, all_multicast) = (attached.tap, attached.touched.all_multicast);
        self.write_record()?;
        redirect::make_place(socket, tap)
            .and_then(|_| redirect::redirect(socket, tap, index))
            .map_err(failed("redirecting to"))?;
        // From here on nothing arrives in the namespace itself.
        redirect::redirect(socket, index, tap).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => NetworkError::Redirected(interface.name.clone()),
            _ => failed("redirecting")(source),
        })?;
        if all_multicast {
            redirect::set_link(socket, index, IFF_ALLMULTI, IFF_ALLMULTI, None)
                .map_err(failed("taking all multicast packets of"))?;
        }
        Ok(())
    }

    fn write_record(&self) -> Result<(), NetworkError> {
        let (Some(file), Some(namespace)) = (&self.record, &self.namespace) else {
            return Ok(());
        };
        let record = Record {
            namespace: namespace.path().to_owned(),
            identity: namespace.identity()?,
            interfaces: self
                .attached
                .values()
                .map(|attached| attached.touched)
                .collect(),
        };
        record.write(file)
    }
}

impl Attached {
    /// A tap carries what its interface does.
    fn follow(&mut self, socket: &Socket, interface: &Interface) -> Result<(), NetworkError> {
        if self.mtu != interface.mtu {
            redirect::set_link(socket, self.tap, 0, 0, Some(interface.mtu)).map_err(
                interface_failed("changing the MTU of the tap beside", interface),
            )?;
            self.mtu = interface.mtu;
        }
        Ok(())
    }
}

/// Brings a tap up, so that the namespace's own protocols say nothing on it. Gives its index.
fn prepare_tap(socket: &Socket, tap: &Tap, mtu: u32) -> io::Result<u32> {
    match fs::write(
        format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.name),
        "1",
    ) {
        // The host has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        written => written?,
    }
    let index = rustix::net::netdevice::name_to_index(socket.file(), &tap.name)?;
    redirect::set_link(socket, index, IFF_UP, IFF_UP, Some(mtu))?;
    Ok(index)
}

fn failed(what: &'static str, namespace: &Path) -> impl FnOnce(io::Error) -> NetworkError {
    let interface = namespace.to_string_lossy().into_owned();
    move |source| NetworkError::Operation {
        what,
        interface,
        source,
    }
}

fn interface_failed(
    what: &'static str,
    interface: &Interface,
) -> impl FnOnce(io::Error) -> NetworkError {
    failed(what, Path::new(&interface.name))
}
