//! What a PVH kernel finds in memory when it is entered: `hvm_start_info` and what it points at.
//!
//! Xen's `public/arch-x86/hvm/start_info.h`, version 1. Must not know KVM.

use crate::arch::x86_64::layout;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Memory map type: usable RAM (`XEN_HVM_MEMMAP_TYPE_RAM`).
const RAM: u32 = 1;
/// Memory map type: ACPI tables, reclaimable.
const ACPI: u32 = 3;

/// Why the boot structures cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {what} at guest address {at:#x}")]
pub struct PvhError {
    what: &'static str,
    at: u64,
    source: GuestMemoryError,
}

/// What the kernel is told.
#[derive(Debug, Clone)]
pub struct StartInfo<'a> {
    /// Kernel command line, without a terminating zero.
    pub cmdline: &'a str,
    /// Initramfs: start and length.
    pub initramfs: Option<(GuestAddress, u64)>,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
}

impl StartInfo<'_> {
    /// Writes everything to its place of [`layout`].
    pub fn write(&self, memory: &GuestMemoryMmap) -> Result<(), PvhError> {
        let map = memory_map(self.ram_bytes);
        let entries = u32::try_from(map.len() / MAP_ENTRY_BYTES).unwrap_or(0);
        put(memory, "the memory map", layout::MEMORY_MAP, &map)?;

        let mut cmdline = self.cmdline.as_bytes().to_vec();
        cmdline.push(0);
        put(memory, "the command line", layout::CMDLINE, &cmdline)?;

        let mut modules = Vec::new();
        if let Some((start, bytes)) = self.initramfs {
            for field in [start.0, bytes, 0, 0] {
                modules.extend(field.to_le_bytes());
            }
        }
        put(memory, "the list of modules", layout::MODULE_LIST, &modules)?;

        let mut info = Vec::new();
        for field in [MAGIC, VERSION, 0, u32::from(self.initramfs.is_some())] {
            info.extend(field.to_le_bytes());
        }
        for address in [
            layout::MODULE_LIST,
            layout::CMDLINE,
            layout::ACPI,
            layout::MEMORY_MAP,
        ] {
            info.extend(address.0.to_le_bytes());
        }
        for field in [entries, 0] {
            info.extend(field.to_le_bytes());
        }
        put(memory, "the start info", layout::START_INFO, &info)
    }
}

/// Bytes of `hvm_memmap_table_entry`.
const MAP_ENTRY_BYTES: usize = 24;

fn memory_map(ram_bytes: u64) -> Vec<u8> {
    let acpi = layout::ACPI_END.0 - layout::ACPI.0;
    let mut entries = vec![
        (0, layout::LOW_RAM_END.0, RAM),
        (layout::ACPI.0, acpi, ACPI),
    ];
    for (start, bytes) in layout::ram(ram_bytes) {
        let usable = start.max(layout::HIGH_RAM);
        entries.push((usable.0, (start.0 + bytes).saturating_sub(usable.0), RAM));
    }
    let mut table = Vec::new();
    for (start, bytes, kind) in entries {
        table.extend(start.to_le_bytes());
        table.extend(bytes.to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend(0_u32.to_le_bytes());
    }
    table
}

fn put(
    memory: &GuestMemoryMmap,
    what: &'static str,
    at: GuestAddress,
    bytes: &[u8],
) -> Result<(), PvhError> {
    memory.write_slice(bytes, at).map_err(|source| PvhError {
        what,
        at: at.0,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use linux_loader::loader::elf::start_info::{
        hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
    };
    use std::mem::size_of;

    fn number(memory: &GuestMemoryMmap, at: u64) -> u64 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn the_kernel_finds_command_line_initramfs_and_memory() {
        assert_eq!(size_of::<hvm_start_info>(), 56);
        assert_eq!(size_of::<hvm_modlist_entry>(), 32);
        assert_eq!(size_of::<hvm_memmap_table_entry>(), MAP_ENTRY_BYTES);

        let memory = memory::allocate(&layout::ram(2 << 20)).unwrap();
        let start_info = StartInfo {
            cmdline: "quiet",
            initramfs: Some((GuestAddress(0x10_1000), 77)),
            ram_bytes: 5 << 30,
        };
        start_info.write(&memory).unwrap();
        let base = layout::START_INFO.0;
        assert_eq!(number(&memory, base), 0x1_336e_c578);
        let flags_and_modules = number(&memory, base + 8);
        assert_eq!(flags_and_modules, 1 << 32);
        let modules = number(&memory, base + 16);
        assert_eq!(number(&memory, modules), 0x10_1000);
        assert_eq!(number(&memory, modules + 8), 77);
        let mut cmdline = [0; 6];
        let at = GuestAddress(number(&memory, base + 24));
        memory.read_slice(&mut cmdline, at).unwrap();
        assert_eq!(&cmdline, b"quiet\0");
        assert_eq!(number(&memory, base + 32), layout::ACPI.0);
        let map = number(&memory, base + 40);
        assert_eq!(number(&memory, base + 48), 4, "entries of the memory map");
        assert_eq!(number(&memory, map + 48), 1 << 20);
        assert_eq!(number(&memory, map + 56), (3 << 30) - (1 << 20));
        assert_eq!(number(&memory, map + 72), 4 << 30);
        assert_eq!(number(&memory, map + 80), 2 << 30);
    }
}
