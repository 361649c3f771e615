//! What a VM of a test is made from, file by file, and how that is sent to the VMM.
//!
//! Must not know what a VMM does with it.

use crate::{
    network::Network,
    programs::Programs,
    vmm::{CMDLINE, PROBE_WORD, Vm},
};
use anyhow::{Context, Result};
use std::{
    fs::{File, OpenOptions},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};
use walnut_vmm_api::{DiskConfig, FdSlot, PmemConfig, Request, ShareConfig, VmConfig};

/// A VM to be.
#[derive(Debug, Clone)]
pub struct VmBuilder {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    cmdline: String,
    kvm: PathBuf,
    vcpus: u8,
    max_vcpus: Option<u8>,
    memory_mib: u32,
    max_memory_mib: Option<u32>,
    vsock: bool,
    share: Option<fn(&mut ShareConfig)>,
    shared_directory: Option<PathBuf>,
    disks: Vec<(PathBuf, DiskConfig)>,
    pmems: Vec<(PathBuf, bool)>,
    networks: Vec<Network>,
    console: Option<PathBuf>,
}

impl VmBuilder {
    /// A guest whose agent says one line on the console and powers off.
    pub fn probe(programs: &Programs) -> Self {
        Self::new(programs).word(PROBE_WORD)
    }

    /// A guest whose agent listens, with a socket device and a shared directory.
    pub fn agent(programs: &Programs) -> Self {
        Self {
            vsock: true,
            share: Some(|_| {}),
            ..Self::new(programs)
        }
    }

    /// A guest that boots this initramfs instead of the agent's.
    pub fn with_initramfs(programs: &Programs, initramfs: &Path) -> Self {
        Self::new(programs).initramfs(initramfs)
    }

    fn new(programs: &Programs) -> Self {
        Self {
            vmm: programs.vmm.clone(),
            kernel: programs.kernel.clone(),
            initramfs: programs.initramfs.clone(),
            cmdline: CMDLINE.to_owned(),
            kvm: "/dev/kvm".into(),
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 128,
            max_memory_mib: None,
            vsock: false,
            share: None,
            shared_directory: None,
            disks: Vec::new(),
            pmems: Vec::new(),
            networks: Vec::new(),
            console: None,
        }
    }

