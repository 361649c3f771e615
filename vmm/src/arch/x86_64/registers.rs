//! State of the boot vCPU at the kernel's PVH entry point: 32-bit protected mode, no paging, flat segments,
//! EBX pointing at `hvm_start_info` (Xen, `docs/misc/pvh.pandoc`). Pure: gives values, sets nothing.
//!
//! The other vCPUs need none: KVM keeps them waiting for INIT and SIPI.

use crate::arch::x86_64::layout;
use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestAddress;

/// CR0: protected mode.
const CR0_PE: u64 = 1;
/// CR0: x87 is there; always one.
const CR0_ET: u64 = 1 << 4;
/// RFLAGS: the bit that is always one. Interrupts are off.
const RFLAGS: u64 = 2;
/// `IA32_MTRR_DEF_TYPE`.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything is write-back memory.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Segment types (Intel SDM, volume 3, table 3-1 and 3-2).
const CODE_EXECUTE_READ: u8 = 0xb;
const DATA_READ_WRITE: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

/// General registers: the entry point, and where the start info is.
pub fn general(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.0,
        rbx: layout::START_INFO.0,
        rflags: RFLAGS,
        ..Default::default()
    }
}

/// Segments and control registers, on top of what KVM gave the vCPU.
pub fn system(initial: kvm_sregs) -> kvm_sregs {
    let code = segment(1, CODE_EXECUTE_READ, true);
    let data = segment(2, DATA_READ_WRITE, true);
    let task = kvm_segment {
        limit: 0x67,
        ..segment(3, TSS_BUSY, false)
    };
    let mut system = kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        cr0: CR0_PE | CR0_ET,
        cr4: 0,
        efer: 0,
        ..initial
    };
    system.gdt.base = layout::GDT.0;
    system.gdt.limit = GDT_BYTES_LESS_ONE;
    system.idt.base = 0;
    system.idt.limit = 0;
    system
}

/// The model-specific register of every vCPU that says: memory is write-back, as firmware would leave it.
pub fn mtrr_default() -> kvm_msr_entry {
    kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        data: MTRR_WRITE_BACK,
        ..Default::default()
    }
}

const GDT_ENTRIES: u8 = 4;
const GDT_BYTES_LESS_ONE: u16 = GDT_ENTRIES as u16 * 8 - 1;

/// The descriptor table that the selectors of [`system`] point into.
pub fn descriptor_table() -> Vec<u8> {
    let segments = [
        segment(1, CODE_EXECUTE_READ, true),
        segment(2, DATA_READ_WRITE, true),
        segment(3, TSS_BUSY, false),
    ];
    let mut table = vec![0; 8];
    for segment in &segments {
        table.extend(descriptor(segment).to_le_bytes());
    }
    table
}

fn segment(index: u16, kind: u8, ordinary: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(ordinary),
        s: u8::from(ordinary),
        l: 0,
        g: u8::from(ordinary),
        ..Default::default()
    }
}

/// Intel SDM, volume 3, figure 3-8, for a base of zero and the largest limit.
fn descriptor(segment: &kvm_segment) -> u64 {
    const LIMIT: u64 = 0x000f_0000_0000_ffff;
    LIMIT
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.present) << 47
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptors_are_flat() {
        let table = descriptor_table();
        assert_eq!(table.len(), usize::from(GDT_BYTES_LESS_ONE) + 1);
        let code = u64::from_le_bytes(table[8..16].try_into().unwrap());
        let data = u64::from_le_bytes(table[16..24].try_into().unwrap());
        assert_eq!(code, 0x00cf_9b00_0000_ffff);
        assert_eq!(data, 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_kernel_is_entered_in_protected_mode_without_paging() {
        let system = system(kvm_sregs::default());
        assert_eq!(system.cr0, 0x11);
        assert_eq!((system.cs.selector, system.cs.db, system.cs.l), (8, 1, 0));
        let general = general(GuestAddress(0x100_0000));
        assert_eq!((general.rip, general.rbx), (0x100_0000, 0x6000));
    }
}
