//! The VMM alone: it builds a VM, runs a guest, and ends as its contract says. No containerd, no agent
//! but in the guest that says one line.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use walnut_tests::{
    command::End,
    deadline::{self, Deadline},
    initramfs::Initramfs,
    programs::Programs,
    requirement,
    vmm::{Ended, Vm, VmBuilder},
};
use walnut_vmm_api::{FailureKind, FdSlot, Message, Request, VmConfig, VmmExit};

/// A guest that says so once it is up, and stays.
const STAYS: &str = "echo guest-is-up; sleep 100000";

/// Looks at the machine from inside, and copies a disk.
const INSPECTS: &str = "
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
    echo processors=$(nproc)
    echo memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    echo entropy=$(cat /sys/class/misc/hw_random/rng_current)
    echo first=$(head -c 13 /dev/vda) sectors=$(cat /sys/block/vda/size) ro=$(cat /sys/block/vda/ro)
    echo serials=$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)
    echo forbidden | dd of=/dev/vda conv=fsync || echo refused
    echo -n 'from the guest' | dd of=/dev/vdb conv=fsync
    # What crosses the ring's end, many requests at once, and the last sector.
    dd if=/dev/vda of=/dev/vdb bs=64k seek=1 conv=fsync
    echo sums=$(tail -c 4194304 /dev/vdb | md5sum) $(md5sum < /dev/vda)
    dmesg | grep -iE 'call trace|bug:|acpi.*(error|warning)|unable to handle' && echo complaints
    echo done; poweroff -f";

fn guest(directory: &TempDir, programs: &Programs, script: &str) -> Result<PathBuf> {
    write(
        directory,
        "initramfs",
        &Initramfs::script(&programs.busybox, script)?,
    )
}

fn write(directory: &TempDir, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = directory.path().join(name);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

#[test]
fn a_guest_boots_speaks_and_powers_off() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let ended = VmBuilder::probe(&programs).start()?.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    ensure!(ended.messages == [Message::Booted], "{ended:?}");
    let probe = ended
        .console
        .lines()
        .find_map(|line| line.trim_end().strip_prefix("walnut-probe: "))
        .context("no probe line")?;
    let (release, uptime) = probe.split_once(" uptime=").context("no uptime")?;
    ensure!(!release.is_empty(), "{probe}");
    let uptime: f64 = uptime.parse().context("no number of seconds")?;
    ensure!(uptime > 0.0, "{probe}");
    Ok(())
}

#[test]
fn two_processors_disks_entropy_and_high_memory_reach_the_guest() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let content: Vec<u8> = b"Disk content\n"
        .iter()
        .copied()
        .cycle()
        .take(4 << 20)
        .collect();
    let read_only = write(&directory, "read-only", &content)?;
    let writable = write(&directory, "writable", &vec![0; (4 << 20) + (64 << 10)])?;
    let ended = VmBuilder::with_initramfs(&programs, &guest(&directory, &programs, INSPECTS)?)
        .vcpus(2)
        // Past the hole below 4 GiB, where devices live.
        .memory_mib(4352)
        .read_only_disk(&read_only)
        .writable_disk(&writable)
        .start()?
        .wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    for expected in [
        "processors=2",
        "entropy=virtio_rng.0",
        "first=Disk content sectors=8192 ro=1",
        "serials=disk0 disk1",
        "refused",
        "done",
    ] {
        says(&ended, expected)?;
    }
    let memory: u32 = value(&ended, "memory=")?.parse()?;
    ensure!(memory > 4000, "the guest sees {memory} MiB of 4352");
    let sums = value(&ended, "sums=")?;
    let sums: Vec<&str> = sums.split(' ').collect();
    ensure!(
        sums.len() == 4 && sums[..2] == sums[2..],
        "the copy differs: {sums:?}"
    );
    ensure!(!ended.console.contains("complaints"), "{}", ended.console);
    ensure!(
        fs::read(&read_only)? == content,
        "a read-only disk was written"
    );
    let written = fs::read(&writable)?;
    ensure!(
        written.starts_with(b"from the guest"),
        "a write did not arrive"
    );
    ensure!(written[64 << 10..] == content, "a copy did not arrive");
    Ok(())
}

fn says(ended: &Ended, expected: &str) -> Result<()> {
    let said = ended.console.lines().any(|line| line.trim() == expected);
    ensure!(said, "no line {expected:?} in: {}", ended.console);
    Ok(())
}

fn value<'a>(ended: &'a Ended, key: &str) -> Result<&'a str> {
    let mut lines = ended.console.lines();
    lines
        .find_map(|line| line.trim().strip_prefix(key))
        .with_context(|| format!("no {key} in: {}", ended.console))
}

