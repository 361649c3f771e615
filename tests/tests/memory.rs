//! The guest's memory while it runs: what it gives back, what it gets, what it maps of the host; and its console.
//! Real data, by the real kernel's drivers.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use walnut_tests::{
    agent,
    deadline::{self, Deadline},
    initramfs::Initramfs,
    memory, requirement,
    shell::ShellGuest,
    story,
    vmm::{Vm, VmBuilder},
};
use walnut_vmm_api::{FailureKind, Message, Request, VmmExit};

const MIB: u64 = 1 << 20;
const AVAILABLE: &str = "awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo";
const TOTAL: &str = "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo";

/// Guest RAM that the VMM has touched, in MiB, of a guest that boots with `mib`.
fn rss_mib(vm: &Vm, mib: u32) -> Result<u64> {
    Ok(memory::of_vmm(vm.pid()?, mib)?.guest_rss_kib / 1024)
}

/// Waits until the guest's RAM on the host is at most this.
fn wait_for_rss(vm: &Vm, mib: u32, most_mib: u64) -> Result<u64> {
    let what = format!("at most {most_mib} MiB of guest RAM");
    let mut last = 0;
    deadline::until(&what, Deadline::after(deadline::BOOT), || {
        last = rss_mib(vm, mib)?;
        Ok((last <= most_mib).then_some(last))
    })
    .with_context(|| format!("last: {last} MiB"))
}

fn done(vm: &mut Vm, request: &Request) -> Result<()> {
    let answer = vm.answer(request, &[])?;
    ensure!(answer == Message::Done, "{request:?}: {answer:?}");
    Ok(())
}

fn refused(vm: &mut Vm, request: &Request, why: &str) -> Result<FailureKind> {
    match vm.answer(request, &[])? {
        Message::Failed { kind, error } if error.contains(why) => Ok(kind),
        other => bail!("{request:?}: {other:?}"),
    }
}

fn file_of_zeroes(directory: &TempDir, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = directory.path().join(name);
    let file = File::create(&path).context("cannot make a file")?;
    file.set_len(bytes).context("cannot size a file")?;
    Ok(path)
}

fn md5(path: &Path) -> Result<String> {
    let output = Command::new("md5sum").arg(path).output()?;
    let text = String::from_utf8(output.stdout)?;
    let sum = text.split(' ').next().context("no md5sum")?;
    Ok(sum.to_owned())
}

const BALLOON_MIB: u32 = 256;

#[test]
fn a_guest_gives_back_what_the_host_asks_for_and_what_it_does_not_use() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let disk = file_of_zeroes(&directory, "disk", 128 * MIB)?;
    let mut guest = ShellGuest::boot(&programs, directory.path(), &[], |vm| {
        vm.memory_mib(BALLOON_MIB)
            .read_only_disk(&disk)
            .word("page_reporting.page_reporting_order=4")
    })?;
    story::tell(
        &mut guest,
        &[
            ("statistics are told", statistics_are_told),
            ("cached files make room for the balloon", cache_makes_room),
            ("the balloon makes room for a program", balloon_makes_room),
            ("a wish that cannot be is refused", impossible_balloons),
            ("free pages are given back", free_pages_are_given_back),
        ],
    )?;
    guest.begin("poweroff -f")?;
    guest.vm.wait()?.ends_with(VmmExit::Ended)?;
    Ok(())
}

fn statistics_are_told(guest: &mut ShellGuest) -> Result<()> {
    // A disk that nobody has open is not cached.
    guest.run("sleep 100000 < /dev/vda > /dev/null 2>&1 & cat /dev/vda > /dev/null")?;
    let seen = guest
        .vm
        .statistics_until("statistics with a cached disk", |statistics| {
            let guest = statistics.memory.guest.unwrap_or_default();
            guest.cache_bytes > 120 * MIB
        })?;
    let told = seen.memory.guest.context("no numbers")?;
    let total = guest.number(TOTAL)?;
    ensure!(
        told.total_bytes / MIB == total,
        "{told:?}, MemTotal {total}"
    );
    ensure!(told.available_bytes > 100 * MIB, "{told:?}");
    ensure!(told.minor_faults > 0, "{told:?}");
    ensure!(seen.memory.balloon_bytes == 0, "{seen:?}");
    Ok(())
}

