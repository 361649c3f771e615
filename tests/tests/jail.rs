//! The jail of a VMM that runs a guest, seen from the host: what it has is what the threat model's table says,
//! neither more nor less. What it is refused is asked from inside by `vmm/tests/jail.rs`.

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command, Stdio},
};
use tempfile::TempDir;
use walnut_tests::{
    initramfs::Initramfs,
    requirement,
    vmm::{Vm, VmBuilder},
};
use walnut_vmm_api::VmmExit;

const THREAT_MODEL: &str = include_str!("../../docs/threat-model.md");
const SECTION: &str = "## What the VMM has on the host";
/// Columns of the table.
const WITH_SHARE: usize = 2;
const WITHOUT_SHARE: usize = 3;

type Facts = BTreeMap<String, BTreeSet<String>>;

/// The table: the quoted words of a column, by row. No quoted word means none.
fn documented(column: usize) -> Result<Facts> {
    let (_, section) = THREAT_MODEL.split_once(SECTION).context("no section")?;
    let rows = section
        .lines()
        .skip_while(|line| !line.starts_with("| ---"));
    let rows = rows.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').collect();
        let cell = cells.get(column).context("a row without this column")?;
        let words = cell.split('`').skip(1).step_by(2).map(str::to_owned);
        Ok((cells[1].trim().to_owned(), words.collect()))
    })
    .collect()
}

