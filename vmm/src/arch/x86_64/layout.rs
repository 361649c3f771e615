//! Where everything lies in the guest's physical address space.
//!
//! ```text
//! 0 .. 640 KiB          RAM: boot structures, command line
//! 640 KiB .. 1 MiB      reserved: ACPI tables
//! 1 MiB .. 3 GiB        RAM: kernel, initramfs (at the end)
//! 3 GiB .. 4 GiB        devices, IOAPIC, LAPIC, KVM's own pages
//! 4 GiB ..              RAM: the rest, then the memory that devices show to the guest
//! ```
//!
//! Numbers only: nothing here touches memory.

use vm_memory::GuestAddress;

/// Smallest unit of mapping.
pub const PAGE_BYTES: u64 = 4096;

/// Global descriptor table of the boot vCPU.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `hvm_start_info`, whose address the kernel gets in EBX.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// List of modules: the initramfs.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x6100);
/// Memory map.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// Kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// End of the RAM below 1 MiB; from here on PCs keep firmware data.
pub const LOW_RAM_END: GuestAddress = GuestAddress(0x9_fc00);
/// ACPI's root pointer, followed by the tables.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// End of what the ACPI tables may use.
pub const ACPI_END: GuestAddress = GENERATION_ID;
/// A page that holds the VM's generation id.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// Start of the RAM that the kernel and the initramfs may use.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// Start of the hole below 4 GiB.
const HOLE: u64 = 3 << 30;
/// Start of the RAM above the hole.
const ABOVE_HOLE: u64 = 4 << 30;

/// Registers of virtio-mmio devices.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xc000_0000);
/// Bytes of [`VIRTIO_MMIO`]'s window.
pub const VIRTIO_MMIO_BYTES: u64 = 0x10_0000;
/// IOAPIC, where KVM puts it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// LAPIC, where KVM puts it.
pub const LAPIC: u32 = 0xfee0_0000;
/// One page that KVM needs on Intel processors without unrestricted guests.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel processors.
pub const TSS: usize = 0xfffb_d000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of COM1.
pub const SERIAL_PORTS: u8 = 8;
/// COM1's interrupt.
pub const SERIAL_INTERRUPT: u32 = 4;
/// The i8042's command and status port.
pub const I8042_PORT: u16 = 0x64;
/// ACPI's sleep control, sleep status and reset registers, one byte each.
pub const POWER_PORT: u16 = 0x600;
/// Ports from [`POWER_PORT`] on.
pub const POWER_PORTS: u16 = 3;
/// Registers of the event device, one byte each.
pub const EVENT_PORT: u16 = 0x610;
/// Interrupt of the event device.
pub const EVENT_INTERRUPT: u32 = 5;
/// First interrupt that devices on the bus may have: those below belong to fixed devices.
pub const FIRST_INTERRUPT: u32 = 6;
/// Last pin of KVM's IOAPIC.
pub const LAST_INTERRUPT: u32 = 23;

/// Guest RAM of `bytes` as ranges of start and length, with the hole left out.
pub fn ram(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let below = bytes.min(HOLE);
    let mut ranges = vec![(GuestAddress(0), below)];
    if bytes > below {
        ranges.push((GuestAddress(ABOVE_HOLE), bytes - below));
    }
    ranges
}

/// Where memory of devices may start: above the hole and above RAM of `bytes`.
pub fn device_memory(bytes: u64) -> GuestAddress {
    GuestAddress(ABOVE_HOLE + bytes.saturating_sub(HOLE))
}

/// End of the RAM below the hole.
pub fn ram_end_below_hole(bytes: u64) -> GuestAddress {
    GuestAddress(bytes.min(HOLE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ram_is_whole_and_leaves_the_hole_free(mib in 96_u64..=1024 * 1024) {
            let bytes = mib << 20;
            let ranges = ram(bytes);
            prop_assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), bytes);
            for (start, len) in ranges {
                prop_assert!(start.0 + len <= HOLE || start.0 >= ABOVE_HOLE);
                prop_assert!(start.0 + len <= device_memory(bytes).0);
            }
        }
    }

    #[test]
    fn the_hole_holds_all_that_is_not_ram() {
        let hole = HOLE..ABOVE_HOLE;
        for address in [
            VIRTIO_MMIO.0,
            VIRTIO_MMIO.0 + VIRTIO_MMIO_BYTES - 1,
            IOAPIC.into(),
            LAPIC.into(),
            IDENTITY_MAP,
            TSS as u64 + 3 * PAGE_BYTES - 1,
        ] {
            assert!(hole.contains(&address), "{address:#x}");
        }
    }
}