#[test]
fn a_guest_that_fails_ends_the_vmm_with_a_status_of_its_own() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let nothing = write(
        &directory,
        "no-init",
        &Initramfs::without_init(&programs.busybox)?,
    )?;
    let panicked = VmBuilder::with_initramfs(&programs, &nothing)
        .start()?
        .wait()?;
    panicked.ends_with(VmmExit::GuestReset)?;
    // The console's tail is what a person needs to see.
    ensure!(panicked.stderr.contains("Kernel panic"), "{panicked:?}");
    ensure!(panicked.stderr.starts_with("walnut-vmm: "), "{panicked:?}");

    let script = guest(&directory, &programs, "reboot -f")?;
    let tripled = VmBuilder::with_initramfs(&programs, &script)
        .word("reboot=t")
        .start()?
        .wait()?;
    tripled.ends_with(VmmExit::TripleFault)?;
    Ok(())
}

#[test]
fn a_file_that_is_no_kernel_is_refused() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let kernel = fs::read(&programs.kernel)?;
    let cases = [
        ("text", b"not a kernel\n".repeat(1000)),
        ("empty", Vec::new()),
        ("cut", kernel[..4096].to_vec()),
        ("half", kernel[..kernel.len() / 2].to_vec()),
    ];
    for (name, bytes) in cases {
        let path = write(&directory, name, &bytes)?;
        let vm = VmBuilder::probe(&programs).kernel(&path).start()?;
        fails(vm, FailureKind::Image).with_context(|| format!("a kernel that is {name}"))?;
    }
    Ok(())
}

#[test]
fn a_device_that_is_not_kvm_is_refused() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let vm = VmBuilder::probe(&programs)
        .kvm(Path::new("/dev/null"))
        .start()?;
    fails(vm, FailureKind::Kvm)
}

#[test]
fn a_configuration_that_breaks_the_contract_is_refused() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let without_files = VmConfig::new(FdSlot(0), FdSlot(1), FdSlot(2));
    let mut vm = Vm::start_bare(&programs.vmm)?;
    vm.ask(&Request::Boot(without_files))?;
    fails(vm, FailureKind::Config)?;
    let vm = VmBuilder::probe(&programs).vcpus(0).start()?;
    fails(vm, FailureKind::Config)
}

/// The VMM says what failed, once on the socket and once in one line on its standard error.
fn fails(vm: Vm, expected: FailureKind) -> Result<()> {
    let ended = vm.wait()?;
    ended.ends_with(VmmExit::Setup)?.says_at_most(1)?;
    let [Message::Failed { kind, error }] = &ended.messages[..] else {
        bail!("expected one failure: {ended:?}");
    };
    ensure!(*kind == expected, "{ended:?}");
    ensure!(
        !error.is_empty() && !error.contains('\n') && ended.stderr.contains(error.as_str()),
        "{ended:?}"
    );
    Ok(())
}

#[test]
fn what_is_no_message_is_refused() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let too_deep = "[".repeat(50_000);
    let cases: [&[u8]; 4] = [
        b"garbage",
        b"{\"boot\":{}}",
        b"{\"boot\":{\"vcpus\":1e99}}",
        too_deep.as_bytes(),
    ];
    for packet in cases {
        let mut vm = Vm::start_bare(&programs.vmm)?;
        vm.send_raw(packet, &[])?;
        fails(vm, FailureKind::Config)?;
    }
    // Started by hand, without a socket: a person reads why.
    let by_hand = std::process::Command::new(&programs.vmm)
        .stdin(std::process::Stdio::null())
        .output()?;
    ensure!(
        by_hand.status.code() == Some(VmmExit::Usage.code().into()) && !by_hand.stderr.is_empty(),
        "{by_hand:?}"
    );
    Ok(())
}

#[test]
fn a_vmm_outlives_neither_its_parent_nor_a_request_to_stop() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let stays = guest(&directory, &programs, STAYS)?;

    let mut vm = VmBuilder::with_initramfs(&programs, &stays).start()?;
    vm.wait_for_console("guest-is-up")?;
    vm.ask(&Request::Statistics)?;
    let statistics = loop {
        match vm.receive(Deadline::after(deadline::REQUEST))? {
            Some(Message::Statistics(statistics)) => break statistics,
            Some(Message::Booted) => {}
            other => bail!("no statistics, but {other:?}"),
        }
    };
    ensure!(statistics.exits().io > 0, "{statistics:?}");
    vm.ask(&Request::Stop)?;
    vm.wait()?.ends_with(VmmExit::Ended)?.says_at_most(0)?;

    let mut orphan = VmBuilder::with_initramfs(&programs, &stays).start()?;
    orphan.wait_for_console("guest-is-up")?;
    orphan.abandon();
    let ended = orphan.wait()?;
    ensure!(matches!(ended.end, End::Exited(_)), "{ended:?}");
    Ok(())
}
