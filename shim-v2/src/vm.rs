//! Spawns `walnut-vmm`, hands it its files, and watches it.
//!
//! The shim opens, the VMM receives (vmm/api): the VMM itself opens nothing. It is spawned inside the
//! Pod's cgroup. It ends by itself when its control socket closes, so it doesn't outlive the shim.
#![allow(
    unsafe_code,
    reason = "the VMM's descriptor 3 and cgroup are set between fork and exec, its PID namespace before"
)]

mod requests;

use crate::{
    cgroup::{Cgroup, CgroupError},
    config::Config,
    control::{self, Control, ControlError},
    error::printable,
    network::Nic,
    process_file::{self, ProcessFileError},
    size::Size,
    state_dir::StateDir,
    vm_end::{MAX_REASON_BYTES, console_tail, describe_status, read_stderr},
};
use rustix::{
    fs::{Mode, OFlags},
    thread::{UnshareFlags, unshare_unsafe},
};
use std::{
    fs::{self, File},
    future::Future,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{fs::OpenOptionsExt as _, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};
use tokio::{
    process::{Child, Command},
    sync::{Mutex, Notify, watch},
    time::timeout,
};
use walnut_vmm_api::{
    CONTROL_FD, FailureKind, FdSlot, Message, Request, ShareConfig, VmConfig, VsockConfig,
};

/// Tag of the shared directory.
pub(crate) const SHARE_TAG: &str = "walnut";
/// The vsock device's other side is a Unix socket of this VM alone, so every guest may have the same id.
const GUEST_CID: u32 = 3;
/// Free memory is reported in pieces of 64 KiB, not only in whole huge pages: an idle Pod keeps less.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k random.trust_cpu=on dummy.numdummies=0 \
    page_reporting.page_reporting_order=4";
/// From spawn to the guest's init, on the slowest machine that we test on.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// For a request to a VM that runs: the VMM does all of them itself, at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// From a killed process to its last message or exit status.
const EXIT_DEADLINE: Duration = Duration::from_secs(10);
/// The names of places have four letters.
const MAX_PLACE_BYTES: usize = 16;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    /// A file that the configuration names.
    #[error(
        "the {what} {path:?} cannot be opened; install it, or name another as `{key}` in /etc/walnut/config.toml"
    )]
    Image {
        /// What it is.
        what: &'static str,
        /// Its key in the configuration.
        key: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No KVM.
    #[error(
        "/dev/kvm cannot be opened; Walnut needs a host with hardware virtualisation and the kvm modules loaded"
    )]
    Kvm(#[source] io::Error),
    /// Something else on the host.
    #[error("{what} {path:?} failed")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The VMM's process file.
    #[error(transparent)]
    ProcessFile(#[from] ProcessFileError),
    /// The control socket.
    #[error("the VMM cannot be controlled")]
    Control(#[from] ControlError),
    /// The VMM refused.
    #[error("the VMM refused to boot: {reason}")]
    Refused {
        /// What to act on.
        kind: FailureKind,
        /// Its own words.
        reason: String,
    },
    /// The VMM refused what it was given to boot; it has no names for files.
    #[error("cannot boot {kernel:?} with {initramfs:?}: {reason}")]
    Unbootable {
        /// The guest's kernel.
        kernel: PathBuf,
        /// The guest's initramfs.
        initramfs: PathBuf,
        /// The VMM's own words.
        reason: String,
    },
    /// The VMM refused a request, or answered wrongly.
    #[error("the VMM could not {what}: {reason}")]
    Request {
        /// What was asked of it.
        what: &'static str,
        /// Its own words.
        reason: String,
    },
    /// The VMM ended.
    #[error("the VM ended before its guest was ready: {0}")]
    Ended(String),
    /// No room for one more device.
    #[error("the VM is full: the VMM could not {what}: {reason}")]
    Full {
        /// What was asked of it.
        what: &'static str,
        /// Its own words.
        reason: String,
    },
    /// Nothing happened.
    #[error("the guest was not ready after {} s; its console: {console}", BOOT_DEADLINE.as_secs())]
    Deadline {
        /// What it said last.
        console: String,
    },
}

/// What a VM is made from.
pub(crate) struct Plan<'a> {
    /// Programs, images and sizes.
    pub(crate) config: &'a Config,
    /// Where the console log, the socket and the process file go.
    pub(crate) state: &'a StateDir,
    /// Where the VMM runs.
    pub(crate) cgroup: &'a Cgroup,
    /// What the guest sees; a mount point.
    pub(crate) share: &'a Path,
    /// Its size at first.
    pub(crate) size: Size,
    /// What it can grow to.
    pub(crate) most: Size,
    /// How readily the host's kernel kills it.
    pub(crate) oom_score_adj: i32,
}

/// How a VMM ended.
#[derive(Debug, Clone)]
struct Ended {
    status: Option<ExitStatus>,
    stderr: String,
}

/// A running VMM. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Vm {
    pid: u32,
    control: Control,
    /// Requests are answered in order, so that there is one at a time.
    asking: Mutex<()>,
    ended: watch::Receiver<Option<Ended>>,
    kill: Arc<Notify>,
    console: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill.notify_one();
    }
}

