//! What can be done to a VM while it runs: pause, power button, more vCPUs, devices that come and go. The VMM alone, with
//! guests that are a script.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;
use walnut_tests::{
    deadline::{self, Deadline},
    initramfs::Initramfs,
    network::Network,
    programs::Programs,
    requirement,
    vmm::{Vm, VmBuilder},
};
use walnut_vmm_api::{
    DiskConfig, FailureKind, FdSlot, Message, NetworkConfig, Request, Statistics, VmmExit,
};

/// How often a disk comes and goes.
const ROUNDS: u32 = 20;
/// How long a VM is paused.
const PAUSE: Duration = Duration::from_secs(5);
/// What a pause may seem to move a guest's clock by: the console's lag on a busy machine. Less than [`PAUSE`].
const TOLERANCE: f64 = 2.5;
/// The places that a VM has for devices that come later.
const PLACES: usize = 8;

/// Addresses of both ends of a network.
const GUEST: &str = "10.77.11.2";
const HOST: &str = "10.77.11.1";

/// One process spins, another counts and tells the time.
const COUNTS: &str = "
    mount -t proc proc /proc
    (while :; do :; done) &
    i=0; while :; do
        echo \"tick $i $(date +%s) $(cut -d' ' -f1 /proc/uptime) end\"; i=$((i + 1)); sleep 0.1
    done";

/// Looks for a disk that comes, reads it, lets go of it, and waits for it to go; then uses vCPUs that come, and at last
/// obeys the power button.
const GROWS: &str = "
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
    acpi=/sys/bus/acpi/devices driver=/sys/bus/platform/drivers/virtio-mmio cpus=/sys/devices/system/cpu
    for path in $acpi/LNRO0005:*/path; do
        grep -q HOTP.H000 $path && device=$(basename $(dirname $path))
    done
    echo generation=$(ls /sys/bus/platform/drivers/vmgenid | grep VMGENCTR)
    echo present=$(cat $cpus/present) possible=$(cat $cpus/possible)
    echo guest-is-up
    i=1; while [ $i -le ROUNDS ]; do
        until [ -e /sys/block/vda ]; do
            [ $i = 1 ] || echo $device > $driver/bind
            sleep 0.1
        done 2> /dev/null
        echo \"round $i: $(head -c 12 /dev/vda) as $(cat /sys/block/vda/serial)\"
        echo $device > $driver/unbind
        echo released-$i.
        until [ $(cat $acpi/$device/status) = 0 ]; do sleep 0.1; done
        echo gone-$i.
        i=$((i + 1))
    done
    until [ -e /sys/class/net/eth0 ]; do echo $device > $driver/bind; sleep 0.1; done 2> /dev/null
    ip addr add GUEST/24 dev eth0; ip link set eth0 up
    ping -c 1 -w 60 HOST > /dev/null && echo host-answers
    echo $device > $driver/unbind
    echo released-network.
    until [ -e $cpus/cpu3 ]; do sleep 0.1; done
    for cpu in 1 2 3; do echo 1 > $cpus/cpu$cpu/online; done
    echo online=$(cat $cpus/online)
    echo ran-on=$(taskset 8 awk '{print $39}' /proc/self/stat)
    dmesg | grep -iE 'call trace|bug:|acpi.*(error|warning)|unable to handle' && echo complaints
    echo waits-for-the-button
    dd if=/dev/input/event0 of=/key bs=24 count=1 2> /dev/null
    echo key=$(od -An -tu2 -j16 -N4 /key)
    poweroff -f";

fn guest(directory: &TempDir, programs: &Programs, script: &str) -> Result<PathBuf> {
    let path = directory.path().join("initramfs");
    fs::write(&path, Initramfs::script(&programs.busybox, script)?)?;
    Ok(path)
}

/// Asks for what has no other answer than that it was done.
fn done(vm: &mut Vm, request: &Request) -> Result<()> {
    let answer = vm.answer(request, &[])?;
    ensure!(answer == Message::Done, "{request:?}: {answer:?}");
    Ok(())
}

/// Asks for what must fail so; the VM goes on.
fn fails(vm: &mut Vm, request: &Request, files: &[File], expected: FailureKind) -> Result<()> {
    let files: Result<Vec<_>, _> = files.iter().map(|file| file.try_clone()).collect();
    let files: Vec<_> = files?.into_iter().map(Into::into).collect();
    match vm.answer(request, &files)? {
        Message::Failed { kind, error } if kind == expected && !error.is_empty() => Ok(()),
        answer => bail!("expected {expected:?} of {request:?}: {answer:?}"),
    }
}

