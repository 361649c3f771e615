//! Starts `walnut-vmm` as the shim does, and tells its story: boot, wait, ask, end.
//!
//! Knows the VMM by its contract alone: a PID namespace, one control socket, file descriptors, exit statuses.
#![allow(
    unsafe_code,
    reason = "makes the PID namespace that the contract asks for, which has no safe wrapper"
)]

pub use crate::ended::Ended;

use crate::{
    command::wait_child,
    deadline::{self, Deadline},
    mounts::BindMount,
    network::Network,
    programs::Programs,
};
use anyhow::{Context, Result, bail, ensure};
use rustix::{
    fs::{Mode, OFlags},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType, sendmsg, socketpair,
    },
    thread::{UnshareFlags, unshare_unsafe},
};
use std::{
    fs::{self, File, OpenOptions},
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixDatagram, UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;
use walnut_vmm_api::{
    DiskConfig, FdSlot, MAX_MESSAGE_BYTES, Message, PmemConfig, Request, ShareConfig, VmConfig,
    VmmExit, VsockConfig,
};

/// What each guest of a test is told first; the shim says the same.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k random.trust_cpu=on";
/// Context id of every test's guest: nothing on the host sees it.
const GUEST_CID: u32 = 3;
/// Tag of the shared directory.
pub const SHARE_TAG: &str = "walnut";

/// What makes the agent say one line and power off.
pub const PROBE_WORD: &str = "walnut.mode=probe";

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
                .map(|change| vm.share(&mut fds, change))
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
struct FdArray(Vec<OwnedFd>);

impl FdArray {
    fn push(&mut self, fd: impl Into<OwnedFd>) -> Result<FdSlot> {
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

/// A VMM that runs; it is killed, and what was made for it removed, when this value goes.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    control: Option<UnixDatagram>,
    seen: Vec<Message>,
    share: Option<BindMount>,
    directory: TempDir,
}

impl Vm {
    /// Starts the VMM with a control socket on which nothing has been sent yet.
    pub fn start_bare(vmm: &Path) -> Result<Self> {
        let directory = TempDir::with_prefix("walnut-vm-").context("cannot make a directory")?;
        let (own, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .context("cannot make a control socket")?;
        let stderr = File::create(directory.path().join("stderr")).context("no stderr file")?;
        // The shell puts the socket where the contract wants it and becomes the VMM.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "exec env -i \"$0\" 3<&0 </dev/null"])
            .arg(vmm)
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(stderr);
        let child = spawn_first(&mut command).context("cannot start the VMM")?;
        Ok(Self {
            child,
            // The calls that this type is used for (send, recv with a timeout) are those of SEQPACKET too.
            control: Some(own.into()),
            seen: Vec::new(),
            share: None,
            directory,
        })
    }

    /// The VMM's process id.
    pub fn pid(&self) -> Result<i32> {
        i32::try_from(self.child.id()).context("a process id that is none")
    }

    /// Where the VMM listens for connections to the guest.
    pub fn socket_path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// The directory that the guest sees by its shared file system.
    pub fn share_path(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// What the guest has written to its console by now.
    pub fn console(&self) -> String {
        read_lossy(&self.console_path())
    }

    fn console_path(&self) -> PathBuf {
        self.directory.path().join("console")
    }

    fn listen(&self, fds: &mut FdArray) -> Result<VsockConfig> {
        let listener = UnixListener::bind(self.socket_path()).context("cannot listen")?;
        Ok(VsockConfig {
            cid: GUEST_CID,
            listener: fds.push(listener)?,
        })
    }

    fn share(
        &mut self,
        source: Option<&Path>,
        fds: &mut FdArray,
        change: fn(&mut ShareConfig),
    ) -> Result<ShareConfig> {
        let path = self.share_path();
        fs::create_dir(&path).context("cannot make the share")?;
        self.share = Some(match source {
            Some(directory) => BindMount::new(directory, &path)?,
            None => BindMount::shared(&path)?,
        });
        let directory = rustix::fs::open(
            &path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context("cannot open the share")?;
        let mut config = ShareConfig::new(SHARE_TAG, fds.push(directory)?);
        change(&mut config);
        Ok(config)
    }

    /// Sends one request.
    pub fn ask(&mut self, request: &Request) -> Result<()> {
        self.send(request, &[])
    }

    /// Sends one request with these files.
    pub fn send(&mut self, request: &Request, fds: &[OwnedFd]) -> Result<()> {
        let packet = request.encode().context("cannot encode a request")?;
        self.send_raw(&packet, fds)
    }

    /// Sends any bytes with any file descriptors.
    pub fn send_raw(&mut self, packet: &[u8], fds: &[OwnedFd]) -> Result<()> {
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            ensure!(
                ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)),
                "too many file descriptors for one message"
            );
        }
        let control = self
            .control
            .as_ref()
            .context("the control socket is closed")?;
        let sent = sendmsg(
            control,
            &[IoSlice::new(packet)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .context("cannot send to the VMM")?;
        ensure!(sent == packet.len(), "a packet was cut");
        Ok(())
    }

    /// The next message; `None` once the VMM has closed its end.
    pub fn receive(&mut self, deadline: Deadline) -> Result<Option<Message>> {
        let control = self
            .control
            .as_ref()
            .context("the control socket is closed")?;
        let left = deadline.left();
        ensure!(!left.is_zero(), "no message from the VMM by the deadline");
        control
            .set_read_timeout(Some(left))
            .context("cannot set a timeout")?;
        let mut packet = vec![0; MAX_MESSAGE_BYTES];
        let length = match control.recv(&mut packet) {
            Ok(length) => length,
            // The peer ended with packets of ours unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error).context("no message from the VMM"),
        };
        if length == 0 {
            return Ok(None);
        }
        let message = Message::decode(&packet[..length]).context("the VMM sent no message")?;
        self.seen.push(message.clone());
        Ok(Some(message))
    }

    /// Reads messages until `expected` comes; anything but the end may come before it.
    pub fn expect(&mut self, expected: &Message) -> Result<()> {
        let deadline = Deadline::after(deadline::BOOT);
        while let Some(message) = self.receive(deadline)? {
            if message == *expected {
                return Ok(());
            }
        }
        let ended = self.end(deadline)?;
        bail!("the VMM ended before it said {expected:?}: {ended:?}");
    }

    /// Waits until the agent listens.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.expect(&Message::GuestReady)
    }

    /// Waits until the guest has written `text` to its console.
    pub fn wait_for_console(&mut self, text: &str) -> Result<()> {
        let deadline = Deadline::after(deadline::BOOT);
        let (child, path) = (&mut self.child, self.directory.path().join("console"));
        deadline::until(&format!("{text:?} on the console"), deadline, || {
            // The process is looked at first: what it wrote before it ended is then in the file.
            let ended = child.try_wait().context("cannot look at the VMM")?;
            let console = read_lossy(&path);
            match (console.contains(text), ended) {
                (true, _) => Ok(Some(())),
                (false, Some(status)) => {
                    bail!("the VMM ended ({status}) before {text:?} was on the console: {console}")
                }
                (false, None) => Ok(None),
            }
        })
    }

    /// Whether the VMM has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        let status = self.child.try_wait().context("cannot look at the VMM")?;
        Ok(status.is_some())
    }

    /// Closes the test's end of the control socket, as the shim's death does.
    pub fn abandon(&mut self) {
        self.control = None;
    }

    /// Kills the VMM.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill the VMM")
    }

    /// Reads all messages, waits for the VMM's end, and tells how it went.
    pub fn wait(mut self) -> Result<Ended> {
        let deadline = Deadline::after(deadline::BOOT);
        while self.control.is_some() && self.receive(deadline)?.is_some() {}
        self.end(deadline)
    }

    fn end(&mut self, deadline: Deadline) -> Result<Ended> {
        let status = wait_child(&mut self.child, deadline)?.with_context(|| {
            let console = self.console();
            format!("the VMM did not end by the deadline; console: {console}")
        })?;
        Ok(Ended {
            end: status.into(),
            status: status.code().and_then(VmmExit::from_code),
            messages: std::mem::take(&mut self.seen),
            console: self.console(),
            stderr: read_lossy(&self.directory.path().join("stderr")),
        })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `command` as the first process of a PID namespace, which is of the children of one thread.
fn spawn_first(command: &mut Command) -> Result<Child> {
    let spawn = || {
        // SAFETY: NEWPID changes nothing for this thread but where its children are.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.context("cannot make a PID namespace")?;
        Ok(command.spawn()?)
    };
    let child = std::thread::scope(|scope| scope.spawn(spawn).join());
    child.unwrap_or_else(|_| bail!("the thread that starts it panicked"))
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
