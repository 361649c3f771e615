//! The guest's network devices: which there are, which of the host's each stands for, and their drivers.

use super::socket::Socket;
use crate::hotplug;
use std::{fs, io};
use walnut_agent_api::netlink::{Mode, attribute, u32_at};

const RTM_GETLINK: u16 = 18;
/// struct ifinfomsg.
pub(super) const LINK_HEADER_BYTES: usize = 16;
pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;

/// A device of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Nic {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    /// Its place, if it came after boot.
    pub(super) place: String,
}

/// Every device that has a driver of virtio.
pub(super) fn list(socket: &Socket) -> io::Result<Vec<Nic>> {
    let mut nics = Vec::new();
    socket.ask(RTM_GETLINK, Mode::Dump, &[0; LINK_HEADER_BYTES], |body| {
        let name = attribute(body, LINK_HEADER_BYTES, IFLA_IFNAME).and_then(text);
        let mac = attribute(body, LINK_HEADER_BYTES, IFLA_ADDRESS);
        if let (Some(index), Some(name), Some(mac)) = (u32_at(body, 4), name, mac) {
            let mac = mac.to_vec();
            nics.push((index, name, mac));
        }
    })?;
    let nics = nics.into_iter().filter_map(|(index, name, mac)| {
        let platform = platform_device(&name)?;
        let place = hotplug::place(&platform).unwrap_or_default();
        Some(Nic {
            index,
            name,
            mac,
            place,
        })
    });
    Ok(nics.collect())
}

/// Gives the device at a place to its driver, if it is there.
pub(super) fn bind(place: &str) -> io::Result<()> {
    if let Some(platform) = hotplug::platform_device(place)?
        && !hotplug::is_driven(&platform)
    {
        hotplug::bind(&platform);
    }
    Ok(())
}

/// Makes its driver let go of a device.
pub(super) fn unbind(nic: &Nic) -> io::Result<()> {
    match platform_device(&nic.name) {
        Some(device) => hotplug::unbind(&device),
        // It has none already.
        None => Ok(()),
    }
}

/// The platform device whose virtio device this interface is.
fn platform_device(interface: &str) -> Option<String> {
    let virtio = fs::canonicalize(format!("/sys/class/net/{interface}/device")).ok()?;
    let platform = virtio.parent()?;
    let name = platform.file_name()?.to_str()?.to_owned();
    hotplug::is_driven(&name).then_some(name)
}

fn text(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?;
    Some(text.trim_end_matches('\0').to_owned())
}