    /// Adds a word to the kernel's command line.
    #[must_use]
    pub fn word(mut self, word: &str) -> Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(word);
        self
    }

    /// Adds a socket device.
    #[must_use]
    pub fn socket(mut self) -> Self {
        self.vsock = true;
        self
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Sets the number of vCPUs that it may grow to.
    #[must_use]
    pub fn max_vcpus(mut self, vcpus: u8) -> Self {
        self.max_vcpus = Some(vcpus);
        self
    }

    /// Sets the size of guest RAM.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Lets guest RAM grow to this size.
    #[must_use]
    pub fn max_memory_mib(mut self, max_memory_mib: u32) -> Self {
        self.max_memory_mib = Some(max_memory_mib);
        self
    }

    /// Replaces the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, cmdline: &str) -> Self {
        cmdline.clone_into(&mut self.cmdline);
        self
    }

    /// Adds a persistent memory.
    #[must_use]
    pub fn pmem(mut self, file: &Path, read_only: bool) -> Self {
        self.pmems.push((file.to_owned(), read_only));
        self
    }

    /// Boots this file as the kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: &Path) -> Self {
        kernel.clone_into(&mut self.kernel);
        self
    }

    /// Boots this file as the initramfs.
    #[must_use]
    pub fn initramfs(mut self, initramfs: &Path) -> Self {
        initramfs.clone_into(&mut self.initramfs);
        self
    }

    /// Passes this file as `/dev/kvm`.
    #[must_use]
    pub fn kvm(mut self, kvm: &Path) -> Self {
        kvm.clone_into(&mut self.kvm);
        self
    }

    /// Writes the console to this file instead of one that [`Vm::console`] reads.
    #[must_use]
    pub fn console(mut self, console: &Path) -> Self {
        self.console = Some(console.to_owned());
        self
    }

    /// Adds a disk that the guest may only read.
    #[must_use]
    pub fn read_only_disk(self, file: &Path) -> Self {
        self.disk(file, |config| config.read_only = true)
    }

    /// Adds a disk that the guest may read and write.
    #[must_use]
    pub fn writable_disk(self, file: &Path) -> Self {
        self.disk(file, |_| {})
    }

    /// Adds a disk: one that the guest may read and write, with one queue and no limits, but for what `change` says.
    #[must_use]
    pub fn disk(mut self, file: &Path, change: impl FnOnce(&mut DiskConfig)) -> Self {
        let serial = format!("disk{}", self.disks.len());
        let mut config = DiskConfig::new(FdSlot(0), false, &serial);
        change(&mut config);
        self.disks.push((file.to_owned(), config));
        self
    }

    /// Adds a network.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.networks.push(network);
        self
    }

    /// Shares a directory, in a way that differs from the usual one.
    #[must_use]
    pub fn share(mut self, change: fn(&mut ShareConfig)) -> Self {
        self.share = Some(change);
        self
    }

    /// Adds a socket device.
    #[must_use]
    pub fn vsock(mut self) -> Self {
        self.vsock = true;
        self
    }

    /// Shares this directory with the guest.
    #[must_use]
    pub fn share_of(mut self, directory: &Path) -> Self {
        self.shared_directory = Some(directory.to_owned());
        self.share = Some(|_| {});
        self
    }

    /// Starts the VMM and sends it this VM; the answer is still to come.
    pub fn start(&self) -> Result<Vm> {
        let vm = Vm::start_bare(&self.vmm)?;
        self.boot(vm)
    }

    fn boot(&self, mut vm: Vm) -> Result<Vm> {
        let mut fds = FdArray::default();
        let kvm = fds.open(&self.kvm, OpenOptions::new().read(true).write(true))?;
        let kernel = fds.open(&self.kernel, OpenOptions::new().read(true))?;
        let console = fds.open(
            &self.console.clone().unwrap_or_else(|| vm.console_path()),
            OpenOptions::new().append(true).create(true),
        )?;
        let config = VmConfig {
            vcpus: self.vcpus,
            max_vcpus: self.max_vcpus,
            memory_mib: self.memory_mib,
            max_memory_mib: self.max_memory_mib,
            cmdline: self.cmdline.clone(),
            initramfs: Some(fds.open(&self.initramfs, OpenOptions::new().read(true))?),
            vsock: self.vsock.then(|| vm.listen(&mut fds)).transpose()?,
            share: self
                .share
                .map(|change| vm.share(self.shared_directory.as_deref(), &mut fds, change))
                .transpose()?,
            disks: self.open_disks(&mut fds)?,
            pmems: self.open_pmems(&mut fds)?,
            networks: (0..)
                .zip(&self.networks)
                .map(|(number, network)| network.open(number, &mut |fd| fds.push(fd)))
                .collect::<Result<_>>()?,
            ..VmConfig::new(kvm, kernel, console)
        };
        vm.send(&Request::Boot(config), &fds.0)?;
        Ok(vm)
    }

    fn open_disks(&self, fds: &mut FdArray) -> Result<Vec<DiskConfig>> {
        let mut disks = Vec::new();
        for (path, config) in &self.disks {
            let write = !config.read_only;
            let file = fds.open(path, OpenOptions::new().read(true).write(write))?;
            disks.push(DiskConfig {
                file,
                ..config.clone()
            });
        }
        Ok(disks)
    }

    fn open_pmems(&self, fds: &mut FdArray) -> Result<Vec<PmemConfig>> {
        let open = |(path, read_only): &(PathBuf, bool)| {
            let (file, read_only) = (path, *read_only);
            let file = fds.open(file, OpenOptions::new().read(true).write(!read_only))?;
            Ok(PmemConfig { file, read_only })
        };
        self.pmems.iter().map(open).collect()
    }
}

/// The file descriptors that travel with one message.
#[derive(Debug, Default)]
pub(crate) struct FdArray(Vec<OwnedFd>);

impl FdArray {
    pub(crate) fn push(&mut self, fd: impl Into<OwnedFd>) -> Result<FdSlot> {
        let slot = u8::try_from(self.0.len()).context("too many file descriptors")?;
        self.0.push(fd.into());
        Ok(FdSlot(slot))
    }

    fn open(&mut self, path: &Path, options: &OpenOptions) -> Result<FdSlot> {
        let file: File = options
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        self.push(file)
    }
}
