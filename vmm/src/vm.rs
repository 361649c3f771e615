#![allow(
    unsafe_code,
    reason = "adopts a file descriptor and gives memory to KVM"
)]
//! The VM as KVM sees it: memory slots, interrupts and kicks by file descriptors, vCPUs.
//!
//! Must not know any device.

use crate::{arch::x86_64::layout, file_mapping::FileMapping, window::Window};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// What this VMM needs of KVM, and its name for people.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// Why KVM does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The file descriptor is not /dev/kvm, or of another age.
    #[error(
        "the file given as /dev/kvm answers KVM_GET_API_VERSION with {0}, not with 12: is it /dev/kvm?"
    )]
    NotKvm(i32),
    /// The host's kernel lacks something.
    #[error("the host's KVM has no {0}: a newer kernel or another host is needed")]
    Missing(&'static str),
    /// More vCPUs than KVM allows.
    #[error("{asked} vCPUs are more than the {most} that this host's KVM allows")]
    TooManyVcpus {
        /// How many were asked for.
        asked: u8,
        /// How many there may be.
        most: usize,
    },
    /// An ioctl failed.
    #[error(
        "{call} failed; can this host run virtual machines (nested virtualisation, if it is one itself)?"
    )]
    Call {
        /// Which.
        call: &'static str,
        /// How.
        source: kvm_ioctls::Error,
    },
}

fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Call { call, source }
}

/// A VM without memory and vCPUs.
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
}

impl Vm {
    /// Creates a VM with an in-kernel interrupt controller. `kvm` is /dev/kvm.
    pub fn new(kvm: OwnedFd, vcpus: u8) -> Result<Self, VmError> {
        // SAFETY: the descriptor is open and owned by nobody else; `into_raw_fd` passes that on.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(VmError::NotKvm(version));
        }
        for (capability, name) in NEEDED {
            if !kvm.check_extension(capability) {
                return Err(VmError::Missing(name));
            }
        }
        let most = kvm.get_max_vcpus();
        if usize::from(vcpus) > most {
            return Err(VmError::TooManyVcpus { asked: vcpus, most });
        }
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::TSS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        Ok(Self { kvm, fd })
    }

    /// Gives the VM its RAM, which must live as long as the VM runs: both are kept by the caller.
    pub fn add_memory(&self, memory: &GuestMemoryMmap) -> Result<(), VmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            // SAFETY: the region is a mapping of this process that only the guest and volatile accesses of
            // devices touch, and the regions of one `GuestMemoryMmap` don't overlap.
            unsafe {
                self.add_memory_slot(
                    slot,
                    region.start_addr(),
                    region.as_ptr(),
                    region.len(),
                    false,
                )?;
            }
        }
        Ok(())
    }

    /// Shows the guest a file at `at`, as memory slot `slot`, which holds nothing yet. The mapping must live as long
    /// as the VM runs: both are kept by the caller.
    pub fn add_mapping(
        &self,
        slot: u32,
        at: GuestAddress,
        mapping: &FileMapping,
    ) -> Result<(), VmError> {
        let (host, bytes) = (mapping.as_ptr(), mapping.bytes());
        // SAFETY: a mapping of this process, which only the guest touches.
        unsafe { self.add_memory_slot(slot, at, host, bytes, mapping.read_only()) }
    }

    /// Shows the guest a window, as memory slot `slot`, which holds nothing yet. It must live as long as the VM
    /// runs: both are kept by the caller.
    pub fn add_window(&self, slot: u32, window: &Window) -> Result<(), VmError> {
        let region = window.region();
        // SAFETY: addresses of this process that nobody but the guest touches.
        unsafe { self.add_memory_slot(slot, region.address, window.as_ptr(), region.bytes, false) }
    }

    /// Shows the guest `bytes` of this process's memory from `host` on at `at`, as memory slot `slot`, which
    /// holds nothing yet. `read_only` makes writes of the guest exits to here.
    ///
    /// # Safety
    ///
    /// The range is a mapping of this process that stays one for as long as the VM runs, and that nobody but the
    /// guest and volatile accesses of devices touch.
    pub unsafe fn add_memory_slot(
        &self,
        slot: u32,
        at: GuestAddress,
        host: *mut u8,
        bytes: u64,
        read_only: bool,
    ) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: at.0,
            memory_size: bytes,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller's promise.
        let result = unsafe { self.fd.set_user_memory_region(region) };
        result.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Writing `event` raises `interrupt`.
    pub fn attach_interrupt(&self, event: &EventFd, interrupt: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, interrupt)
            .map_err(failed("KVM_IRQFD"))
    }

    /// Writing `event` no longer raises `interrupt`; that it never did is well too.
    pub fn detach_interrupt(&self, event: &EventFd, interrupt: u32) {
        let _ = self.fd.unregister_irqfd(event, interrupt);
    }

    /// When the guest writes `value` (32 bits) to `address`, `event` becomes readable, without an exit to here.
    pub fn attach_kick(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(failed("KVM_IOEVENTFD"))
    }

    /// The end of [`Vm::attach_kick`]; that there was none is well too.
    pub fn detach_kick(&self, event: &EventFd, address: u64, value: u32) {
        let address = IoEventAddress::Mmio(address);
        let _ = self.fd.unregister_ioevent(event, &address, value);
    }

    /// What vCPUs of this host can do.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Creates a vCPU with this number, which is its APIC id.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, VmError> {
        self.fd
            .create_vcpu(id.into())
            .map_err(failed("KVM_CREATE_VCPU"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_file_that_is_not_kvm_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let error = Vm::new(null.into(), 1).err().unwrap().to_string();
        assert!(error.contains("is it /dev/kvm?"), "{error}");
    }
}
