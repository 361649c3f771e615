//! A VM under construction: memory, bus and KVM together, so that adding a device is one step.
//!
//! Must not know any particular device.

use crate::{
    arch::x86_64::{
        acpi::{self, AcpiError},
        cpuid::{self, Place},
        image::Loaded,
        layout,
        pvh::{PvhError, StartInfo},
        registers,
    },
    bus::{Allocation, Bus, BusDevice, BusError},
    devices::virtio::{
        VirtioDevice,
        mmio::{QUEUE_NOTIFY, REGISTERS_BYTES, Transport, TransportError},
    },
    event_loop::Threads,
    memory::{self, MemoryError},
    vcpu::{self, VcpuError, Vcpus},
    vm::{Vm, VmError},
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
    threads: Threads,
    virtio: Vec<Allocation>,
}

/// A VM whose vCPUs wait or run. Memory and VM live as long as they do.
pub struct RunningMachine {
    /// The vCPU threads.
    pub vcpus: Vcpus,
    _vm: Vm,
    _memory: GuestMemoryMmap,
}

impl Machine {
    /// RAM and an interrupt controller.
    pub fn new(kvm: OwnedFd, config: &VmConfig) -> Result<Self, MachineError> {
        let ram_bytes = u64::from(config.memory_mib) << 20;
        let vm = Vm::new(kvm, config.vcpus)?;
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

    /// Says where the threads of virtio devices that are added from now on come from.
    pub fn use_threads(&mut self, threads: Threads) {
        self.threads = threads;
    }

    /// Puts a virtio device behind a transport, with its interrupt and its kicks.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let place = self.bus.allocate(REGISTERS_BYTES)?;
        let irqfd = Arc::new(self.interrupt(place.interrupt)?);
        let transport = Transport::new(device, self.memory.clone(), self.threads.clone(), irqfd)?;
        for (index, kick) in (0..).zip(transport.kicks()) {
            self.vm
                .attach_kick(kick, place.base + QUEUE_NOTIFY, index)?;
        }
        self.bus
            .add_memory(&place, Arc::new(Mutex::new(transport)))?;
        self.virtio.push(place);
        Ok(())
    }

    /// Describes the machine to the kernel, and makes the vCPUs. After the last device.
    pub fn finish(self, config: &VmConfig, loaded: Loaded) -> Result<RunningMachine, MachineError> {
        let start_info = StartInfo {
            cmdline: &config.cmdline,
            initramfs: loaded.initramfs,
            ram_bytes: self.ram_bytes,
        };
        start_info.write(&self.memory)?;
        acpi::write(&self.memory, config.vcpus, &self.virtio)?;
        self.memory
            .write_slice(&registers::descriptor_table(), layout::GDT)
            .map_err(MachineError::DescriptorTable)?;

        let supported = self.vm.supported_cpuid()?;
        let mut vcpus = Vec::new();
        for id in 0..config.vcpus {
            let vcpu = self.vm.create_vcpu(id)?;
            let place = Place {
                id,
                count: config.vcpus,
            };
            let cpuid = cpuid::adapt(&supported, place).map_err(|_| MachineError::Cpuid)?;
            vcpu.set_cpuid2(&cpuid)
                .map_err(|source| MachineError::SetCpuid { id, source })?;
            vcpu::prepare(&vcpu, id, loaded.entry)?;
            vcpus.push(vcpu);
        }
        Ok(RunningMachine {
            vcpus: Vcpus::spawn(vcpus, Arc::new(self.bus))?,
            _vm: self.vm,
            _memory: self.memory,
        })
    }
}
