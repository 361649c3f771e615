//! One guest with a disk, a share, a network and a socket device, on either VMM, and what it measures.

use super::sockets;
use crate::{console::Console, progress, qemu};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    io::pipe,
    os::fd::AsRawFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;
use walnut_tests::{
    command,
    deadline::{self, Deadline},
    initramfs::Initramfs,
    network::Network,
    programs::Programs,
    vmm::{CMDLINE, Vm, VmBuilder},
};

/// RAM of each guest.
const MEMORY_MIB: u32 = 512;
/// The guest's script.
const SCRIPT: &str = include_str!("guest.sh");
/// Programs of this machine that the guest measures with.
const PROGRAMS: [&str; 3] = ["fio", "iperf3", "socat"];
/// What the guest says when only the host has something left to measure.
const SERVES: &str = "the guest serves sockets";
/// Bytes of the disk and of the large file.
const LARGE_BYTES: usize = 64 << 20;
/// Folders and files in each of the tree of small files.
const TREE: (usize, usize) = (20, 50);
/// The tap of the guests, one at a time.
const TAP: &str = "walnutbench";
/// Its address.
const HOST_ADDRESS: &str = "10.77.0.1/24";
/// Where Debian's virtiofsd is.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Walnut,
    Qemu,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Walnut => "Walnut",
            Self::Qemu => super::OTHER,
        }
    }
}

/// What both guests are made from.
#[derive(Debug)]
pub(crate) struct Story {
    folder: TempDir,
    initramfs: PathBuf,
}

