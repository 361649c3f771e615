//! What a VMM costs beside its guest's RAM, and what of that RAM comes back after a load.

use super::guest::{Killed, Peer};
use crate::{
    console::Console,
    persist, qemu,
    report::{Better, Report, Row, Samples},
};
use anyhow::{Context, Result};
use std::{
    fs,
    io::pipe,
    os::fd::AsRawFd,
    process::Stdio,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use walnut_tests::{
    deadline::{self, Deadline},
    initramfs::Initramfs,
    memory::{self, Footprint},
    programs::Programs,
    vmm::{CMDLINE, Vm, VmBuilder},
};

const MEMORY_MIB: u32 = 256;
/// What the product's guests are told: pieces of 64 KiB.
const REPORTING: &str = "page_reporting.page_reporting_order=4";
/// Fills and frees 128 MiB of RAM.
const LOAD: &str = "
    mkdir -p /tmp; mount -t tmpfs tmpfs /tmp
    dd if=/dev/zero of=/tmp/load bs=1M count=128 2> /dev/null; rm /tmp/load
    echo bench-freed; sleep 100000";
/// Only waits.
const STAYS: &str = "echo bench-idle; sleep 100000";
/// RAM that hasn't changed for this long has settled: a guest reports free pages two seconds after it freed them.
const SETTLED: Duration = Duration::from_secs(6);

struct Guest {
    pid: i32,
    console: Console,
    _vm: Option<Vm>,
    _child: Option<Killed>,
    _folder: TempDir,
}

fn boot(programs: &Programs, peer: Peer, vcpus: u8, script: &str) -> Result<Guest> {
    let folder = TempDir::with_prefix("walnut-bench-").context("cannot make a folder")?;
    let initramfs = folder.path().join("initramfs");
    let archive = Initramfs::script(&programs.busybox, script)?;
    fs::write(&initramfs, archive).context("cannot write the initramfs")?;
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let (pid, vm, child) = match peer {
        Peer::Walnut => {
            let console = format!("/proc/self/fd/{}", writer.as_raw_fd());
            let vm = VmBuilder::with_initramfs(programs, &initramfs)
                .word(REPORTING)
                .vcpus(vcpus)
                .memory_mib(MEMORY_MIB)
                .console(console.as_ref())
                .start()?;
            (vm.pid()?, Some(vm), None)
        }
        Peer::Qemu => {
            let cmdline = format!("{CMDLINE} {REPORTING}");
            let child = qemu::command(programs, &initramfs, &cmdline, MEMORY_MIB)
                .args(["-smp", &vcpus.to_string()])
                .args(["-global", "virtio-mmio.force-legacy=false"])
                .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
                .args(["-device", "virtio-rng-device"])
                .stdin(Stdio::null())
                .stdout(writer)
                .spawn()
                .context("cannot start QEMU")?;
            let pid = i32::try_from(child.id()).context("a process id that is none")?;
            (pid, None, Some(Killed(child)))
        }
    };
    Ok(Guest {
        pid,
        console: Console::new(reader),
        _vm: vm,
        _child: child,
        _folder: folder,
    })
}

fn mib(kib: u64) -> Result<f64> {
    Ok(f64::from(u32::try_from(kib).context("terabytes")?) / 1024.0)
}

/// PSS of a VMM without its guest's RAM, in MiB, once its guest's init runs.
pub(crate) fn overhead_mib(programs: &Programs, peer: Peer, vcpus: u8) -> Result<f64> {
    let guest = boot(programs, peer, vcpus, STAYS)?;
    let up = guest.console.wait_for("bench-idle");
    up.with_context(|| format!("{} with {vcpus} vCPUs", peer.name()))?;
    mib(memory::of_vmm(guest.pid, MEMORY_MIB)?.overhead_pss_kib)
}

/// A VMM's memory once its guest has settled.
pub(crate) fn settled(pid: i32, guest_mib: u32) -> Result<Footprint> {
    let mut seen = (memory::of_vmm(pid, guest_mib)?, Instant::now());
    let deadline = Deadline::after(deadline::BOOT);
    deadline::until("the guest to settle", deadline, || {
        let now = memory::of_vmm(pid, guest_mib)?;
        if now.guest_rss_kib != seen.0.guest_rss_kib {
            seen = (now, Instant::now());
        }
        Ok((seen.1.elapsed() >= SETTLED).then_some(now))
    })
}

/// Adds the row of what a guest keeps of the 128 MiB that it once used.
pub(crate) fn given_back(report: &mut Report, programs: &Programs) -> Result<()> {
    let kept = |peer| -> Result<f64> {
        let guest = boot(programs, peer, 1, LOAD)?;
        guest.console.wait_for("bench-freed")?;
        mib(settled(guest.pid, MEMORY_MIB)?.guest_rss_kib)
    };
    report.add(Row {
        what: "guest RAM after 128 MiB came and went",
        unit: "MiB",
        walnut: Samples::of([persist(|| kept(Peer::Walnut))?]),
        other: Some((super::OTHER, Samples::of([persist(|| kept(Peer::Qemu))?]))),
        better: Better::Less,
        aim_ratio: Some(1.0),
        aim_most: None,
    });
    Ok(())
}