fn cache_makes_room(guest: &mut ShellGuest) -> Result<()> {
    let (available, rss) = (guest.number(AVAILABLE)?, rss_mib(&guest.vm, BALLOON_MIB)?);
    let mib = 150;
    done(&mut guest.vm, &Request::SetBalloon { mib })?;
    let full = u64::from(mib) * MIB;
    guest
        .vm
        .statistics_until("a full balloon", |seen| seen.memory.balloon_bytes == full)?;
    let after = wait_for_rss(&guest.vm, BALLOON_MIB, 110)?;
    let left = guest.number(AVAILABLE)?;
    println!(
        "balloon of {mib} MiB: guest RAM {rss} to {after} MiB, available {available} to {left} MiB"
    );
    ensure!(rss > 150, "{rss} MiB before");
    ensure!(left + 100 < available, "{available} MiB, then {left} MiB");
    Ok(())
}

fn balloon_makes_room(guest: &mut ShellGuest) -> Result<()> {
    // More than is left beside the balloon, and no cache that could be dropped for it.
    let sum = guest.run("dd if=/dev/zero of=/tmp/load bs=1M count=120 && md5sum < /tmp/load")?;
    ensure!(sum.contains("da5ec8fa14cec9cd479b5eadbac519d6"), "{sum}");
    let killed = guest.run("dmesg | grep -c 'Out of memory: Killed' || true")?;
    ensure!(killed.trim() == "0", "{}", guest.vm.console());
    let seen = guest.vm.statistics_until("a smaller balloon", |seen| {
        seen.memory.balloon_bytes < 150 * MIB
    })?;
    println!(
        "balloon under pressure: {} MiB",
        seen.memory.balloon_bytes / MIB
    );
    Ok(())
}

fn impossible_balloons(guest: &mut ShellGuest) -> Result<()> {
    let vm = &mut guest.vm;
    refused(
        vm,
        &Request::SetBalloon { mib: 257 },
        "larger than the 256 MiB",
    )?;
    let kind = refused(vm, &Request::SetBalloon { mib: u32::MAX }, "larger than")?;
    ensure!(kind == FailureKind::Config, "{kind:?}");
    let kind = refused(vm, &resize_to(512), "max_memory_mib")?;
    ensure!(kind == FailureKind::Unsupported, "{kind:?}");
    Ok(())
}

/// A wish for so much RAM.
fn resize_to(mib: u32) -> Request {
    Request::Resize {
        vcpus: None,
        memory_mib: Some(mib),
    }
}

fn free_pages_are_given_back(guest: &mut ShellGuest) -> Result<()> {
    done(&mut guest.vm, &Request::SetBalloon { mib: 0 })?;
    guest
        .vm
        .statistics_until("an empty balloon", |seen| seen.memory.balloon_bytes == 0)?;
    let loaded = rss_mib(&guest.vm, BALLOON_MIB)?;
    guest.run("rm /tmp/load; echo 3 > /proc/sys/vm/drop_caches")?;
    let after = wait_for_rss(&guest.vm, BALLOON_MIB, loaded.saturating_sub(110))?;
    println!("free page reporting: guest RAM {loaded} to {after} MiB after a load of 120 MiB");
    Ok(())
}

const BOOT_MIB: u32 = 128;

#[test]
fn a_guest_grows_uses_its_new_memory_and_shrinks() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let disk = file_of_zeroes(&directory, "disk", 200 * MIB)?;
    let mut guest = ShellGuest::boot(&programs, directory.path(), &["socat"], |vm| {
        vm.memory_mib(BOOT_MIB)
            .max_memory_mib(BOOT_MIB + 384)
            .writable_disk(&disk)
    })?;
    let before = guest.number(TOTAL)?;
    let request = resize_to(BOOT_MIB + 256);
    done(&mut guest.vm, &request)?;
    guest.vm.statistics_until("256 MiB more", |seen| {
        seen.memory.plugged_bytes == 256 * MIB
    })?;
    let grown = guest.number(&format!(
        "until [ $({TOTAL}) -ge {} ]; do sleep 0.1; done; {TOTAL}",
        before + 240
    ))?;
    println!("MemTotal {before} to {grown} MiB");

    use_new_memory(&mut guest, &disk)?;

    for mib in [BOOT_MIB + 386, BOOT_MIB - 2] {
        refused(&mut guest.vm, &resize_to(mib), "it may have 128 to 512")?;
    }
    let most = resize_to(BOOT_MIB + 384);
    done(&mut guest.vm, &most)?;
    guest.vm.statistics_until("all there may be", |seen| {
        seen.memory.plugged_bytes == 384 * MIB
    })?;

    guest.run("rm /tmp/*; echo 3 > /proc/sys/vm/drop_caches")?;
    let rss = rss_mib(&guest.vm, BOOT_MIB)?;
    done(&mut guest.vm, &resize_to(BOOT_MIB))?;
    // What the kernel keeps in the new memory stays plugged.
    let seen = guest.vm.statistics_until("nearly all of it back", |seen| {
        seen.memory.plugged_bytes <= 64 * MIB
    })?;
    let plugged = seen.memory.plugged_bytes / MIB;
    let after = wait_for_rss(&guest.vm, BOOT_MIB, u64::from(BOOT_MIB) + plugged)?;
    println!("shrunk: {plugged} MiB still plugged, guest RAM {rss} to {after} MiB");
    let complaints = "dmesg | grep -iE 'call trace|bug:|unable to handle' || true";
    ensure!(guest.run(complaints)?.is_empty(), "{}", guest.vm.console());
    Ok(())
}