/// The same, as the kernel shows it.
fn observed(pid: i32) -> Result<Facts> {
    let proc = format!("/proc/{pid}");
    let read = |name: &str| {
        let path = format!("{proc}/{name}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let (status, limits) = (read("status")?, read("limits")?);
    let field = |name: &str| -> Result<Vec<String>> {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(strings(value.context("no such field")?.split_whitespace()))
    };
    let limit = |name: &str| -> Result<Vec<String>> {
        let mut lines = limits.lines();
        let values = lines.find_map(|line| line.strip_prefix(name));
        Ok(strings(
            values.context("no such limit")?.split_whitespace().take(2),
        ))
    };
    let (maps, mounts, devices) = (read("maps")?, read("mountinfo")?, read("net/dev")?);
    let writable_and_executable = maps.lines().filter(|line| {
        let permissions = line.split(' ').nth(1).unwrap_or_default();
        permissions.contains('w') && permissions.contains('x')
    });
    let mount_points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let interfaces = devices.lines().filter_map(|line| line.split_once(':'));
    let facts = [
        ("namespaces of its own", own_namespaces(&proc)?),
        (
            "network interfaces",
            strings(interfaces.map(|(name, _)| name.trim())),
        ),
        ("mount points", strings(mount_points)),
        ("permitted capabilities", field("CapPrm")?),
        ("effective capabilities", field("CapEff")?),
        ("bounding capabilities", field("CapBnd")?),
        ("inheritable capabilities", field("CapInh")?),
        ("ambient capabilities", field("CapAmb")?),
        ("supplementary groups", field("Groups")?),
        ("no new privileges", field("NoNewPrivs")?),
        ("seccomp of each thread", of_threads(&proc, seccomp)?),
        ("core file bytes", limit("Max core file size")?),
        ("locked memory bytes", limit("Max locked memory")?),
        ("message queue bytes", limit("Max msgqueue size")?),
        (
            "environment",
            strings(read("environ")?.split_terminator('\0')),
        ),
        (
            "memory both writable and executable",
            strings(writable_and_executable),
        ),
        ("files", files(&proc)?),
        ("threads", of_threads(&proc, name)?),
    ];
    let facts = facts.into_iter();
    Ok(facts
        .map(|(row, words)| (row.to_owned(), words.into_iter().collect()))
        .collect())
}

fn strings<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    words.map(str::to_owned).collect()
}

fn entries(path: &str) -> Result<Vec<String>> {
    let entries = fs::read_dir(path).with_context(|| format!("cannot list {path}"))?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn link(path: &str) -> Result<String> {
    let target = fs::read_link(path).with_context(|| format!("cannot read {path}"))?;
    Ok(target.to_string_lossy().into_owned())
}

fn own_namespaces(proc: &str) -> Result<Vec<String>> {
    let mut own = Vec::new();
    for name in entries(&format!("{proc}/ns"))? {
        // For children, of which there are none.
        if !name.ends_with("_for_children")
            && link(&format!("{proc}/ns/{name}"))? != link(&format!("/proc/self/ns/{name}"))?
        {
            own.push(name);
        }
    }
    Ok(own)
}

fn of_threads(proc: &str, fact: fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let mut facts = Vec::new();
    for task in entries(&format!("{proc}/task"))? {
        let task = format!("{proc}/task/{task}");
        // The kernel's own, for KVM and for a disk's ring, which never run code of the process.
        let name = name(&task)?;
        if !["kvm-", "iou-wrk-"]
            .iter()
            .any(|kernel| name.starts_with(kernel))
        {
            facts.push(fact(&task)?);
        }
    }
    Ok(facts)
}

fn seccomp(task: &str) -> Result<String> {
    let status = fs::read_to_string(format!("{task}/status"))?;
    let mut lines = status.lines();
    let mode = lines.find_map(|line| line.strip_prefix("Seccomp:"));
    Ok(mode.context("no seccomp")?.trim().to_owned())
}

fn name(task: &str) -> Result<String> {
    Ok(fs::read_to_string(format!("{task}/comm"))?
        .trim()
        .to_owned())
}

/// Kinds of open files.
fn files(proc: &str) -> Result<Vec<String>> {
    let mut kinds = Vec::new();
    for fd in entries(&format!("{proc}/fd"))? {
        let target = link(&format!("{proc}/fd/{fd}"))?;
        let (kind, rest) = target.split_once(':').unwrap_or((&target, ""));
        kinds.push(match kind {
            "socket" | "pipe" => kind.to_owned(),
            "anon_inode" => {
                let kind = rest.trim_start_matches('[').trim_end_matches(']');
                kind.trim_end_matches(|end: char| end == ':' || end.is_ascii_digit())
                    .to_owned()
            }
            // The test's own names for what it passed in.
            path if path.starts_with("/tmp/") => {
                let name = Path::new(path).file_name().context("no name")?;
                name.to_string_lossy().into_owned()
            }
            path => path.to_owned(),
        });
    }
    Ok(kinds)
}

fn compare(vm: &Vm, column: usize) -> Result<()> {
    let (expected, observed) = (documented(column)?, observed(vm.pid()?)?);
    let rows: BTreeSet<&String> = expected.keys().chain(observed.keys()).collect();
    let mut wrong = Vec::new();
    for row in rows {
        let (expected, observed) = (expected.get(row), observed.get(row));
        if expected != observed {
            wrong.push(format!(
                "{row}: the threat model says {expected:?}, it is {observed:?}"
            ));
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[test]
fn a_vmm_with_a_share_has_what_the_threat_model_says() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let mut vm = VmBuilder::agent(&programs).start()?;
    vm.wait_until_ready()?;
    compare(&vm, WITH_SHARE)?;
    // The first process of a namespace ignores what it doesn't handle, but not this.
    vm.kill()
}

#[test]
fn a_vmm_without_a_share_has_what_the_threat_model_says() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let directory = TempDir::new()?;
    let (initramfs, disk) = (
        directory.path().join("initramfs"),
        directory.path().join("disk"),
    );
    let script = "cat /proc/version; echo guest-is-up; sleep 100000";
    fs::write(&initramfs, Initramfs::script(&programs.busybox, script)?)?;
    fs::write(&disk, vec![0; 1 << 20])?;
    let mut vm = VmBuilder::with_initramfs(&programs, &initramfs)
        .writable_disk(&disk)
        .start()?;
    vm.wait_for_console("guest-is-up")?;
    compare(&vm, WITHOUT_SHARE)
}

#[test]
fn a_vmm_that_is_not_first_in_its_namespace_refuses() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let flags = SocketFlags::CLOEXEC;
    let (_own, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let output = Command::new("/bin/sh")
        .args(["-c", "exec \"$0\" 3<&0 </dev/null"])
        .arg(&programs.vmm)
        .stdin(Stdio::from(theirs))
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() != Some(VmmExit::Usage.code().into())
        || !stderr.contains("CLONE_NEWPID")
    {
        bail!("not refused: {output:?}");
    }
    Ok(())
}
