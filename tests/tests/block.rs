//! Disks: real file systems, verified random writes, what is discarded, what is refused, what is limited, and
//! drivers that leave and come back.

use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use walnut_tests::{
    command,
    deadline::{self, Deadline},
    initramfs::Initramfs,
    programs::Programs,
    requirement,
    vmm::{Ended, Vm, VmBuilder},
};
use walnut_vmm_api::{RateLimit, TokenBucket, VmmExit};

const MIB: u64 = 1 << 20;
/// What the limited disk may do at once, and how long it takes to do as much again.
const BURST: TokenBucket = TokenBucket {
    size: 20,
    refill_ms: 1000,
};
/// The switch that takes io_uring from every process.
const IO_URING_SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

const PREPARE: &str = "
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
    mkdir -p /mnt /tmp /run
";

/// Six disks at once: `a` for a file system, `b` for random writes, `c` to read alone, `d` to discard, `e` to be slow,
/// `f` a block device of the host.
const USES_DISKS: &str = r#"
    for disk in a b c d e f; do
        q=/sys/block/vd$disk
        echo $disk serial=$(cat $q/serial) sectors=$(cat $q/size) ro=$(cat $q/ro) queues=$(ls $q/mq | wc -w) \
            blocks=$(cat $q/queue/logical_block_size)/$(cat $q/queue/physical_block_size) \
            discard=$(cat $q/queue/discard_max_bytes) zeroes=$(cat $q/queue/write_zeroes_max_bytes) \
            segments=$(cat $q/queue/max_segments)x$(cat $q/queue/max_segment_size) cache=$(cat $q/queue/write_cache)
    done

    mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt || echo failed to mount
    dd if=/dev/urandom of=/mnt/big bs=64k count=256 2>/dev/null
    dd if=/dev/urandom of=/mnt/kept bs=4k count=300 2>/dev/null
    mkdir /mnt/many; for i in $(seq 100); do echo $i > /mnt/many/$i; done
    sync; rm /mnt/big; sync; fstrim /mnt || echo failed to trim
    echo 3 > /proc/sys/vm/drop_caches
    echo many=$(cat /mnt/many/* | wc -l) kept=$(md5sum < /mnt/kept | cut -d ' ' -f 1)
    umount /mnt

    fio --name=verified --filename=/dev/vdb --direct=1 --ioengine=io_uring --iodepth=16 --thread --numjobs=2 \
        --rw=randwrite --bsrange=4k-64k --size=3M --offset_increment=8M --verify=crc32c --verify_fatal=1 \
        --minimal > /tmp/fio 2>&1 && echo fio-verified || cat /tmp/fio

    dd if=/dev/zero of=/dev/vdc bs=4k count=1 oflag=direct 2>/dev/null || echo write-refused
    blkdiscard /dev/vdc 2>/dev/null || echo discard-refused

    blkdiscard -o $((1 << 20)) -l $((4 << 20)) /dev/vdd && fallocate -z -o $((6 << 20)) -l $((1 << 20)) /dev/vdd \
        && echo discarded
    dd if=/dev/vdd bs=1M skip=1 count=4 iflag=direct 2>/dev/null | tr -d '\0' | wc -c

    now() { read up idle < /proc/uptime; echo $up; }
    reads() { dd if=/dev/vde of=/dev/null bs=4k count=$1 iflag=direct 2>/dev/null; }
    sleep 2
    echo times $(now) $(reads 15; now) $(reads 40; now)

    dd if=/dev/vdc of=/dev/vdf bs=64k conv=fsync 2>/dev/null
    blkdiscard -o $((4 << 20)) -l $((4 << 20)) /dev/vdf && echo device-discarded
    dmesg | grep -iE 'call trace|bug:|i/o error|unable to handle' | grep -v 'vdc' && echo complaints
    echo done; poweroff -f
"#;

/// Takes each device from its driver and gives it back, twice, and shows that the disk still works. Between the rounds
/// it waits for a word on the other disk.
const REBINDS: &str = r#"
    echo sum-before=$(md5sum < /dev/vda)
    word() { dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | head -c 7; }
    for round in 1 2 3; do
        for device in /sys/bus/virtio/devices/*; do
            driver=$(readlink -f $device/driver) name=${device##*/}
            echo $name > $driver/unbind; echo $name > $driver/bind || echo $name is lost
        done
        echo drivers-$round=$(ls -d /sys/bus/virtio/devices/*/driver | wc -l)/$(ls /sys/bus/virtio/devices | wc -l)
        echo 3 > /proc/sys/vm/drop_caches
        echo sum-$round=$(md5sum < /dev/vda)
        head -c 64 /dev/hwrng | wc -c
        echo rebound-$round
        until [ "$(word)" = "round-$round" ]; do sleep 0.1; done
    done
    dmesg | grep -iE 'call trace|bug:|i/o error|unable to handle' && echo complaints
    echo done; poweroff -f
"#;

fn guest(directory: &Path, programs: &Programs, tools: &[&str], script: &str) -> Result<PathBuf> {
    let script = format!("{PREPARE}{script}");
    let initramfs = Initramfs::script_with(&programs.busybox, tools, &script)?;
    let path = directory.join("initramfs");
    fs::write(&path, initramfs).context("cannot write the initramfs")?;
    Ok(path)
}

/// A file of so many MiB; all of it is `byte`, or a hole.
fn image(directory: &Path, name: &str, mib: u64, byte: Option<u8>) -> Result<PathBuf> {
    let path = directory.join(name);
    let file = File::create(&path).with_context(|| format!("cannot make {name}"))?;
    file.set_len(mib * MIB)?;
    if let Some(byte) = byte {
        file.write_all_at(&vec![byte; usize::try_from(mib * MIB)?], 0)?;
    }
    Ok(path)
}

fn allocated_bytes(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    let deadline = Deadline::after(deadline::REQUEST);
    let output = command::run(command.args(arguments), Vec::new(), deadline)?;
    Ok(output.success()?.text())
}

/// A file as a block device, until this value goes.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(file: &Path) -> Result<Self> {
        let path = file.to_str().context("a path that is not text")?;
        let device = run("losetup", &["--find", "--show", path])?;
        Ok(Self(device.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Some(device) = self.0.to_str() {
            let _ = run("losetup", &["--detach", device]);
        }
    }
}

fn says(ended: &Ended, expected: &str) -> Result<()> {
    let said = ended.console.lines().any(|line| line.trim() == expected);
    ensure!(said, "no line {expected:?} in: {}", ended.console);
    Ok(())
}

fn value<'a>(console: &'a str, key: &str) -> Result<&'a str> {
    let mut lines = console.lines();
    let found = lines.find_map(|line| Some(line.trim().split_once(key)?.1));
    found.with_context(|| format!("no {key} in: {console}"))
}

#[test]
fn disks_hold_file_systems_and_do_what_they_say() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let path = directory.path();
    let tools = ["mkfs.ext4", "fio", "fallocate", "fstrim", "dd"];
    let file_system = image(path, "file-system", 64, None)?;
    let random = image(path, "random", 16, None)?;
    let read_only = image(path, "read-only", 4, Some(0x5a))?;
    let discarded = image(path, "discarded", 8, Some(0xd1))?;
    let limited = image(path, "limited", 4, None)?;
    let behind_loop = image(path, "behind-loop", 8, Some(0xff))?;
    let device = LoopDevice::new(&behind_loop)?;
    let vm = VmBuilder::with_initramfs(&programs, &guest(path, &programs, &tools, USES_DISKS)?)
        .vcpus(2)
        .memory_mib(384)
        .disk(&file_system, |disk| disk.queues = 2)
        .disk(&random, |disk| {
            disk.queues = 4;
            (disk.logical_block_bytes, disk.physical_block_bytes) = (4096, 4096);
        })
        .disk(&read_only, |disk| disk.read_only = true)
        .disk(&discarded, |disk| disk.physical_block_bytes = 4096)
        .disk(&limited, |disk| {
            disk.rate = Some(RateLimit {
                bytes: None,
                operations: Some(BURST),
            });
        })
        .disk(&device.0, |disk| disk.serial = "a-device".to_owned())
        .start()?;
    let ended = vm.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    drop(device);

    let erasable = 512 * 1024 * 512;
    for (letter, serial, sectors, ro, queues, blocks) in [
        ("a", "disk0", 64 * 2048, 0, 2, "512/512"),
        ("b", "disk1", 16 * 2048, 0, 2, "4096/4096"),
        ("c", "disk2", 4 * 2048, 1, 1, "512/512"),
        ("d", "disk3", 8 * 2048, 0, 1, "512/4096"),
        ("e", "disk4", 4 * 2048, 0, 1, "512/512"),
        ("f", "a-device", 8 * 2048, 0, 1, "512/512"),
    ] {
        let erasable = if ro == 1 { 0 } else { erasable };
        says(
            &ended,
            &format!(
                "{letter} serial={serial} sectors={sectors} ro={ro} queues={queues} blocks={blocks} \
                 discard={erasable} zeroes={erasable} segments=254x65536 cache=write back"
            ),
        )?;
    }
    file_system_is_sound(&ended, &file_system)?;
    for expected in ["fio-verified", "write-refused", "discard-refused", "done"] {
        says(&ended, expected)?;
    }
    ensure!(fs::read(&read_only)? == [0x5a; 4 << 20], "it was written");
    erased_is_zero(&ended, &discarded)?;
    limit_was_kept(&ended)?;

    says(&ended, "device-discarded")?;
    let content = fs::read(&behind_loop)?;
    ensure!(content[..4 << 20] == [0x5a; 4 << 20], "a write is missing");
    ensure!(content[4 << 20..] == [0; 4 << 20], "a discard is missing");
    let allocated = allocated_bytes(&behind_loop)?;
    ensure!(allocated <= 5 * MIB, "{allocated} bytes are left");
    ensure!(!ended.console.contains("complaints"), "{}", ended.console);
    Ok(())
}

/// Seen from the host, without the guest.
fn file_system_is_sound(ended: &Ended, image: &Path) -> Result<()> {
    let path = image.to_str().context("a path that is not text")?;
    run("e2fsck", &["-fn", path])?;
    let kept = run(
        "/bin/sh",
        &[
            "-c",
            "debugfs -R 'cat /kept' \"$0\" 2>/dev/null | md5sum",
            path,
        ],
    )?;
    let kept = kept.split_whitespace().next().context("no sum")?;
    says(ended, &format!("many=100 kept={kept}"))?;
    // 16 MiB were written to a file that is gone.
    let allocated = allocated_bytes(image)?;
    ensure!(allocated < 14 * MIB, "{allocated} bytes are left");
    Ok(())
}

fn erased_is_zero(ended: &Ended, image: &Path) -> Result<()> {
    says(ended, "discarded")?;
    let mut expected = vec![0xd1; 8 << 20];
    expected[1 << 20..5 << 20].fill(0);
    expected[6 << 20..7 << 20].fill(0);
    ensure!(fs::read(image)? == expected, "the wrong bytes are gone");
    let allocated = allocated_bytes(image)?;
    ensure!(allocated <= 5 * MIB, "{allocated} bytes are left");
    Ok(())
}

/// 15 requests are less than the burst; of the next 40 at least 35 wait for one twentieth of a second each.
fn limit_was_kept(ended: &Ended) -> Result<()> {
    let times = value(&ended.console, "times ")?;
    let times: Vec<f64> = times
        .split(' ')
        .map(|time| time.parse().context("no time"))
        .collect::<Result<_>>()?;
    let [start, burst, end] = times[..] else {
        anyhow::bail!("{times:?}");
    };
    ensure!(end - burst >= 1.7, "faster than its limit: {times:?}");
    ensure!(burst - start < (end - burst) / 2.0, "no burst: {times:?}");
    Ok(())
}

/// The threads by their names, and the number of open files.
fn resources(vm: &Vm) -> Result<(BTreeMap<String, usize>, usize)> {
    let process = PathBuf::from(format!("/proc/{}", vm.pid()?));
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(process.join("task"))? {
        let name = fs::read_to_string(task?.path().join("comm"))?;
        // The kernel's own for io_uring come and go.
        if !name.starts_with("iou-") {
            *threads.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    Ok((threads, fs::read_dir(process.join("fd"))?.count()))
}

#[test]
fn every_device_works_again_after_its_driver_left_and_came_back() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let path = directory.path();
    let data = image(path, "data", 4, Some(0x33))?;
    let words = image(path, "words", 1, None)?;
    let mut vm = VmBuilder::agent(&programs)
        .initramfs(&guest(path, &programs, &["dd"], REBINDS)?)
        .vcpus(2)
        .disk(&data, |disk| disk.queues = 3)
        .writable_disk(&words)
        .start()?;
    let word = OpenOptions::new().write(true).open(&words)?;
    let mut seen = Vec::new();
    for round in 1..=3 {
        vm.wait_for_console(&format!("rebound-{round}"))?;
        seen.push(resources(&vm)?);
        word.write_all_at(format!("round-{round}").as_bytes(), 0)?;
    }
    let ended = vm.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    ensure!(seen[0] == seen[1] && seen[1] == seen[2], "leaks: {seen:?}");
    ensure!(seen[0].0.get("block") == Some(&3), "{seen:?}");
    let sum = value(&ended.console, "sum-before=")?;
    for round in 1..=3 {
        says(&ended, &format!("sum-{round}={sum}"))?;
        let drivers = value(&ended.console, &format!("drivers-{round}="))?;
        let (bound, all) = drivers.split_once('/').context("no numbers")?;
        ensure!(bound == all && bound.len() == 1, "{drivers} have a driver");
    }
    ensure!(!ended.console.contains("is lost"), "{}", ended.console);
    ensure!(!ended.console.contains("complaints"), "{}", ended.console);
    says(&ended, "done")
}

/// Takes io_uring from this machine until the value goes.
struct WithoutRing(String);

impl WithoutRing {
    fn new() -> Result<Self> {
        let before = fs::read_to_string(IO_URING_SWITCH).context("no switch for io_uring")?;
        fs::write(IO_URING_SWITCH, "2").context("cannot switch io_uring off")?;
        Ok(Self(before))
    }
}

impl Drop for WithoutRing {
    fn drop(&mut self) {
        let _ = fs::write(IO_URING_SWITCH, &self.0);
    }
}

fn rings(vm: &Vm) -> Result<usize> {
    let mut rings = 0;
    for fd in fs::read_dir(format!("/proc/{}/fd", vm.pid()?))? {
        let target = fs::read_link(fd?.path());
        rings += usize::from(target.is_ok_and(|target| target.ends_with("anon_inode:[io_uring]")));
    }
    Ok(rings)
}

#[test]
fn a_host_without_io_uring_has_disks_too() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let path = directory.path();
    let (from, to) = (
        image(path, "from", 8, Some(0x42))?,
        image(path, "to", 8, None)?,
    );
    let script = "echo is-up; until dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | grep -q go; do :; done
        dd if=/dev/vda of=/dev/vdb bs=256k conv=fsync 2>/dev/null && blkdiscard -o 4194304 /dev/vdb && echo copied
        poweroff -f";
    let initramfs = guest(path, &programs, &["dd"], script)?;
    for expected in [5, 0] {
        let without = (expected == 0).then(WithoutRing::new).transpose()?;
        let to = image(path, "to", 8, None).map(|_| to.clone())?;
        let mut vm = VmBuilder::with_initramfs(&programs, &initramfs)
            .vcpus(2)
            .disk(&from, |disk| disk.queues = 2)
            .disk(&to, |disk| disk.queues = 3)
            .start()?;
        vm.wait_for_console("is-up")?;
        ensure!(rings(&vm)? == expected, "{} rings", rings(&vm)?);
        let file = OpenOptions::new().write(true).open(&to)?;
        file.write_all_at(b"go", 0)?;
        let ended = vm.wait()?;
        drop(without);
        ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
        says(&ended, "copied")?;
        let content = fs::read(&to)?;
        ensure!(content[..4 << 20] == [0x42; 4 << 20], "not copied");
        ensure!(content[4 << 20..] == [0; 4 << 20], "not discarded");
    }
    Ok(())
}
