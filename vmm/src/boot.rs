//! From a configuration and its files to a VM that is ready to run: the order of things, and the one file
//! that knows every device. Must not hold logic.

use crate::{
    arch::x86_64::{
        image::{self, ImageError},
        layout,
    },
    control::{ControlError, Files},
    devices::{
        reset::{I8042, Power},
        serial::SerialPort,
        virtio::{
            balloon::Balloon,
            block::{Block, BlockError, Disk},
            fs::{FileSystem, FsError, PendingShare, ShareServer},
            rng::Rng,
            vsock::{Vsock, VsockError},
        },
    },
    event_loop::Threads,
    jail::{Apart, JailError, Root},
    machine::{Machine, MachineError, RunningMachine},
    seccomp::{Filter, Kind, SeccompError},
};
use std::{
    fs::File,
    io,
    sync::{Arc, Mutex},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{DiskConfig, FailureKind, VmConfig};

/// Why the VM was not built.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The files are not as the configuration says.
    #[error("the configuration's files are not all there")]
    Files(#[from] ControlError),
    /// Kernel or initramfs.
    #[error("the VM has nothing to boot")]
    Image(#[from] ImageError),
    /// KVM, memory, bus, tables.
    #[error("the machine cannot be built")]
    Machine(#[from] MachineError),
    /// Disks.
    #[error("a disk cannot be attached")]
    Disk(#[from] BlockError),
    /// The file server.
    #[error("the share cannot be served")]
    Share(#[from] FsError),
    /// The socket device.
    #[error("the socket device cannot be attached")]
    Vsock(#[from] VsockError),
    /// Confinement.
    #[error("the VMM cannot confine itself")]
    Jail(#[from] JailError),
    /// The threads that start others.
    #[error("cannot start the thread that starts the devices' threads")]
    Threads(#[source] io::Error),
    /// Filters.
    #[error("the VMM cannot filter its system calls")]
    Seccomp(#[from] SeccompError),
    /// An event file descriptor.
    #[error("cannot make an event file descriptor")]
    Event(#[source] io::Error),
}

impl BootError {
    /// What a program can act on.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Files(_) => FailureKind::Config,
            Self::Image(_) => FailureKind::Image,
            Self::Machine(error) => error.kind(),
            Self::Disk(_)
            | Self::Share(_)
            | Self::Vsock(_)
            | Self::Jail(_)
            | Self::Threads(_)
            | Self::Seccomp(_)
            | Self::Event(_) => FailureKind::Internal,
        }
    }
}

/// A VM whose vCPUs wait for the word to run.
pub struct Booted {
    /// vCPUs and memory.
    pub machine: RunningMachine,
    /// COM1, for the console's tail.
    pub console: Arc<Mutex<SerialPort>>,
    /// Readable once the guest's init listens.
    pub ready: EventFd,
}

/// Builds the VM, and confines this process.
pub fn boot(config: &VmConfig, files: &mut Files) -> Result<Booted, BootError> {
    let mut machine = Machine::new(files.take(config.kvm)?, config)?;
    let loaded = load(&machine, config, files)?;
    let console = add_serial(&mut machine, files.take_file(config.console)?)?;
    add_reset(&mut machine)?;
    let ready = EventFd::new(EFD_NONBLOCK).map_err(BootError::Event)?;

    let apart = enter_namespaces(config, files)?;
    let share = prepare_share(config)?;
    apart.confine()?;
    machine.use_threads(Threads::confined().map_err(BootError::Threads)?);

    machine.add_virtio(Box::new(Rng::new()))?;
    machine.add_virtio(Box::new(Balloon::new()))?;
    add_vsock(&mut machine, config, files, &ready)?;
    add_share(&mut machine, share)?;
    for disk in &config.disks {
        add_disk(&mut machine, disk, files)?;
    }
    let machine = machine.finish(config, loaded)?;
    Filter::of(Kind::Control)?.enter()?;
    Ok(Booted {
        machine,
        console,
        ready,
    })
}

fn load(
    machine: &Machine,
    config: &VmConfig,
    files: &mut Files,
) -> Result<image::Loaded, BootError> {
    let kernel = files.take_file(config.kernel)?;
    let initramfs = config
        .initramfs
        .map(|slot| files.take_file(slot))
        .transpose()?;
    let (memory, ram_bytes) = (machine.memory(), machine.ram_bytes());
    Ok(image::load(memory, ram_bytes, &kernel, initramfs.as_ref())?)
}

fn add_serial(machine: &mut Machine, log: File) -> Result<Arc<Mutex<SerialPort>>, BootError> {
    let irqfd = machine.interrupt(layout::SERIAL_INTERRUPT)?;
    let serial = Arc::new(Mutex::new(SerialPort::new(log, irqfd)));
    let ports = layout::SERIAL_PORTS.into();
    machine.add_ports(layout::SERIAL_PORT, ports, serial.clone())?;
    Ok(serial)
}

fn add_reset(machine: &mut Machine) -> Result<(), BootError> {
    machine.add_ports(layout::I8042_PORT, 1, Arc::new(Mutex::new(I8042)))?;
    machine.add_ports(
        layout::POWER_PORT,
        layout::POWER_PORTS,
        Arc::new(Mutex::new(Power)),
    )?;
    Ok(())
}

/// What the file server needs of the private /proc, before that is out of reach.
fn prepare_share(config: &VmConfig) -> Result<Option<(String, PendingShare)>, BootError> {
    let Some(share) = &config.share else {
        return Ok(None);
    };
    // The path is that of the jail, where the share is the root.
    Ok(Some((share.tag.clone(), ShareServer::before_jail("/")?)))
}

fn enter_namespaces(config: &VmConfig, files: &mut Files) -> Result<Apart, BootError> {
    let root = match &config.share {
        Some(share) => Root::Share(files.take(share.directory)?),
        None => Root::Empty,
    };
    Ok(Apart::enter(root)?)
}

fn add_vsock(
    machine: &mut Machine,
    config: &VmConfig,
    files: &mut Files,
    ready: &EventFd,
) -> Result<(), BootError> {
    if let Some(vsock) = &config.vsock {
        let listener = files.take(vsock.listener)?;
        let ready = ready.try_clone().map_err(BootError::Event)?;
        let device = Vsock::new(vsock.cid.into(), listener, ready)?;
        machine.add_virtio(Box::new(device))?;
    }
    Ok(())
}

fn add_share(
    machine: &mut Machine,
    share: Option<(String, PendingShare)>,
) -> Result<(), BootError> {
    if let Some((tag, pending)) = share {
        let device = FileSystem::new(&tag, pending.after_jail()?);
        machine.add_virtio(Box::new(device))?;
    }
    Ok(())
}

fn add_disk(
    machine: &mut Machine,
    config: &DiskConfig,
    files: &mut Files,
) -> Result<(), BootError> {
    let file = files.take_file(config.file)?;
    let disk = Disk::new(file, config.read_only, &config.serial)?;
    machine.add_virtio(Box::new(Block::new(disk)))?;
    Ok(())
}
