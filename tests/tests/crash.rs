//! What breaks, and what must then be left: one clear line for the user, and nothing on the machine.

use anyhow::{Context, Result, ensure};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::Signal,
};
use std::{fs, path::Path};
use walnut_tests::{
    command::{End, Output},
    ctr::{BUSYBOX, Runtime, ctr},
    deadline::{self, Deadline},
    leak::Leak,
    node::{Hidden, NodeConfig, nullify},
    processes, requirement,
};

#[test]
fn a_killed_vmm_ends_its_container_with_137() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let sleeps = || Runtime::Walnut.run(BUSYBOX).command(&["sleep", "100000"]);

    // In the background: the task stays, stopped, until it is removed.
    let container = sleeps().detach()?;
    container.vmm()?.kill(Signal::KILL)?;
    container.wait_for("STOPPED")?;
    ensure!(container.task_status()? == 137, "no 137");
    container.remove()?;
    leak.nothing_left()?;

    // In the foreground, with a process added.
    let (container, running) = sleeps().start()?;
    container.wait_for("RUNNING")?;
    let vmm = container.vmm()?;
    let added = std::thread::scope(|scope| {
        let exec = scope.spawn(|| container.shell("touch /added; sleep 100000"));
        deadline::until("the added process", Deadline::after(deadline::BOOT), || {
            let there = container.exec(&["test", "-e", "/added"])?.end;
            Ok((there == End::Exited(0)).then_some(()))
        })?;
        vmm.kill(Signal::KILL)?;
        exec.join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })?;
    added.exits(137)?;
    running
        .wait(Deadline::after(deadline::REQUEST))?
        .exits(137)?;
    leak.nothing_left()
}

#[test]
fn a_killed_shim_takes_its_vm_along() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let (container, running) = Runtime::Walnut
        .run(BUSYBOX)
        .command(&["sleep", "100000"])
        .start()?;
    container.wait_for("RUNNING")?;
    let vmm = container.vmm()?;
    container.shim()?.kill(Signal::KILL)?;
    let output = running.wait(Deadline::after(deadline::BOOT))?;
    ensure!(output.end != End::Exited(0), "{output:?}");
    deadline::until("the VMM's end", Deadline::after(deadline::REQUEST), || {
        let gone = !Path::new(&format!("/proc/{}", vmm.pid)).exists();
        Ok(gone.then_some(()))
    })?;
    drop(container);
    leak.nothing_left()
}

/// `ctr run` of a container that cannot start.
fn refused() -> Result<Output> {
    Runtime::Walnut
        .run(BUSYBOX)
        .command(&["true"])
        .finish()
        .context("ctr run")
}

/// One line that names what is wrong, and nothing on the machine.
fn says(words: &[&str], leak: &Leak) -> Result<()> {
    let output = refused()?;
    ensure!(output.end == End::Exited(1), "{output:?}");
    // containerd puts the status of a failed `start` on a line of its own.
    let said = output.stderr.replace("\n: exit status 1", "");
    ensure!(said.trim_end().lines().count() == 1, "{output:?}");
    for word in words {
        ensure!(
            output.stderr.contains(word),
            "{word:?} is not in {output:?}"
        );
    }
    leak.nothing_left()
}

#[test]
fn a_wrong_configuration_is_named() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let cases: [(&str, &[&str]); 6] = [
        ("kernel = \"/no/such/kernel\"", &["/no/such/kernel"]),
        (
            "initramfs = \"/no/such/initramfs\"",
            &["/no/such/initramfs"],
        ),
        ("vmm = \"/no/such/vmm\"", &["/no/such/vmm"]),
        ("kernel = \"/etc/passwd\"", &["/etc/passwd"]),
        ("turbo = true", &["/etc/walnut/config.toml", "turbo"]),
        ("memory_mib = 1", &["/etc/walnut/config.toml", "memory_mib"]),
    ];
    for (config, words) in cases {
        let _config = NodeConfig::write(config)?;
        says(words, &leak).with_context(|| format!("with {config}"))?;
    }
    Ok(())
}

#[test]
fn a_machine_without_kvm_is_named() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let device = Path::new("/dev/kvm");
    {
        let _absent = Hidden::new(device)?;
        says(&["/dev/kvm"], &leak).context("absent")?;
    }
    let _null = nullify(device)?;
    says(&["KVM"], &leak).context("not KVM")
}

#[test]
fn a_container_that_ends_while_containerd_is_gone_is_known_when_it_is_back() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let container = Runtime::Walnut
        .run(BUSYBOX)
        .shell("trap 'exit 7' TERM; touch /traps; sleep 100000 & wait")
        .detach()?;
    deadline::until("the trap", Deadline::after(deadline::BOOT), || {
        let set = container.shell("test -e /traps")?.end;
        Ok((set == End::Exited(0)).then_some(()))
    })?;
    let tasks = container.tasks()?;
    for daemon in processes::named("containerd")? {
        daemon.kill(Signal::KILL)?;
    }
    tasks.kill(container.id(), "", 15, false)?;
    ensure!(tasks.wait(container.id(), "")? == 7, "no 7");
    drop(tasks);
    // The node starts it again.
    deadline::until("containerd", Deadline::after(deadline::BOOT), || {
        Ok((ctr(&["version"])?.end == End::Exited(0)).then_some(()))
    })?;
    container.wait_for("STOPPED")?;
    ensure!(container.task_status()? == 7, "no 7");
    container.remove()?;
    leak.nothing_left()
}

/// A file system without room, in the place of a directory.
struct Full(&'static str);

impl Full {
    fn new(directory: &'static str) -> Result<Self> {
        fs::create_dir_all(directory)?;
        mount(
            "tmpfs",
            directory,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=16k"),
        )?;
        let full = Self(directory);
        let written = fs::write(Path::new(directory).join("filler"), vec![0; 1 << 20]);
        ensure!(written.is_err(), "there is room");
        Ok(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_state_directory_is_named() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let _full = Full::new("/run/walnut")?;
    let leak = Leak::watch()?;
    says(&["No space left", "/run/walnut"], &leak)
}
