//! How often guests leave their processor, counted by the kernel's tracepoint `kvm:kvm_exit`
//! (Documentation/trace/ftrace.rst). Nothing else may use KVM meanwhile.

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, mount};
use std::{fs, path::Path};
use walnut_tests::{
    deadline::{self, Deadline},
    guest::Guest,
    programs::Programs,
};
use walnut_vmm_api::{Message, Request};

const TRACING: &str = "/sys/kernel/tracing";
const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/enable";

/// Exits of all guests while `story` is told.
pub(crate) fn during(story: impl FnOnce() -> Result<()>) -> Result<f64> {
    if !Path::new(TRACING).join("tracing_on").exists() {
        mount(
            "tracefs",
            TRACING,
            "tracefs",
            MountFlags::empty(),
            None::<&std::ffi::CStr>,
        )
        .context("cannot mount tracefs")?;
    }
    write(&format!("{TRACING}/tracing_on"), "0")?;
    write(&format!("{TRACING}/trace"), "")?;
    let before = recorded()?;
    write(EVENT, "1")?;
    write(&format!("{TRACING}/tracing_on"), "1")?;
    let told = story();
    write(&format!("{TRACING}/tracing_on"), "0")?;
    write(EVENT, "0")?;
    told?;
    let exits = recorded()? - before;
    ensure!(exits > 0.0, "the tracepoint saw no exit");
    Ok(exits)
}

/// Events that were recorded since the buffers were cleared, kept or overwritten.
fn recorded() -> Result<f64> {
    let mut sum = 0.0;
    let folder = format!("{TRACING}/per_cpu");
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))? {
        let path = entry
            .context("cannot list the buffers")?
            .path()
            .join("stats");
        let stats =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for key in ["entries: ", "overrun: ", "dropped events: "] {
            let number = stats.lines().find_map(|line| line.strip_prefix(key));
            let number = number.with_context(|| format!("no {key:?} in {stats}"))?;
            sum += number.trim().parse::<f64>().context("no number")?;
        }
    }
    Ok(sum)
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {path}"))
}

/// Exits from the start of a VM with all its devices until its agent has answered one call: all of them, and
/// those that the VMM had to serve, as it counts them itself.
pub(crate) fn until_agent_answers(programs: &Programs) -> Result<(f64, f64)> {
    let mut booted = None;
    let all = during(|| {
        let guest = Guest::boot(programs)?;
        guest.agent.setup().context("setup")?;
        booted = Some(guest);
        Ok(())
    })?;
    let mut guest = booted.context("no guest")?;
    guest.vm.ask(&Request::Statistics)?;
    let deadline = Deadline::after(deadline::REQUEST);
    while let Some(message) = guest.vm.receive(deadline)? {
        if let Message::Statistics(statistics) = message {
            let exits = statistics.exits();
            let sum = exits.io + exits.mmio + exits.other;
            let served = f64::from(u32::try_from(sum).context("too many exits")?);
            return Ok((all, served));
        }
    }
    bail!("the VMM ended instead of counting");
}
