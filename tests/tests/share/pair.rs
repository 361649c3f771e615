//! A guest with the share, and the host's side of it.

use anyhow::{Context, Result, bail, ensure};
use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use walnut_tests::{
    deadline::{self, Deadline},
    initramfs::Initramfs,
    mounts::BindMount,
    programs::Programs,
    vmm::{SHARE_TAG, Vm, VmBuilder},
};
use walnut_vmm_api::ShareConfig;

/// Programs of this machine that the guest uses; Python's modules come through the share.
const PROGRAMS: [&str; 8] = [
    "setfattr", "getfattr", "setfacl", "getfacl", "setcap", "getcap", "flock", "python3",
];

/// Takes `run-1`, `run-2`, … from the share and leaves `out-1`, `out-2`, … there. A script is copied first, so that
/// it may unmount the share.
const INIT: &str = "
    mkdir -p /share /tmp; mount -t proc proc /proc; mount -t sysfs sysfs /sys
    mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
    mount -t virtiofs OPTIONS TAG /share || echo no-share
    export PYTHONHOME=/share/node PYTHONDONTWRITEBYTECODE=1; cd /; umask 022
    echo guest-takes-scripts
    n=1
    while true; do
        if [ -e /share/run-$n ]; then
            cp /share/run-$n /tmp/run
            (cd /share; umask 022; set -e; . /tmp/run) > /tmp/out 2>&1; echo status=$? >> /tmp/out
            sync; cp /tmp/out /share/part; sync; mv /share/part /share/out-$n; n=$((n + 1))
        else
            sleep 0.1
        fi
    done";

/// A guest that has the share mounted, and the host's side of it.
pub(crate) struct Pair {
    pub(crate) vm: Vm,
    scripts: u32,
    pub(crate) options: &'static str,
    _node: BindMount,
    _directory: TempDir,
}

impl Pair {
    pub(crate) fn boot(
        programs: &Programs,
        options: &'static str,
        change: fn(&mut ShareConfig),
    ) -> Result<Self> {
        let directory = TempDir::new()?;
        let init = INIT.replace("TAG", SHARE_TAG).replace("OPTIONS", options);
        let archive = Initramfs::script_with(&programs.busybox, &PROGRAMS, &init)?;
        let initramfs = directory.path().join("initramfs");
        fs::write(&initramfs, archive).context("cannot write an initramfs")?;
        let builder = VmBuilder::agent(programs).initramfs(&initramfs);
        let mut vm = builder.vcpus(2).memory_mib(512).share(change).start()?;
        vm.wait_for_console("guest-takes-scripts")?;
        // Made after the VMM has entered its jail, as the shim does with each container's volumes.
        let node = vm.share_path().join("node");
        fs::create_dir(&node)?;
        let node = BindMount::new(Path::new("/usr"), &node)?;
        Ok(Self {
            vm,
            scripts: 0,
            options,
            _node: node,
            _directory: directory,
        })
    }

    pub(crate) fn host(&self, name: &str) -> PathBuf {
        self.vm.share_path().join(name)
    }

    /// Runs a script in the guest, in the share, and gives what it printed. It must succeed.
    pub(crate) fn guest(&mut self, script: &str) -> Result<String> {
        self.scripts += 1;
        let (part, run) = (self.host("script"), format!("run-{}", self.scripts));
        fs::write(&part, script).context("cannot write a script")?;
        fs::rename(part, self.host(&run)).context("cannot rename a script")?;
        let path = self.host(&format!("out-{}", self.scripts));
        let (vm, deadline) = (&mut self.vm, Deadline::after(deadline::REQUEST));
        let output = deadline::until(
            "the end of a script",
            deadline,
            || match fs::read_to_string(&path) {
                Ok(output) => Ok(Some(output)),
                Err(_) if vm.has_ended()? => bail!("the VM ended"),
                Err(_) => Ok(None),
            },
        );
        let output = output.with_context(|| vm.console())?;
        let (output, status) = output.rsplit_once("status=").context("no status")?;
        ensure!(status.trim() == "0", "status {status}: {output}");
        Ok(output.trim_end().to_owned())
    }

    /// Runs a program in Python there.
    pub(crate) fn python(&mut self, program: &str) -> Result<String> {
        self.guest(&format!(
            "python3 -B -S - <<'PYTHON'\nimport os\n{program}\nPYTHON"
        ))
    }

    /// Runs a script until it prints `expected`.
    pub(crate) fn until(&mut self, script: &str, expected: &str) -> Result<()> {
        let deadline = Deadline::after(deadline::REQUEST);
        let what = format!("{expected:?} by {script:?}");
        deadline::until(&what, deadline, || {
            Ok((self.guest(script)? == expected).then_some(()))
        })
    }
}

pub(crate) fn run(program: &str, arguments: &[&OsStr]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{program}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

pub(crate) fn md5(path: &Path) -> Result<String> {
    let output = run("md5sum", &[path.as_os_str()])?;
    Ok(output.split(' ').next().context("no md5sum")?.to_owned())
}

pub(crate) fn equal(seen: &str, expected: &str) -> Result<()> {
    ensure!(seen == expected, "{seen:?} is not {expected:?}");
    Ok(())
}
