//! What the parent may ask about the guest's memory while the VM runs: a balloon, more RAM, statistics.
//!
//! Must not know how the guest is asked.

use crate::devices::virtio::{
    balloon::{BalloonControl, BalloonError},
    mem::{MemoryControl, MemoryControlError},
};
use walnut_vmm_api::{FailureKind, MemoryStatistics};

/// Why the guest's memory stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The balloon.
    #[error("the balloon cannot be set")]
    Balloon(#[from] BalloonError),
    /// The size.
    #[error("the memory's size cannot be set")]
    Memory(#[from] MemoryControlError),
    /// There is nothing to add.
    #[error(
        "this VM's memory cannot grow: its configuration has no max_memory_mib above memory_mib"
    )]
    Fixed,
}

impl ResizeError {
    /// What a program can act on.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Balloon(_) | Self::Memory(_) => FailureKind::Config,
            Self::Fixed => FailureKind::Unsupported,
        }
    }
}

/// The hands on the guest's memory.
#[derive(Debug, Clone)]
pub struct Resize {
    /// The balloon's.
    pub balloon: BalloonControl,
    /// The memory device's, where the VM has one.
    pub growth: Option<MemoryControl>,
}

impl Resize {
    /// Wishes that the balloon holds `mib`.
    pub fn set_balloon(&self, mib: u32) -> Result<(), ResizeError> {
        Ok(self.balloon.set_target(mib)?)
    }

    /// Wishes that the guest has `mib` of RAM.
    pub fn set_memory(&self, mib: u32) -> Result<(), ResizeError> {
        let growth = self.growth.as_ref().ok_or(ResizeError::Fixed)?;
        Ok(growth.set_size(mib)?)
    }

    /// How the guest's memory is used.
    pub fn statistics(&self) -> MemoryStatistics {
        let growth = self.growth.as_ref();
        MemoryStatistics {
            balloon_bytes: self.balloon.actual_bytes(),
            plugged_bytes: growth.map_or(0, MemoryControl::plugged_bytes),
            guest: self.balloon.guest_memory(),
        }
    }
}