fn statistics(vm: &mut Vm) -> Result<Statistics> {
    match vm.answer(&Request::Statistics, &[])? {
        Message::Statistics(statistics) => Ok(statistics),
        answer => bail!("no statistics: {answer:?}"),
    }
}

/// The last tick on the console: its number, the guest's seconds since 1970, and since its boot.
fn last_tick(console: &str) -> Option<(u64, f64, f64)> {
    let line = console
        .lines()
        .rev()
        .find(|line| line.trim().ends_with("end"))?;
    let mut words = line.split_whitespace().skip(1);
    let number = words.next()?.parse().ok()?;
    Some((
        number,
        words.next()?.parse().ok()?,
        words.next()?.parse().ok()?,
    ))
}

/// Waits for a tick after `number`, and gives the guest's clocks less the host's.
fn clocks_after(vm: &mut Vm, number: u64) -> Result<(u64, f64, f64)> {
    let deadline = Deadline::after(deadline::BOOT);
    deadline::until("another tick", deadline, || {
        let tick = last_tick(&vm.console()).filter(|tick| tick.0 > number);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        Ok(tick.map(|(number, real, monotonic)| (number, real - now, monotonic - now)))
    })
}

#[test]
fn a_paused_vm_stands_still_answers_and_finds_the_right_time() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let counts = guest(&directory, &programs, COUNTS)?;
    let mut vm = VmBuilder::with_initramfs(&programs, &counts)
        .vcpus(2)
        .start()?;
    vm.wait_for_console("tick 2")?;
    fails(&mut vm, &Request::Resume, &[], FailureKind::State)?;
    let (_, real_before, monotonic_before) = clocks_after(&mut vm, 2)?;

    done(&mut vm, &Request::Pause)?;
    fails(&mut vm, &Request::Pause, &[], FailureKind::State)?;
    let (still, console) = (statistics(&mut vm)?, vm.console());
    ensure!(still.paused && still.vcpus.len() == 2, "{still:?}");
    let start = Instant::now();
    deadline::until("the pause", Deadline::after(deadline::REQUEST), || {
        ensure!(statistics(&mut vm)? == still, "a vCPU runs");
        ensure!(vm.console() == console, "the guest speaks");
        Ok((start.elapsed() >= PAUSE).then_some(()))
    })?;

    let (number, _, _) = last_tick(&console).context("no tick")?;
    done(&mut vm, &Request::Resume)?;
    let (_, real_after, monotonic_after) = clocks_after(&mut vm, number)?;
    let (real, monotonic) = (real_after - real_before, monotonic_after - monotonic_before);
    println!(
        "real time was off by {real_before:.2} s; a pause of {PAUSE:?} moved it by {real:.2} s, monotonic time by \
         {monotonic:.2} s"
    );
    // A guest loses what its early boot takes, which is long in a lab: what counts is that the pause isn't lost.
    ensure!(real.abs() < TOLERANCE, "real time moved by {real} s");
    ensure!(
        monotonic.abs() < TOLERANCE,
        "monotonic time moved by {monotonic} s"
    );
    ensure!(!statistics(&mut vm)?.paused);
    // One that spins stops, too.
    vm.ask(&Request::Stop)?;
    vm.wait()?.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    Ok(())
}

/// Threads and open files of the VMM.
fn held(vm: &Vm) -> Result<(usize, usize)> {
    let process = PathBuf::from(format!("/proc/{}", vm.pid()?));
    let count = |name| -> Result<usize> { Ok(fs::read_dir(process.join(name))?.count()) };
    Ok((count("task")?, count("fd")?))
}

fn attach(vm: &mut Vm, file: &Path, serial: &str) -> Result<String> {
    let config = DiskConfig::new(FdSlot(0), true, serial);
    let file = File::open(file)?;
    match vm.answer(&Request::AttachDisk(config), &[file.into()])? {
        Message::Attached { name } => Ok(name),
        answer => bail!("no disk was attached: {answer:?}"),
    }
}

fn detach(name: &str) -> Request {
    Request::Detach { name: name.into() }
}

