//! Starts `walnut-vmm` as the shim does, and tells its story: boot, wait, ask, end.
//!
//! Knows the VMM by its contract alone: a PID namespace, one control socket, file descriptors, exit statuses.
#![allow(
    unsafe_code,
    reason = "makes the PID namespace that the contract asks for, which has no safe wrapper"
)]

pub use crate::{ended::Ended, vm_builder::VmBuilder};

use crate::{
    command::wait_child,
    deadline::{self, Deadline},
    mounts::BindMount,
    vm_builder::FdArray,
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
    fs::{self, File},
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
use walnut_vmm_api::{MAX_MESSAGE_BYTES, Message, Request, ShareConfig, VmmExit, VsockConfig};

/// What each guest of a test is told first; the shim says the same.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k random.trust_cpu=on";
/// Context id of every test's guest: nothing on the host sees it.
const GUEST_CID: u32 = 3;
/// Tag of the shared directory.
pub const SHARE_TAG: &str = "walnut";

/// What makes the agent say one line and power off.
pub const PROBE_WORD: &str = "walnut.mode=probe";

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

    pub(crate) fn console_path(&self) -> PathBuf {
        self.directory.path().join("console")
    }

    pub(crate) fn listen(&self, fds: &mut FdArray) -> Result<VsockConfig> {
        let listener = UnixListener::bind(self.socket_path()).context("cannot listen")?;
        Ok(VsockConfig {
            cid: GUEST_CID,
            listener: fds.push(listener)?,
        })
    }

    pub(crate) fn share(
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