impl Vm {
    /// Spawns the VMM, boots the guest, and answers once the guest's agent listens.
    pub(crate) async fn boot(plan: &Plan<'_>, nics: Vec<Nic>) -> Result<Self, VmError> {
        let (mut config, mut files) = open_files(plan)?;
        config.networks = nics
            .into_iter()
            .map(|nic| nic.hand_over(&mut files))
            .collect();
        let (control, theirs) = control::pair()?;
        let child = spawn(plan, theirs)?;
        let vm = Self::watch(child, control, plan.state.console());
        process_file::write(&plan.state.vmm_pid(), vm.pid)?;
        set_oom_score(vm.pid, plan.oom_score_adj);
        let borrowed: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        // A VMM that ended before it read its configuration tells more than the broken socket does.
        if let Err(error) = vm.control.send(&Request::Boot(config), &borrowed).await {
            return Err(vm.reason_of_end().await.unwrap_or(error.into()));
        }
        drop(files);
        match timeout(BOOT_DEADLINE, vm.wait_ready()).await {
            Ok(Ok(())) => Ok(vm),
            Ok(Err(VmError::Refused {
                kind: FailureKind::Image,
                reason,
            })) => Err(VmError::Unbootable {
                kernel: plan.config.kernel.clone(),
                initramfs: plan.config.initramfs.clone(),
                reason,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(VmError::Deadline {
                console: console_tail(&vm.console),
            }),
        }
    }

    fn watch(mut child: Child, control: Control, console: PathBuf) -> Self {
        let pid = child.id().unwrap_or(0);
        let kill = Arc::new(Notify::new());
        let killed = Arc::clone(&kill);
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            let stderr = tokio::spawn(read_stderr(child.stderr.take()));
            let status = tokio::select! {
                status = child.wait() => status,
                () = killed.notified() => {
                    // It may have ended already; `wait` tells.
                    let _ = child.start_kill();
                    child.wait().await
                }
            };
            let stderr = timeout(EXIT_DEADLINE, stderr)
                .await
                .ok()
                .and_then(Result::ok);
            let stderr = stderr.unwrap_or_default();
            sender.send_replace(Some(Ended {
                status: status.ok(),
                stderr,
            }));
        });
        Self {
            pid,
            control,
            asking: Mutex::default(),
            ended,
            kill,
            console,
        }
    }

    /// Waits for the two messages of a boot, racing the VMM's end.
    async fn wait_ready(&self) -> Result<(), VmError> {
        loop {
            let message = tokio::select! {
                biased;
                message = self.control.receive() => message,
                () = self.exited() => {
                    // Its last words may still be in the socket.
                    timeout(EXIT_DEADLINE, self.control.receive())
                        .await
                        .unwrap_or(Err(ControlError::Closed))
                }
            };
            match message {
                Ok(
                    Message::Booted
                    | Message::Done
                    | Message::Attached { .. }
                    | Message::Statistics(_),
                ) => {}
                Ok(Message::GuestReady) => return Ok(()),
                Ok(Message::Failed { kind, error }) => {
                    let reason = printable(&error, MAX_REASON_BYTES);
                    return Err(VmError::Refused { kind, reason });
                }
                Err(error) => return Err(self.reason_of_end().await.unwrap_or(error.into())),
            }
        }
    }

