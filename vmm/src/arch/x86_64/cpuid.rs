//! What each vCPU says about itself: KVM's list of what it supports, with the topology of this VM.
//!
//! Intel SDM, volume 2, CPUID; AMD APM, volume 3, appendix E. All vCPUs are cores of one package without
//! hyper-threads, and vCPU number and APIC id are the same. Pure: gives values, sets nothing.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_MORE_FEATURES: u32 = 7;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaves of which nothing is passed on: 5, MONITOR and MWAIT, which would keep a processor from other VMs; 0xa and
/// 0x23 and 0x8000_0022, performance counters; 0x12, SGX; 0x14, processor trace; 0x8000_000a, SVM; 0x8000_001b,
/// instruction-based sampling; 0x8000_001f, memory encryption, of which this VMM knows nothing.
const WITHHELD_LEAVES: [u32; 9] = [
    5,
    0xa,
    0x12,
    0x14,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0022,
];

/// Leaf 1, ECX. MONITOR, VMX, and PDCM, the performance counters' capabilities.
const WITHHELD_1_ECX: u32 = 1 << 3 | 1 << 5 | 1 << 15;
/// Leaf 7, EBX. SGX; HLE and RTM, transactions that leak what aborts them; processor trace.
const WITHHELD_7_EBX: u32 = 1 << 2 | 1 << 4 | 1 << 11 | 1 << 25;
/// Leaf 7, ECX. Launch control of SGX.
const WITHHELD_7_ECX: u32 = 1 << 30;
/// Leaf 0x8000_0001, ECX. SVM and SKINIT; instruction-based sampling; the performance counters of core, data fabric
/// and last-level cache.
const WITHHELD_AMD_ECX: u32 = 1 << 2 | 1 << 10 | 1 << 12 | 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX.
const AMD_CMP_LEGACY: u32 = 1 << 1;
/// Kinds of levels in leaf 0xb, ECX bits 8 to 15.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Which vCPU of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the vCPU, and its APIC id.
    pub id: u8,
    /// How many there are, or may be later.
    pub count: u8,
}

impl Place {
    /// Bits of an APIC id that number cores.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }

    /// Highest number of a core, as leaves that count from zero want it.
    fn last_core(self) -> u32 {
        (1 << self.core_bits()) - 1
    }
}

/// What the vCPU at `place` should answer, from what KVM supports.
///
/// Nested virtualisation is withheld: it is the largest part of KVM that a guest could attack, and no
/// container may use it. So is what KVM doesn't do for this VM, and what tells of other VMs on the processor. What KVM
/// itself offers (leaf 0x4000_0000 and on) is passed on whole.
pub fn adapt(supported: &CpuId, place: Place) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| {
            !matches!(
                entry.function,
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_AMD_TOPOLOGY
            ) && !WITHHELD_LEAVES.contains(&entry.function)
        })
        .copied()
        .collect();
    for entry in &mut entries {
        adapt_entry(entry, place);
    }
    entries.extend(topology(place));
    if supported
        .as_slice()
        .iter()
        .any(|entry| entry.function == LEAF_AMD_TOPOLOGY)
    {
        entries.push(amd_topology(place));
    }
    CpuId::from_entries(&entries)
}

fn adapt_entry(entry: &mut kvm_cpuid_entry2, place: Place) {
    let id = u32::from(place.id);
    let count = u32::from(place.count);
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = (entry.ebx & 0xffff) | count << 16 | id << 24;
            entry.ecx = (entry.ecx & !WITHHELD_1_ECX) | TSC_DEADLINE | HYPERVISOR;
            entry.edx = with(entry.edx, HTT, count > 1);
        }
        LEAF_MORE_FEATURES if entry.index == 0 => {
            entry.ebx &= !WITHHELD_7_EBX;
            entry.ecx &= !WITHHELD_7_ECX;
        }
        // A cache of level 3 is shared by all cores, those below are not shared.
        LEAF_CACHES if entry.eax & 0x1f != 0 => {
            let sharing = if cache_level(entry) < 3 {
                0
            } else {
                place.last_core()
            };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | place.last_core().min(0x3f) << 26;
        }
        LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            let sharing = if cache_level(entry) < 3 {
                0
            } else {
                place.last_core()
            };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        }
        LEAF_AMD_FEATURES => {
            entry.ecx = with(entry.ecx & !WITHHELD_AMD_ECX, AMD_CMP_LEGACY, count > 1);
        }
        LEAF_AMD_SIZES => entry.ecx = (count - 1) | place.core_bits() << 12,
        _ => {}
    }
}

fn cache_level(entry: &kvm_cpuid_entry2) -> u32 {
    entry.eax >> 5 & 7
}

fn with(value: u32, bit: u32, set: bool) -> u32 {
    if set { value | bit } else { value & !bit }
}

fn topology(place: Place) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind | index,
        edx: place.id.into(),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, place.core_bits(), place.count.into(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn amd_topology(place: Place) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: LEAF_AMD_TOPOLOGY,
        eax: place.id.into(),
        ebx: place.id.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: 0x7f,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn adapted(place: Place) -> Vec<kvm_cpuid_entry2> {
        let all = [
            1,
            4,
            5,
            7,
            0xa,
            0xb,
            0x1f,
            0x8000_0001,
            0x8000_0008,
            0x8000_001d,
            0x8000_001e,
            0x8000_001f,
            0x4000_0001,
        ];
        let supported = CpuId::from_entries(&all.map(entry)).unwrap();
        adapt(&supported, place).unwrap().as_slice().to_vec()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|entry| entry.function == function && entry.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x} is there twice");
        entry
    }

    #[test]
    fn what_a_guest_must_not_use_is_withheld() {
        let entries = adapted(Place { id: 0, count: 1 });
        assert_eq!(find(&entries, 1, 0).ecx & WITHHELD_1_ECX, 0);
        assert_eq!(find(&entries, 7, 0).ebx, !WITHHELD_7_EBX);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & WITHHELD_AMD_ECX, 0);
        for leaf in WITHHELD_LEAVES {
            assert!(entries.iter().all(|entry| entry.function != leaf));
        }
        let of_kvm = find(&entries, 0x4000_0001, 0);
        assert_eq!(of_kvm, entry(0x4000_0001), "paravirtual features are whole");
    }

    proptest! {
        #[test]
        fn all_leaves_agree_on_the_apic_id(count in 1_u8..=254, seed: u8) {
            let id = seed % count;
            let entries = adapted(Place { id, count });
            let id = u32::from(id);
            prop_assert_eq!(find(&entries, 1, 0).ebx >> 24, id);
            prop_assert_eq!(find(&entries, 1, 0).ebx >> 16 & 0xff, u32::from(count));
            prop_assert_eq!(find(&entries, 1, 0).edx & HTT != 0, count > 1);
            let core = find(&entries, 0xb, 1);
            prop_assert_eq!((core.ebx, core.edx), (u32::from(count), id));
            prop_assert!(id >> core.eax == 0, "all vCPUs are in package 0");
            prop_assert_eq!(find(&entries, 0x8000_0008, 0).ecx & 0xff, u32::from(count) - 1);
            prop_assert_eq!(find(&entries, 0x8000_001e, 0).eax, id);
        }
    }
}
