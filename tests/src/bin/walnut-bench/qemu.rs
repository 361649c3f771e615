//! Debian's QEMU as a VMM of the same kind: the microvm machine, with ACPI, one serial port, no devices.

use std::{path::Path, process::Command};
use walnut_tests::programs::Programs;

/// The smallest firmware that the machine can have. The usual one, SeaBIOS, was seen to place the ACPI tables of eight
/// processors where the initramfs is, whose kernel then sums up a table of gigabytes.
const FIRMWARE: &str = "/usr/share/qemu/qboot.rom";

/// A guest of the same kernel, with the same RAM and processors as the benchmark's Walnut VMs.
pub(crate) fn command(
    programs: &Programs,
    initramfs: &Path,
    cmdline: &str,
    memory_mib: u32,
) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "microvm,acpi=on", "-accel", "kvm", "-cpu", "host"])
        .args(["-bios", FIRMWARE])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio", "-smp", "1"])
        .args(["-m", &memory_mib.to_string()])
        .arg("-kernel")
        .arg(&programs.kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", cmdline]);
    qemu
}