impl Story {
    /// Makes the initramfs, the disk and the shared files.
    pub(crate) fn prepare(programs: &Programs) -> Result<Self> {
        let folder = TempDir::with_prefix("walnut-bench-").context("cannot make a folder")?;
        let initramfs = folder.path().join("initramfs");
        let archive = Initramfs::script_with(&programs.busybox, &PROGRAMS, SCRIPT)?;
        fs::write(&initramfs, archive).context("cannot write the initramfs")?;
        let story = Self { folder, initramfs };
        let large: Vec<u8> = (0..LARGE_BYTES)
            .map(|i| i.to_le_bytes()[1] ^ 0x5a)
            .collect();
        fs::write(story.disk(), &large).context("cannot write the disk")?;
        let share = story.share();
        fs::create_dir(&share).context("cannot make the share")?;
        fs::write(share.join("big"), &large).context("cannot write the large file")?;
        for folder in 0..TREE.0 {
            let path = share.join(format!("tree/{folder}"));
            fs::create_dir_all(&path).context("cannot make the tree")?;
            for file in 0..TREE.1 {
                let bytes = vec![b'x'; 100 * file];
                fs::write(path.join(file.to_string()), bytes).context("cannot fill the tree")?;
            }
        }
        run(Command::new("tar")
            .arg("cf")
            .arg(share.join("tree.tar"))
            .arg("-C")
            .arg(&share)
            .arg("tree"))?;
        Ok(story)
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn share(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    /// Boots the guest, and gives every figure that it or the host measured.
    pub(crate) fn tell(&self, programs: &Programs, peer: Peer) -> Result<Vec<(String, f64)>> {
        for module in ["tun", "vhost_net", "vhost_vsock"] {
            run(Command::new("modprobe").arg(module))?;
        }
        let _tap = Tap::new()?;
        let _server = Killed(
            Command::new("iperf3")
                .args(["-s", "-B", "10.77.0.1"])
                .stdout(Stdio::null())
                .spawn()
                .context("cannot start iperf3")?,
        );
        let guest = match peer {
            Peer::Walnut => self.walnut(programs)?,
            Peer::Qemu => self.qemu(programs)?,
        };
        let mut figures = Vec::new();
        loop {
            let next = guest.console.next_line(Deadline::after(deadline::BOOT));
            let (_, line) = next.with_context(|| format!("{} after {figures:?}", peer.name()))?;
            if let Some(rest) = line.strip_prefix("figure ") {
                let (name, value) = rest.split_once(' ').context("a figure without a value")?;
                let value = value.trim().parse();
                progress(&format!("{}: {rest}", peer.name()));
                figures.push((name.to_owned(), value.with_context(|| line.clone())?));
            } else if line.starts_with("failed ") {
                bail!("the guest of {} says: {line}", peer.name());
            } else if line == SERVES {
                break;
            }
        }
        figures.extend(sockets::measure(&guest.sockets)?);
        Ok(figures)
    }

    fn walnut(&self, programs: &Programs) -> Result<Guest> {
        let (reader, writer) = pipe().context("cannot make a pipe")?;
        let vm = VmBuilder::with_initramfs(programs, &self.initramfs)
            .memory_mib(MEMORY_MIB)
            .console(format!("/proc/self/fd/{}", writer.as_raw_fd()).as_ref())
            .writable_disk(&self.disk())
            .share_of(&self.share())
            .vsock()
            // As the shim gives it, where the host has it.
            .network(Network {
                vhost: true,
                ..Network::new(TAP)
            })
            .start()?;
        let sockets = sockets::Way::Unix(vm.socket_path());
        Ok(Guest {
            console: Console::new(reader),
            sockets,
            _life: Life::Walnut(vm),
        })
    }

    fn qemu(&self, programs: &Programs) -> Result<Guest> {
        let (reader, writer) = pipe().context("cannot make a pipe")?;
        let socket = self.folder.path().join("virtiofsd");
        let daemon = Killed(
            Command::new(VIRTIOFSD)
                .arg(format!("--socket-path={}", socket.display()))
                .arg(format!("--shared-dir={}", self.share().display()))
                .args(["--sandbox=chroot", "--cache=auto", "--log-level=error"])
                .spawn()
                .context("cannot start virtiofsd")?,
        );
        let deadline = Deadline::after(deadline::REQUEST);
        deadline::until("virtiofsd's socket", deadline, || {
            Ok(socket.exists().then_some(()))
        })?;
        let memory = format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on");
        let child = qemu::command(programs, &self.initramfs, CMDLINE, MEMORY_MIB)
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-object", &memory, "-machine", "memory-backend=mem"])
            .arg("-drive")
            .arg(format!(
                "if=none,id=disk,format=raw,aio=io_uring,file={}",
                self.disk().display()
            ))
            .args(["-device", "virtio-blk-device,drive=disk"])
            .arg("-chardev")
            .arg(format!("socket,id=fs,path={}", socket.display()))
            .args(["-device", "vhost-user-fs-device,chardev=fs,tag=walnut"])
            .args([
                "-device",
                &format!("vhost-vsock-device,guest-cid={}", sockets::GUEST_CID),
            ])
            .arg("-netdev")
            .arg(format!(
                "tap,id=net,ifname={TAP},script=no,downscript=no,vhost=on"
            ))
            .args(["-device", "virtio-net-device,netdev=net"])
            .stdin(Stdio::null())
            .stdout(writer)
            .spawn()
            .context("cannot start QEMU")?;
        Ok(Guest {
            console: Console::new(reader),
            sockets: sockets::Way::Vsock,
            _life: Life::Qemu(Killed(child), daemon),
        })
    }
}

struct Guest {
    console: Console,
    sockets: sockets::Way,
    _life: Life,
}

/// The processes of a guest, in the order in which they end.
enum Life {
    Walnut(#[expect(dead_code, reason = "ends when dropped")] Vm),
    Qemu(
        #[expect(dead_code, reason = "ends when dropped")] Killed,
        #[expect(dead_code, reason = "ends when dropped")] Killed,
    ),
}

/// A process that ends with this value.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The tap of a guest; it goes with this value.
#[derive(Debug)]
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        let ip = |words: &str| run(Command::new("ip").args(words.split(' ')));
        ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr"))?;
        let tap = Self;
        ip(&format!("addr add {HOST_ADDRESS} dev {TAP}"))?;
        ip(&format!("link set {TAP} up"))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A tap that is gone already is as good as removed.
        let _ = run(Command::new("ip").args(["link", "del", TAP]));
    }
}

fn run(command: &mut Command) -> Result<()> {
    let deadline = Deadline::after(deadline::REQUEST);
    command::run(command, Vec::new(), deadline)?.success()?;
    Ok(())
}
