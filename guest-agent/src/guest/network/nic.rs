//! The guest's network devices: which there are, which of the host's each stands for, and their drivers.

use super::socket::Socket;
use std::{fs, io, path::Path};
use walnut_agent_api::netlink::{Mode, attribute, u32_at};

const RTM_GETLINK: u16 = 18;
/// struct ifinfomsg.
pub(super) const LINK_HEADER_BYTES: usize = 16;
pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const ACPI_DEVICES: &str = "/sys/bus/acpi/devices";
/// Below this object of ACPI are the places for devices that come later (the VMM's contract).
const LATER: &str = ".HOTP.";

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
        let place = place(&platform).unwrap_or_default();
        Some(Nic {
            index,
            name,
            mac,
            place,
        })
    });
    Ok(nics.collect())
}

/// Gives the device at a place to its driver, if it is there and has none: the second and later devices of a place
/// come without the kernel's doing so.
pub(super) fn bind(wanted: &str) {
    let devices = fs::read_dir(ACPI_DEVICES).into_iter().flatten().flatten();
    for device in devices {
        let name = device.file_name();
        let is_it = name
            .to_str()
            .and_then(place)
            .is_some_and(|place| place == wanted);
        if is_it {
            // The kernel does so itself the first time, and then refuses; whether the device is there is seen by others.
            let _ = fs::write(format!("{DRIVER}/bind"), name.to_string_lossy().as_bytes());
        }
    }
}

/// Makes its driver let go of a device.
pub(super) fn unbind(nic: &Nic) -> io::Result<()> {
    match platform_device(&nic.name) {
        Some(device) => fs::write(format!("{DRIVER}/unbind"), device),
        // It has none already.
        None => Ok(()),
    }
}

/// The platform device whose virtio device this interface is.
fn platform_device(interface: &str) -> Option<String> {
    let virtio = fs::canonicalize(format!("/sys/class/net/{interface}/device")).ok()?;
    let platform = virtio.parent()?;
    let driven = Path::new(DRIVER).join(platform.file_name()?).exists();
    driven.then(|| Some(platform.file_name()?.to_str()?.to_owned()))?
}

/// The place of a platform device among those that come later.
fn place(platform: &str) -> Option<String> {
    let path = fs::read_to_string(format!("{ACPI_DEVICES}/{platform}/path")).ok()?;
    let (_, place) = path.trim().split_once(LATER)?;
    Some(place.to_owned())
}

fn text(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?;
    Some(text.trim_end_matches('\0').to_owned())
}
