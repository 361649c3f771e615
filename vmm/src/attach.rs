//! From the configuration of a device and its files to a device of the running machine: like `boot`, this file knows
//! every device that can come later, and holds no logic.

use crate::{
    boot::{self, BootError},
    control::Files,
    running::{RunningError, RunningMachine},
};
use walnut_vmm_api::{ConfigError, DiskConfig, FailureKind, NetworkConfig};

/// Why a device was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The configuration breaks the contract.
    #[error("the device's configuration is refused")]
    Config(#[from] ConfigError),
    /// The device cannot be made.
    #[error("the device cannot be made")]
    Device(#[from] BootError),
    /// The machine does not take it.
    #[error("the machine does not take the device")]
    Machine(#[from] RunningError),
}

impl AttachError {
    /// What a program can act on.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Config(_) => FailureKind::Config,
            Self::Device(error) => error.kind(),
            Self::Machine(error) => error.kind(),
        }
    }
}

/// Attaches a disk and gives its name.
pub fn disk(
    machine: &mut RunningMachine,
    config: &DiskConfig,
    files: &mut Files,
) -> Result<String, AttachError> {
    config.validate()?;
    let device = boot::disk(config, files)?;
    Ok(machine.attach(Box::new(device))?)
}

/// Attaches a network interface and gives its name.
pub fn network(
    machine: &mut RunningMachine,
    config: &NetworkConfig,
    files: &mut Files,
) -> Result<String, AttachError> {
    config.validate()?;
    let device = boot::network(config, files)?;
    Ok(machine.attach(Box::new(device))?)
}