    async fn reason_of_end(&self) -> Option<VmError> {
        timeout(EXIT_DEADLINE, self.exited()).await.ok()?;
        Some(VmError::Ended(self.describe_end()))
    }

    /// The VMM's process id on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the VMM's end.
    pub(crate) fn exited(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            // The sender only goes after it has told the end.
            let _ = ended.wait_for(Option::is_some).await;
        }
    }

    /// Whether the VMM has ended.
    pub(crate) fn has_exited(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Why the VMM ended, on one line.
    pub(crate) fn describe_end(&self) -> String {
        let ended = self.ended.borrow().clone();
        let Some(ended) = ended else {
            return "it runs".to_owned();
        };
        let mut reason = describe_status(ended.status);
        let detail = match ended.stderr.trim() {
            "" => console_tail(&self.console),
            stderr => stderr.to_owned(),
        };
        if !detail.is_empty() {
            reason.push_str(": ");
            reason.push_str(&detail);
        }
        printable(&reason, MAX_REASON_BYTES)
    }

    /// Ends the VM at once, first by asking, then by SIGKILL. Waits for the end.
    pub(crate) async fn stop(&self) {
        // A VMM that can't be asked is killed.
        let asked = self.control.send(&Request::Stop, &[]).await;
        if asked.is_ok() && timeout(EXIT_DEADLINE, self.exited()).await.is_ok() {
            return;
        }
        self.kill().await;
    }

    /// SIGKILL. Waits for the end.
    pub(crate) async fn kill(&self) {
        self.kill.notify_one();
        if timeout(EXIT_DEADLINE, self.exited()).await.is_err() {
            crate::log::line(&format!("walnut-vmm {} does not die", self.pid));
        }
    }
}

/// Opens what the VMM receives, in the order of the slots.
fn open_files(plan: &Plan<'_>) -> Result<(VmConfig, Vec<OwnedFd>), VmError> {
    let host = |what, path: &Path| {
        let path = path.to_owned();
        move |source| VmError::Host { what, path, source }
    };
    let config = plan.config;
    let kernel = image("guest kernel", "kernel", &config.kernel)?;
    let initramfs = image("guest initramfs", "initramfs", &config.initramfs)?;
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(VmError::Kvm)?;
    let path = plan.state.console();
    let console = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(host("creating console log", &path))?;
    let path = plan.state.vsock();
    let listener = UnixListener::bind(&path).map_err(host("listening on", &path))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let share = rustix::fs::open(plan.share, flags, Mode::empty())
        .map_err(|error| host("opening shared directory", plan.share)(error.into()))?;
    let files = vec![
        OwnedFd::from(kvm),
        kernel.into(),
        initramfs.into(),
        console.into(),
        listener.into(),
        share,
    ];
    let vm = VmConfig {
        vcpus: plan.size.vcpus,
        max_vcpus: Some(plan.most.vcpus),
        memory_mib: plan.size.memory_mib,
        max_memory_mib: Some(plan.most.memory_mib),
        cmdline: CMDLINE.to_owned(),
        initramfs: Some(FdSlot(2)),
        vsock: Some(VsockConfig {
            cid: GUEST_CID,
            listener: FdSlot(4),
        }),
        share: Some(ShareConfig::new(SHARE_TAG, FdSlot(5))),
        ..VmConfig::new(FdSlot(0), FdSlot(1), FdSlot(3))
    };
    Ok((vm, files))
}

