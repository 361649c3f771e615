//! Places for devices that come while the guest runs: from the VMM's name of a place to the platform device in
//! it, and that device's driver.
//!
//! The places are ACPI devices below one module device (vmm/api, `Message::Attached`). The second and later
//! device of a place comes without the kernel's giving it to its driver. Must not know what a device is.

use std::{fs, io, path::Path};

/// Platform devices, by names like `LNRO0005:03`, which ACPI's have too.
pub(crate) const PLATFORM: &str = "/sys/bus/platform/devices";
const ACPI: &str = "/sys/bus/acpi/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// The module device.
const PLACES: &str = "\\_SB_.HOTP.";

/// The platform device at a place.
pub(crate) fn platform_device(wanted: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir(ACPI)? {
        let name = entry?.file_name().into_string().ok();
        let is_it = |name: &String| place(name).is_some_and(|place| place == wanted);
        if let Some(name) = name.filter(is_it) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The place of a platform device; none for those that are there since boot.
pub(crate) fn place(platform: &str) -> Option<String> {
    // Not every device of ACPI has a path.
    let path = fs::read_to_string(format!("{ACPI}/{platform}/path")).ok()?;
    path.trim().strip_prefix(PLACES).map(str::to_owned)
}

/// Whether the driver has it.
pub(crate) fn is_driven(platform: &str) -> bool {
    Path::new(DRIVER).join(platform).exists()
}

/// Gives it to the driver, if it is there. Refused when the kernel itself is about to do so; whether the device
/// works is seen by what the driver makes of it.
pub(crate) fn bind(platform: &str) {
    let _ = fs::write(format!("{DRIVER}/bind"), platform);
}

/// Makes the driver let go of it, which writes what is not yet written. Without a driver nothing happens.
pub(crate) fn unbind(platform: &str) -> io::Result<()> {
    if !is_driven(platform) {
        return Ok(());
    }
    fs::write(format!("{DRIVER}/unbind"), platform)
}