#[test]
fn a_vm_grows_by_disks_and_vcpus_and_obeys_its_power_button() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let script = GROWS.replace("ROUNDS", &ROUNDS.to_string());
    let script = script.replace("GUEST", GUEST).replace("HOST", HOST);
    let grows = guest(&directory, &programs, &script)?;
    let disk = directory.path().join("disk");
    fs::write(&disk, b"Disk content".repeat(1 << 12))?;
    let mut vm = VmBuilder::with_initramfs(&programs, &grows)
        .max_vcpus(4)
        .start()?;
    vm.wait_for_console("guest-is-up")?;
    let console = vm.console();
    ensure!(console.contains("generation=VMGENCTR"), "{console}");
    ensure!(console.contains("present=0 possible=0-3"), "{console}");

    let mut before = (0, 0);
    for round in 1..=ROUNDS {
        let serial = format!("disk-of-{round}");
        let name = attach(&mut vm, &disk, &serial)?;
        vm.wait_for_console(&format!("round {round}: Disk content as {serial}"))?;
        vm.wait_for_console(&format!("released-{round}."))?;
        done(&mut vm, &detach(&name))?;
        fails(&mut vm, &detach(&name), &[], FailureKind::NotFound)?;
        vm.wait_for_console(&format!("gone-{round}."))?;
        if round == 1 {
            before = held(&vm)?;
        }
    }
    let after = held(&vm)?;
    ensure!(
        before == after,
        "threads and files: {before:?}, then {after:?}"
    );

    a_network_comes_and_goes(&mut vm)?;
    ensure!(held(&vm)? == after, "a network leaves something behind");

    let vcpus = |count| Request::Resize {
        vcpus: Some(count),
        memory_mib: None,
    };
    fails(&mut vm, &vcpus(5), &[], FailureKind::Full)?;
    done(&mut vm, &vcpus(2))?;
    done(&mut vm, &vcpus(4))?;
    fails(&mut vm, &vcpus(3), &[], FailureKind::Unsupported)?;
    vm.wait_for_console("online=0-3")?;
    vm.wait_for_console("waits-for-the-button")?;
    ensure!(vm.console().contains("ran-on=3"), "{}", vm.console());
    ensure!(!vm.console().contains("complaints"), "{}", vm.console());
    ensure!(statistics(&mut vm)?.vcpus.len() == 4);

    what_cannot_be_attached_is_refused(&mut vm, &disk)?;
    let ended_at = held(&vm)?;
    done(&mut vm, &Request::PowerButton)?;
    let ended = vm.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    ensure!(ended.console.contains("key= 1 116"), "{}", ended.console);
    println!("threads and files: {before:?} without a disk, {ended_at:?} with {PLACES}");
    Ok(())
}

fn a_network_comes_and_goes(vm: &mut Vm) -> Result<()> {
    let tap = "wn-machine";
    let mut files = Vec::new();
    let config = Network::new(tap).open(1, &mut |file| {
        files.push(file);
        Ok(FdSlot(0))
    })?;
    let answer = vm.answer(&Request::AttachNetwork(config), &files)?;
    drop(files);
    let Message::Attached { name } = answer else {
        bail!("no network was attached: {answer:?}");
    };
    let up = format!("ip addr add {HOST}/24 dev {tap} && ip link set {tap} up");
    let up = Command::new("sh").args(["-c", &up]).status()?;
    ensure!(up.success(), "the host's end: {up}");
    vm.wait_for_console("released-network.")?;
    ensure!(vm.console().contains("host-answers"), "{}", vm.console());
    done(vm, &detach(&name))?;
    let left = Path::new("/sys/class/net").join(tap).exists();
    ensure!(!left, "the tap's file is still open");
    Ok(())
}

fn what_cannot_be_attached_is_refused(vm: &mut Vm, disk: &Path) -> Result<()> {
    let before = held(vm)?;
    let files = [File::open(disk)?];
    let mut wrong = DiskConfig::new(FdSlot(0), true, "wrong");
    wrong.queues = 0;
    fails(vm, &Request::AttachDisk(wrong), &files, FailureKind::Config)?;
    let missing = DiskConfig::new(FdSlot(1), true, "missing");
    fails(
        vm,
        &Request::AttachDisk(missing),
        &files,
        FailureKind::Config,
    )?;
    let no_tap = NetworkConfig {
        taps: vec![FdSlot(0)],
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        receive_rate: None,
        transmit_rate: None,
    };
    fails(
        vm,
        &Request::AttachNetwork(no_tap),
        &files,
        FailureKind::Internal,
    )?;
    fails(vm, &detach("H999"), &files, FailureKind::NotFound)?;
    let memory = Request::Resize {
        vcpus: None,
        memory_mib: Some(256),
    };
    fails(vm, &memory, &[], FailureKind::Unsupported)?;
    ensure!(held(vm)? == before, "a refused request keeps its files");

    for place in 0..PLACES {
        attach(vm, disk, &format!("disk{place}"))?;
    }
    let further = DiskConfig::new(FdSlot(0), true, "further");
    fails(vm, &Request::AttachDisk(further), &files, FailureKind::Full)
}
