#![allow(unsafe_code, reason = "asks the kernel for a tap")]
//! Networks of a test's VM: taps of this machine that are made for it, and that go with it.

use anyhow::{Context, Result, ensure};
use rustix::ioctl::{Setter, ioctl, opcode};
use std::{
    fs::OpenOptions,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};
use walnut_vmm_api::{FdSlot, NetworkConfig, RateLimit};

/// Linux' if_tun.h; the request says that it carries an int, whatever it carries.
const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq` with flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// A network of a VM to be.
#[derive(Debug, Clone)]
pub struct Network {
    /// Name of the tap.
    pub tap: String,
    /// Pairs of queues.
    pub queues: usize,
    /// Whether packets have a header, which the VMM insists on.
    pub header: bool,
    /// Whether the host's kernel moves the packets.
    pub vhost: bool,
    /// What is opened for each queue.
    pub device: PathBuf,
    /// Bytes of a packet.
    pub mtu: u16,
    /// How much the guest may send.
    pub transmit_rate: Option<RateLimit>,
}

impl Network {
    /// A network as a Pod gets it.
    pub fn new(tap: &str) -> Self {
        Self {
            tap: tap.to_owned(),
            queues: 1,
            header: true,
            vhost: false,
            device: "/dev/net/tun".into(),
            mtu: 1500,
            transmit_rate: None,
        }
    }

    /// Makes the tap, hands its files over, and describes it.
    pub fn open(
        &self,
        number: u8,
        push: &mut dyn FnMut(OwnedFd) -> Result<FdSlot>,
    ) -> Result<NetworkConfig> {
        let mut taps = Vec::new();
        let mut vhost = Vec::new();
        for _ in 0..self.queues {
            taps.push(push(self.open_queue()?)?);
            if self.vhost {
                vhost.push(push(open(Path::new("/dev/vhost-net"))?)?);
            }
        }
        Ok(NetworkConfig {
            taps,
            vhost,
            mac: [2, 0, 0, 0, 0, number],
            mtu: self.mtu,
            receive_rate: None,
            transmit_rate: self.transmit_rate,
        })
    }

    fn open_queue(&self) -> Result<OwnedFd> {
        let file = open(&self.device)?;
        if self.device != Path::new("/dev/net/tun") {
            return Ok(file);
        }
        let mut name = [0; 16];
        ensure!(self.tap.len() < name.len(), "a long name: {}", self.tap);
        name[..self.tap.len()].copy_from_slice(self.tap.as_bytes());
        let mut flags = IFF_TAP | IFF_NO_PI;
        if self.header {
            flags |= IFF_VNET_HDR;
        }
        if self.queues > 1 {
            flags |= IFF_MULTI_QUEUE;
        }
        let request = InterfaceRequest {
            name,
            flags,
            rest: [0; 22],
        };
        // SAFETY: TUNSETIFF is given a `struct ifreq`, as the kernel expects.
        let request = unsafe { Setter::<TUNSETIFF, _>::new(request) };
        // SAFETY: the file is that of the driver which knows the request.
        let result = unsafe { ioctl(&file, request) };
        result.with_context(|| format!("cannot make the tap {}", self.tap))?;
        Ok(file)
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    Ok(file.into())
}