/// A connection to the guest's port 5000, once something listens there.
fn connected(vm: &Vm) -> Result<UnixStream> {
    let (socket, deadline) = (vm.socket_path(), Deadline::after(deadline::REQUEST));
    deadline::until("a listener in the guest", deadline, || {
        Ok(agent::connect(&socket, 5000).ok())
    })
}

/// 200 MiB are more than the guest booted with: its files, and the buffers of all devices, lie in what is new.
fn use_new_memory(guest: &mut ShellGuest, disk: &Path) -> Result<()> {
    let sum = guest.run(
        "mount -o remount,size=90% /tmp
        head -c 209715200 /dev/urandom > /tmp/data && md5sum < /tmp/data",
    )?;
    let sum = sum.split(' ').next().context("no sum")?;
    let rss = rss_mib(&guest.vm, BOOT_MIB)?;
    ensure!(rss > 200, "{rss} MiB of guest RAM");
    guest.run("dd if=/tmp/data of=/dev/vda bs=1M oflag=direct 2> /dev/null")?;
    ensure!(md5(disk)? == sum, "the disk got something else");
    let read = guest.run("echo 3 > /proc/sys/vm/drop_caches; md5sum < /dev/vda")?;
    ensure!(read.starts_with(sum), "the guest read {read}, not {sum}");
    guest.run("dd if=/tmp/data of=/share/data bs=1M 2> /dev/null")?;
    let shared = guest.vm.share_path().join("data");
    ensure!(md5(&shared)? == sum, "the share got something else");
    let tail = guest.run("tail -c 33554432 /tmp/data | md5sum")?;
    guest.begin("tail -c 33554432 /tmp/data | socat -u STDIN VSOCK-LISTEN:5000")?;
    let received = disk.with_file_name("received");
    io::copy(&mut connected(&guest.vm)?, &mut File::create(&received)?)?;
    guest.finish()?;
    ensure!(
        tail.starts_with(&md5(&received)?),
        "the socket got something else"
    );
    println!("200 MiB by tmpfs, block and share: {sum}; guest RAM {rss} MiB");
    Ok(())
}

/// A file system image of what is in `tree`.
fn image(directory: &TempDir, name: &str, command: &[&str], tree: &Path) -> Result<PathBuf> {
    let path = directory.path().join(name);
    let [program, arguments @ ..] = command else {
        bail!("no command");
    };
    let mut make = Command::new(program);
    let output = match *program {
        "mkfs.erofs" => make.args(arguments).arg(&path).arg(tree).output()?,
        _ => make
            .args(arguments)
            .arg("-d")
            .arg(tree)
            .arg(&path)
            .arg("48m")
            .output()?,
    };
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(path)
}

