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
            VirtioDevice,
            mmio::{REGISTERS_BYTES, TransportError},
        },
    },
    memory::{self, MemoryError},
    running::RunningMachine,
    slots::{Plugged, Slots},
    vcpu::{self, VcpuError, Vcpus},
    vm::{Vm, VmError},
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
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{FailureKind, VmConfig};

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
    bus: Bus,
    virtio: Vec<Allocation>,
}

impl Machine {
    /// RAM and an interrupt controller.
    pub fn new(kvm: OwnedFd, config: &VmConfig) -> Result<Self, MachineError> {
        let ram_bytes = u64::from(config.memory_mib) << 20;
        let vm = Vm::new(kvm, max_vcpus(config))?;
        let memory = memory::allocate(&layout::ram(ram_bytes))?;
        vm.add_memory(&memory)?;
        let interrupts = layout::FIRST_INTERRUPT..=layout::LAST_INTERRUPT;
        let window = layout::VIRTIO_MMIO.0;
        Ok(Self {
            vm,
            memory,
            ram_bytes,
            bus: Bus::new(
                window,
                layout::VIRTIO_MMIO_BYTES,
                layout::device_memory(ram_bytes).0,
                interrupts,
            ),
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

    /// Puts a virtio device behind a transport, with its interrupt and its kicks.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let place = self.bus.allocate(REGISTERS_BYTES)?;
        Plugged::new(&self.vm, &self.bus, &self.memory, place, device)?;
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
        let mut vcpus = Vcpus::new(bus.clone())?;
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
