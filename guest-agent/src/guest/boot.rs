//! PID 1, from the kernel's first instruction of it to the service: one step per line.
//!
//! Must not hold a step itself.

use super::{GuestError, kernel_release, mounts, network, power};
use crate::{
    server::{self, AgentConfig},
    syscall,
};
use rustix::{
    fs::Mode,
    process::{Resource, Rlimit, setrlimit},
    time::{ClockId, clock_gettime},
};
use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};
use tokio::{runtime, time::timeout};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use walnut_agent_api::{AGENT_PORT, READY_PORT, STDIO_PORT};

/// For the host to refuse the one connection that says that the guest is ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// File descriptors that the agent may hold: some for each stream and process.
const MAX_FILES: u64 = 524_288;
/// What Linux distributions set and the kernel does not.
const SYSCTLS: &[(&str, &str)] = &[
    // Open files are memory of the container that opens them, and limited as such; a limit of the guest's
    // would be one container's to use up for all.
    ("fs/file-max", "9223372036854775807"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("kernel/kptr_restrict", "1"),
    ("kernel/pid_max", "4194304"),
    // As the kubelet sets it on nodes: a VM as small as its limits must not refuse what a large host promises.
    ("vm/overcommit_memory", "1"),
];

/// What PID 1 is to do, by `walnut.mode=` on the kernel command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Serve the shim.
    Serve,
    /// Say how long the boot took, and power off.
    Probe,
}

/// Runs as PID 1; never returns to the kernel but by power-off or panic.
pub(crate) fn run() -> ExitCode {
    let begun = Instant::now();
    power::panics_are_fatal();
    let result = prepare().and_then(|mode| match mode {
        Purpose::Probe => probe(),
        Purpose::Serve => serve(begun),
    });
    match result {
        Ok(()) => power::off(),
        Err(error) => power::give_up(&power::chain(&error)),
    }
}

fn prepare() -> Result<Purpose, GuestError> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    mounts::mount_all()?;
    let cmdline = fs::read_to_string("/proc/cmdline")
        .map_err(GuestError::system("read the kernel command line"))?;
    let mode = purpose(&cmdline);
    if mode == Purpose::Serve {
        network::bring_loopback_up().map_err(GuestError::system("bring up the loopback device"))?;
        set_sysctls()?;
        protect()?;
    }
    Ok(mode)
}

fn purpose(cmdline: &str) -> Purpose {
    let probe = cmdline
        .split_ascii_whitespace()
        .any(|word| word == "walnut.mode=probe");
    if probe {
        Purpose::Probe
    } else {
        Purpose::Serve
    }
}

fn set_sysctls() -> Result<(), GuestError> {
    for (name, value) in SYSCTLS {
        fs::write(format!("/proc/sys/{name}"), value)
            .map_err(GuestError::system(format!("set {name} to {value}")))?;
    }
    Ok(())
}

/// Memory runs out and files are many because of containers, not because of the agent.
fn protect() -> Result<(), GuestError> {
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(GuestError::system(
        "protect the agent from the out-of-memory killer",
    ))?;
    let limit = Rlimit {
        current: Some(MAX_FILES),
        maximum: Some(MAX_FILES),
    };
    setrlimit(Resource::Nofile, limit).map_err(GuestError::system("raise the number of open files"))
}

fn probe() -> Result<(), GuestError> {
    let uptime = clock_gettime(ClockId::Boottime);
    println!(
        "walnut-probe: {} uptime={}.{:06}",
        kernel_release(),
        uptime.tv_sec,
        uptime.tv_nsec / 1000
    );
    Ok(())
}

fn serve(begun: Instant) -> Result<(), GuestError> {
    let cid = syscall::local_cid().unwrap_or(VMADDR_CID_ANY);
    // Below it are the hypervisor, the loopback and the host: no device gave this guest an id of its own.
    if cid <= VMADDR_CID_HOST || cid == VMADDR_CID_ANY {
        println!("walnut-agent: this machine has no vsock device, so nobody can be served");
        return Ok(());
    }
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(GuestError::system("start the runtime"))?
        .block_on(serve_vsock(begun))
}

async fn serve_vsock(begun: Instant) -> Result<(), GuestError> {
    let requests = listen(AGENT_PORT)?;
    let streams = listen(STDIO_PORT)?;
    let program =
        std::env::current_exe().map_err(GuestError::system("find the agent's program"))?;
    let config = AgentConfig {
        program,
        cgroup_root: PathBuf::from(mounts::CGROUP_ROOT),
        boot_time: begun.elapsed(),
    };
    let service = server::serve(&config, accept(requests), accept(streams));
    // Both ports listen: connections wait from here on.
    knock().await;
    service.await.map_err(|error| {
        GuestError::system("serve the shim")(std::io::Error::other(power::chain(&error)))
    })
}

fn listen(port: u32) -> Result<VsockListener, GuestError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .map_err(GuestError::system(format!("listen on vsock port {port}")))
}

/// Connections of the host; others are closed at once.
fn accept(
    listener: VsockListener,
) -> impl futures::Stream<Item = std::io::Result<VsockStream>> + Send + 'static {
    futures::stream::unfold(listener, async |listener| {
        loop {
            match listener.accept().await {
                // A container that may open vsock sockets reaches this port through the guest's loopback.
                Ok((_, peer)) if peer.cid() != VMADDR_CID_HOST => {}
                accepted => return Some((accepted.map(|(stream, _)| stream), listener)),
            }
        }
    })
}

/// One connection attempt that the host refuses: being asked is what it waits for.
async fn knock() {
    let host = VsockAddr::new(VMADDR_CID_HOST, READY_PORT);
    let _ = timeout(READY_DEADLINE, VsockStream::connect(host)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_a_whole_word() {
        assert_eq!(
            purpose("console=ttyS0 walnut.mode=probe quiet\n"),
            Purpose::Probe
        );
        assert_eq!(
            purpose("walnut.mode=probe2 x.walnut.mode=probe"),
            Purpose::Serve
        );
        assert_eq!(purpose(""), Purpose::Serve);
    }
}