#[test]
fn files_of_the_host_are_memory_of_the_guest() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let tree = directory.path().join("tree");
    fs::create_dir(&tree)?;
    fs::copy(&programs.kernel, tree.join("content"))?;
    let sum = md5(&programs.kernel)?;
    let ext4 = ["mkfs.ext4", "-q", "-b", "4096", "-m", "0"];
    let writable = image(&directory, "ext4", &ext4, &tree)?;
    let read_only = image(&directory, "erofs", &["mkfs.erofs", "--quiet"], &tree)?;
    let read_only_sum = md5(&read_only)?;
    // Neither a multiple of 2 MiB nor of a page.
    let odd = directory.path().join("odd");
    fs::write(&odd, vec![b'o'; 3 * 1024 * 1024 + 700])?;
    let mut guest = ShellGuest::boot(&programs, directory.path(), &[], |vm| {
        vm.memory_mib(160)
            .pmem(&writable, false)
            .pmem(&read_only, true)
            .pmem(&odd, false)
    })?;
    let mounted = guest.run(
        "mkdir /rw /ro && mount -t ext4 -o dax /dev/pmem0 /rw && mount -t erofs -o ro,dax /dev/pmem1 /ro
        grep -E '/rw|/ro' /proc/mounts; cat /sys/block/pmem2/size
        md5sum < /rw/content; md5sum < /ro/content",
    )?;
    println!("{mounted}");
    ensure!(mounted.matches(&sum).count() == 2, "{mounted}, not {sum}");
    ensure!(mounted.matches("dax").count() >= 2, "{mounted}");
    ensure!(mounted.contains("\n8192\n"), "4 MiB: {mounted}");

    guest.run("head -c 8388608 /dev/urandom > /rw/new && sync && umount /rw")?;
    let expected =
        guest.run("mount -t ext4 -o dax /dev/pmem0 /rw && md5sum < /rw/new && umount /rw")?;
    let dumped = directory.path().join("dumped");
    let dump = format!("dump /new {}", dumped.display());
    let debugfs = Command::new("debugfs")
        .args(["-R", &dump])
        .arg(&writable)
        .output()?;
    ensure!(
        expected.starts_with(&md5(&dumped)?),
        "{expected}: {debugfs:?}"
    );

    guest.run("umount /ro; dd if=/dev/zero of=/dev/pmem1 bs=4k count=1 conv=fsync 2>&1 || true")?;
    ensure!(
        md5(&read_only)? == read_only_sum,
        "a read-only file was written"
    );
    let again = guest.run(
        "echo 3 > /proc/sys/vm/drop_caches
        mount -t erofs -o ro,dax /dev/pmem1 /ro && md5sum < /ro/content",
    )?;
    ensure!(again.starts_with(&sum), "{again}");

    truncated_under_the_guest(guest, &odd)
}

/// Memory of the guest is gone: its processor could neither go on nor give up, so the VM ends, and says why.
fn truncated_under_the_guest(mut guest: ShellGuest, file: &Path) -> Result<()> {
    let whole = fs::metadata(file)?.len();
    guest.begin("touch /share/begun; while :; do cat /dev/pmem2 > /dev/null; done")?;
    let begun = guest.vm.share_path().join("begun");
    let deadline = Deadline::after(deadline::REQUEST);
    deadline::until("a script's begin", deadline, || {
        Ok(begun.exists().then_some(()))
    })?;
    // What grows, or is written, is still there.
    File::options()
        .append(true)
        .open(file)?
        .write_all(b"more")?;
    guest.vm.statistics()?;
    File::options().write(true).open(file)?.set_len(4096)?;
    let said = format!("the host cut the file of persistent memory 2 from {whole} to 4096 bytes");
    let ended = guest.vm.wait()?;
    ended.ends_with(VmmExit::Device)?;
    ensure!(ended.stderr.contains(&said), "{ended:?}");
    Ok(())
}

/// A boot that says all there is to say, and then a program that does.
const CHATTY: &str = "mount -t proc proc /proc; dmesg -n 1
    i=0; while [ $i -lt 400 ]; do echo \"line $i of a program that talks a lot\"; i=$((i + 1)); done
    echo that-was-all; sleep 100000";

#[test]
fn the_virtio_console_prints_everything_with_fewer_exits() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let path = directory.path().join("initramfs");
    fs::write(&path, Initramfs::script(&programs.busybox, CHATTY)?)?;
    let mut exits = Vec::new();
    for console in ["ttyS0", "hvc0"] {
        let cmdline = format!("console={console} panic=-1 reboot=k random.trust_cpu=on");
        let guest = VmBuilder::with_initramfs(&programs, &path).cmdline(&cmdline);
        let mut vm = guest.start()?;
        vm.wait_for_console("that-was-all")?;
        let seen = vm.statistics()?;
        let text = vm.console();
        println!("{console}: {} bytes, {seen:?}", text.len());
        let lines: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("line "))
            .collect();
        ensure!(
            lines.len() == 400,
            "{console}: {} lines: {text}",
            lines.len()
        );
        for (number, line) in lines.iter().enumerate() {
            let expected = format!("{number} of a program that talks a lot");
            ensure!(*line == expected, "{console}: {line:?}");
        }
        // What the kernel prints before it has found the virtio console is COM1's alone.
        let early = text.contains("Linux version");
        ensure!(early == (console == "ttyS0"), "{console}: {text}");
        ensure!(text.contains("Run /init"), "{console}: {text}");
        exits.push(seen.exits().io + seen.exits().mmio + seen.exits().other);
        vm.ask(&Request::Stop)?;
        vm.wait()?.ends_with(VmmExit::Ended)?;
    }
    ensure!(exits[1] * 2 < exits[0], "{exits:?}");
    Ok(())
}
