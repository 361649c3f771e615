//! A guest without an agent that does what it is told: its init takes scripts from the shared directory.

use crate::{
    deadline::{self, Deadline},
    initramfs::Initramfs,
    programs::Programs,
    vmm::{SHARE_TAG, Vm, VmBuilder},
};
use anyhow::{Context, Result, bail, ensure};
use std::{fs, path::Path};
use walnut_vmm_api::{Message, Request, Statistics};

/// Takes `run-1`, `run-2`, … and leaves `out-1`, `out-2`, ….
const INIT: &str = "
    mkdir -p /share /tmp; mount -t proc proc /proc; mount -t sysfs sysfs /sys
    mount -t devtmpfs dev /dev; mount -t tmpfs -o size=90% tmp /tmp
    mount -t virtiofs TAG /share; echo guest-takes-scripts
    n=1
    while true; do
        if [ -e /share/run-$n ]; then
            sh /share/run-$n > /share/part 2>&1; echo status=$? >> /share/part
            mv /share/part /share/out-$n; n=$((n + 1))
        else
            sleep 0.1
        fi
    done";

/// A VM whose guest takes scripts.
#[derive(Debug)]
pub struct ShellGuest {
    /// The VM.
    pub vm: Vm,
    scripts: u32,
}

impl ShellGuest {
    /// Boots `vm` with busybox and these programs of this machine; `directory` keeps the initramfs.
    pub fn boot(
        programs: &Programs,
        directory: &Path,
        with: &[&str],
        vm: impl FnOnce(VmBuilder) -> VmBuilder,
    ) -> Result<Self> {
        let init = INIT.replace("TAG", SHARE_TAG);
        let archive = Initramfs::script_with(&programs.busybox, with, &init)?;
        let path = directory.join("shell-initramfs");
        fs::write(&path, archive).context("cannot write an initramfs")?;
        let builder = vm(VmBuilder::agent(programs).initramfs(&path));
        let mut vm = builder.start()?;
        vm.wait_for_console("guest-takes-scripts")?;
        Ok(Self { vm, scripts: 0 })
    }

    /// Gives the guest a script, which it begins soon.
    pub fn begin(&mut self, script: &str) -> Result<()> {
        self.scripts += 1;
        let share = self.vm.share_path();
        let part = share.join("part-of-script");
        fs::write(&part, script).context("cannot write a script")?;
        fs::rename(part, share.join(format!("run-{}", self.scripts))).context("cannot rename")
    }

    /// Waits for the end of the last script, and gives what it printed. It must succeed.
    pub fn finish(&mut self) -> Result<String> {
        let path = self.vm.share_path().join(format!("out-{}", self.scripts));
        let (vm, deadline) = (&mut self.vm, Deadline::after(deadline::BOOT));
        let output = deadline::until(
            "the end of a script",
            deadline,
            || match fs::read_to_string(&path) {
                Ok(output) => Ok(Some(output)),
                Err(_) if vm.has_ended()? => bail!("the VM ended: {}", vm.console()),
                Err(_) => Ok(None),
            },
        )?;
        let (output, status) = output.rsplit_once("status=").context("no status")?;
        ensure!(status.trim() == "0", "status {status}: {output}");
        Ok(output.to_owned())
    }

    /// Runs a script in the guest.
    pub fn run(&mut self, script: &str) -> Result<String> {
        self.begin(script)?;
        self.finish()
    }

    /// A number that a script prints.
    pub fn number(&mut self, script: &str) -> Result<u64> {
        let output = self.run(script)?;
        let number = output.trim().parse();
        number.with_context(|| format!("no number: {output:?}"))
    }
}

impl Vm {
    /// The VMM's statistics.
    pub fn statistics(&mut self) -> Result<Statistics> {
        match self.answer(&Request::Statistics, &[])? {
            Message::Statistics(statistics) => Ok(statistics),
            other => bail!("no statistics, but {other:?}"),
        }
    }

    /// Asks for statistics until they are as expected.
    pub fn statistics_until(
        &mut self,
        what: &str,
        expected: impl Fn(&Statistics) -> bool,
    ) -> Result<Statistics> {
        let mut last = None;
        deadline::until(what, Deadline::after(deadline::BOOT), || {
            let statistics = self.statistics()?;
            last = Some(statistics.clone());
            Ok(expected(&statistics).then_some(statistics))
        })
        .with_context(|| format!("last: {last:?}"))
    }
}
