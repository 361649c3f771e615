#![allow(unsafe_code, reason = "a guest's memory is given to KVM by address")]
//! The probe guest: a few instructions that every ordinary kernel executes, run by KVM and timed.
//!
//! It says where it is by writing to a port: started in long mode with paging, `cpuid` done, loop
//! done, `lock cmpxchg16b` done. This runs in a process of its own ([`report`]), so that a KVM that
//! hangs can be killed.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

const MEMORY_BYTES: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x1_0000;

/// Rounds of a loop of two instructions.
const ROUNDS: u32 = 2_500_000;

/// Instructions in the timed loop.
pub(crate) const LOOP_INSTRUCTIONS: u32 = 2 * ROUNDS;

/// The port that the guest writes its progress to.
const PORT: u16 = 0x80;

/// How far the guest came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Milestone {
    /// Nothing was heard of it.
    Nothing,
    /// It runs in long mode with paging.
    LongMode,
    /// `cpuid` returned.
    Cpuid,
    /// The timed loop ended.
    Loop,
    /// `lock cmpxchg16b` returned.
    Cmpxchg16b,
}

impl Milestone {
    const ALL: [Self; 5] = [
        Self::Nothing,
        Self::LongMode,
        Self::Cpuid,
        Self::Loop,
        Self::Cmpxchg16b,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// What a guest that stopped here could not do.
    pub(crate) fn failed_step(self) -> Option<&'static str> {
        match self {
            Self::Nothing => Some("entering long mode with paging"),
            Self::LongMode => Some("cpuid"),
            Self::Cpuid => Some("a loop of plain instructions"),
            Self::Loop => Some("lock cmpxchg16b"),
            Self::Cmpxchg16b => None,
        }
    }
}

/// Runs the guest and prints one line for each milestone (its number and the microseconds since the
/// guest's start), then `end` and how it ended.
pub(crate) fn report() -> Result<()> {
    let (_vm, mut vcpu, _memory) = create()?;
    let started = Instant::now();
    loop {
        let line = match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [code])) => {
                format!("{code} {}", started.elapsed().as_micros())
            }
            Ok(VcpuExit::Hlt) => "end halted".to_owned(),
            Ok(exit) => format!("end unexpected exit: {exit:?}"),
            Err(error) => format!("end KVM_RUN: {error}"),
        };
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")
            .and_then(|()| stdout.flush())
            .context("print a milestone")?;
        if line.starts_with("end ") {
            return Ok(());
        }
    }
}

/// Reads one line of [`report`].
pub(crate) fn parse(line: &str) -> Option<(Milestone, u64)> {
    let (code, micros) = line.split_once(' ')?;
    Some((
        Milestone::from_code(code.parse().ok()?)?,
        micros.parse().ok()?,
    ))
}

fn create() -> Result<(VmFd, VcpuFd, GuestMemoryMmap)> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .context("allocate guest memory")?;
    let address = memory
        .get_host_address(GuestAddress(0))
        .context("find guest memory")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the mapping is MEMORY_BYTES long and the caller keeps it as long as the VM.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    write_tables(&memory).context("write the guest's page tables")?;
    memory
        .write_slice(&code(), GuestAddress(CODE))
        .context("write the guest's code")?;
    let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    enter_long_mode(&vcpu)?;
    Ok((vm, vcpu, memory))
}

/// Maps the first 2 MiB onto themselves: present, writable, the last level a large page.
fn write_tables(memory: &GuestMemoryMmap) -> Result<()> {
    memory.write_obj(PDPT | 0x3, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | 0x3, GuestAddress(PDPT))?;
    memory.write_obj(0x83u64, GuestAddress(PAGE_DIRECTORY))?;
    Ok(())
}

/// Control bits of the AMD64 manual, volume 2, sections 3.1 and 14.6.
fn enter_long_mode(vcpu: &VcpuFd) -> Result<()> {
    let segment = |kind: u8, long: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let mut system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    system.cs = segment(0xb, 1);
    let data = segment(0x3, 0);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.cr0 = 0x8000_0011; // paging, extension type, protection
    system.cr3 = PML4;
    system.cr4 = 0x20; // physical address extension
    system.efer = 0x500; // long mode enabled and active
    vcpu.set_sregs(&system).context("KVM_SET_SREGS")?;
    let mut registers = vcpu.get_regs().context("KVM_GET_REGS")?;
    registers.rip = CODE;
    registers.rflags = 0x2;
    vcpu.set_regs(&registers).context("KVM_SET_REGS")
}

/// The guest's program, assembled by hand.
fn code() -> Vec<u8> {
    let milestone = |code: u8| [0xb0, code, 0xe6, 0x80]; // mov al, code; out 0x80, al
    let mut bytes = Vec::new();
    bytes.extend(milestone(1));
    bytes.extend([0x31, 0xc0, 0x0f, 0xa2]); // xor eax, eax; cpuid
    bytes.extend(milestone(2));
    bytes.push(0xb9); // mov ecx, ROUNDS
    bytes.extend(ROUNDS.to_le_bytes());
    bytes.extend([0xff, 0xc9, 0x75, 0xfc]); // again: dec ecx; jnz again
    bytes.extend(milestone(3));
    bytes.extend([0xbf, 0x00, 0x00, 0x02, 0x00]); // mov edi, 0x20000
    bytes.extend([0x31, 0xc0, 0x31, 0xd2, 0x31, 0xdb, 0x31, 0xc9]); // eax, edx, ebx, ecx = 0
    bytes.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0f]); // lock cmpxchg16b [rdi]
    bytes.extend(milestone(4));
    bytes.push(0xf4); // hlt
    bytes
}

/// Fails if this machine's KVM can't even be opened, with the reason.
pub(crate) fn open() -> Result<()> {
    let kvm = Kvm::new().map_err(|error| anyhow::anyhow!("open /dev/kvm: {error}"))?;
    match kvm.get_api_version() {
        12 => Ok(()),
        version => bail!("KVM has interface version {version}, not 12"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milestones_are_parsed() {
        assert_eq!(parse("3 1500"), Some((Milestone::Loop, 1500)));
        assert_eq!(parse("9 1500"), None);
        assert_eq!(parse("end halted"), None);
    }

    #[test]
    fn only_the_last_milestone_is_a_success() {
        let steps = Milestone::ALL
            .iter()
            .filter(|milestone| milestone.failed_step().is_none());
        assert_eq!(steps.count(), 1);
        assert!(Milestone::Loop < Milestone::Cmpxchg16b);
    }
}
