//! From a configuration and its files to a VM that is ready to run: the order of things, and the one file
//! that knows every device. Must not hold logic.

use crate::{
    arch::x86_64::{
        image::{self, ImageError},
        layout,
    },
    control::{ControlError, Files},
    cuts::{CutError, Cuts},
    devices::{
        console_log::ConsoleLog,
        reset::{I8042, Power},
        serial::SerialPort,
        virtio::{
            balloon::{Balloon, BalloonControl, BalloonError},
            block::{Block, BlockError},
            console::Console,
            fs::{FileSystem, FsError, PendingShare, ShareServer},
            mem::{MemoryControl, MemoryDevice},
            net::{NetError, Network},
            pmem::Pmem,
            rng::Rng,
            vsock::{Vsock, VsockError},
        },
    },
    event_loop::Threads,
    file_mapping::{FileMapping, MappingError},
    jail::{Apart, JailError, Root},
    machine::{Machine, MachineError},
    resize::Resize,
    running::RunningMachine,
    seccomp::{Filter, Kind, SeccompError},
};
use std::{
    fs::File,
    io,
    sync::{Arc, Mutex},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{
    DiskConfig, FailureKind, FdSlot, NetworkConfig, PmemConfig, ShareConfig, VmConfig,
};

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
    /// Networks.
    #[error("a network cannot be attached")]
    Network(#[from] NetError),
    /// The file server.
    #[error("the share cannot be served")]
    Share(#[from] FsError),
    /// The socket device.
    #[error("the socket device cannot be attached")]
    Vsock(#[from] VsockError),
    /// The balloon.
    #[error("the balloon cannot be attached")]
    Balloon(#[from] BalloonError),
    /// Persistent memories.
    #[error("a persistent memory cannot be attached")]
    Pmem(#[from] MappingError),
    /// Persistent memories' sizes.
    #[error("a persistent memory cannot be attached")]
    Cuts(#[from] CutError),
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
            _ => FailureKind::Internal,
        }
    }
}

/// A VM whose vCPUs wait for the word to run.
pub struct Booted {
    /// vCPUs and memory.
    pub machine: RunningMachine,
    /// What the guest printed.
    pub console: ConsoleLog,
    /// The hands on the guest's memory.
    pub resize: Resize,
    /// Readable once the guest's init listens.
    pub ready: EventFd,
    /// The files that must not become shorter.
    pub cuts: Cuts,
}

/// Builds the VM, and confines this process.
pub fn boot(config: &VmConfig, files: &mut Files) -> Result<Booted, BootError> {
    let mut machine = Machine::new(files.take(config.kvm)?, config)?;
    let loaded = load(&machine, config, files)?;
    let console = ConsoleLog::new(files.take_file(config.console)?);
    add_serial(&mut machine, &console)?;
    add_reset(&mut machine)?;
    let ready = EventFd::new(EFD_NONBLOCK).map_err(BootError::Event)?;

    let apart = enter_namespaces(config, files)?;
    let share = prepare_share(config)?;
    let (pmems, cuts) = prepare_pmems(config, files)?;
    apart.confine()?;
    machine.use_threads(Threads::confined().map_err(BootError::Threads)?);

    machine.add_virtio(Box::new(Rng::new()))?;
    let resize = Resize {
        balloon: add_balloon(&mut machine, config)?,
        growth: add_growth(&mut machine, config)?,
    };
    add_console(&mut machine, config, &console)?;
    add_vsock(&mut machine, config, files, &ready)?;
    add_share(&mut machine, config, share)?;
    for config in &config.disks {
        machine.add_virtio(Box::new(disk(config, files)?))?;
    }
    for (config, file) in config.pmems.iter().zip(pmems) {
        add_pmem(&mut machine, config, file)?;
    }
    for config in &config.networks {
        machine.add_virtio(Box::new(network(config, files)?))?;
    }
    let machine = machine.finish(config, loaded)?;
    Filter::of(Kind::Control)?.enter()?;
    Ok(Booted {
        machine,
        console,
        resize,
        ready,
        cuts,
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

fn add_serial(machine: &mut Machine, log: &ConsoleLog) -> Result<(), BootError> {
    let irqfd = machine.interrupt(layout::SERIAL_INTERRUPT)?;
    let serial = Arc::new(Mutex::new(SerialPort::new(log.clone(), irqfd)));
    let ports = layout::SERIAL_PORTS.into();
    machine.add_ports(layout::SERIAL_PORT, ports, serial)?;
    Ok(())
}

fn add_console(
    machine: &mut Machine,
    config: &VmConfig,
    log: &ConsoleLog,
) -> Result<(), BootError> {
    if config.has_virtio_console() {
        machine.add_virtio(Box::new(Console::new(log.clone())))?;
    }
    Ok(())
}

fn add_balloon(machine: &mut Machine, config: &VmConfig) -> Result<BalloonControl, BootError> {
    let balloon = Balloon::new(config.memory_mib)?;
    let control = balloon.control();
    machine.add_virtio(Box::new(balloon))?;
    Ok(control)
}

fn add_growth(
    machine: &mut Machine,
    config: &VmConfig,
) -> Result<Option<MemoryControl>, BootError> {
    let Some(region) = machine.growth() else {
        return Ok(None);
    };
    let device = MemoryDevice::new(region, config.memory_mib);
    let control = device.control();
    machine.add_virtio(Box::new(device))?;
    Ok(Some(control))
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
fn prepare_share(config: &VmConfig) -> Result<Option<(ShareConfig, PendingShare)>, BootError> {
    let Some(share) = &config.share else {
        return Ok(None);
    };
    // The path is that of the jail, where the share is the root.
    Ok(Some((share.clone(), ShareServer::before_jail("/")?)))
}

/// Files that the guest has as memory, watched by the private /proc.
fn prepare_pmems(config: &VmConfig, files: &mut Files) -> Result<(Vec<File>, Cuts), BootError> {
    let mut cuts = Cuts::default();
    let taken = config.pmems.iter().map(|pmem| {
        let file = files.take_file(pmem.file)?;
        cuts.watch(&file)?;
        Ok(file)
    });
    let taken = taken.collect::<Result<_, BootError>>()?;
    Ok((taken, cuts))
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
    config: &VmConfig,
    share: Option<(ShareConfig, PendingShare)>,
) -> Result<(), BootError> {
    if let Some((share, pending)) = share {
        let window = machine.add_window(share.window_mib)?;
        let server = pending.after_jail(share.writeback, window)?;
        let device = FileSystem::new(&share.tag, server, config.vcpus);
        machine.add_virtio(Box::new(device))?;
    }
    Ok(())
}

/// A disk, for [`boot`] or a running machine.
pub fn disk(config: &DiskConfig, files: &mut Files) -> Result<Block, BootError> {
    let file = files.take_file(config.file)?;
    let others = config.joined.iter().map(|slot| files.take_file(*slot));
    Ok(Block::joined(
        file,
        others.collect::<Result<_, _>>()?,
        config,
    )?)
}

fn add_pmem(machine: &mut Machine, config: &PmemConfig, file: File) -> Result<(), BootError> {
    let region = machine.add_mapping(FileMapping::new(&file, config.read_only)?)?;
    machine.add_virtio(Box::new(Pmem::new(file, region)))?;
    Ok(())
}

/// A network interface, for [`boot`] or a running machine.
pub fn network(config: &NetworkConfig, files: &mut Files) -> Result<Network, BootError> {
    let mut take = |slots: &[FdSlot]| -> Result<Vec<_>, ControlError> {
        slots.iter().map(|&slot| files.take(slot)).collect()
    };
    let (taps, vhost) = (take(&config.taps)?, take(&config.vhost)?);
    Ok(Network::new(config, taps, vhost)?)
}
