//! A VM under construction: memory, bus and KVM together, so that adding a device is one step.
//!
//! Must not know any particular device but the one by which the guest hears of changes to the machine.

use crate::{
    arch::x86_64::{
        acpi::{self, AcpiError, Contents},
        cpuid::{self, Place},
        hotplug::EVENT_PORTS,
        image::Loaded,
        layout,
        pvh::{PvhError, StartInfo},
        registers,
    },
    bus::{Allocation, Bus, BusDevice, BusError},
    devices::{
        ged::EventDevice,
        virtio::{
            SharedRegion, VirtioDevice,
            mmio::{REGISTERS_BYTES, TransportError},
        },
    },
    event_loop::Threads,
    file_mapping::{self, FileMapping},
    memory::{self, MemoryError},
    running::RunningMachine,
    slots::{Board, Slots},
    vcpu::{self, VcpuError, Vcpus},
    vm::{Vm, VmError},
    window::Window,
};
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};
use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{FailureKind, MEMORY_STEP_MIB, VmConfig};

/// What the guest adds device memory in pieces of (`SUBSECTION_SIZE` of Linux).
const WINDOW_ALIGNMENT: u64 = 2 << 20;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error("KVM cannot make the VM")]
    Vm(#[from] VmError),
    /// Its vCPUs.
    #[error("KVM cannot make the vCPUs")]
    Vcpu(#[from] VcpuError),
    /// CPUID entries that KVM gave do not fit.
    #[error("KVM supports more CPUID leaves than it takes")]
    Cpuid,
    /// A vCPU refuses its CPUID.
    #[error("KVM_SET_CPUID2 failed on vCPU {id}")]
    SetCpuid {
        /// Which vCPU.
        id: u8,
        /// How.
        source: kvm_ioctls::Error,
    },
    /// RAM.
    #[error("cannot make guest RAM")]
    Memory(#[from] MemoryError),
    /// Addresses and interrupts.
    #[error("cannot put a device on the bus")]
    Bus(#[from] BusError),
    /// More memory slots than there are numbers.
    #[error("the VM has too many pieces of memory")]
    Slots,
    /// A window on files.
    #[error("cannot reserve addresses for {mib} MiB of shared files")]
    Window {
        /// How much.
        mib: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The virtio transport.
    #[error("cannot make a virtio device")]
    Transport(#[from] TransportError),
    /// An event file descriptor.
    #[error("cannot make an event file descriptor for an interrupt")]
    Event(#[source] io::Error),
    /// Boot structures.
    #[error("cannot describe the machine to the kernel")]
    StartInfo(#[from] PvhError),
    /// ACPI tables.
    #[error("cannot describe the machine by ACPI")]
    Acpi(#[from] AcpiError),
    /// The generation id.
    #[error("the host has no random bytes for the VM's generation id")]
    Random(#[source] Errno),
    /// Descriptor table.
    #[error("cannot write the descriptor table")]
    DescriptorTable(#[source] GuestMemoryError),
}

impl MachineError {
    /// What a program can act on.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Vm(_) | Self::Vcpu(_) | Self::Cpuid | Self::SetCpuid { .. } => FailureKind::Kvm,
            _ => FailureKind::Internal,
        }
    }
}

/// A VM without running vCPUs.
pub struct Machine {
    vm: Vm,
    memory: GuestMemoryMmap,
    ram_bytes: u64,
    growth: Option<SharedRegion>,
    mappings: Vec<FileMapping>,
    windows: Vec<Arc<Window>>,
    bus: Bus,
    threads: Threads,
    virtio: Vec<Allocation>,
}

impl Machine {
    /// RAM and an interrupt controller.
    pub fn new(kvm: OwnedFd, config: &VmConfig) -> Result<Self, MachineError> {
        let ram_bytes = u64::from(config.memory_mib) << 20;
        let vm = Vm::new(kvm, max_vcpus(config))?;
        let mut bus = Bus::new(
            layout::VIRTIO_MMIO.0,
            layout::VIRTIO_MMIO_BYTES,
            layout::device_memory(ram_bytes).0,
            layout::FIRST_INTERRUPT..=layout::LAST_INTERRUPT,
        );
        let growth = allocate_growth(&mut bus, config)?;
        let mut ranges = layout::ram(ram_bytes);
        ranges.extend(growth.map(|region| (region.address, region.bytes)));
        let memory = memory::allocate(&ranges)?;
        vm.add_memory(&memory)?;
        Ok(Self {
            vm,
            memory,
            ram_bytes,
            growth,
            mappings: Vec::new(),
            windows: Vec::new(),
            bus,
            threads: Threads::default(),
            virtio: Vec::new(),
        })
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Bytes of guest RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// The part of guest memory that the guest does not have yet, where it may grow.
    pub fn growth(&self) -> Option<SharedRegion> {
        self.growth
    }

    /// Shows a file to the guest, and tells where.
    pub fn add_mapping(&mut self, mapping: FileMapping) -> Result<SharedRegion, MachineError> {
        let bytes = mapping.bytes();
        let base = self.bus.allocate_memory(bytes, file_mapping::ALIGNMENT)?;
        let address = GuestAddress(base);
        let slot = self.next_slot()?;
        self.vm.add_mapping(slot, address, &mapping)?;
        self.mappings.push(mapping);
        Ok(SharedRegion { address, bytes })
    }

    /// Gives the guest a window of this size, through which a device may show it files; none of 0 MiB.
    pub fn add_window(&mut self, mib: u32) -> Result<Option<Arc<Window>>, MachineError> {
        if mib == 0 {
            return Ok(None);
        }
        let bytes = u64::from(mib) << 20;
        let address = GuestAddress(self.bus.allocate_memory(bytes, WINDOW_ALIGNMENT)?);
        let window = Window::new(SharedRegion { address, bytes });
        let window = window.map_err(|source| MachineError::Window {
            mib,
            source: source.into(),
        })?;
        let slot = self.next_slot()?;
        self.vm.add_window(slot, &window)?;
        let window = Arc::new(window);
        self.windows.push(window.clone());
        Ok(Some(window))
    }

    /// The first memory slot that holds nothing.
    fn next_slot(&self) -> Result<u32, MachineError> {
        let used = self.memory.num_regions() + self.mappings.len() + self.windows.len();
        u32::try_from(used).map_err(|_| MachineError::Slots)
    }

    /// An event that raises `interrupt`.
    pub fn interrupt(&self, interrupt: u32) -> Result<EventFd, MachineError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(MachineError::Event)?;
        self.vm.attach_interrupt(&event, interrupt)?;
        Ok(event)
    }

    /// Puts a device on ports.
    pub fn add_ports(
        &mut self,
        base: u16,
        count: u16,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), MachineError> {
        Ok(self.bus.add_ports(base, count, device)?)
    }

    /// Says where the threads of vCPUs and of virtio devices that are added from now on come from.
    pub fn use_threads(&mut self, threads: Threads) {
        self.threads = threads;
    }

    /// Puts a virtio device behind a transport, with its interrupt and its kicks.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let place = self.bus.allocate(REGISTERS_BYTES)?;
        let board = Board {
            vm: &self.vm,
            bus: &self.bus,
            memory: &self.memory,
            threads: &self.threads,
        };
        board.plug(place, device)?;
        self.virtio.push(place);
        Ok(())
    }

    /// Describes the machine to the kernel, and makes the vCPUs. After the last device.
    pub fn finish(
        mut self,
        config: &VmConfig,
        loaded: Loaded,
    ) -> Result<RunningMachine, MachineError> {
        let slots = Slots::reserve(&mut self.bus);
        self.describe(config, &loaded, &slots.allocations())?;
        let interrupt = self.interrupt(layout::EVENT_INTERRUPT)?;
        let events = Arc::new(Mutex::new(EventDevice::new(config.vcpus, interrupt)));
        let ports = EVENT_PORTS.into();
        self.add_ports(layout::EVENT_PORT, ports, events.clone())?;

        let supported = self.vm.supported_cpuid()?;
        let bus = Arc::new(self.bus);
        let mut vcpus = Vcpus::new(bus.clone(), self.threads.clone())?;
        for id in 0..config.vcpus {
            let count = max_vcpus(config);
            let vcpu = make_vcpu(&self.vm, &supported, Place { id, count })?;
            if id == 0 {
                vcpu::enter(&vcpu, loaded.entry)?;
            }
            vcpus.add(id, vcpu)?;
        }
        Ok(RunningMachine {
            vcpus,
            vm: self.vm,
            memory: self.memory,
            threads: self.threads,
            _mappings: self.mappings,
            _windows: self.windows,
            bus,
            events,
            slots,
            supported,
            max_vcpus: max_vcpus(config),
            memory_mib: config.memory_mib,
            paused: false,
        })
    }

    /// Writes what the kernel reads about the machine.
    fn describe(
        &self,
        config: &VmConfig,
        loaded: &Loaded,
        places: &[Allocation],
    ) -> Result<(), MachineError> {
        let start_info = StartInfo {
            cmdline: &config.cmdline,
            initramfs: loaded.initramfs,
            ram_bytes: self.ram_bytes,
        };
        start_info.write(&self.memory)?;
        let contents = Contents {
            vcpus: config.vcpus,
            max_vcpus: max_vcpus(config),
            virtio: &self.virtio,
            places,
        };
        let mut generation_id = [0; 16];
        getrandom(&mut generation_id, GetRandomFlags::empty()).map_err(MachineError::Random)?;
        acpi::write(&self.memory, &contents, generation_id)?;
        self.memory
            .write_slice(&registers::descriptor_table(), layout::GDT)
            .map_err(MachineError::DescriptorTable)
    }
}

/// Where the guest's memory may grow: above RAM, by whole steps.
fn allocate_growth(bus: &mut Bus, config: &VmConfig) -> Result<Option<SharedRegion>, BusError> {
    let most = config.max_memory_mib.unwrap_or(config.memory_mib);
    let bytes = u64::from(most.saturating_sub(config.memory_mib)) << 20;
    if bytes == 0 {
        return Ok(None);
    }
    let base = bus.allocate_memory(bytes, u64::from(MEMORY_STEP_MIB) << 20)?;
    let address = GuestAddress(base);
    Ok(Some(SharedRegion { address, bytes }))
}

fn max_vcpus(config: &VmConfig) -> u8 {
    config.max_vcpus.unwrap_or(config.vcpus)
}

/// A vCPU with all that it needs before it runs, but the registers with which vCPU 0 enters the kernel.
pub fn make_vcpu(vm: &Vm, supported: &CpuId, place: Place) -> Result<VcpuFd, MachineError> {
    let id = place.id;
    let vcpu = vm.create_vcpu(id)?;
    let cpuid = cpuid::adapt(supported, place).map_err(|_| MachineError::Cpuid)?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(|source| MachineError::SetCpuid { id, source })?;
    vcpu::prepare(&vcpu, id)?;
    Ok(vcpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use walnut_vmm_api::FdSlot;

    proptest! {
        #[test]
        fn growth_lies_above_ram_and_below_what_is_allocated_next(
            memory_mib in 96_u32..8192,
            steps in 0_u32..64,
        ) {
            let config = VmConfig {
                memory_mib,
                max_memory_mib: Some(memory_mib + steps * MEMORY_STEP_MIB),
                ..VmConfig::new(FdSlot(0), FdSlot(1), FdSlot(2))
            };
            let ram_end = layout::device_memory(u64::from(memory_mib) << 20);
            let mut bus = Bus::new(0, 0, ram_end.0, 5..=5);
            let growth = allocate_growth(&mut bus, &config).unwrap();
            prop_assert_eq!(growth.is_none(), steps == 0);
            if let Some(region) = growth {
                let step = u64::from(MEMORY_STEP_MIB) << 20;
                prop_assert!(region.address >= ram_end && region.address.0.is_multiple_of(step));
                prop_assert_eq!(region.bytes, u64::from(steps) * step);
                let next = bus.allocate_memory(1, 1).unwrap();
                prop_assert!(next >= region.address.0 + region.bytes);
            }
        }
    }
}
