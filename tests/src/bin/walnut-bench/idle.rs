//! What an idle Pod costs the host: its shim, its VMM, and the guest RAM that it has touched.

use crate::{
    boot::{MEMORY_MIB, PROBE, REBOOT},
    console::Console,
    qemu,
    vmm::memory::settled,
};
use anyhow::{Context, Result};
use std::{io::pipe, process::Stdio};
use walnut_tests::{
    ctr::{BUSYBOX, Container, Runtime},
    memory,
    node::NodeConfig,
    programs::Programs,
    vmm::{CMDLINE, PROBE_WORD},
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
    let vmm = settled(container.vmm()?.pid, MEMORY_MIB)?;
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

/// QEMU with the same kernel and initramfs once its guest's init has spoken; there is no shim. The guest then
/// powers off, which QEMU is told to survive.
pub(crate) fn qemu(programs: &Programs) -> Result<Pod> {
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let cmdline = format!("{CMDLINE} {PROBE_WORD} {REBOOT}");
    let mut child = qemu::command(programs, &programs.initramfs, &cmdline, MEMORY_MIB)
        .arg("-no-shutdown")
        .stdin(Stdio::null())
        .stdout(writer)
        .spawn()
        .context("cannot start QEMU")?;
    let up = Console::new(reader).wait_for(PROBE);
    let pid = i32::try_from(child.id()).context("a process id that is none")?;
    let measured = memory::of_vmm(pid, MEMORY_MIB);
    child.kill().context("cannot kill QEMU")?;
    child.wait().context("cannot wait for QEMU")?;
    up.context("QEMU's guest did not come up")?;
    let measured = measured?;
    Ok(Pod {
        shim: 0.0,
        vmm: mib(measured.overhead_pss_kib)?,
        guest: mib(measured.guest_rss_kib)?,
    })
}
