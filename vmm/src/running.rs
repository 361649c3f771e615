//! A VM whose vCPUs were made: what can be done to it until its end. Must not know any particular device but the one by
//! which the guest hears of changes to the machine.

use crate::{
    arch::x86_64::cpuid::Place,
    bus::Bus,
    devices::{ged::EventDevice, virtio::VirtioDevice},
    event_loop::Threads,
    file_mapping::FileMapping,
    machine::{MachineError, make_vcpu},
    slots::{Board, Plugged, Slots},
    vcpu::Vcpus,
    vm::Vm,
    window::Window,
};
use kvm_bindings::CpuId;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use vm_memory::GuestMemoryMmap;
use walnut_vmm_api::{FailureKind, Statistics};

/// A vCPU that is in the guest leaves it at once; one that waits for a device may take longer.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// Why something is not done to a running machine, which goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum RunningError {
    /// A second pause.
    #[error("the VM is paused already")]
    Paused,
    /// A second end of a pause.
    #[error("the VM runs already")]
    Running,
    /// A vCPU did not answer.
    #[error("a vCPU did not stand still within {PAUSE_DEADLINE:?}")]
    PauseDeadline,
    /// Nothing has the name.
    #[error("no device that was attached to the running VM has this name")]
    NoSuchDevice,
    /// No place for a device is free.
    #[error("every place for a device that is attached to a running VM is taken")]
    NoPlace,
    /// More vCPUs than the VM was made for.
    #[error("{asked} vCPUs are more than the {most} that this VM was made for")]
    TooManyVcpus {
        /// How many were asked for.
        asked: u8,
        /// How many there may be.
        most: u8,
    },
    /// vCPUs can't go.
    #[error("the VM has {there} vCPUs and cannot go back to {asked}")]
    FewerVcpus {
        /// How many were asked for.
        asked: u8,
        /// How many there are.
        there: usize,
    },
    /// A part cannot be made.
    #[error("the machine cannot grow")]
    Machine(#[from] MachineError),
}

impl RunningError {
    /// What a program can act on.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Paused | Self::Running => FailureKind::State,
            Self::PauseDeadline => FailureKind::Internal,
            Self::NoSuchDevice => FailureKind::NotFound,
            Self::NoPlace | Self::TooManyVcpus { .. } => FailureKind::Full,
            Self::FewerVcpus { .. } => FailureKind::Unsupported,
            Self::Machine(error) => error.kind(),
        }
    }
}

/// A VM whose vCPUs wait or run. Memory and VM live as long as they do.
pub struct RunningMachine {
    /// The vCPU threads.
    pub vcpus: Vcpus,
    pub(crate) vm: Vm,
    pub(crate) memory: GuestMemoryMmap,
    /// Where the threads of what comes later come from.
    pub(crate) threads: Threads,
    pub(crate) _mappings: Vec<FileMapping>,
    pub(crate) _windows: Vec<Arc<Window>>,
    pub(crate) bus: Arc<Bus>,
    /// How the guest hears of changes.
    pub(crate) events: Arc<Mutex<EventDevice>>,
    pub(crate) slots: Slots<Plugged>,
    /// What vCPUs of this host can do, for those that come later.
    pub(crate) supported: CpuId,
    pub(crate) max_vcpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) paused: bool,
}

impl RunningMachine {
    /// How the machine stands.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            paused: self.paused,
            memory_mib: self.memory_mib,
            vcpus: self.vcpus.exits(),
            ..Statistics::default()
        }
    }

    /// Lets no vCPU execute the guest. Its clocks go on: after the pause it finds the right time.
    pub fn pause(&mut self) -> Result<(), RunningError> {
        if self.paused {
            return Err(RunningError::Paused);
        }
        if !self.vcpus.pause(PAUSE_DEADLINE) {
            return Err(RunningError::PauseDeadline);
        }
        self.paused = true;
        Ok(())
    }

    /// Ends a pause.
    pub fn resume(&mut self) -> Result<(), RunningError> {
        if !self.paused {
            return Err(RunningError::Running);
        }
        self.vcpus.run();
        self.paused = false;
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.events().press_power_button();
    }

    /// Tells the guest, whose drivers are there now, what it may have missed while it started.
    pub fn remind_guest(&self) {
        self.events().remind();
    }

    /// Puts a device into a free place and tells the guest. Gives the name of the place.
    pub fn attach(&mut self, device: Box<dyn VirtioDevice>) -> Result<String, RunningError> {
        let (index, place) = self.slots.free().ok_or(RunningError::NoPlace)?;
        let board = Board {
            vm: &self.vm,
            bus: &self.bus,
            memory: &self.memory,
            threads: &self.threads,
        };
        let plugged = board.plug(place, device)?;
        let name = self.slots.fill(index, plugged);
        self.events().set_device(index, true);
        Ok(name)
    }

    /// Takes away what [`RunningMachine::attach`] put into the place of this name.
    pub fn detach(&mut self, name: &str) -> Result<(), RunningError> {
        let (index, plugged) = self.slots.empty(name).ok_or(RunningError::NoSuchDevice)?;
        plugged.remove(&self.vm, &self.bus);
        self.events().set_device(index, false);
        Ok(())
    }

    /// Changes the number of vCPUs.
    pub fn set_vcpus(&mut self, asked: u8) -> Result<(), RunningError> {
        let (there, most) = (self.vcpus.count(), self.max_vcpus);
        if usize::from(asked) < there {
            return Err(RunningError::FewerVcpus { asked, there });
        }
        if asked > most {
            return Err(RunningError::TooManyVcpus { asked, most });
        }
        for id in (0..asked).skip(there) {
            let place = Place { id, count: most };
            let vcpu = make_vcpu(&self.vm, &self.supported, place)?;
            self.vcpus.add(id, vcpu).map_err(MachineError::from)?;
            if !self.paused {
                self.vcpus.run();
            }
            self.events().set_vcpus(id + 1);
        }
        Ok(())
    }

    fn events(&self) -> MutexGuard<'_, EventDevice> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
