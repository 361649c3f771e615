//! From the start of a VMM to its guest's init, and to the VMM's end.
//!
//! Both VMMs boot the same kernel and initramfs with the same command line and the same RAM; the guest's
//! agent says one line and powers off. The console is a pipe, so that the line's arrival is an event.

use crate::{console::Console, qemu};
use anyhow::{Context, Result, ensure};
use std::{io::pipe, os::fd::AsRawFd, process::Stdio, time::Instant};
use walnut_tests::{
    command::wait_child,
    deadline::{self, Deadline},
    programs::Programs,
    vmm::{CMDLINE, PROBE_WORD, VmBuilder},
};
use walnut_vmm_api::VmmExit;

/// What the probe's line begins with.
pub(crate) const PROBE: &str = "walnut-probe: ";

/// RAM of each guest.
pub(crate) const MEMORY_MIB: u32 = 256;

/// How a guest without a keyboard controller, which the microvm machine lacks, would reboot.
pub(crate) const REBOOT: &str = "reboot=t";

/// One guest's life.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) to_init_ms: f64,
    pub(crate) to_end_ms: f64,
    pub(crate) uptime_ms: f64,
}

pub(crate) fn walnut(programs: &Programs) -> Result<Boot> {
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let console = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let started = Instant::now();
    let vm = VmBuilder::probe(programs)
        .word(REBOOT)
        .memory_mib(MEMORY_MIB)
        .console(console.as_ref())
        .start()?;
    drop(writer);
    let line = Console::new(reader).wait_for(PROBE);
    let ended = vm.wait()?;
    let line = line.with_context(|| format!("walnut-vmm: {ended:?}"))?;
    ended.ends_with(VmmExit::Ended)?;
    finish(line, started)
}

pub(crate) fn qemu(programs: &Programs) -> Result<Boot> {
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let cmdline = format!("{CMDLINE} {PROBE_WORD} {REBOOT}");
    let started = Instant::now();
    let mut child = qemu::command(programs, &programs.initramfs, &cmdline, MEMORY_MIB)
        .stdin(Stdio::null())
        .stdout(writer)
        .spawn()
        .context("cannot start QEMU")?;
    let line = Console::new(reader).wait_for(PROBE);
    let status = wait_child(&mut child, Deadline::after(deadline::BOOT))?;
    if status.is_none() {
        child.kill().context("cannot kill QEMU")?;
        child.wait().context("cannot wait for QEMU")?;
    }
    let status = status.context("QEMU did not end by the deadline")?;
    let line = line.with_context(|| format!("QEMU ended with {status}"))?;
    ensure!(status.success(), "QEMU ended with {status}");
    finish(line, started)
}

fn finish((at, line): (Instant, String), started: Instant) -> Result<Boot> {
    let to_end_ms = milliseconds(started, Instant::now());
    let (_, uptime) = line.split_once(" uptime=").context("no uptime")?;
    let uptime: f64 = uptime.parse().with_context(|| format!("uptime {uptime}"))?;
    Ok(Boot {
        to_init_ms: milliseconds(started, at),
        to_end_ms,
        uptime_ms: uptime * 1000.0,
    })
}

fn milliseconds(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1000.0
}
