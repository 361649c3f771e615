//! What an idle Pod costs the host: its shim, its VMM, and the guest RAM that it has touched.

use crate::{boot::MEMORY_MIB, qemu};
use anyhow::{Context, Result};
use std::{
    fs,
    io::{BufRead, BufReader, pipe},
    process::Stdio,
};
use tempfile::TempDir;
use walnut_tests::{
    ctr::{BUSYBOX, Container, Runtime},
    initramfs::Initramfs,
    memory,
    node::NodeConfig,
    programs::Programs,
    vmm::CMDLINE,
};

/// Memory in MiB.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) shim: f64,
    pub(crate) vmm: f64,
    pub(crate) guest: f64,
}

fn sleeping(runtime: Runtime) -> Result<Container> {
    runtime.run(BUSYBOX).command(&["sleep", "100000"]).detach()
}

fn mib(kib: u64) -> Result<f64> {
    Ok(f64::from(u32::try_from(kib).context("terabytes")?) / 1024.0)
}

/// A Pod whose only process sleeps.
pub(crate) fn walnut() -> Result<Pod> {
    let _config = NodeConfig::write(&format!("memory_mib = {MEMORY_MIB}\n"))?;
    let container = sleeping(Runtime::Walnut)?;
    let shim = memory::of_process(container.shim()?.pid)?;
    let vmm = memory::of_vmm(container.vmm()?.pid, MEMORY_MIB)?;
    Ok(Pod {
        shim: mib(shim.overhead_pss_kib)?,
        vmm: mib(vmm.overhead_pss_kib)?,
        guest: mib(vmm.guest_rss_kib)?,
    })
}

/// runc's shim, likewise.
pub(crate) fn runc_shim() -> Result<f64> {
    let container = sleeping(Runtime::Runc)?;
    mib(memory::of_process(container.shim()?.pid)?.overhead_pss_kib)
}

/// QEMU with a guest of the same size whose only process sleeps. There is no shim, and no agent.
pub(crate) fn qemu(programs: &Programs) -> Result<Pod> {
    const UP: &str = "guest-is-up";
    let directory = TempDir::new().context("no temporary directory")?;
    let initramfs = directory.path().join("initramfs");
    let script = format!("echo {UP}; exec sleep 100000");
    fs::write(&initramfs, Initramfs::script(&programs.busybox, &script)?)
        .context("cannot write an initramfs")?;
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let mut child = qemu::command(programs, &initramfs, CMDLINE, MEMORY_MIB)
        .stdin(Stdio::null())
        .stdout(writer)
        .spawn()
        .context("cannot start QEMU")?;
    let mut lines = BufReader::new(reader).lines();
    let up = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(UP)));
    let pid = i32::try_from(child.id()).context("a process id that is none")?;
    let measured = memory::of_vmm(pid, MEMORY_MIB);
    child.kill().context("cannot kill QEMU")?;
    child.wait().context("cannot wait for QEMU")?;
    up.context("QEMU's guest did not come up")?
        .context("cannot read QEMU's console")?;
    let measured = measured?;
    Ok(Pod {
        shim: 0.0,
        vmm: mib(measured.overhead_pss_kib)?,
        guest: mib(measured.guest_rss_kib)?,
    })
}