fn image(what: &'static str, key: &'static str, path: &Path) -> Result<File, VmError> {
    let failed = |source| VmError::Image {
        what,
        key,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    match file.metadata().map_err(failed)?.is_file() {
        true => Ok(file),
        false => Err(failed(io::Error::other("it is not a file"))),
    }
}

/// Starts the VMM inside its cgroup with its end of the control socket as descriptor [`CONTROL_FD`].
fn spawn(plan: &Plan<'_>, control: OwnedFd) -> Result<Child, VmError> {
    let path = &plan.config.vmm;
    let failed = |source| VmError::Image {
        what: "VMM",
        key: "vmm",
        path: path.clone(),
        source,
    };
    let procs = plan.cgroup.open_procs()?;
    let mut command = Command::new(path);
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let enter = move || {
        for file in &procs {
            // "0" is the writing process. Both calls are plain system calls.
            rustix::io::write(file, b"0")?;
        }
        // SAFETY: dup2 only changes the descriptor table of this forked child, and descriptor 3 belongs
        // to the shim's runtime, whose copy in the child is not used any more.
        let result = unsafe { libc::dup2(control.as_raw_fd(), CONTROL_FD) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: `enter` makes two system calls on descriptors that it owns and does not allocate.
    unsafe { command.pre_exec(enter) };
    spawn_first(&mut command).map_err(failed)
}

/// Starts `command` as the first process of a PID namespace. The namespace is of the children of the thread that
/// asks for it, so that is a thread of this purpose; the process is a child of the shim as any other.
fn spawn_first(command: &mut Command) -> io::Result<Child> {
    let runtime = tokio::runtime::Handle::current();
    let spawn = || {
        let _runtime = runtime.enter();
        // SAFETY: NEWPID changes nothing for this thread but where its children are, and takes no file
        // descriptors away.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("spawn".to_owned());
        let child = thread.spawn_scoped(scope, spawn)?.join();
        child.unwrap_or_else(|_| Err(io::Error::other("the thread that starts it panicked")))
    })
}

fn set_oom_score(pid: u32, score: i32) {
    // The shim's own score protects it; the VM is as killable as its workload asked to be. Failing to say so
    // leaves it as protected as the shim, which is not a reason to refuse the Pod.
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        crate::log::error("setting the VMM's oom_score_adj", &error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_image_is_named_with_its_key() {
        let error = image("guest kernel", "kernel", Path::new("/no/vmlinux")).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("/no/vmlinux") && text.contains("`kernel`"),
            "{text}"
        );
        assert!(
            image("guest kernel", "kernel", Path::new("/")).is_err(),
            "a directory"
        );
    }

    fn vm_of(script: &str) -> (Vm, OwnedFd) {
        let (control, theirs) = control::pair().unwrap();
        let child = Command::new("sh")
            .args(["-c", script])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        (Vm::watch(child, control, "/nonexistent".into()), theirs)
    }

    fn say(socket: &OwnedFd, message: &Message) {
        let packet = message.encode().unwrap();
        rustix::net::send(socket, &packet, rustix::net::SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn a_guest_is_ready_when_the_vmm_says_so() {
        let (vm, theirs) = vm_of("exec sleep 1000");
        say(&theirs, &Message::Booted);
        say(&theirs, &Message::GuestReady);
        vm.wait_ready().await.unwrap();
        vm.kill().await;
        assert!(vm.has_exited());
        assert_eq!(vm.describe_end(), "walnut-vmm was killed by signal 9");
    }

    #[tokio::test]
    async fn a_refusal_is_told_even_if_the_vmm_has_gone() {
        let (vm, theirs) = vm_of("exit 65");
        vm.exited().await;
        let kind = FailureKind::Image;
        say(
            &theirs,
            &Message::Failed {
                kind,
                error: "no PVH note".into(),
            },
        );
        let error = vm.wait_ready().await.unwrap_err();
        assert_eq!(error.to_string(), "the VMM refused to boot: no PVH note");
    }

    #[tokio::test]
    async fn a_panic_carries_what_the_vmm_said() {
        let (vm, theirs) = vm_of("echo 'Kernel panic: no init' >&2; exit 66");
        drop(theirs);
        let error = vm.wait_ready().await.unwrap_err().to_string();
        assert!(
            error.ends_with("the guest kernel panicked: Kernel panic: no init"),
            "{error}"
        );
    }
}
