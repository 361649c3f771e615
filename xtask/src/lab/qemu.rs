//! The lab's QEMU: its command line, its process, its monitor.

use std::fs::{File, OpenOptions};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use walnut_lab_init::wire;

use crate::lab::qmp::Qmp;

/// The program.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// The lab's memory. Untouched pages cost the host nothing.
pub(crate) const MEMORY_MIB: u64 = 4096;

/// The outbox: a raw disk that the host writes archives to and the lab reads them from. Sparse.
pub(crate) const OUTBOX_BYTES: u64 = 8 << 30;

/// What executes the lab's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Accelerator {
    /// The host's KVM, nested.
    Kvm,
    /// QEMU's own emulation of a processor with SVM.
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => [
                "-accel",
                "tcg,thread=multi,tb-size=1024",
                "-cpu",
                "EPYC-v3,+svm,+npt",
            ],
        }
    }
}

/// What a lab's RAM file is to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// The file becomes the template's RAM.
    Saved,
    /// The file is a template: what is written stays in this process.
    CopyOnWrite,
}

/// One machine to start.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// What executes it.
    pub(crate) accelerator: Accelerator,
    /// The node's kernel.
    pub(crate) kernel: PathBuf,
    /// The lab's initramfs.
    pub(crate) initramfs: PathBuf,
    /// The node image.
    pub(crate) disk: PathBuf,
    /// The RAM file and what it is.
    pub(crate) memory: (PathBuf, Memory),
    /// The folder for the outbox, the console log and QEMU's messages.
    pub(crate) folder: &'a Path,
}

/// A started machine.
#[derive(Debug)]
pub(crate) struct Started {
    /// The process.
    pub(crate) child: Child,
    /// Its monitor.
    pub(crate) qmp: Qmp,
    /// The port on this host that leads to the command server.
    pub(crate) port: u16,
}

/// A machine's shape, for the hash of a template.
pub(crate) fn shape(accelerator: Accelerator) -> String {
    format!(
        "{accelerator:?} {:?} {MEMORY_MIB} {}",
        accelerator.arguments(),
        processors(accelerator)
    )
}

/// One where it is emulated: QEMU's threads race for the interrupts of a processor that enters or leaves a nested guest
/// (docs/testing.md), the more of them the more often.
fn processors(accelerator: Accelerator) -> usize {
    match accelerator {
        Accelerator::Tcg => 1,
        Accelerator::Kvm => std::thread::available_parallelism()
            .map_or(1, std::num::NonZero::get)
            .min(2),
    }
}

impl Machine<'_> {
    /// Starts QEMU with its processors stopped.
    pub(crate) fn start(&self) -> Result<Started> {
        let outbox = self.folder.join("outbox");
        let file = File::create(&outbox).with_context(|| format!("create {}", outbox.display()))?;
        file.set_len(OUTBOX_BYTES).context("size the outbox")?;
        let port = free_port()?;
        let (monitor, other_end) = UnixStream::pair().context("make a socket pair")?;
        let log = self.folder.join("qemu.log");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("open {}", log.display()))?;
        let mut command = self.command(&outbox, port);
        let child = command
            // The monitor is QEMU's standard input: no path, so nothing to collide with.
            .stdin(Stdio::from(OwnedFd::from(other_end)))
            .stdout(log.try_clone().context("share QEMU's log")?)
            .stderr(log)
            // It outlives this command, and isn't interrupted with it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("run {PROGRAM}"))?;
        // It holds QEMU's end of the monitor, which would hide that QEMU ended.
        drop(command);
        let qmp = Qmp::connect(monitor).with_context(|| {
            format!(
                "QEMU doesn't answer; see {}/qemu.log",
                self.folder.display()
            )
        });
        match qmp {
            Ok(qmp) => Ok(Started { child, qmp, port }),
            Err(error) => {
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn command(&self, outbox: &Path, port: u16) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args([
            "-name",
            "walnut-lab",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-S",
        ]);
        command
            .args(["-display", "none"])
            .args(self.accelerator.arguments());
        command.args(["-smp", &processors(self.accelerator).to_string()]);
        self.add_memory(&mut command);
        command
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs);
        command.args([
            "-append",
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off",
        ]);
        add_disk(&mut command, "node", &self.disk);
        add_disk(&mut command, "outbox", outbox);
        let network = format!(
            "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{}",
            wire::PORT
        );
        command.args([
            "-netdev",
            &network,
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ]);
        command.args(["-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto"]);
        let console = format!(
            "file,id=console,path={}",
            quote(&self.folder.join("console.log"))
        );
        command.args(["-chardev", &console, "-serial", "chardev:console"]);
        command.args(["-chardev", "socket,id=qmp,fd=0", "-qmp", "chardev:qmp"]);
        command
    }

    fn add_memory(&self, command: &mut Command) {
        let (path, share) = match &self.memory {
            (path, Memory::Saved) => (path, "on"),
            // Not reserved: a machine needs room only for what the lab writes.
            (path, Memory::CopyOnWrite) => (path, "off,reserve=off"),
        };
        let file = format!("mem-path={},share={share}", quote(path));
        let memory = format!("memory-backend-file,id=ram,size={MEMORY_MIB}M,{file}");
        command.args(["-machine", "q35,memory-backend=ram", "-object", &memory]);
        command.args(["-m", &format!("{MEMORY_MIB}M")]);
        if self.memory.1 == Memory::CopyOnWrite {
            command.args(["-incoming", "defer"]);
        }
    }
}

/// A read-only disk. Several labs use the same node image, and the host writes to the outbox.
fn add_disk(command: &mut Command, id: &str, path: &Path) {
    let file = quote(path);
    let drive = format!("if=none,id={id},format=raw,readonly=on,file.locking=off,file={file}");
    command.args([
        "-drive",
        &drive,
        "-device",
        &format!("virtio-blk-pci,drive={id}"),
    ]);
}

/// A comma in an option's value is written twice.
fn quote(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("find a free port")?;
    Ok(listener.local_addr().context("find a free port")?.port())
}

/// QEMU's version, as major and whole text.
pub(crate) fn version() -> Result<(u32, String)> {
    let output = Command::new(PROGRAM)
        .arg("--version")
        .output()
        .with_context(|| format!("run {PROGRAM}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default().to_owned();
    let major = line
        .split_whitespace()
        .find_map(|word| word.split('.').next()?.parse().ok())
        .with_context(|| format!("no version in {line:?}"))?;
    Ok((major, line))
}
